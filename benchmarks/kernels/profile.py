"""What each CUDA kernel of a call takes. Needs a GPU, and a build with the CUDA kernels.

python -m benchmarks.kernels.profile [--json FILE] [--shapes R1 R2 M64 M128]

The shapes are those of benchmarks.speed.predict, the inputs lie as a model's projections leave them. A call's
own times are medians by events; those of its kernels, forward and backward together, are torch.profiler's
means. The file is written after every call, so that a run that is cut short leaves what it has.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernels.kernel import readable
from benchmarks.speed.harness import Shape
from benchmarks.speed.peers import projections, split_heads
from benchmarks.speed.predict import MAPS, SIZES, STEP, shape_of
from benchmarks.speed.report import commit, duration, print_table, save
from rebased_cuda import RebasedState, build_info, rebased_attention, rebased_attention_step
from rebased_cuda.demo import timing

COMMAND = "python -m benchmarks.kernels.profile"
DEVICE = "cuda"  # a test's is the CPU
TIMED, PROFILED = 7, 3  # calls


def usable() -> bool:
    return bool(build_info()["cuda"]) and torch.cuda.is_available()


def calls(sizes: Sequence[str]) -> Iterator[tuple[str, Shape, str]]:
    """Size, shape and LayerNorm."""
    for size in sizes:
        for feature_map in MAPS:
            yield size, shape_of(size, feature_map), "token"
    if "R1" in sizes:  # what else there are kernels for
        outer, square = (shape_of("R1", feature_map) for feature_map in MAPS)
        yield "R1", replace(outer, feature_map="taylor"), "token"
        yield "R1", replace(outer, feature_map="elu"), "token"
        yield "R1", outer, "head"
        yield "R1", replace(outer, dtype="float32"), "token"
        yield "R1", replace(square, dtype="float32"), "token"
        yield "R1", replace(outer, feature_dim=32), "token"


def kernel_times(events: Iterable[Any], profiled: int) -> list[dict[str, Any]]:
    """Of the profiler's averages over so many calls, what ran on the GPU, per call, the longest first."""
    times = [
        {
            "kernel": readable(event.key) if "rebased::" in event.key else event.key,
            "launches": event.count / profiled,
            "seconds": event.self_device_time_total * 1e-6 / profiled,
        }
        for event in events
        if event.device_type != DeviceType.CPU  # a launch may be charged with what it launched
    ]
    return sorted(times, key=lambda row: -row["seconds"])


def median_seconds(run: Callable[[], Any]) -> float:
    run()
    return statistics.median(timing.once(run, DEVICE) for _ in range(TIMED))


def measure_call(shape: Shape, layer_norm: str) -> dict[str, Any]:
    tensors = projections(shape, DEVICE)
    grad_y = split_heads(torch.randn_like(tensors[2]), shape.heads)

    def attention() -> torch.Tensor:
        q, k, v = (split_heads(x, shape.heads) for x in tensors[:3])
        return rebased_attention(q, k, v, *tensors[3:], feature_map=shape.feature_map, layer_norm=layer_norm)

    def both() -> None:
        torch.autograd.grad(attention(), tensors, grad_y)

    with torch.no_grad():
        forward = median_seconds(attention)
    forward_backward = median_seconds(both)
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            both()
        timing.synchronize(DEVICE)
    kernels = kernel_times(profiler.key_averages(), PROFILED)
    if not kernels:
        raise RuntimeError("the profiler saw nothing on the GPU")
    return {"forward": forward, "forward_backward": forward_backward, "kernels": kernels}


def measure_step(sequences: int, feature_map: str) -> float:
    heads, dim, head_dim = STEP[1], 16, 64
    state = RebasedState.zeros(sequences, heads, dim, head_dim, feature_map=feature_map, device=DEVICE)
    q, k, v = (torch.randn(sequences, heads, x, device=DEVICE).bfloat16() for x in (dim, dim, head_dim))
    options = {"feature_map": feature_map, "layer_norm": "token"}
    with torch.no_grad():
        return median_seconds(lambda: rebased_attention_step(q, k, v, state, **options))


def show(title: str, result: dict[str, Any]) -> None:
    total = sum(row["seconds"] for row in result["kernels"])
    forward, both = (duration(result[name]) for name in ("forward", "forward_backward"))
    rows = [  # torch's own kernels have very long names
        [x["kernel"][:110], f"{x['launches']:g}", duration(x["seconds"]), f"{x['seconds'] / total:.0%}"]
        for x in result["kernels"]
    ]
    title += f": forward {forward}, forward + backward {both}, its kernels {duration(total)}"
    print_table(title, ("kernel", "launches", "time", "share"), rows)


def main(arguments: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__, formatter_class=formatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures")
    parser.add_argument("--shapes", nargs="+", choices=list(SIZES), default=list(SIZES))
    options = parser.parse_args(arguments)
    if not usable():
        print("error: torch sees no GPU, or this build has no CUDA kernels", file=sys.stderr)
        return 1
    contents = {"command": COMMAND, "commit": commit(), "machine": timing.machine(), "build": build_info()}
    contents |= {"calls": [], "steps": []}

    def keep(kind: str, row: dict[str, Any]) -> None:
        contents[kind].append(row)
        if options.json:
            save(options.json, contents)

    for size, shape, layer_norm in calls(options.shapes):
        title = f"{size} {shape}, {layer_norm} LayerNorm"
        try:
            result = measure_call(shape, layer_norm)
            show(title, result)
        except RuntimeError as error:  # the other calls' times are wanted all the same
            result = {"failed": str(error)}
            print(f"\n{title}: failed: {error}")
        keep("calls", {"size": size, "shape": asdict(shape), "layer_norm": layer_norm, **result})
    for feature_map in MAPS:
        for sequences in (STEP[0], 1):
            seconds = measure_step(sequences, feature_map)
            print(f"decode step, {sequences} x {STEP[1]} heads, {feature_map}: {duration(seconds)}")
            keep("steps", {"sequences": sequences, "feature_map": feature_map, "seconds": seconds})
    return int(any("failed" in row for row in contents["calls"]))


if __name__ == "__main__":
    sys.exit(main())
