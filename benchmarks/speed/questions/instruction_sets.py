"""AVX2, forced, against AVX-512 on one core; ratios are to AVX-512."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rebased_cuda import build_info

from ..harness import DIRECTIONS, Row, Shape
from ..worker import Worker
from .run import Run

SECONDS = (12.0, 8.0)


def rows(run: Run) -> Iterator[Row]:
    """The choice is made once a process: each has one of its own, and they take turns."""
    if run.device == "cuda" or not str(build_info()["cpu_instruction_set"]).startswith("avx512"):
        return
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(Worker(name)) for name in ("avx512", "avx2")]
        for feature_map in ("outer", "square"):
            shape = Shape(1, 1 if run.quick else 4, 4096, feature_map, threads=1)
            for direction in DIRECTIONS:
                methods = [worker.method(shape, direction) for worker in workers]
                yield from run.compare("instruction_sets", direction, methods)
