"""All four feature maps, and other widths, against `outer` at d = 16, dv = 64."""

from __future__ import annotations

from collections.abc import Iterator

from .. import others
from ..harness import DIRECTIONS, OURS, Row, Shape
from ..op import Call
from .run import Run, both_directions

SECONDS = (30.0, 0.0)


def shapes(run: Run) -> list[Shape]:
    if run.quick:
        return []
    batch = 8 if run.device == "cuda" else 1
    maps = [Shape(batch, 12, 4096, name, run.dtype) for name in ("outer", "square", "taylor", "elu")]
    narrow = [Shape(batch, 12, 4096, "outer", run.dtype, feature_dim=d) for d in (8, 32)]
    wide = [
        Shape(batch, 12, 4096, "square", run.dtype, feature_dim=64),
        Shape(batch, 12, 4096, "outer", run.dtype, head_dim=128),
    ]
    return [*maps, *narrow, *wide]


def calls(run: Run) -> list[Call]:
    return both_directions(shapes(run))


def rows(run: Run) -> Iterator[Row]:
    if run.quick:
        return
    for direction in DIRECTIONS:
        methods = [run.method(OURS, shape, direction) for shape in shapes(run)]
        if run.device == "cuda":  # the one peer that has taylor
            based = next(name for name, (_, names) in others.FLA.items() if "taylor" in names)
            (taylor,) = (shape for shape in shapes(run) if shape.feature_map == "taylor")
            methods.append(run.method(based, taylor, direction))
        yield from run.compare("feature_maps", direction, methods)
