"""Against batch x heads, from 1 to 512, the total work about the same."""

from __future__ import annotations

from collections.abc import Iterator

from .. import peers
from ..harness import OURS, Row, Shape
from .run import Run

SECONDS = (55.0, 0.0)
EAGER = (OURS, peers.LOOP, peers.CUMSUM, peers.QUADRATIC)
SIZES = ((1, 1, 16384), (4, 12, 1024), (64, 1, 512), (512, 1, 128))


def rows(run: Run) -> Iterator[Row]:
    if run.quick:
        return
    factor = 32 if run.device == "cuda" else 1
    for feature_map in ("outer", "square"):
        for batch, heads, seqlen in SIZES:
            shape = Shape(batch, heads, seqlen * factor, feature_map, run.dtype)
            yield from run.ask("batch_heads", [shape], EAGER)
