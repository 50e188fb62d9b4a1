"""Against N, from 256 to 131,072: at 12 heads where that fits, at fewer where it would take minutes."""

from __future__ import annotations

from collections.abc import Iterator

from ..harness import Row, Shape
from .run import Run

SECONDS = (55.0, 12.0)


def rows(run: Run) -> Iterator[Row]:
    """N = 4096 and beyond are among the reference shapes too."""
    batch = 8 if run.device == "cuda" else 1
    short = [(batch, 12, 256), (batch, 12, 1024)]
    long = [(1, 12, 32768)] if run.device == "cuda" else [(1, 1, 131072)]
    for feature_map in ("outer", "square"):
        for size in short[1:] if run.quick else short + long:
            yield from run.ask("length", [Shape(*size, feature_map, run.dtype)], run.few)
