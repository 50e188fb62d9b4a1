"""Is the op anywhere slower than the best plain PyTorch, from N = 128 on, with 1 thread or all?

This measures short and thin shapes that no other question has; `ratios` goes through the rows of all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import peers
from ..harness import OURS, Row, Shape
from .batch_heads import EAGER
from .run import Run

SECONDS = (95.0, 25.0)
SHORTEST = 128
SIZES = ((1, 1, 128), (1, 12, 128), (1, 12, 512), (1, 1, 2048))


def rows(run: Run) -> Iterator[Row]:
    most = 0 if run.device == "cuda" else torch.get_num_threads()
    sizes = SIZES[1:3] if run.quick else SIZES
    for threads in sorted({min(1, most), most}):
        for feature_map in ("outer", "square"):
            for size in sizes:
                shape = Shape(*size, feature_map, run.dtype, threads=threads)
                yield from run.ask("nothing_slower", [shape], EAGER)
            if threads == 1 and not run.quick:
                shape = Shape(1, 12, 4096, feature_map, run.dtype, threads=1)
                yield from run.ask("nothing_slower", [shape], EAGER[:3])


@dataclass(frozen=True)
class Ratio:
    """The best plain PyTorch of one shape and direction, and its time over ours."""

    shape: Shape
    direction: str
    method: str
    ratio: float


def ratios(rows: Sequence[dict[str, Any]]) -> list[Ratio]:
    """Of all rows of a result, in order of the ratio; a shape asked twice counts with the smaller one."""
    ours, best = set(), {}
    for row in rows:
        if row["status"] == "ok" and row["method"] == OURS:
            ours.add((row["question"], Shape(**row["shape"]), row["direction"]))
    for row in rows:
        shape = Shape(**row["shape"])
        if row["status"] != "ok" or row["method"] not in peers.PLAIN or shape.seqlen < SHORTEST:
            continue
        if (row["question"], shape, row["direction"]) not in ours:
            continue
        found = Ratio(shape, row["direction"], row["method"], row["ratio"])
        key = (shape, row["direction"])
        if found.ratio < (best[key].ratio if key in best else math.inf):
            best[key] = found
    return sorted(best.values(), key=lambda x: x.ratio)
