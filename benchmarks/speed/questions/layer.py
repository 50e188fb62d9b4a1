"""A layer's forward of 32 tokens after a state, beside its four Linears and the op with that state.

A run makes CALLS calls, as a model's layers follow one another: before a run the harness sweeps the caches,
and a single call of a millisecond would be timed for how long Python itself takes to come from memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from rebased_cuda import ReBasedAttention, rebased_attention

from ..harness import DIRECTIONS, OURS, Method, Prepared, Row, Shape, relative_error
from .run import Run

SECONDS = (4.0, 2.0)
PARTS = "its Linears and the op alone"
SHAPE = Shape(1, 12, 32)
CALLS = 48
BOUND = 1e-5


def _methods(device: str) -> list[Method]:
    layer = ReBasedAttention(SHAPE.heads * SHAPE.head_dim, SHAPE.heads, SHAPE.feature_dim).to(device)
    x = torch.randn(SHAPE.batch, SHAPE.seqlen, layer.hidden_size, device=device)
    with torch.no_grad():
        _, state = layer.prefill(torch.randn_like(x))
        parts = [layer.proj_q(x), layer.proj_k(x), layer.proj_v(x)]
        q, k, v = (part.unflatten(2, (SHAPE.heads, -1)).transpose(1, 2) for part in parts)
        options = {
            **{"gamma_q": layer.ln_q.weight, "beta_q": layer.ln_q.bias},
            **{"gamma_k": layer.ln_k.weight, "beta_k": layer.ln_k.bias},
        }
        options = {name: part.view(SHAPE.heads, -1) for name, part in options.items()}

    def attend() -> torch.Tensor:
        return rebased_attention(q, k, v, **options, layer_norm="token", eps=layer.eps, initial_state=state)

    with torch.no_grad():
        heads = attend().transpose(1, 2).flatten(2)
        expected = layer.proj_o(heads)

    def whole() -> None:
        with torch.no_grad():
            layer(x, state=state)

    def alone() -> None:
        with torch.no_grad():
            layer.proj_q(x)
            layer.proj_k(x)
            layer.proj_v(x)
            attend()
            layer.proj_o(heads)

    def error() -> float:
        with torch.no_grad():
            return relative_error(layer(x, state=state), expected)

    return [
        Method(OURS, SHAPE, lambda: Prepared(whole, error, BOUND, calls=CALLS)),
        Method(PARTS, SHAPE, lambda: Prepared(alone, lambda: 0.0, 0.0, calls=CALLS)),
    ]


def rows(run: Run) -> Iterator[Row]:
    yield from run.compare("layer", DIRECTIONS[0], _methods(run.device), floor=False)
