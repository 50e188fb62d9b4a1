"""The op at a shape, with its inputs, as every benchmark here calls it.

Of rebased_cuda only the public names are used, which another version of it has too: against.py times two.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rebased_cuda import RebasedState, rebased_attention, rebased_attention_step

OURS = "rebased_cuda"
DIRECTIONS = ("forward", "forward + backward")
STEP = "step"


def keep_freed_memory() -> bool:
    """Tells the C library to give no memory back to the system; whether it does so (glibc).

    Outputs then lie in pages that are there already, for every method. Else calls also time the system
    handing out pages and clearing them, more or less of it as the methods before have left the heap.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(m_mmap_max, 0) and mallopt(m_trim_threshold, -1))


@dataclass(frozen=True)
class Shape:
    """One call of the op. `threads` is what torch is told, 0 for all."""

    batch: int
    heads: int
    seqlen: int
    feature_map: str = "outer"
    dtype: str = "float32"
    feature_dim: int = 16
    head_dim: int = 64
    threads: int = 0

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    def __str__(self) -> str:
        words = [self.feature_map, f"({self.batch}, {self.heads}, {self.seqlen})"]
        if self.dtype != "float32":
            words.append(self.dtype)
        if (self.feature_dim, self.head_dim) != (16, 64):
            words.append(f"d {self.feature_dim} dv {self.head_dim}")
        if self.threads:
            words.append(f"{self.threads} thread" + "s" * (self.threads > 1))
        return " ".join(words)


@dataclass(frozen=True)
class Call:
    """What is timed of the op. `host`: on a GPU the host's time alone, and nothing waits for the kernels."""

    shape: Shape
    direction: str
    host: bool = False

    def __str__(self) -> str:
        return f"{self.shape}, {self.direction}"


class Flush:
    """Overwrites a GPU's L2 cache between calls; a CPU's caches are left as a training step leaves them."""

    def __init__(self, device: str) -> None:
        self._buffer: Tensor | None = None
        if device == "cuda":
            bytes_ = 4 * torch.cuda.get_device_properties(0).L2_cache_size
            self._buffer = torch.empty(bytes_, dtype=torch.uint8, device=device)

    def __call__(self, *_: object) -> None:
        if self._buffer is not None:
            self._buffer.zero_()


@functools.lru_cache(maxsize=2)
def projections(shape: Shape, device: str) -> tuple[Tensor, ...]:
    """q, k, v as the projections leave them; gamma_q, beta_q, gamma_k, beta_k (H, d), float32 or float64."""
    generator = torch.Generator(device).manual_seed(0)
    rows = (shape.batch, shape.seqlen)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    widths = (shape.feature_dim, shape.feature_dim, shape.head_dim)
    qkv = [normal(*rows, shape.heads * width).to(shape.torch_dtype) for width in widths]
    wide = torch.float64 if shape.dtype == "float64" else torch.float32
    affine = [(mean + 0.3 * normal(shape.heads, shape.feature_dim)).to(wide) for mean in (1.0, 0.2, 1.0, 0.2)]
    return tuple(x.requires_grad_() for x in (*qkv, *affine))


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(B, N, H*width) -> (B, H, N, width), a view."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, *affine: Tensor, heads: int, feature_map: str) -> Tensor:
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    return rebased_attention(q, k, v, *affine, feature_map=feature_map, layer_norm="token")


def runner(
    function: Callable[..., Tensor], tensors: tuple[Tensor, ...], shape: Shape, direction: str, device: str
) -> Callable[[], Any]:
    """One call of `function` at a shape, with its gradients where the direction has them."""
    if direction == "forward":

        def forward() -> None:
            with torch.no_grad():
                function(*tensors)

        return forward
    generator = torch.Generator(device).manual_seed(1)
    sizes = (shape.batch, shape.heads, shape.seqlen, shape.head_dim)
    grad_y = torch.randn(sizes, generator=generator, device=device).to(shape.torch_dtype)

    def both() -> None:
        torch.autograd.grad(function(*tensors), tensors, grad_y)

    return both


@functools.lru_cache(maxsize=1)
def step_inputs(shape: Shape, device: str) -> dict[str, Any]:
    """One token's q, k, v (B, H, width), the parameters, and a state of a few tokens."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device)

    heads = (shape.batch, shape.heads)
    widths = (shape.feature_dim, shape.feature_dim, shape.head_dim)
    affine = [mean + 0.3 * normal(shape.heads, shape.feature_dim) for mean in (1.0, 0.2, 1.0, 0.2)]
    options = {"feature_map": shape.feature_map, "layer_norm": "token"}
    prompt = [normal(*heads, 8, width) for width in widths]
    _, state = rebased_attention(*prompt, *affine, **options, return_state=True)
    token = [normal(*heads, width) for width in widths]
    return {"token": token, "affine": affine, "options": options, "state": state}


def clone(state: RebasedState) -> RebasedState:
    return RebasedState(*(x.clone() for x in state))


def step_runner(function: Callable[..., Tensor], shape: Shape, device: str) -> Callable[[], Any]:
    """One decode step that updates a state of its own."""
    given = step_inputs(shape, device)
    own = clone(given["state"])

    def run() -> None:
        with torch.no_grad():
            function(*given["token"], own, *given["affine"], **given["options"])

    return run


def prepare(call: Call, device: str) -> Callable[[], Any]:
    """The op's own call at a shape: forward, forward + backward or a decode step."""
    shape = call.shape
    if call.direction == STEP:
        return step_runner(rebased_attention_step, shape, device)
    function = functools.partial(attention, heads=shape.heads, feature_map=shape.feature_map)
    return runner(function, projections(shape, device), shape, call.direction, device)
