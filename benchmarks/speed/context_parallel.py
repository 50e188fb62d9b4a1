"""`python -m benchmarks.speed.context_parallel`: the time of a sequence over several processes, against one.

Every process has one thread and, where the system allows it, one core; they talk through gloo. In a round
each method runs once, from a barrier to the last rank's end, so that a machine that is slow for a while is
slow for all. Beside the time of a whole call it says what the exchange costs where it is waited for, and what
hiding it in forward would cost: one more product with the state per row, which is what a pass over the keys
for their state alone takes. `in a row`: the time of one of several calls with no barrier between them. Of the
op's and of a layer's forward it says how long a rank waited for the exchange, the longest of all ranks: the
layer projects its queries meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from rebased_cuda import ReBasedAttention, rebased_attention
from rebased_cuda.autograd import ops
from rebased_cuda.context_parallel import attention, context_parallel_rebased_attention, context_parallelize
from rebased_cuda.context_parallel.exchange import Exchange, process_group
from rebased_cuda.demo import timing

RESULTS = Path(__file__).parent.parent / "results" / "context_parallel.json"
HEADS, FEATURE_DIM, HEAD_DIM = 12, 16, 64
IN_A_ROW = 3
OPTIONS = {"feature_map": "outer", "layer_norm": "token"}


def inputs(seqlen: int) -> list[Tensor]:
    """q, k, v (1, HEADS, seqlen, ...), gamma and beta of q and k: the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(1, HEADS, seqlen, n, generator=generator) for n in (FEATURE_DIM,) * 2 + (HEAD_DIM,)
    ]
    for mean in (1.0, 0.1, 1.0, 0.1):
        tensors.append(mean + 0.1 * torch.randn(HEADS, FEATURE_DIM, generator=generator))
    return tensors


def both(function: Callable[..., Any], tensors: list[Tensor]) -> Callable[[], None]:
    leaves = [x.detach().requires_grad_() for x in tensors]
    with torch.no_grad():
        grad_y = torch.ones_like(function(*leaves, **OPTIONS))

    def run() -> None:
        torch.autograd.grad(function(*leaves, **OPTIONS), leaves, grad_y)

    return run


def forward(function: Callable[..., Any], tensors: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            function(*tensors, **OPTIONS)

    return run


class TimedExchange(Exchange):
    """Counts the seconds that it is waited for."""

    waited = 0.0

    def wait(self) -> list[list[Tensor]]:
        start = time.perf_counter()
        gathered = super().wait()
        TimedExchange.waited += time.perf_counter() - start
        return gathered


def layer_forward(rows: int) -> Callable[[], None]:
    """Of a layer with the op's sizes, on this rank's rows."""
    layer = context_parallelize(ReBasedAttention(HEADS * HEAD_DIM, HEADS, FEATURE_DIM))
    x = torch.randn(1, rows, HEADS * HEAD_DIM)

    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def measure(rank: int, ranks: int, port: int, seqlen: int, rounds: int, result: Any) -> None:
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank % len(cores)]})
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    whole = inputs(seqlen)
    rows = slice(seqlen * rank // ranks, seqlen * (rank + 1) // ranks)
    shard = [x[:, :, rows].contiguous() if i < 3 else x for i, x in enumerate(whole)]
    _, k, v, _, _, gamma_k, beta_k = shard
    state = tuple(torch.zeros(HEADS * FEATURE_DIM * (FEATURE_DIM + 1) // 2, n) for n in (HEAD_DIM, 1))

    attention.Exchange = TimedExchange  # type: ignore[misc]
    error = check(whole, shard, rows)
    shared = both(context_parallel_rebased_attention, shard)

    def in_a_row() -> None:
        for _ in range(IN_A_ROW):
            shared()

    everyone: dict[str, Callable[[], Any]] = {
        "forward, all processes": forward(context_parallel_rebased_attention, shard),
        "forward of a layer, all processes": layer_forward(shard[0].shape[2]),
        "forward + backward, all processes": shared,
        "forward + backward in a row, all processes": in_a_row,
        "the exchange alone": lambda: Exchange(state, process_group(None)).wait(),
        "the state of a shard's keys": lambda: ops.forward_state(
            k, v, gamma_k, beta_k, None, "outer", "token", 1e-5
        ),
    }
    alone = {
        "forward, one process": forward(rebased_attention, whole),
        "forward + backward, one process": both(rebased_attention, whole),
    }
    seconds: dict[str, list[float]] = {name: [] for name in (*alone, *everyone)}
    waited: dict[str, list[float]] = {name: [] for name in everyone if name.startswith("forward")}
    for number in range(-1, rounds):  # the first round warms up
        for name in seconds:
            dist.barrier()
            start = time.perf_counter()
            TimedExchange.waited = 0.0
            if name in everyone:
                everyone[name]()
            elif rank == 0:
                alone[name]()
            else:
                continue
            taken = torch.tensor(time.perf_counter() - start)
            if name in everyone:
                dist.all_reduce(taken, op=dist.ReduceOp.MAX)
            if name in waited:
                wait = torch.tensor(TimedExchange.waited)
                dist.all_reduce(wait, op=dist.ReduceOp.MAX)
                if number >= 0:
                    waited[name].append(float(wait))
            if number >= 0:
                seconds[name].append(float(taken) / (IN_A_ROW if "in a row" in name else 1))
    if rank == 0:
        result.put((seconds, waited, error))
    dist.destroy_process_group()


def check(whole: list[Tensor], shard: list[Tensor], rows: slice) -> float:
    """The largest relative error of a rank's y against one process'."""
    with torch.no_grad():
        y = context_parallel_rebased_attention(*shard, **OPTIONS)
        expected = rebased_attention(*whole, **OPTIONS)[:, :, rows]
    error = torch.tensor(timing.relative_error(y, expected))
    dist.all_reduce(error, op=dist.ReduceOp.MAX)
    return float(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seqlen", type=int, default=65536)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the result goes")
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    result = context.SimpleQueue()
    running = multiprocessing.start_processes(
        measure,
        (arguments.processes, port, arguments.seqlen, arguments.rounds, result),
        arguments.processes,
        join=False,
    )
    assert running is not None
    while not running.join():
        pass
    seconds, waited, error = result.get()

    single = {
        "forward, all processes": "forward, one process",
        "forward + backward, all processes": "forward + backward, one process",
        "forward + backward in a row, all processes": "forward + backward, one process",
    }
    methods = {
        name: {
            "seconds": times,
            "median": statistics.median(times),
            "over_one_process": timing.ratio(times, seconds[single[name]]) if name in single else None,
            "waited": statistics.median(waited[name]) if name in waited else None,
        }
        for name, times in seconds.items()
    }
    print(f"N = {arguments.seqlen}, {HEADS} heads, {arguments.processes} processes, error {error:.1e}")
    for name, method in methods.items():
        ratio = method["over_one_process"]
        beside = "" if ratio is None else f"  {ratio:.3f} of one process"
        if method["waited"] is not None:
            beside += f"  waited {1e3 * method['waited']:.2f} ms"
        print(f"{name:<45} {1e3 * method['median']:9.2f} ms{beside}")
    report = {
        "command": "python -m benchmarks.speed.context_parallel",
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": {**timing.machine(), "threads": 1},
        "processes": arguments.processes,
        "shape": [1, HEADS, arguments.seqlen, FEATURE_DIM, HEAD_DIM],
        "options": OPTIONS,
        "error": error,
        "methods": methods,
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
