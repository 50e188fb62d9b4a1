"""Other people's packages as peers: fast-transformers on a CPU, flash-linear-attention (fla) on a GPU.

The adapters of fla are written against the signatures of its release 0.6.0. Each result is checked against
the float64 reference before it is timed, as everybody's is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from rebased_cuda.demo import baselines

from . import fast_transformers
from .harness import Shape, UnavailableError

Function = Callable[..., Tensor]

FAST_TRANSFORMERS = "fast-transformers"
# by name: its module and the feature maps that it can compute
FLA = {
    "fla parallel_rebased": ("fla.ops.rebased", ("outer",)),
    "fla fused_chunk_based": ("fla.ops.based", ("taylor",)),
    "fla chunk_linear_attn": ("fla.ops.linear_attn", ("outer", "square")),
}
NAMES = (FAST_TRANSFORMERS, *FLA)


def versions() -> dict[str, str]:
    """Of the packages; those that are not installed are left out."""
    found = {FAST_TRANSFORMERS: fast_transformers.VERSION} if fast_transformers.library().exists() else {}
    for package in ("flash-linear-attention", "fla-core", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def function(name: str, shape: Shape, device: str, build: bool) -> Function:
    """Raises UnavailableError where it does not run here. `build`: compile fast-transformers if need be."""
    if name in FLA:
        return _fla(name, shape, device)
    if device != "cpu":
        raise UnavailableError("timed on a CPU only")
    if shape.dtype != "float32":
        raise UnavailableError("has float32 only")
    if shape.feature_map not in ("outer", "square"):
        raise UnavailableError("not written for this feature map")
    product = fast_transformers.product(build)
    return functools.partial(
        _fast_transformers, product.apply, heads=shape.heads, feature_map=shape.feature_map
    )


def _normalised(x: Tensor, gamma: Tensor, beta: Tensor, heads: int, scale: float = 1.0) -> Tensor:
    """(B, N, H, d): LayerNorm over all heads' features, affine."""
    gamma, beta = ((scale * y).flatten().to(x.dtype) for y in (gamma, beta))
    return F.layer_norm(x, x.shape[-1:], gamma, beta).unflatten(-1, (heads, -1))


def _fast_transformers(
    product: Function, q: Tensor, k: Tensor, v: Tensor, *affine: Tensor, heads: int, feature_map: str
) -> Tensor:
    """Its causal linear attention: numerator by its loop, denominator by a cumulative sum of the keys."""
    scale = (q.shape[-1] / heads) ** -0.5 if feature_map == "outer" else 1.0
    q = _normalised(q, *affine[:2], heads, scale).transpose(1, 2)
    k = _normalised(k, *affine[2:], heads).transpose(1, 2)
    query, key = baselines.features(feature_map)
    q, k = query(q).contiguous(), key(k).contiguous()
    sums = (q * k.cumsum(2)).sum(-1, keepdim=True)
    v = v.unflatten(-1, (heads, -1)).transpose(1, 2).contiguous()
    return product(q, k, v) / (sums + baselines.EPS)


def _fla(name: str, shape: Shape, device: str) -> Function:
    module, feature_maps = FLA[name]
    if device != "cuda":
        raise UnavailableError("runs on a GPU only")
    if shape.feature_map not in feature_maps:
        raise UnavailableError(f"has {' and '.join(feature_maps)} only")
    if shape.dtype == "float64":
        raise UnavailableError("has no float64")
    try:
        kernel = getattr(importlib.import_module(module), name.split()[1])
    except (ImportError, AttributeError) as error:
        raise UnavailableError(f"not installed (pip install flash-linear-attention): {error}") from error
    adapters = {
        "fla parallel_rebased": _parallel_rebased,
        "fla fused_chunk_based": _fused_chunk_based,
        "fla chunk_linear_attn": functools.partial(_chunk_linear_attn, feature_map=shape.feature_map),
    }
    return functools.partial(adapters[name], kernel, heads=shape.heads)


def _parallel_rebased(
    kernel: Function, q: Tensor, k: Tensor, v: Tensor, *affine: Tensor, heads: int
) -> Tensor:
    """parallel_rebased(q, k, v, eps, use_scale=True, use_normalize=True), all (B, N, H, width).

    Quadratic in N. Its scale is d^-0.5.
    """
    q, k = _normalised(q, *affine[:2], heads), _normalised(k, *affine[2:], heads)
    return kernel(q, k, v.unflatten(-1, (heads, -1)), eps=baselines.EPS).transpose(1, 2)


def _fused_chunk_based(
    kernel: Function, q: Tensor, k: Tensor, v: Tensor, *affine: Tensor, heads: int
) -> Tensor:
    """fused_chunk_based(q, k, v, scale=d^-0.5, use_norm=True), all (B, N, H, width); its eps is 1e-6."""
    q, k = _normalised(q, *affine[:2], heads), _normalised(k, *affine[2:], heads)
    if q.shape[-1] > 16:
        raise UnavailableError("feature_dim up to 16 only")
    return kernel(q, k, v.unflatten(-1, (heads, -1))).transpose(1, 2)


def _chunk_linear_attn(
    kernel: Callable[..., tuple[Tensor, object]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *affine: Tensor,
    heads: int,
    feature_map: str,
) -> Tensor:
    """chunk_linear_attn(phi q, phi k, v, scale, normalize=False) -> y, state, all (B, N, H, width).

    It takes features as they are: its user writes them to memory. The denominator is its user's too: its own
    (normalize=True) rounds sums and products to the inputs' dtype, and in bfloat16 a first token with a small
    score then loses all (on an H100 the relative error of the whole was 0.21, `outer`, 8 x 12 heads of 4096).
    """
    scale = (q.shape[-1] / heads) ** -0.5 if feature_map == "outer" else 1.0
    query, key = baselines.features(feature_map)
    q = query(_normalised(q, *affine[:2], heads, scale))
    k = key(_normalised(k, *affine[2:], heads))
    y, _ = kernel(q, k, v.unflatten(-1, (heads, -1)), scale=1.0, normalize=False)
    wide = torch.promote_types(q.dtype, torch.float32)
    sums = (q.to(wide) * k.to(wide).cumsum(1)).sum(-1, keepdim=True)
    return (y / (sums + baselines.EPS)).to(v.dtype).transpose(1, 2)
