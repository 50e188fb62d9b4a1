"""RebasedState: all that a sequence leaves behind, in the one feature order that every backend shares."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

FEATURE_MAPS = ("outer", "square", "taylor", "elu")
MAX_FEATURE_DIM = 128
MAX_HEAD_DIM = 256
IDENTITY = "identity"  # q and k are features already: plain linear attention, beside the models' own maps


def num_features(feature_map: str, feature_dim: int) -> int:
    """How many features phi has: d(d+1)/2 for outer, 1 + d + d(d+1)/2 for taylor, d for the others.

    Raises:
        ValueError: `feature_map` is unknown, or no name at all.
    """
    known = (*FEATURE_MAPS, IDENTITY)
    if not isinstance(feature_map, str) or feature_map not in known:
        raise ValueError(f"feature_map: must be one of {', '.join(known)}, got {feature_map!r}")
    circulant = feature_dim * (feature_dim + 1) // 2
    return {"outer": circulant, "taylor": 1 + feature_dim + circulant}.get(feature_map, feature_dim)


def check_size(name: str, value: Any, least: int, most: int | None = None) -> Any:
    """`value` where it is an integer from `least` to `most`; one of numpy's becomes Python's.

    A size that torch.compile or torch.jit.trace follows stays what it is, or it would become a constant.
    """
    traced = isinstance(value, torch.SymInt) or (isinstance(value, Tensor) and torch._C._is_tracing())
    if isinstance(value, bool) or not (traced or isinstance(value, numbers.Integral)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    value = value if traced or isinstance(value, int) else int(value)
    if value < least or (most is not None and value > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: expected {allowed}, got {value}")
    return value


def check_layout(name: str, x: Tensor) -> None:
    """Refuses a tensor that is not laid out by sizes and strides."""
    if x.layout != torch.strided or x.is_nested or x.is_quantized:
        kind = "nested" if x.is_nested else "quantized" if x.is_quantized else x.layout
        raise ValueError(f"{name}: expected a dense tensor, got layout {kind}")


def extent(x: Tensor) -> int:
    """How many elements there are from the first of x, which has some, to the last in memory."""
    if x.is_contiguous():
        return x.numel()
    elements = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        elements += (size - 1) * stride
    return elements


def check_memory(name: str, x: Tensor) -> None:
    """Refuses a tensor whose storage was freed or shrunk under it (untyped_storage().resize_).

    The operators look at the memory of what they are given themselves: this is for what torch is about to
    read, which would crash.
    """
    if type(x) not in (Tensor, nn.Parameter) or torch.compiler.is_compiling() or torch._C._is_tracing():
        return  # a subclass knows best what it holds, and sizes are no numbers while a call is followed
    if x.numel() == 0 or torch._C._are_functorch_transforms_active():
        return
    needed, held = (x.storage_offset() + extent(x)) * x.element_size(), x.untyped_storage().nbytes()
    if needed > held:
        raise ValueError(f"{name}: its storage was freed or shrunk: it takes {needed} bytes and has {held}")


def _check_dtype(dtype: object) -> None:
    if dtype not in (torch.float32, torch.float64):
        raise ValueError(f"dtype: a state is float32 or float64, got {dtype}")


def _check_device(device: Any) -> None:
    if device is None or isinstance(device, torch.device):
        return
    if isinstance(device, bool) or not isinstance(device, (str, int)):
        raise TypeError(f"device: expected a torch.device, a str or an int, got {type(device).__name__}")
    try:
        torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: expected one that torch knows, got {device!r}: {error}") from None


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

        Args:
            batch: at least 0.
            kv_heads: at least 1.
            feature_dim: d, 1 to 128.
            head_dim: dv, 1 to 256.
            feature_map: as in `rebased_attention`.
            dtype: torch.float32, or torch.float64 for float64 inputs.
            device: a torch.device, or what makes one; torch's default device when None.

        Raises:
            ValueError, TypeError: an argument is not as above; the message names it.
        """
        _check_dtype(dtype)
        _check_device(device)
        batch = check_size("batch", batch, 0)
        kv_heads = check_size("kv_heads", kv_heads, 1)
        feature_dim = check_size("feature_dim", feature_dim, 1, MAX_FEATURE_DIM)
        head_dim = check_size("head_dim", head_dim, 1, MAX_HEAD_DIM)
        features = num_features(feature_map, feature_dim)
        return cls(
            torch.zeros(batch, kv_heads, features, head_dim, dtype=dtype, device=device),
            torch.zeros(batch, kv_heads, features, dtype=dtype, device=device),
        )

    def index_select(self, index: Tensor) -> RebasedState:
        """Copies of the rows `index` (1-D, int32 or int64, on the state's device), as beam search wants them.

        Raises:
            ValueError, TypeError: `index` is not that; on the CPU, where reading it costs no synchronisation,
                also where it names a row that the state does not have.
        """
        if not isinstance(index, Tensor):
            raise TypeError(f"index: expected a torch.Tensor, got {type(index).__name__}")
        check_layout("index", index)
        if index.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"index: expected dtype int32 or int64, got {index.dtype}")
        if index.dim() != 1:
            raise ValueError(f"index: expected one dimension, got shape {tuple(index.shape)}")
        if index.device != self.kv.device:
            raise ValueError(f"index: expected the state's device {self.kv.device}, got {index.device}")
        for name, x in (("index", index), ("kv", self.kv), ("k", self.k)):
            check_memory(name, x)
        try:
            return RebasedState(self.kv.index_select(0, index), self.k.index_select(0, index))
        except (IndexError, RuntimeError) as error:  # torch reads the values anyway; these words say whose
            raise ValueError(f"index: expected rows 0 to {self.kv.shape[0] - 1}: {error}") from None

    def repeat_interleave(self, repeats: int) -> RebasedState:
        """Every row `repeats` times, one copy behind the other: a prompt's state for its beams or samples.

        Raises:
            ValueError, TypeError: `repeats` is not an integer of at least 0.
        """
        repeats = check_size("repeats", repeats, 0)
        check_memory("kv", self.kv)
        check_memory("k", self.k)
        return RebasedState(self.kv.repeat_interleave(repeats, 0), self.k.repeat_interleave(repeats, 0))

    def to(self, *args: Any, **kwargs: Any) -> RebasedState:
        """kv and k as `torch.Tensor.to` gives them: another device, or float64 for float32 and back.

        As there, a state that is what was asked for already is returned without a copy.

        Raises:
            ValueError: the dtype asked for is neither float32 nor float64, which is all that a state can be.
            TypeError, RuntimeError: as `torch.Tensor.to`.
        """
        check_memory("kv", self.kv)
        check_memory("k", self.k)
        kv, k = self.kv.to(*args, **kwargs), self.k.to(*args, **kwargs)
        _check_dtype(kv.dtype)
        return RebasedState(kv, k)

    def clone(self) -> RebasedState:
        """A copy, through which gradients flow; for one that a step may write while this one stays."""
        check_memory("kv", self.kv)
        check_memory("k", self.k)
        return RebasedState(self.kv.clone(), self.k.clone())

    def detach(self) -> RebasedState:
        """The same memory without the graph, as decoding after a forward with gradients wants it."""
        return RebasedState(self.kv.detach(), self.k.detach())


# torch.load reads only classes that it was told of, and this one is a tuple of two tensors
torch.serialization.add_safe_globals([RebasedState])
