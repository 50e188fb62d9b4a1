"""PREDICTED times of the CUDA kernels, without a GPU, and beside them what was measured where there was one.

    python -m benchmarks.speed.predict [--json benchmarks/results/predictions.json]

bfloat16, d 16, "head" LayerNorm as the traffic was traced; the last column is for "token", as ReBased has it.
gpu_facts.py has what is counted, gpu_model.py the arithmetic; the launch plan is the op's own. Where files of
such a card by benchmarks.speed or benchmarks.kernels.profile lie in benchmarks/results, measurement is set
against prediction; those may be of an older commit than the prediction.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rebased_cuda import testing
from rebased_cuda.state import num_features

from .gpu_facts import Facts, MissingFactsError, load
from .gpu_model import GPUS, RESOURCES, Gpu, Kernel, Time, Work, predict
from .harness import DIRECTIONS, OURS, Shape, work
from .report import RESULTS, duration, print_table

OUTPUT = "predictions.json"
CHUNK, COLUMNS = 64, 64  # tokens of a chunk, value columns of a block
SIZES = {
    "R1": (8, 12, 4096, 64),  # batch, heads, N, dv: a language model's batch
    "R2": (1, 12, 131072, 64),  # long context
    "M64": (512, 1, 2048, 64),  # the recall task
    "M128": (512, 1, 2048, 128),
}
STEP = (256, 12)  # sequences, heads
SWEEPS = ("forward", "backward")
MAPS = ("outer", "square")


def shape_of(size: str, feature_map: str) -> Shape:
    batch, heads, seqlen, head_dim = SIZES[size]
    return Shape(batch, heads, seqlen, feature_map, "bfloat16", head_dim=head_dim)


def segments_of(gpu: Gpu, shape: Shape, sweep: str) -> int:
    plan = testing.plan(
        sweep,
        batch=shape.batch,
        heads=shape.heads,
        kv_heads=shape.heads,
        seqlen=shape.seqlen,
        feature_dim=shape.feature_dim,
        head_dim=shape.head_dim,
        dtype=shape.dtype,
        feature_map=shape.feature_map,
        layer_norm="head",
        multiprocessors=int(gpu["multiprocessors"]),
    )
    if plan["path"] != "tensor_core":
        raise MissingFactsError(f"{shape}: the plan takes the {plan['path']} path, whose work is not counted")
    return int(plan["segments"])


def launches(facts: Facts, shape: Shape, sweep: str, segments: int) -> Iterator[Work]:
    """What a call launches. Traffic per head and token is the traced one, but for states: they come with
    segments, of which the traced ones had 1024 tokens. A block has 64 value columns and reads q and k itself.
    A kernel that only a call of more than the 4 traced segments has is not in the traffic and left out.
    """
    groups = -(-shape.head_dim // COLUMNS)
    states = shape.batch * shape.heads * groups
    tokens = states * shape.seqlen
    whole = facts.kernels(sweep, shape.feature_map, 1)
    names = whole if segments == 1 else facts.kernels(sweep, shape.feature_map, 4)
    density = segments / shape.seqlen / (4 / facts.traced_tokens)
    share = (segments - 1) / segments / (3 / 4)  # of the tokens, that a sweep over all segments but one reads
    for name, moved in names.items():
        kernel = facts.kernel(name, shape.feature_map)
        blocks, chunks = states * segments, math.ceil(shape.seqlen / segments / CHUNK)
        if name in whole:
            amounts = [
                whole[name][x] + (moved[x] - whole[name][x]) * density for x in ("bytes", "sector_bytes")
            ]
        elif kernel.chunk_instructions:
            blocks = states * (segments - 1)
            state = facts.state_share(sweep, shape.feature_map)
            amounts = [(moved[x] - state[x]) * share + state[x] * density for x in ("bytes", "sector_bytes")]
        else:
            amounts = [moved[x] * density for x in ("bytes", "sector_bytes")]
        yield Work(kernel, blocks, chunks, *(tokens * x for x in amounts))


def token_norm(shape: Shape, sweep: str) -> Work:
    """Of LayerNorm over all heads, by the sizes of its tensors: the statistics of q and k; backward also the
    float32 gradients written instead of bfloat16 ones, read again with q and k, and written in bfloat16.
    """
    rows = shape.batch * shape.heads * shape.seqlen * shape.feature_dim
    moved = rows * 2 * 2
    if sweep == "backward":
        moved += rows * 2 * ((4 - 2) + 4 + 2 + 2)
    kernel = Kernel("token LayerNorm", 8, 4)
    return Work(kernel, math.ceil(rows / 2048), 0, moved, moved, launches=1 if sweep == "forward" else 2)


def step_work(facts: Facts, feature_map: str) -> Work:
    """A state of F (dv + 1) floats read and written, by each of 256 x 12 blocks."""
    states = STEP[0] * STEP[1]
    moved = states * num_features(feature_map, 16) * (64 + 1) * 4 * 2
    return Work(facts.kernel("step_kernel", feature_map), states, 0, moved, moved)


@dataclass(frozen=True)
class Prediction:
    gpu: str
    shape: str  # R1 ...
    sizes: dict[str, Any]
    direction: str  # forward, backward, step
    segments: int
    floor: float
    kernels: list[Time]
    token_norm: Time | None  # on top with layer_norm="token"
    works: list[Work]

    @property
    def predicted(self) -> float:
        return sum(time.predicted for time in self.kernels)

    @property
    def predicted_with_token_norm(self) -> float:
        return self.predicted + (self.token_norm.predicted if self.token_norm else 0.0)

    @property
    def at_most(self) -> float:
        return sum(time.at_most for time in self.kernels)


def floor(gpu: Gpu, shape: Shape, direction: str) -> float:
    """The larger of the shape's products at the matmul's rate and its tensors at the copy's, once each."""
    flops, moved = work(shape, direction, CHUNK)
    return max(flops / gpu["matmul"], moved / gpu["copy"])


def predictions(facts: Facts, gpu: Gpu) -> Iterator[Prediction]:
    for size in SIZES:
        for feature_map in MAPS:
            for sweep in SWEEPS:
                shape = shape_of(size, feature_map)
                segments = segments_of(gpu, shape, sweep)
                works = list(launches(facts, shape, sweep, segments))
                times = [predict(gpu, x) for x in works]
                # of a single head, "token" LayerNorm is "head" LayerNorm, which needs no kernels
                norm = predict(gpu, token_norm(shape, sweep)) if shape.heads > 1 else None
                least = floor(gpu, shape, sweep)
                yield Prediction(gpu.name, size, asdict(shape), sweep, segments, least, times, norm, works)
    for feature_map in MAPS:
        shape = Shape(*STEP, 1, feature_map, "bfloat16")
        step = step_work(facts, feature_map)
        least = step.bytes / gpu["copy"]
        times = [predict(gpu, step)]
        yield Prediction(gpu.name, "decode", asdict(shape), "step", 1, least, times, None, [step])


def measured_files(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Card and contents of every JSON file that one of these cards made."""
    for path in sorted(folder.rglob("*.json")):
        contents = json.loads(path.read_text())
        if isinstance(contents, dict) and isinstance(contents.get("machine"), dict):
            cards = " ".join(contents["machine"].get("gpus", ()))
            yield from ((gpu.name, contents) for gpu in GPUS if gpu.name in cards)


def measurements(folder: Path = RESULTS) -> Iterator[tuple[str, dict[str, Any], str, float]]:
    """Card, shape, direction and seconds of every call of the op that was timed on one of these cards."""
    for gpu, contents in measured_files(folder):
        if contents.get("device") == "cuda":
            for row in contents.get("rows", ()):
                if row["method"] == OURS and row["status"] == "ok":
                    yield gpu, row["shape"], row["direction"], row["median"]
        for call in contents.get("calls", ()):
            if call["layer_norm"] == "token" and "kernels" in call:
                for direction, name in zip(DIRECTIONS, ("forward", "forward_backward"), strict=True):
                    yield gpu, call["shape"], direction, call[name]


def against_measured(made: list[Prediction], folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Forward, and forward + backward, which is what is timed; with "token" LayerNorm, as it is timed."""
    found = []
    names = ("batch", "heads", "seqlen", "head_dim", "feature_map", "feature_dim", "dtype")
    measured: dict[tuple[Any, ...], list[float]] = {}
    for gpu, shape, direction, seconds in measurements(folder):
        key = (gpu, direction, *(shape[name] for name in names))
        measured.setdefault(key, []).append(seconds)
    for forward in made:
        if forward.direction != "forward":
            continue
        same = [x for x in made if (x.gpu, x.sizes) == (forward.gpu, forward.sizes)]
        for direction in DIRECTIONS:
            parts = [forward] if direction == "forward" else same
            times = measured.get((forward.gpu, direction, *(forward.sizes[name] for name in names)))
            if times:
                predicted = sum(x.predicted_with_token_norm for x in parts)
                row = {"gpu": forward.gpu, "shape": forward.shape, "map": forward.sizes["feature_map"]}
                row |= {"direction": direction, "predicted": predicted}
                found.append(row | {"measured": statistics.median(times)})
    return found


def base_name(kernel: str) -> str:
    """forward_kernel of tensor_core::forward_kernel<bfloat16, outer, 16, false>."""
    return kernel.partition("<")[0].rpartition("::")[2]


def kernels_against_measured(made: list[Prediction], folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Each kernel's time in a forward and a backward, without what lies between launches, by the profiler.

    "token" LayerNorm, as profiled; its own kernels, which the prediction has as one, come last.
    """
    found = []
    for gpu, contents in measured_files(folder):
        for call in contents.get("calls", ()):
            same = [x for x in made if (x.gpu, x.shape, x.sizes) == (gpu, call["size"], call["shape"])]
            if not same or call["layer_norm"] != "token" or "kernels" not in call:
                continue
            measured: dict[str, float] = {}
            for row in call["kernels"]:
                name = base_name(row["kernel"])
                name = "token LayerNorm" if name.startswith("token_") else name
                measured[name] = measured.get(name, 0.0) + row["seconds"]
            predicted: dict[str, float] = {}
            for time in (time for x in same for time in x.kernels):
                name = base_name(time.kernel)
                predicted[name] = predicted.get(name, 0.0) + time.busy
            predicted["token LayerNorm"] = sum(x.token_norm.busy for x in same if x.token_norm)
            described = {"gpu": gpu, "shape": call["size"], "map": call["shape"]["feature_map"]}
            found += [
                described | {"kernel": name, "predicted": predicted[name], "measured": measured[name]}
                for name in predicted
                if name in measured
            ]
    return found


def show(facts: Facts, made: list[Prediction], compared: list[dict[str, Any]]) -> None:
    print("PREDICTIONS: no time below was measured on a GPU, except in a table that says measured")
    for gpu in GPUS:
        rows = [[x.name, f"{x.value:.4g}", x.unit, x.source] for x in gpu.inputs]
        print_table(f"inputs, {gpu.name}", ("input", "value", "unit", "source"), rows)
    rows = [[name, command] for name, command in facts.commands.items()]
    rows.append(["launch plan", "rebased_cuda.testing.plan"])
    print_table("inputs, counted without a GPU", ("file", "made by"), rows)
    rows = []
    for x in made:
        call = f"{x.gpu} {x.shape} {x.sizes['feature_map']} {x.direction}"
        for time, launched in zip(x.kernels, x.works, strict=True):
            kernel = launched.kernel
            counted = f"{kernel.chunk_instructions}/{kernel.chunk_mma}" if kernel.chunk_instructions else ""
            rows.append(
                [
                    call if launched is x.works[0] else "",
                    kernel.name.split("::")[-1].split("<")[0].removesuffix("_kernel"),
                    str(kernel.blocks_per_multiprocessor),
                    str(launched.blocks),
                    f"{launched.chunks:g}" if counted else "",
                    counted,
                    f"{launched.bytes / 1e6:.1f}/{launched.sector_bytes / 1e6:.1f}",
                    *(f"{time.seconds_of[name] * 1e6:.1f}" for name in RESOURCES),
                    f"{time.predicted * 1e6:.1f}",
                    time.bound,
                ]
            )
    columns = ("call", "kernel", "per SM", "blocks", "chunks", "instr/mma", "MB/sectors")
    columns += (*RESOURCES, "PREDICTED", "bound by")
    print_table("PREDICTED by kernel, microseconds; instructions and mma per warp and chunk", columns, rows)
    rows = [
        [
            f"{x.gpu} {x.shape} {x.sizes['feature_map']} {x.direction}",
            str(x.segments),
            duration(x.floor),
            duration(x.predicted),
            duration(x.at_most),
            f"{x.floor / x.predicted:.0%}",
            duration(x.predicted_with_token_norm),
        ]
        for x in made
    ]
    columns = ("call", "segments", "floor", "PREDICTED", "at most", "floor/predicted", "with token LayerNorm")
    print_table("PREDICTED by call, beside the floor (one pass, no segments)", columns, rows)
    for title, first, what in (
        ("PREDICTED against measured, whole calls", "call", "direction"),
        ("PREDICTED against measured, kernels of a forward and a backward", "kernel", "kernel"),
    ):
        rows = [
            [
                f"{x['gpu']} {x['shape']} {x['map']} {x[what]}",
                duration(x["predicted"]),
                duration(x["measured"]),
                f"{x['measured'] / x['predicted']:.2f}x",
            ]
            for x in compared
            if what in x
        ]
        if rows:
            print_table(title, (first, "PREDICTED", "measured", "measured/predicted"), rows)
    if not compared:
        print("\nno file of these cards in benchmarks/results: no prediction has been checked yet")


def to_json(facts: Facts, made: list[Prediction], compared: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "what": "predictions by benchmarks/speed/gpu_model.py; nothing was measured but what says so",
        "command": "python -m benchmarks.speed.predict",
        "counted_by": facts.commands,
        "inputs": {gpu.name: [asdict(x) for x in gpu.inputs] for gpu in GPUS},
        "predictions": [
            {
                "gpu": x.gpu,
                "shape": x.shape,
                "sizes": x.sizes,
                "direction": x.direction,
                "segments": x.segments,
                "floor_seconds": x.floor,
                "predicted_seconds": x.predicted,
                "predicted_at_most_seconds": x.at_most,
                "predicted_token_norm_seconds": x.token_norm.predicted if x.token_norm else 0.0,
                "kernels": [
                    {**asdict(launched), **asdict(time), "kernel": asdict(launched.kernel)}
                    | {"predicted_seconds": time.predicted, "bound": time.bound}
                    for time, launched in zip(x.kernels, x.works, strict=True)
                ],
            }
            for x in made
        ],
        "predicted_against_measured": compared,
    }


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed.predict", description=__doc__, formatter_class=formatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS / OUTPUT, help="where to write all of it")
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder with the counted facts")
    arguments = parser.parse_args(argv)
    try:
        facts = load(arguments.results)
        made = [x for gpu in GPUS for x in predictions(facts, gpu)]
    except MissingFactsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    compared = against_measured(made, arguments.results) + kernels_against_measured(made, arguments.results)
    show(facts, made, compared)
    arguments.json.write_text(json.dumps(to_json(facts, made, compared), indent=1) + "\n")
    print(f"\n{arguments.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
