"""Checks of every argument of the public functions, in words: before an operator runs, or once it refused."""

from __future__ import annotations

import torch
from torch import Tensor

from ._load import build_info
from .autograd import accumulator
from .state import RebasedState, num_features

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_LAYER_NORMS = (None, "token", "head")
Options = tuple[str, str, float, float, float, bool]
"""feature_map, layer_norm, scale, eps, layer_norm_eps, normalize, as the operators take them."""
MAX_FEATURE_DIM = 128
MAX_HEAD_DIM = 256
MAX_FLOAT = torch.finfo(torch.float64).max
HAS_CUDA = build_info()["cuda"]


def fail(argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{argument}: expected {expected}, got {got}")


def check_tensor(name: str, value: object, dims: int, shape: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dim() != dims:
        raise fail(name, f"shape {shape}", f"shape {tuple(value.shape)}")
    return value


def check_qkv(q: Tensor, k: Tensor, v: Tensor, rows: str) -> None:
    """Shapes (batch, heads[, rows], width), devices and dtypes of q, k and v; `rows` is "N, " or ""."""
    dims = 4 if rows else 3
    check_tensor("q", q, dims, f"(B, Hq, {rows}d)")
    check_tensor("k", k, dims, f"(B, Hkv, {rows}d)")
    check_tensor("v", v, dims, f"(B, Hkv, {rows}dv)")
    if q.dtype not in _DTYPES:
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
    if q.device.type not in ("cpu", "cuda", "meta") or q.layout != torch.strided:
        raise fail("q", "a dense CPU or CUDA tensor", f"device {q.device}, layout {q.layout}")
    if q.device.type == "cuda" and not HAS_CUDA:
        raise RuntimeError(
            "q: is on a GPU, but this build has no CUDA kernels: "
            "reinstall with nvcc on PATH or in $CUDA_HOME/bin"
        )
    if not 1 <= q.shape[-1] <= MAX_FEATURE_DIM:
        raise fail("q", f"a feature dim from 1 to {MAX_FEATURE_DIM}", f"shape {tuple(q.shape)}")
    if not 1 <= v.shape[-1] <= MAX_HEAD_DIM:
        raise fail("v", f"a head dim from 1 to {MAX_HEAD_DIM}", f"shape {tuple(v.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise fail("k", f"q's feature dim {q.shape[-1]}", f"shape {tuple(k.shape)}")
    if k.shape[1] == 0:
        raise fail("k", "at least one head", f"shape {tuple(k.shape)}")
    if q.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise fail("q", f"heads in multiples of k's {k.shape[1]} (and at least one)", f"{q.shape[1]} heads")
    if v.shape[1] != k.shape[1]:
        raise fail("v", f"k's {k.shape[1]} heads", f"shape {tuple(v.shape)}")


def check_parameter(name: str, value: Tensor | None, heads: int, like: Tensor) -> Tensor | None:
    """gamma or beta, checked and in the accumulation dtype."""
    if value is None:
        return None
    feature_dim = like.shape[-1]
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(value).__name__}")
    if tuple(value.shape) not in ((feature_dim,), (heads, feature_dim)):
        allowed = f"shape ({feature_dim},) or ({heads}, {feature_dim})"
        raise fail(name, allowed, f"shape {tuple(value.shape)}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    if value.device != like.device:
        raise fail(name, f"q's device {like.device}", value.device)
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
    num_features(feature_map, feature_dim)
    if layer_norm not in _LAYER_NORMS:
        raise fail("layer_norm", 'None, "token" or "head"', repr(layer_norm))
    numbers = {"scale": feature_dim**-0.5 if scale is None else scale, "eps": eps}
    numbers["layer_norm_eps"] = layer_norm_eps
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
        if not -MAX_FLOAT <= value <= MAX_FLOAT or (name != "scale" and value < 0):
            raise fail(name, "a finite number" + ("" if name == "scale" else " >= 0"), value)
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize: expected a bool, got {type(normalize).__name__}")
    scale, eps, layer_norm_eps = (float(value) for value in numbers.values())
    return feature_map, layer_norm or "none", scale, eps, layer_norm_eps, normalize


def check_state(
    name: str, state: RebasedState, sizes: tuple[int, int, int, int], states: str, like: Tensor
) -> None:
    if not (isinstance(state, tuple) and len(state) == 2 and all(isinstance(x, Tensor) for x in state)):
        raise TypeError(f"{name}: expected a RebasedState, got {type(state).__name__}")
    for part, x, shape in (("kv", state[0], sizes), ("k", state[1], sizes[:3])):
        if tuple(x.shape) != shape:
            expected = f"shape {shape} ({states}, kv heads, features{', head dim' if part == 'kv' else ''})"
            raise fail(f"{name}.{part}", expected, f"shape {tuple(x.shape)}")
        if x.dtype != accumulator(like.dtype):
            raise TypeError(
                f"{name}.{part}: expected {accumulator(like.dtype)} for {like.dtype}, got {x.dtype}"
            )
        if x.device != like.device:
            raise fail(f"{name}.{part}", f"q's device {like.device}", x.device)


def check_index(name: str, index: Tensor, like: Tensor) -> Tensor:
    if not isinstance(index, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(index).__name__}")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected dtype int32 or int64, got {index.dtype}")
    if index.dim() != 1:
        raise fail(name, "one dimension", f"shape {tuple(index.shape)}")
    if index.device != like.device:
        raise fail(name, f"q's device {like.device}", index.device)
    return index.to(torch.int64).contiguous()


def autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as scaled_dot_product_attention takes them under autocast: all but float64 in its dtype."""
    device = q.device.type if isinstance(q, Tensor) else ""
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if eligible else x

    return cast(q), cast(k), cast(v)


def distinct(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Views in place of repeated tensors (one gamma for q and k): dynamo refuses the same one twice."""
    return [
        x.view_as(x) if x is not None and any(x is y for y in tensors[:i]) else x
        for i, x in enumerate(tensors)
    ]


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma_q: Tensor | None,
    beta_q: Tensor | None,
    gamma_k: Tensor | None,
    beta_k: Tensor | None,
    *,
    feature_map: str,
    layer_norm: str | None,
    scale: float | None,
    eps: float,
    layer_norm_eps: float,
    normalize: bool,
    initial_state: RebasedState | None,
    return_state: bool,
    cu_seqlens: Tensor | None,
) -> tuple[list[Tensor | None], Tensor | None, Options]:
    """A call of rebased_attention, checked: q, k, v, parameters and initial state; cu_seqlens; options."""
    q, k, v = autocast(q, k, v)
    check_qkv(q, k, v, "N, ")
    options = check_options(feature_map, layer_norm, scale, eps, layer_norm_eps, normalize, q.shape[3])
    parameters = (
        check_parameter("gamma_q", gamma_q, q.shape[1], q),
        check_parameter("beta_q", beta_q, q.shape[1], q),
        check_parameter("gamma_k", gamma_k, k.shape[1], k),
        check_parameter("beta_k", beta_k, k.shape[1], k),
    )
    states = q.shape[0]
    if cu_seqlens is not None:
        cu_seqlens = check_index("cu_seqlens", cu_seqlens, q)
        if q.shape[0] != 1:
            raise fail("q", "batch size 1 where cu_seqlens is given", f"shape {tuple(q.shape)}")
        if cu_seqlens.shape[0] < 1:
            raise fail("cu_seqlens", "at least one element", f"shape {tuple(cu_seqlens.shape)}")
        states = cu_seqlens.shape[0] - 1
    initial: tuple[Tensor | None, Tensor | None] = (None, None)
    if initial_state is not None:
        sizes = (states, k.shape[1], num_features(feature_map, q.shape[3]), v.shape[3])
        check_state("initial_state", initial_state, sizes, "sequences", q)
        initial = (initial_state[0], initial_state[1])
    if not isinstance(return_state, bool):
        raise TypeError(f"return_state: expected a bool, got {type(return_state).__name__}")
    return distinct([q, k, v, *parameters, *initial]), cu_seqlens, options
