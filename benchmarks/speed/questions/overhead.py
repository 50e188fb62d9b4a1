"""What one call costs from Python where there is nothing to compute: one token, one head, batch 1."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from ..harness import DIRECTIONS, OURS, Method, Prepared, Row, Shape, measure
from ..op import STEP, Call
from . import decoding
from .run import Run

SECONDS = (2.0, 2.0)
SHAPE = Shape(1, 1, 1, "square")


def _call(run: Callable[[], Any]) -> Prepared:
    return Prepared(run, lambda: 0.0, 0.0)


def _layer_norm(device: str) -> Prepared:
    x = torch.randn(1, 1, 16, device=device)

    def run() -> None:
        with torch.no_grad():
            F.layer_norm(x, (16,))

    return _call(run)


def calls(run: Run) -> list[Call]:
    return [Call(SHAPE, direction, host=True) for direction in (STEP, *DIRECTIONS)]


def rows(run: Run) -> Iterator[Row]:
    """Of the host alone: on a GPU nothing waits for the kernels. torch's layer_norm is what any op costs."""
    step = functools.partial(decoding.prepare_ours, SHAPE, run.device)
    norm = functools.partial(_layer_norm, run.device)
    yield from measure(
        "overhead",
        STEP,
        [Method(OURS, SHAPE, step), Method("torch layer_norm", SHAPE, norm)],
        "cpu",
        run.budget / 2,
        tell=run.tell,
    )
    for direction in DIRECTIONS:
        yield from measure("overhead", direction, [run.method(OURS, SHAPE, direction)], "cpu", run.budget / 2)
