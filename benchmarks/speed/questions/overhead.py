"""What one call costs from Python where there is nothing to compute: one token, one head, batch 1.

The measure is what torch itself takes for any such function: a `torch.autograd.Function` that saves as many
tensors as the op has inputs and returns empty ones (`trivial Function`), and for a step torch's layer_norm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rebased_cuda import rebased_attention
from rebased_cuda.autograd import ops

from ..harness import DIRECTIONS, OURS, Method, Prepared, Row, Shape, measure
from ..op import STEP, Call, runner
from . import decoding
from .run import Run

SECONDS = (4.0, 4.0)
SHAPE = Shape(1, 1, 1, "square")
ONE_THREAD = Shape(1, 1, 1, "square", threads=1)
TRIVIAL, OPERATOR = "trivial Function", f"{OURS}, the operator alone"
OPTIONS = ("square", "token", 0.25, 1e-6, 1e-5, True)


class Trivial(torch.autograd.Function):
    """As many tensors in, saved and out as the op has, and nothing computed."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        return torch.empty_like(inputs[2])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def _call(run: Callable[[], Any]) -> Prepared:
    return Prepared(run, lambda: 0.0, 0.0)


def _inputs(device: str) -> tuple[Tensor, ...]:
    """q, k, v and the four affine vectors."""
    sizes = ((1, 1, 1, 16), (1, 1, 1, 16), (1, 1, 1, 64), *[(16,)] * 4)
    return tuple(torch.randn(size, device=device, requires_grad=True) for size in sizes)


def _prepare(function: Callable[..., Tensor], direction: str, device: str) -> Prepared:
    return _call(runner(function, _inputs(device), ONE_THREAD, direction, device))


def _prepare_operator(direction: str, device: str) -> Prepared:
    """forward, or for a forward + backward the backward alone."""
    inputs = (*(x.detach() for x in _inputs(device)), None)
    if direction == DIRECTIONS[0]:
        return _call(lambda: ops.forward.default(*inputs, *OPTIONS))
    y, r = ops.forward.default(*inputs, *OPTIONS)
    return _call(lambda: ops.backward.default(y, *inputs, y, r, *OPTIONS))


def _layer_norm(device: str) -> Prepared:
    x = torch.randn(1, 1, 16, device=device)

    def run() -> None:
        with torch.no_grad():
            F.layer_norm(x, (16,))

    return _call(run)


def calls(run: Run) -> list[Call]:
    return [Call(SHAPE, direction, host=True) for direction in (STEP, *DIRECTIONS)]


def rows(run: Run) -> Iterator[Row]:
    """Of the host alone: on a GPU nothing waits for the kernels."""
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
    attention = functools.partial(rebased_attention, feature_map="square", layer_norm="token")
    for direction in DIRECTIONS:
        prepared = {
            TRIVIAL: functools.partial(_prepare, Trivial.apply, direction, run.device),
            OURS: functools.partial(_prepare, attention, direction, run.device),
            OPERATOR: functools.partial(_prepare_operator, direction, run.device),
        }
        methods = [Method(name, ONE_THREAD, prepare) for name, prepare in prepared.items()]
        yield from measure("overhead", direction, methods, "cpu", run.budget)
