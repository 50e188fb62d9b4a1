"""RebasedState: all that a sequence leaves behind, in the one feature order that every backend shares."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FEATURE_MAPS = ("outer", "square", "taylor", "elu")
IDENTITY = "identity"  # q and k are features already: plain linear attention, beside the models' own maps


def num_features(feature_map: str, feature_dim: int) -> int:
    """How many features phi has: d(d+1)/2 for outer, 1 + d + d(d+1)/2 for taylor, d for the others.

    Raises:
        ValueError: `feature_map` is unknown.
    """
    known = (*FEATURE_MAPS, IDENTITY)
    if feature_map not in known:
        raise ValueError(f"feature_map: must be one of {', '.join(known)}, got {feature_map!r}")
    circulant = feature_dim * (feature_dim + 1) // 2
    return {"outer": circulant, "taylor": 1 + feature_dim + circulant}.get(feature_map, feature_dim)


class RebasedState(NamedTuple):
    """The state of linear attention: kv = sum_j phi(k'_j) v_j^T and k = sum_j phi(k'_j).

    float32 (float64 for float64 inputs), contiguous. phi is unscaled and unweighted, so a state does not
    depend on `scale`. Feature order, the same on every backend and device:

    * outer: circulant: entry (e, i) is k'_i k'_((i+e) mod d), e = 0..d//2; for even d the last offset keeps
      only its first d/2 entries, since the others repeat them;
    * taylor: 1, then k' (d entries), then the circulant entries;
    * square: k'^2; elu: elu(k') + 1; identity: k'.
    """

    kv: Tensor
    """(batch, kv_heads, num_features, head_dim)"""
    k: Tensor
    """(batch, kv_heads, num_features)"""

    @classmethod
    def zeros(
        cls,
        batch: int,
        kv_heads: int,
        feature_dim: int,
        head_dim: int,
        *,
        feature_map: str = "outer",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> RebasedState:
        """The state of an empty sequence, for `batch` sequences (or slots of a pool).

        Raises:
            ValueError: `feature_map` is unknown, `dtype` neither float32 nor float64, a size too small.
        """
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype: a state is float32 or float64, got {dtype}")
        features = num_features(feature_map, feature_dim)
        sizes = {"batch": batch, "kv_heads": kv_heads, "feature_dim": feature_dim, "head_dim": head_dim}
        for name, size in sizes.items():
            least = 0 if name == "batch" else 1
            if size < least:
                raise ValueError(f"{name}: expected at least {least}, got {size}")
        return cls(
            torch.zeros(batch, kv_heads, features, head_dim, dtype=dtype, device=device),
            torch.zeros(batch, kv_heads, features, dtype=dtype, device=device),
        )

    def index_select(self, index: Tensor) -> RebasedState:
        """Copies of the rows `index` (1-D, int32 or int64), as beam search wants them."""
        return RebasedState(self.kv.index_select(0, index), self.k.index_select(0, index))
