"""The decode step, and a prefill that hands over to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rebased_cuda import RebasedState, rebased_attention, rebased_attention_step, reference

from .harness import OURS, Prepared, Preparer, Row, Shape, measure, relative_error

HEADS, FEATURE_DIM, HEAD_DIM = 12, 16, 64
PROMPT, STEPS = 4096, 64
COPY = "copy of the state"
REFERENCE = "PyTorch step"
BOUND = 1e-4

Tell = Callable[[str], None]


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


def _prepare_step(function: Callable[..., Tensor], given: dict[str, Any]) -> Prepared:
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


def _prepare_copy(given: dict[str, Any]) -> Prepared:
    """Reads the state once and writes it once: what a step cannot do without."""
    target = _clone(given["state"])

    def run() -> None:
        for source, copy in zip(given["state"], target, strict=True):
            copy.copy_(source)

    return Prepared(run, lambda: 0.0, 0.0)


def rows(device: str, sequences: int, feature_map: str, budget: float, tell: Tell) -> list[Row]:
    """The step of `sequences` x 12 heads beside a copy of their states."""
    shape = Shape(sequences, HEADS, 1, feature_map)
    given = _inputs(shape, device)
    methods: dict[str, Preparer] = {
        OURS: functools.partial(_prepare_step, rebased_attention_step, given),
        COPY: functools.partial(_prepare_copy, given),
        REFERENCE: functools.partial(_prepare_step, _plain_step, given),
    }
    result = measure("decoding", shape, "step", methods, device, budget, tell=tell)
    copied = {row.method: row.median for row in result}[COPY]
    if copied is not None:
        for row in result:
            if row.method == OURS and row.median is not None:
                row.over_floor = row.median / copied
    return result


def hand_over(device: str, feature_map: str, budget: float, tell: Tell) -> list[Row]:
    """A prompt read with return_state, then STEPS tokens one by one, against prefill alone."""
    shape = Shape(1, HEADS, PROMPT, feature_map)
    generator = torch.Generator(device).manual_seed(0)
    widths = (FEATURE_DIM, FEATURE_DIM, HEAD_DIM)
    total = PROMPT + STEPS
    q, k, v = (torch.randn(1, HEADS, total, width, generator=generator, device=device) for width in widths)
    options = {"feature_map": feature_map, "layer_norm": "token"}

    def decoded(steps: int) -> Tensor:
        with torch.no_grad():
            prompt = (x[:, :, :PROMPT] for x in (q, k, v))
            y, state = rebased_attention(*prompt, **options, return_state=True)
            last = [
                rebased_attention_step(*(x[:, :, PROMPT + i] for x in (q, k, v)), state, **options)
                for i in range(steps)
            ]
        return torch.cat([y, torch.stack(last, 2)], 2) if steps else y

    def prepared(steps: int) -> Prepared:
        def error() -> float:
            wide = (x.double()[:, :, : PROMPT + steps] for x in (q, k, v))
            expected = reference.chunked(*wide, **options, chunk=256)
            assert isinstance(expected, Tensor)
            return relative_error(decoded(steps), expected)

        return Prepared(functools.partial(decoded, steps), error, BOUND)

    methods = {OURS: functools.partial(prepared, STEPS), "prefill alone": functools.partial(prepared, 0)}
    direction = f"prefill + {STEPS} steps"
    return measure("hand_over", shape, direction, methods, device, budget, tell=tell)
