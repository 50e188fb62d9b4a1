"""Prefill of a prompt of 4096 tokens that hands its state to 64 decode steps."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from rebased_cuda import rebased_attention, rebased_attention_step, reference

from ..harness import OURS, Method, Prepared, Row, Shape, relative_error
from .decoding import BOUND, HEADS
from .run import Run

SECONDS = (5.0, 4.0)
PROMPT, STEPS = 4096, 64


def rows(run: Run) -> Iterator[Row]:
    """Ratios are to the whole; the second row is the same without its steps."""
    for feature_map in ("outer", "square"):
        shape = Shape(1, HEADS, PROMPT, feature_map)
        whole = functools.partial(_prepare, shape, STEPS, run.device)
        prefill = functools.partial(_prepare, shape, 0, run.device)
        methods = [Method(OURS, shape, whole), Method("prefill alone", shape, prefill)]
        yield from run.compare("hand_over", f"prefill + {STEPS} steps", methods, floor=False)


def _prepare(shape: Shape, steps: int, device: str) -> Prepared:
    generator = torch.Generator(device).manual_seed(0)
    widths = (shape.feature_dim, shape.feature_dim, shape.head_dim)
    sizes = (shape.batch, shape.heads, PROMPT + STEPS)
    q, k, v = (torch.randn(*sizes, width, generator=generator, device=device) for width in widths)
    options = {"feature_map": shape.feature_map, "layer_norm": "token"}

    def decoded() -> Tensor:
        with torch.no_grad():
            prompt = (x[:, :, :PROMPT] for x in (q, k, v))
            y, state = rebased_attention(*prompt, **options, return_state=True)
            last = [
                rebased_attention_step(*(x[:, :, PROMPT + i] for x in (q, k, v)), state, **options)
                for i in range(steps)
            ]
        return torch.cat([y, torch.stack(last, 2)], 2) if steps else y

    def error() -> float:
        wide = (x.double()[:, :, : PROMPT + steps] for x in (q, k, v))
        expected = reference.chunked(*wide, **options, chunk=256)
        assert isinstance(expected, Tensor)
        return relative_error(decoded(), expected)

    return Prepared(decoded, error, BOUND)
