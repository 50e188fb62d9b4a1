"""What one would run without this package: plain PyTorch, eager, as fast as it could be made.

Each takes what a model's projections give, q and k (B, N, H*d) and v (B, N, H*dv), with gamma and beta
(H, d), and returns y (B, H, N, dv): LayerNorm over a token's features, affine, feature map and division
included, as in `rebased_attention(..., layer_norm="token")`. Used by the speed table of `python -m
rebased_cuda` and by the benchmarks, never by the op.

The feature map is `outer` in full circulant slabs, x_i x_((i+e) mod d) by `roll` and one `cat`. Timed against
the d*d outer product, and against gathering the d(d+1)/2 distinct products by index_select, by advanced
indexing or by slices (N = 4096, 12 heads, chunks of 64, 128 and 256), it was the fastest forward, within 5 %
of the fastest in forward + backward, and the only one near the top in both chunked forms.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Features = Callable[[Tensor], Tensor]
ChunkStep = Callable[[str, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]]
EPS = 1e-6
CHUNKS = (64, 128, 256)


def _slabs(x: Tensor, twice: Tensor) -> Tensor:
    """x_i x_((i+e) mod d) for e = 0..d//2, the slabs whose products occur twice in (q'.k')^2 from `twice`."""
    d = x.shape[-1]
    once = (0, d // 2) if d % 2 == 0 else (0,)
    rotated = ((x if e in once else twice) * torch.roll(x, -e, -1) for e in range(d // 2 + 1))
    return torch.cat(list(rotated), -1)


def features(feature_map: str) -> tuple[Features, Features]:
    """phi for queries and for keys: their dot product is sim, scale apart."""
    if feature_map == "outer":
        return (lambda q: _slabs(q, q + q)), (lambda k: _slabs(k, k))
    if feature_map == "square":
        return torch.square, torch.square
    raise ValueError(f"feature_map: the baselines have outer and square, got {feature_map!r}")


def _sim(feature_map: str, q: Tensor, k: Tensor) -> Tensor:
    return (q @ k.mT).square() if feature_map == "outer" else q.square() @ k.square().mT


def _prepare(
    feature_map: str, q: Tensor, k: Tensor, v: Tensor, affine: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """q' (scaled for `outer`), k' and [v, 1] as (B, H, N, width): the column of ones sums the denominator."""
    heads, d = affine[0].shape
    gamma_q, beta_q, gamma_k, beta_k = (x.flatten() for x in affine)
    if feature_map == "outer":
        gamma_q, beta_q = gamma_q * d**-0.5, beta_q * d**-0.5
    q = F.layer_norm(q, (heads * d,), gamma_q.to(q.dtype), beta_q.to(q.dtype))
    k = F.layer_norm(k, (heads * d,), gamma_k.to(k.dtype), beta_k.to(k.dtype))
    q, k, v = (torch.unflatten(x, -1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return q, k, F.pad(v, (0, 1), value=1.0)


def _divide(sums: Tensor) -> Tensor:
    return sums[..., :-1] / (sums[..., -1:] + EPS)


def quadratic(q: Tensor, k: Tensor, v: Tensor, *affine: Tensor, feature_map: str = "outer") -> Tensor:
    """With the N x N matrix of sim."""
    q, k, v = _prepare(feature_map, q, k, v, affine)
    return _divide(_sim(feature_map, q, k).tril() @ v)


def one_chunk(
    feature_map: str, q: Tensor, k: Tensor, v: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (B, H, C, dv) of one chunk, and the state (B, H, F, dv + 1) after it."""
    sums = _sim(feature_map, q, k).tril() @ v
    query_features, key_features = features(feature_map)
    update = key_features(k).mT @ v
    if state is None:
        return _divide(sums), update
    return _divide(sums + query_features(q) @ state), state + update


def chunked_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *affine: Tensor,
    feature_map: str = "outer",
    chunk: int = 128,
    chunk_step: ChunkStep = one_chunk,
) -> Tensor:
    """One chunk after the other, with the state carried along."""
    state: Tensor | None = None
    rows = []
    pieces = (torch.split(x, chunk, 2) for x in _prepare(feature_map, q, k, v, affine))
    for q_c, k_c, v_c in zip(*pieces, strict=True):
        y, state = chunk_step(feature_map, q_c, k_c, v_c, state)
        rows.append(y)
    return torch.cat(rows, 2)


def chunked_cumsum(
    q: Tensor, k: Tensor, v: Tensor, *affine: Tensor, feature_map: str = "outer", chunk: int = 128
) -> Tensor:
    """All chunks at once: their states by a cumulative sum over the chunks' updates."""
    seqlen = q.shape[1]
    q, k, v = _prepare(feature_map, q, k, v, affine)
    if seqlen % chunk:
        q, k, v = (F.pad(x, (0, 0, 0, -seqlen % chunk)) for x in (q, k, v))
    q, k, v = (torch.unflatten(x, 2, (-1, chunk)) for x in (q, k, v))  # (B, H, chunks, chunk, width)
    query_features, key_features = features(feature_map)
    updates = key_features(k).mT @ v
    states = F.pad(updates.cumsum(2)[:, :, :-1], (0, 0, 0, 0, 1, 0))
    sums = _sim(feature_map, q, k).tril() @ v + query_features(q) @ states
    return _divide(sums).flatten(2, 3)[:, :, :seqlen]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal scaled_dot_product_attention of (B, H, N, 64)."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
