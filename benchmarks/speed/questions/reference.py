"""The reference shapes: everybody against everybody, and against the floor."""

from __future__ import annotations

from collections.abc import Iterator

from ..harness import Row, Shape
from ..op import Call
from .run import Run, both_directions

SECONDS = (420.0, 40.0)  # a first run's compilers take most of it
CPU = ((1, 12, 4096, 64), (1, 4, 16384, 64), (8, 1, 2048, 64))  # batch, heads, N, head dim
# a language model's batch, long context, and a recall task at two head dims
GPU = ((8, 12, 4096, 64), (1, 12, 131072, 64), (512, 1, 2048, 64), (512, 1, 2048, 128))


def shapes(run: Run) -> list[Shape]:
    sizes = GPU if run.device == "cuda" else CPU
    return [
        Shape(*size[:3], feature_map, run.dtype, head_dim=size[3])
        for size in (sizes[:1] if run.quick else sizes)
        for feature_map in ("outer", "square")
    ]


def calls(run: Run) -> list[Call]:
    return both_directions(shapes(run))


def rows(run: Run) -> Iterator[Row]:
    yield from run.ask("reference", shapes(run))
