"""One decode step of 256 sequences x 12 heads beside a copy of their states, and one of a single sequence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from rebased_cuda import RebasedState, rebased_attention, rebased_attention_step, reference

from ..harness import OURS, Method, Prepared, Row, Shape, relative_error
from .run import Run

SECONDS = (6.0, 5.0)
HEADS, FEATURE_DIM, HEAD_DIM = 12, 16, 64
COPY = "copy of the state"
PYTORCH = "PyTorch step"
BOUND = 1e-4


@functools.lru_cache(maxsize=1)
def _inputs(shape: Shape, device: str) -> dict[str, Any]:
    """One token's q, k, v (B, H, width), the parameters, and a state of a few tokens."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    heads = (shape.batch, shape.heads)
    widths = (FEATURE_DIM, FEATURE_DIM, HEAD_DIM)
    affine = [mean + 0.3 * normal(shape.heads, FEATURE_DIM) for mean in (1.0, 0.2, 1.0, 0.2)]
    options = {"feature_map": shape.feature_map, "layer_norm": "token"}
    prompt = [normal(*heads, 8, width) for width in widths]
    _, state = rebased_attention(*prompt, *affine, **options, return_state=True)
    token = [normal(*heads, width) for width in widths]
    return {"token": token, "affine": affine, "options": options, "state": state}


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


def _clone(state: RebasedState) -> RebasedState:
    return RebasedState(*(x.clone() for x in state))


def _prepare(function: Callable[..., Tensor], shape: Shape, device: str) -> Prepared:
    given = _inputs(shape, device)
    q, k, v = given["token"]
    arguments, options = given["affine"], given["options"]
    own = _clone(given["state"])

    def run() -> None:
        with torch.no_grad():
            function(q, k, v, own, *arguments, **options)

    def error() -> float:
        with torch.no_grad():
            y = function(q, k, v, _clone(given["state"]), *arguments, **options)
            wide = [x.double() for x in (q, k, v)]
            state = tuple(x.double() for x in given["state"])
            expected, _ = reference.step(*wide, state, *(x.double() for x in arguments), **options)
        return relative_error(y, expected)

    return Prepared(run, error, BOUND)


def prepare_ours(shape: Shape, device: str) -> Prepared:
    return _prepare(rebased_attention_step, shape, device)


def _prepare_plain(shape: Shape, device: str) -> Prepared:
    return _prepare(_plain_step, shape, device)


def _prepare_copy(shape: Shape, device: str) -> Prepared:
    """Reads the state once and writes it once: what a step cannot do without."""
    given = _inputs(shape, device)
    target = _clone(given["state"])

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
    result = run.compare("decoding", "step", methods, floor=False)
    by_name = {row.method: row for row in result}
    if by_name[COPY].ratio is not None:
        by_name[OURS].over_floor = 1 / by_name[COPY].ratio
    return result


def rows(run: Run) -> Iterator[Row]:
    for feature_map in ("outer", "square"):
        for sequences in (256, 1):
            yield from compare(run, sequences, feature_map)
