"""Against N, from 256 to 131,072: at 12 heads where that fits, at fewer where it would take minutes."""

from __future__ import annotations

from collections.abc import Iterator

from ..harness import Row, Shape
from ..op import Call
from .run import Run, both_directions

SECONDS = (55.0, 12.0)


# Only for another version beside this one: with few features a token, what depends on N alone is not lost.
LONGEST = tuple((1, 1, seqlen, name) for seqlen in (65536, 262144) for name in ("square", "elu"))


def shapes(run: Run) -> list[Shape]:
    """N = 4096 and beyond are among the reference shapes too."""
    batch = 8 if run.device == "cuda" else 1
    short = [(batch, 12, 256), (batch, 12, 1024)]
    long = [(1, 12, 32768)] if run.device == "cuda" else [(1, 1, 131072)]
    sizes = short[1:] if run.quick else short + long
    return [Shape(*size, feature_map, run.dtype) for feature_map in ("outer", "square") for size in sizes]


def calls(run: Run) -> list[Call]:
    return both_directions([*shapes(run), *(Shape(*size, run.dtype) for size in LONGEST)])


def rows(run: Run) -> Iterator[Row]:
    for shape in shapes(run):
        yield from run.ask("length", [shape], run.few)
