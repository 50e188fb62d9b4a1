"""The dtypes against float32, and chunked PyTorch in them."""

from __future__ import annotations

from collections.abc import Iterator

from .. import peers
from ..harness import DIRECTIONS, OURS, Row, Shape
from ..op import Call
from .run import Run, both_directions

SECONDS = (30.0, 8.0)


def shapes(run: Run, feature_map: str) -> list[Shape]:
    names = ("float32", "bfloat16") if run.quick else ("float32", "bfloat16", "float16", "float64")
    return [Shape(1, 12, 4096, feature_map, dtype) for dtype in names]


def calls(run: Run) -> list[Call]:
    return both_directions([*shapes(run, "outer"), *shapes(run, "square")])


def rows(run: Run) -> Iterator[Row]:
    """Ours in all dtypes at once, ratios to float32; then PyTorch's forms in bfloat16, ratios to ours."""
    for feature_map in ("outer", "square"):
        for direction in DIRECTIONS:
            ours = [run.method(OURS, shape, direction) for shape in shapes(run, feature_map)]
            yield from run.compare("dtypes", direction, ours)
    if not run.quick and run.device == "cpu":
        for feature_map in ("outer", "square"):
            low = [Shape(1, 12, 4096, feature_map, "bfloat16")]
            yield from run.ask("dtypes_peers", low, (OURS, peers.LOOP, peers.CUMSUM))
