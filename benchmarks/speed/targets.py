"""`--targets`: the figures that the project has set itself for the CPU, beside those of a run; left out where
rows are missing. For whoever works on the kernels: what a user compares is in the report's own tables.

For two cores, float32, LayerNorm and affine on our side included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from . import others, peers
from .harness import DIRECTIONS, OURS
from .questions import layer, nothing_slower, reference

Rows = Sequence[dict[str, Any]]
CASES = [(feature_map, direction) for feature_map in ("outer", "square") for direction in DIRECTIONS]
# by case: outer forward, outer forward + backward, square forward, square forward + backward
OVER_FLOOR = (1.10, 1.18, 1.5, 2.0)
SOFTMAX = {4096: (18.0, 17.0, 75.0, 60.0), 16384: (65.0, 62.0, 300.0, 220.0)}  # by N
CHUNKED = (2.8, 2.6, 5.0, 3.5)
FAST_TRANSFORMERS = (5.5, 5.0, 3.0, 2.2)
BFLOAT16, AVX2, TWO_THREADS = 1.5, 0.75, (1.8, 1.7)
STEP_OVER_COPY, OVERHEAD_SECONDS, LAYER_OVER_PARTS = 1.3, 15e-6, 1.1
CHUNKED_FORMS = tuple(x for x in peers.PLAIN if peers.QUADRATIC not in x)


@dataclass(frozen=True)
class Target:
    name: str
    value: float
    wanted: float
    at_most: bool = False
    unit: str = "x"

    @property
    def held(self) -> bool:
        return self.value <= self.wanted if self.at_most else self.value >= self.wanted


def targets(rows: Rows) -> list[Target]:
    timed = [row for row in rows if row["status"] == "ok"]
    return [
        *_reference(timed),
        *_dtypes(timed),
        *_instruction_sets(timed),
        *_threads(timed),
        *_calls(timed),
        *_layer(timed),
        *_nothing_slower(timed),
    ]


def _pick(rows: Rows, question: str, direction: str, feature_map: str, **shape: Any) -> dict[str, Any]:
    """By method, the rows of one comparison at one shape."""
    wanted = {"feature_map": feature_map, **shape}
    return {
        row["method"]: row
        for row in rows
        if (row["question"], row["direction"]) == (question, direction)
        and all(row["shape"][name] == value for name, value in wanted.items())
    }


def _reference(rows: Rows) -> Iterator[Target]:
    for batch, heads, seqlen, head_dim in reference.CPU:
        for case, (feature_map, direction) in enumerate(CASES):
            sizes = {"batch": batch, "heads": heads, "seqlen": seqlen, "head_dim": head_dim}
            found = _pick(rows, "reference", direction, feature_map, dtype="float32", **sizes)
            name = f"{feature_map} ({batch}, {heads}, {seqlen}), {direction}"
            if OURS not in found:
                continue
            yield Target(f"{name}: over the floor", found[OURS]["over_floor"], OVER_FLOOR[case], at_most=True)
            if seqlen in SOFTMAX and peers.SDPA in found:
                yield Target(f"{name}: SDPA", found[peers.SDPA]["ratio"], SOFTMAX[seqlen][case])
            chunked = [found[x] for x in CHUNKED_FORMS if x in found]
            if chunked:
                best = min(chunked, key=lambda row: row["ratio"])
                yield Target(f"{name}: {best['method']}", best["ratio"], CHUNKED[case])
            if others.FAST_TRANSFORMERS in found:
                ratio = found[others.FAST_TRANSFORMERS]["ratio"]
                yield Target(f"{name}: {others.FAST_TRANSFORMERS}", ratio, FAST_TRANSFORMERS[case])


def _dtypes(rows: Rows) -> Iterator[Target]:
    for direction in DIRECTIONS:  # `square` runs the float32 recurrence in every dtype
        row = _pick(rows, "dtypes", direction, "outer", dtype="bfloat16").get(OURS)
        if row is not None and row["ratio"]:
            yield Target(f"outer, {direction}: bfloat16 over float32", 1 / row["ratio"], BFLOAT16)


def _instruction_sets(rows: Rows) -> Iterator[Target]:
    for feature_map, direction in CASES:
        row = _pick(rows, "instruction_sets", direction, feature_map).get(f"{OURS}, avx2")
        if row is not None and row["ratio"]:
            yield Target(f"{feature_map}, {direction}: AVX2 over AVX-512, one core", 1 / row["ratio"], AVX2)


def _threads(rows: Rows) -> Iterator[Target]:
    for case, (feature_map, direction) in enumerate(CASES):
        long = {"batch": 1, "heads": 1, "seqlen": 131072}
        one = _pick(rows, "threads", direction, feature_map, **long, threads=1).get(OURS)
        two = _pick(rows, "threads", direction, feature_map, **long, threads=2).get(OURS)
        if one and two and one["ratio"] and two["ratio"]:
            name = f"{feature_map} (1, 1, 131072), {direction}: two threads over one"
            yield Target(name, one["ratio"] / two["ratio"], TWO_THREADS[case % 2])


def _calls(rows: Rows) -> Iterator[Target]:
    for feature_map in ("outer", "square"):
        row = _pick(rows, "decoding", "step", feature_map, batch=256).get(OURS)
        if row is not None and row["over_floor"]:
            name = f"{feature_map}, a step of 256 x 12: over the copy of its state"
            yield Target(name, row["over_floor"], STEP_OVER_COPY, at_most=True)
    row = _pick(rows, "overhead", "step", "square").get(OURS)
    if row is not None:
        name = "one step of one head: microseconds"
        yield Target(name, row["median"] * 1e6, OVERHEAD_SECONDS * 1e6, at_most=True, unit="us")


def _layer(rows: Rows) -> Iterator[Target]:
    row = _pick(rows, "layer", DIRECTIONS[0], "outer").get(layer.PARTS)
    if row is not None and row["ratio"]:
        name = "a layer's 32 tokens after a state: over its Linears and the op alone"
        yield Target(name, 1 / row["ratio"], LAYER_OVER_PARTS, at_most=True)


def _nothing_slower(rows: Rows) -> Iterator[Target]:
    found = nothing_slower.ratios(rows)
    if found:
        worst = found[0]
        name = f"worst of {len(found)} shapes against plain PyTorch: {worst.shape}, {worst.direction}"
        yield Target(name, worst.ratio, 1.0)
