"""Checks of every argument of the public functions, in words: before an operator runs, or once it refused."""

from __future__ import annotations

import numbers
import warnings
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from ._load import build_info
from .autograd import accumulator
from .state import MAX_FEATURE_DIM, MAX_HEAD_DIM, check_layout, check_memory, num_features

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_LAYER_NORMS = (None, "token", "head")
Options = tuple[str, str, float, float, float, bool]
"""feature_map, layer_norm, scale, eps, layer_norm_eps, normalize, as the operators take them."""
GivenOptions = tuple[str, str | None, float | None, float, float, bool]
"""The same as a caller gives them."""
MAX_FLOAT = torch.finfo(torch.float64).max
HAS_CUDA = build_info()["cuda"]
_NUMPY_BOOLS = (("numpy", "bool"), ("numpy", "bool_"))  # known by name: nothing here needs numpy
_Checked = TypeVar("_Checked")


def fail(argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{argument}: expected {expected}, got {got}")


def check_bool(name: str, value: object) -> bool:
    """A bool, or numpy's, which torch takes for one."""
    kind = type(value)
    if not isinstance(value, bool) and (kind.__module__, kind.__name__) not in _NUMPY_BOOLS:
        raise TypeError(f"{name}: expected a bool, got {kind.__name__}")
    return bool(value)


def check_number(name: str, value: Any, least: float = -MAX_FLOAT) -> float:
    """A finite number from `least` on, numpy's scalars included."""
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:  # an int or a fraction beyond all floats
        number = float("inf")
    if not least <= number <= MAX_FLOAT:
        raise fail(name, "a finite number" + (" >= 0" if least == 0 else ""), value)
    return number


def check_tensor(name: str, value: object, dims: int, shape: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    check_layout(name, value)
    if value.dim() != dims:
        raise fail(name, f"shape {shape}", f"shape {tuple(value.shape)}")
    return value


def check_qkv(q: Tensor, k: Tensor, v: Tensor, rows: str, of_op: bool = True) -> None:
    """Shapes (batch, heads[, rows], width), devices and dtypes of q, k and v; `rows` is "N, " or "".

    `of_op`: also what only the operators ask, a device that they run on and widths up to theirs.
    """
    dims = 4 if rows else 3
    check_tensor("q", q, dims, f"(B, Hq, {rows}d)")
    check_tensor("k", k, dims, f"(B, Hkv, {rows}d)")
    check_tensor("v", v, dims, f"(B, Hkv, {rows}dv)")
    if q.dtype not in DTYPES:
        raise TypeError(f"q: expected dtype float32, float64, float16 or bfloat16, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise fail(name, f"q's device {q.device}", x.device)
        if x.shape[0] != q.shape[0]:
            raise fail(name, f"q's batch size {q.shape[0]}", f"shape {tuple(x.shape)}")
        if rows and x.shape[2] != q.shape[2]:
            raise fail(name, f"q's sequence length {q.shape[2]}", f"shape {tuple(x.shape)}")
    if of_op:
        _check_device(q)
    for name, x, kind, most in (
        ("q", q, "a feature dim", MAX_FEATURE_DIM),
        ("v", v, "a head dim", MAX_HEAD_DIM),
    ):
        if x.shape[-1] < 1 or (of_op and x.shape[-1] > most):
            allowed = f"from 1 to {most}" if of_op else "of at least 1"
            raise fail(name, f"{kind} {allowed}", f"shape {tuple(x.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise fail("k", f"q's feature dim {q.shape[-1]}", f"shape {tuple(k.shape)}")
    if k.shape[1] == 0:
        raise fail("k", "at least one head", f"shape {tuple(k.shape)}")
    if q.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise fail("q", f"heads in multiples of k's {k.shape[1]} (and at least one)", f"{q.shape[1]} heads")
    if v.shape[1] != k.shape[1]:
        raise fail("v", f"k's {k.shape[1]} heads", f"shape {tuple(v.shape)}")


def _check_device(q: Tensor) -> None:
    if q.device.type not in ("cpu", "cuda", "meta"):
        raise fail("q", "a CPU or CUDA tensor", f"device {q.device}")
    if q.device.type == "cuda" and not HAS_CUDA:
        raise RuntimeError(
            "q: is on a GPU, but this build has no CUDA kernels: "
            "reinstall with nvcc on PATH or in $CUDA_HOME/bin"
        )


def check_parameter(
    name: str, value: Tensor | None, heads: int, like: Tensor, called: str = "q"
) -> Tensor | None:
    """gamma or beta, checked and in the accumulation dtype; errors call `like` by its name `called`."""
    if value is None:
        return None
    feature_dim = like.shape[-1]
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(value).__name__}")
    check_layout(name, value)
    if tuple(value.shape) not in ((feature_dim,), (heads, feature_dim), (heads * feature_dim,)):
        allowed = f"shape ({feature_dim},), ({heads}, {feature_dim}) or ({heads * feature_dim},)"
        raise fail(name, allowed, f"shape {tuple(value.shape)}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    if value.device != like.device:
        raise fail(name, f"{called}'s device {like.device}", value.device)
    if value.dtype == accumulator(like.dtype):
        return value
    check_memory(name, value)
    return value.to(accumulator(like.dtype))


def check_options(
    feature_map: str,
    layer_norm: str | None,
    scale: float | None,
    eps: float,
    layer_norm_eps: float,
    normalize: bool,
    feature_dim: int,
) -> Options:
    """The operator's options, checked."""
    if isinstance(feature_dim, (Tensor, torch.SymInt)):  # torch.jit.trace, or an export that follows sizes
        feature_dim = int(feature_dim)
    num_features(feature_map, feature_dim)
    if not (layer_norm is None or (isinstance(layer_norm, str) and layer_norm in _LAYER_NORMS)):
        raise fail("layer_norm", 'None, "token" or "head"', repr(layer_norm))
    return (
        feature_map,
        layer_norm or "none",
        feature_dim**-0.5 if scale is None else check_number("scale", scale),
        check_number("eps", eps, 0),
        check_number("layer_norm_eps", layer_norm_eps, 0),
        check_bool("normalize", normalize),
    )


def untraced(check: Callable[..., _Checked], *arguments: Any) -> _Checked:
    """check(*arguments), silent under torch.jit.trace, where sizes are tensors and every comparison warns.

    What is compared is no part of the trace: no operator takes a size, so it is good for other sizes too.
    """
    if torch.compiler.is_compiling() or not torch._C._is_tracing():  # dynamo refuses the latter
        return check(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", torch.jit.TracerWarning)  # type: ignore[attr-defined]
        return check(*arguments)


def check_state(
    name: str, state: tuple[Tensor, Tensor], sizes: tuple[int, int, int, int], states: str, like: Tensor
) -> None:
    if not (isinstance(state, tuple) and len(state) == 2 and all(isinstance(x, Tensor) for x in state)):
        raise TypeError(f"{name}: expected a RebasedState, got {type(state).__name__}")
    for part, x, shape in (("kv", state[0], sizes), ("k", state[1], sizes[:3])):
        check_layout(f"{name}.{part}", x)
        if tuple(x.shape) != shape:
            expected = f"shape {shape} ({states}, kv heads, features{', head dim' if part == 'kv' else ''})"
            raise fail(f"{name}.{part}", expected, f"shape {tuple(x.shape)}")
        if x.dtype != accumulator(like.dtype):
            raise TypeError(
                f"{name}.{part}: expected {accumulator(like.dtype)} for {like.dtype}, got {x.dtype}"
            )
        if x.device != like.device:
            raise fail(f"{name}.{part}", f"q's device {like.device}", x.device)


def check_index(name: str, index: Tensor, like: Tensor, size: int | None = None, called: str = "q") -> Tensor:
    """cu_seqlens, or state_index of `size` elements, contiguous and int64; errors call `like` `called`."""
    if not isinstance(index, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(index).__name__}")
    check_layout(name, index)
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected dtype int32 or int64, got {index.dtype}")
    if index.dim() != 1:
        raise fail(name, "one dimension", f"shape {tuple(index.shape)}")
    if index.device != like.device:
        raise fail(name, f"{called}'s device {like.device}", index.device)
    if size is None:
        if index.shape[0] < 1:
            raise fail(name, "at least one element", f"shape {tuple(index.shape)}")
        # one element in memory may be expanded to more than any memory holds, and is copied below
        if index.stride(0) == 0 and index.shape[0] > like.shape[-2] + 1:
            raise fail(
                name, "memory for every element, or at most N + 1 of them", f"{index.shape[0]} expanded"
            )
    elif index.shape[0] != size:
        raise fail(name, f"shape ({size},)", f"shape {tuple(index.shape)}")
    check_memory(name, index)
    return index.to(torch.int64).contiguous()


def check_bounds(bounds: list[int], seqlen: int) -> None:
    """The values of cu_seqlens."""
    if any(a > b for a, b in pairwise([0, *bounds, seqlen])):
        raise ValueError(
            "cu_seqlens: must not decrease and must stay within 0 and the sequence length "
            f"{seqlen}, got {bounds}"
        )


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as scaled_dot_product_attention takes them under autocast: all but float64 in its dtype."""
    device = q.device.type if isinstance(q, Tensor) else ""
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)

    def cast(name: str, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or not x.is_floating_point() or x.dtype in (torch.float64, dtype):
            return x
        check_layout(name, x)
        check_memory(name, x)
        return x.to(dtype)

    return cast("q", q), cast("k", k), cast("v", v)


def distinct(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Views in place of repeated tensors (one gamma for q and k): dynamo refuses the same one twice."""
    return [
        x.view_as(x) if x is not None and any(x is y for y in tensors[:i]) else x
        for i, x in enumerate(tensors)
    ]


def check_call(
    inputs: Sequence[Any],
    options: GivenOptions,
    state: Any,
    index: Tensor | None,
    of_step: bool = False,
) -> tuple[list[Tensor | None], Tensor | None, Options]:
    """A call of the op, or of its step, checked.

    Args:
        inputs: q, k, v, gamma_q, beta_q, gamma_k, beta_k.
        state: initial_state, or of a step the state.
        index: cu_seqlens, or of a step state_index.

    Returns:
        The inputs and the state's kv and k, in the operators' dtypes; the index; the options.
    """
    q, k, v = autocast(*inputs[:3])
    check_qkv(q, k, v, "" if of_step else "N, ")
    checked = check_options(*options, q.shape[-1])
    named = zip(("gamma_q", "beta_q", "gamma_k", "beta_k"), inputs[3:], (q, q, k, k), strict=True)
    parameters = [check_parameter(name, x, of.shape[1], q) for name, x, of in named]
    states = q.shape[0]
    if of_step and index is not None:
        index = check_index("state_index", index, q, states)
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], Tensor) and state[0].dim():
            check_layout("state.kv", state[0])  # a nested tensor has no shape
            states = state[0].shape[0]
    elif index is not None:
        index = check_index("cu_seqlens", index, q)
        if q.shape[0] != 1:
            raise fail("q", "batch size 1 where cu_seqlens is given", f"shape {tuple(q.shape)}")
        states = index.shape[0] - 1
    parts: list[Tensor | None] = [None, None]
    if of_step or state is not None:
        sizes = (states, k.shape[1], num_features(options[0], q.shape[-1]), v.shape[-1])
        counted = "slots" if of_step and index is not None else "sequences"
        check_state("state" if of_step else "initial_state", state, sizes, counted, q)
        parts = list(state)
    return distinct([q, k, v, *parameters, *parts]), index, checked
