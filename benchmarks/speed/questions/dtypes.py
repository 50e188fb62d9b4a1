"""The dtypes against float32, and chunked PyTorch in them."""

from __future__ import annotations

from collections.abc import Iterator

from .. import peers
from ..harness import DIRECTIONS, OURS, Row, Shape
from .run import Run

SECONDS = (30.0, 8.0)


def rows(run: Run) -> Iterator[Row]:
    """Ours in all dtypes at once, ratios to float32; then PyTorch's forms in bfloat16, ratios to ours."""
    names = ("float32", "bfloat16") if run.quick else ("float32", "bfloat16", "float16", "float64")
    for feature_map in ("outer", "square"):
        shapes = [Shape(1, 12, 4096, feature_map, dtype) for dtype in names]
        for direction in DIRECTIONS:
            ours = [run.method(OURS, shape, direction) for shape in shapes]
            yield from run.compare("dtypes", direction, ours)
    if not run.quick and run.device == "cpu":
        for feature_map in ("outer", "square"):
            low = [Shape(1, 12, 4096, feature_map, "bfloat16")]
            yield from run.ask("dtypes_peers", low, (OURS, peers.LOOP, peers.CUMSUM))
