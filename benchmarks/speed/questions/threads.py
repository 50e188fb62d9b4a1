"""Scaling over threads, of many heads and of one long sequence; ratios are to all threads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..harness import DIRECTIONS, OURS, Row, Shape
from .run import Run

SECONDS = (20.0, 10.0)


def rows(run: Run) -> Iterator[Row]:
    if run.device == "cuda":
        return
    most = torch.get_num_threads()
    counts = [most, *(1 << i for i in range(16) if 1 << i < most)]
    for size in [(1, 1, 131072)] if run.quick else [(1, 12, 4096), (1, 1, 131072)]:
        for feature_map in ("outer", "square"):
            shapes = [replace(Shape(*size, feature_map), threads=count) for count in counts]
            for direction in DIRECTIONS:
                methods = [run.method(OURS, shape, direction) for shape in shapes]
                yield from run.compare("threads", direction, methods)
