"""Trains on one long sequence that is shared out over processes, and on one process, and compares.

    torchrun --nproc-per-node 2 examples/long_context.py

Each process has its own rows of the sequence and sends one state for each layer and direction, however long
the sequence is (`rebased_cuda.context_parallel`). Losses and gradients must be those of one process that has
the whole sequence; the first process trains such a model first, as the judge.
"""

from __future__ import annotations

import argparse
import copy
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rebased_cuda import ReBasedAttention
from rebased_cuda.context_parallel import context_parallelize
from rebased_cuda.models import RebasedConfig, RebasedForCausalLM

BOUND = 1e-4  # on relative differences, which are float32's rounding


def main(argv: Sequence[str] | None = None) -> None:
    options = parse(argv)
    dist.init_process_group("gloo")  # "nccl" on GPUs
    rank, ranks = dist.get_rank(), dist.get_world_size()
    try:
        run(options, rank, ranks)
    finally:
        dist.destroy_process_group()


def run(options: argparse.Namespace, rank: int, ranks: int) -> None:
    if options.length % ranks:
        raise SystemExit(f"--length: expected a multiple of {ranks}, the processes, got {options.length}")
    torch.manual_seed(0)  # the same weights on every process
    model = RebasedForCausalLM(
        RebasedConfig.of(
            "rebased",
            vocab_size=256,
            hidden_size=options.width,
            num_hidden_layers=options.layers,
            num_attention_heads=4,
            initializer_range=0.05,
        )
    )
    tokens = first_bytes(options.length + 1)
    inputs, targets = tokens[:-1], tokens[1:]  # the last row of a process is judged by the next one's first
    losses_alone, gradients_alone, seconds_alone = [0.0] * options.steps, list[Tensor](), 0.0
    if rank == 0:
        print(f"{options.length} tokens, {model.num_parameters() / 1e6:.2f} M parameters", flush=True)
        alone = copy.deepcopy(model)
        losses_alone, gradients_alone, seconds_alone = train(alone, inputs, targets, options.steps)
        print(f"one process: {seconds_alone:.2f} s a step", flush=True)
    dist.barrier()

    shared = DistributedDataParallel(context_parallelize(model))  # whose gradients are means over processes
    mine = slice(rank * options.length // ranks, (rank + 1) * options.length // ranks)
    losses, gradients, seconds = train(shared, inputs[mine], targets[mine], options.steps)
    mean = torch.tensor(losses)
    dist.all_reduce(mean)
    if rank == 0:
        faults = report(mean / ranks, losses_alone, gradients, gradients_alone)
        layer = next(x for x in model.modules() if isinstance(x, ReBasedAttention))
        features = layer.feature_dim * (layer.feature_dim + 1) // 2
        sent = 4 * layer.num_kv_heads * features * (layer.head_dim + 1)
        print(
            f"{ranks} processes: {seconds:.2f} s a step, {seconds / seconds_alone:.2f} of one; each sends "
            f"{sent / 1e3:.0f} kB for each attention layer and direction, whatever the length"
        )
        if faults:
            raise SystemExit(f"FAILED: {faults} of the comparisons")


def train(
    model: nn.Module, inputs: Tensor, targets: Tensor, steps: int
) -> tuple[list[float], list[Tensor], float]:
    """Losses of the steps, gradients of the first one, and the median step's seconds."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses, gradients, seconds = [], list[Tensor](), []
    for step in range(steps):
        start = time.perf_counter()
        logits = model(input_ids=inputs[None], use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[0], targets)
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            gradients = [x.grad.clone() for x in model.parameters()]
        optimizer.step()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    return losses, gradients, sorted(seconds)[len(seconds) // 2]


def report(
    losses: Tensor, losses_alone: list[float], gradients: list[Tensor], gradients_alone: list[Tensor]
) -> int:
    """Prints both beside one another; how many comparisons failed."""
    faults = 0
    for step, (loss, alone) in enumerate(zip(losses.tolist(), losses_alone, strict=True)):
        difference = abs(loss - alone) / alone
        faults += not difference <= BOUND
        print(f"  step {step + 1}: loss {loss:.5f}, of one process {alone:.5f}, difference {difference:.1e}")
    worst = max(float((a - b).norm() / b.norm()) for a, b in zip(gradients, gradients_alone, strict=True))
    print(f"  gradients of step 1: largest relative difference {worst:.1e}, allowed {BOUND:.0e}")
    return faults + (not worst <= BOUND)


def first_bytes(count: int) -> Tensor:
    """That many bytes of the standard library's sources, as tokens."""
    text = bytearray()
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        text += file.read_bytes()
        if len(text) >= count:
            return torch.frombuffer(text[:count], dtype=torch.uint8).long()
    raise SystemExit(f"--length: expected less than {len(text)}, all that there is")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--length", type=int, default=32768, help="tokens of the sequence (default: 32768)")
    parser.add_argument("--steps", type=int, default=3, help="training steps (default: 3)")
    parser.add_argument("--width", type=int, default=128, help="hidden size of the model (default: 128)")
    parser.add_argument(
        "--layers", type=int, default=4, help="a convolution, ReBased attention, ... (default: 4)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
