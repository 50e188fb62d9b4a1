"""One decode step of 256 sequences x 12 heads beside a copy of their states, and one of a single sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rebased_cuda import RebasedState, rebased_attention_step, reference

from ..harness import OURS, Method, Prepared, Row, Shape, relative_error
from ..op import STEP, Call, clone, step_inputs, step_runner
from .run import Run

SECONDS = (6.0, 5.0)
HEADS = 12
SEQUENCES = (256, 1)
COPY = "copy of the state"
PYTORCH = "PyTorch step"
BOUND = 1e-4


def _plain_step(
    q: Tensor, k: Tensor, v: Tensor, state: RebasedState, *affine: Tensor, **options: Any
) -> Tensor:
    """The recurrence in plain PyTorch, in place as one would write it for decoding."""
    names = {"layer_norm": options["layer_norm"]}
    q = reference.normalise(q.unsqueeze(2), *affine[:2], **names).squeeze(2)
    k = reference.normalise(k.unsqueeze(2), *affine[2:], **names).squeeze(2)
    query = reference.query_features(q, options["feature_map"]).unsqueeze(2)
    key = reference.key_features(k, options["feature_map"])
    state.kv.addcmul_(key.unsqueeze(-1), v.unsqueeze(2))
    state.k.add_(key)
    return (query @ state.kv).squeeze(2) / ((query.squeeze(2) * state.k).sum(-1, keepdim=True) + 1e-6)


def _prepare(function: Callable[..., Tensor], shape: Shape, device: str) -> Prepared:
    given = step_inputs(shape, device)
    q, k, v = given["token"]
    arguments, options = given["affine"], given["options"]

    def error() -> float:
        with torch.no_grad():
            y = function(q, k, v, clone(given["state"]), *arguments, **options)
            wide = [x.double() for x in (q, k, v)]
            state = tuple(x.double() for x in given["state"])
            expected, _ = reference.step(*wide, state, *(x.double() for x in arguments), **options)
        return relative_error(y, expected)

    return Prepared(step_runner(function, shape, device), error, BOUND)


def prepare_ours(shape: Shape, device: str) -> Prepared:
    return _prepare(rebased_attention_step, shape, device)


def _prepare_plain(shape: Shape, device: str) -> Prepared:
    return _prepare(_plain_step, shape, device)


def _prepare_copy(shape: Shape, device: str) -> Prepared:
    """Reads the state once and writes it once: what a step cannot do without."""
    given = step_inputs(shape, device)
    target = clone(given["state"])

    def run() -> None:
        for source, copy in zip(given["state"], target, strict=True):
            copy.copy_(source)

    return Prepared(run, lambda: 0.0, 0.0)


def compare(run: Run, sequences: int, feature_map: str) -> list[Row]:
    """Over its floor: over the copy's time."""
    shape = Shape(sequences, HEADS, 1, feature_map)
    makers = {OURS: prepare_ours, COPY: _prepare_copy, PYTORCH: _prepare_plain}
    methods = [
        Method(name, shape, functools.partial(make, shape, run.device)) for name, make in makers.items()
    ]
    result = run.compare("decoding", STEP, methods, floor=False)
    by_name = {row.method: row for row in result}
    if by_name[COPY].ratio is not None:
        by_name[OURS].over_floor = 1 / by_name[COPY].ratio
    return result


def calls(run: Run) -> list[Call]:
    return [Call(Shape(n, HEADS, 1, name), STEP) for name in ("outer", "square") for n in SEQUENCES]


def rows(run: Run) -> Iterator[Row]:
    for feature_map in ("outer", "square"):
        for sequences in SEQUENCES:
            yield from compare(run, sequences, feature_map)
