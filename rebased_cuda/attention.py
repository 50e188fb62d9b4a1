"""The two public functions. Every argument is checked here, in words, before anything is touched."""

from __future__ import annotations

import functools
from typing import Any, Literal, overload

import torch
from torch import Tensor

from ._load import build_info
from .autograd import Attention, accumulator, ops
from .state import RebasedState, num_features

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_LAYER_NORMS = (None, "token", "head")
MAX_FEATURE_DIM = 128
MAX_HEAD_DIM = 256
MAX_FLOAT = torch.finfo(torch.float64).max
HAS_CUDA = build_info()["cuda"]


def _fail(argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{argument}: expected {expected}, got {got}")


def _check_tensor(name: str, value: object, dims: int, shape: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dim() != dims:
        raise _fail(name, f"shape {shape}", f"shape {tuple(value.shape)}")
    return value


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, rows: str) -> None:
    """Shapes (batch, heads[, rows], width), devices and dtypes of q, k and v; `rows` is "N, " or ""."""
    dims = 4 if rows else 3
    _check_tensor("q", q, dims, f"(B, Hq, {rows}d)")
    _check_tensor("k", k, dims, f"(B, Hkv, {rows}d)")
    _check_tensor("v", v, dims, f"(B, Hkv, {rows}dv)")
    if q.dtype not in _DTYPES:
        raise TypeError(f"q: expected dtype float32, float64, float16 or bfloat16, got {q.dtype}")
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(f"{name}: expected q's dtype {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise _fail(name, f"q's device {q.device}", x.device)
        if x.shape[0] != q.shape[0]:
            raise _fail(name, f"q's batch size {q.shape[0]}", f"shape {tuple(x.shape)}")
        if rows and x.shape[2] != q.shape[2]:
            raise _fail(name, f"q's sequence length {q.shape[2]}", f"shape {tuple(x.shape)}")
    if q.device.type not in ("cpu", "cuda", "meta") or q.layout != torch.strided:
        raise _fail("q", "a dense CPU or CUDA tensor", f"device {q.device}, layout {q.layout}")
    if q.device.type == "cuda" and not HAS_CUDA:
        raise RuntimeError(
            "q: is on a GPU, but this build has no CUDA kernels: "
            "reinstall with nvcc on PATH or in $CUDA_HOME/bin"
        )
    if not 1 <= q.shape[-1] <= MAX_FEATURE_DIM:
        raise _fail("q", f"a feature dim from 1 to {MAX_FEATURE_DIM}", f"shape {tuple(q.shape)}")
    if not 1 <= v.shape[-1] <= MAX_HEAD_DIM:
        raise _fail("v", f"a head dim from 1 to {MAX_HEAD_DIM}", f"shape {tuple(v.shape)}")
    if k.shape[-1] != q.shape[-1]:
        raise _fail("k", f"q's feature dim {q.shape[-1]}", f"shape {tuple(k.shape)}")
    if k.shape[1] == 0:
        raise _fail("k", "at least one head", f"shape {tuple(k.shape)}")
    if q.shape[1] == 0 or q.shape[1] % k.shape[1] != 0:
        raise _fail("q", f"heads in multiples of k's {k.shape[1]} (and at least one)", f"{q.shape[1]} heads")
    if v.shape[1] != k.shape[1]:
        raise _fail("v", f"k's {k.shape[1]} heads", f"shape {tuple(v.shape)}")


def _parameter(name: str, value: Tensor | None, heads: int, like: Tensor) -> Tensor | None:
    """gamma or beta, checked and in the accumulation dtype."""
    if value is None:
        return None
    feature_dim = like.shape[-1]
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(value).__name__}")
    if tuple(value.shape) not in ((feature_dim,), (heads, feature_dim)):
        allowed = f"shape ({feature_dim},) or ({heads}, {feature_dim})"
        raise _fail(name, allowed, f"shape {tuple(value.shape)}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {value.dtype}")
    if value.device != like.device:
        raise _fail(name, f"q's device {like.device}", value.device)
    return value.to(accumulator(like.dtype))


def _options(
    feature_map: str,
    layer_norm: str | None,
    scale: float | None,
    eps: float,
    layer_norm_eps: float,
    normalize: bool,
    feature_dim: int,
) -> tuple[str, str, float, float, float, bool]:
    """The operator's options, checked: (feature_map, layer_norm, scale, eps, layer_norm_eps, normalize)."""
    num_features(feature_map, feature_dim)
    if layer_norm not in _LAYER_NORMS:
        raise _fail("layer_norm", 'None, "token" or "head"', repr(layer_norm))
    numbers = {"scale": feature_dim**-0.5 if scale is None else scale, "eps": eps}
    numbers["layer_norm_eps"] = layer_norm_eps
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a float, got {type(value).__name__}")
        if not -MAX_FLOAT <= value <= MAX_FLOAT or (name != "scale" and value < 0):
            raise _fail(name, "a finite number" + ("" if name == "scale" else " >= 0"), value)
    if not isinstance(normalize, bool):
        raise TypeError(f"normalize: expected a bool, got {type(normalize).__name__}")
    scale, eps, layer_norm_eps = (float(value) for value in numbers.values())
    return feature_map, layer_norm or "none", scale, eps, layer_norm_eps, normalize


# `typed` keeps True and 1 apart; what cannot be hashed raises a TypeError
_cached_options = functools.lru_cache(maxsize=256, typed=True)(_options)


def _check_state(
    name: str, state: RebasedState, sizes: tuple[int, int, int, int], states: str, like: Tensor
) -> None:
    if not (isinstance(state, tuple) and len(state) == 2 and all(isinstance(x, Tensor) for x in state)):
        raise TypeError(f"{name}: expected a RebasedState, got {type(state).__name__}")
    for part, x, shape in (("kv", state[0], sizes), ("k", state[1], sizes[:3])):
        if tuple(x.shape) != shape:
            expected = f"shape {shape} ({states}, kv heads, features{', head dim' if part == 'kv' else ''})"
            raise _fail(f"{name}.{part}", expected, f"shape {tuple(x.shape)}")
        if x.dtype != accumulator(like.dtype):
            raise TypeError(
                f"{name}.{part}: expected {accumulator(like.dtype)} for {like.dtype}, got {x.dtype}"
            )
        if x.device != like.device:
            raise _fail(f"{name}.{part}", f"q's device {like.device}", x.device)


def _check_index(name: str, index: Tensor, like: Tensor) -> Tensor:
    if not isinstance(index, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(index).__name__}")
    if index.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name}: expected dtype int32 or int64, got {index.dtype}")
    if index.dim() != 1:
        raise _fail(name, "one dimension", f"shape {tuple(index.shape)}")
    if index.device != like.device:
        raise _fail(name, f"q's device {like.device}", index.device)
    return index.to(torch.int64).contiguous()


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as scaled_dot_product_attention takes them under autocast: all but float64 in its dtype."""
    device = q.device.type if isinstance(q, Tensor) else ""
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return q, k, v
    dtype = torch.get_autocast_dtype(device)

    def cast(x: Tensor) -> Tensor:
        eligible = isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if eligible else x

    return cast(q), cast(k), cast(v)


def _distinct(tensors: list[Tensor | None]) -> list[Tensor | None]:
    """Views in place of repeated tensors (one gamma for q and k): dynamo refuses the same one twice."""
    return [
        x.view_as(x) if x is not None and any(x is y for y in tensors[:i]) else x
        for i, x in enumerate(tensors)
    ]


@overload
def rebased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma_q: Tensor | None = None,
    beta_q: Tensor | None = None,
    gamma_k: Tensor | None = None,
    beta_k: Tensor | None = None,
    *,
    feature_map: str = "outer",
    layer_norm: str | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    layer_norm_eps: float = 1e-5,
    normalize: bool = True,
    initial_state: RebasedState | None = None,
    return_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor: ...


@overload
def rebased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma_q: Tensor | None = None,
    beta_q: Tensor | None = None,
    gamma_k: Tensor | None = None,
    beta_k: Tensor | None = None,
    *,
    feature_map: str = "outer",
    layer_norm: str | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    layer_norm_eps: float = 1e-5,
    normalize: bool = True,
    initial_state: RebasedState | None = None,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, RebasedState]: ...


@overload
def rebased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma_q: Tensor | None = None,
    beta_q: Tensor | None = None,
    gamma_k: Tensor | None = None,
    beta_k: Tensor | None = None,
    *,
    feature_map: str = "outer",
    layer_norm: str | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    layer_norm_eps: float = 1e-5,
    normalize: bool = True,
    initial_state: RebasedState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, RebasedState]: ...


def rebased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma_q: Tensor | None = None,
    beta_q: Tensor | None = None,
    gamma_k: Tensor | None = None,
    beta_k: Tensor | None = None,
    *,
    feature_map: str = "outer",
    layer_norm: str | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    layer_norm_eps: float = 1e-5,
    normalize: bool = True,
    initial_state: RebasedState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> Tensor | tuple[Tensor, RebasedState]:
    r"""Causal ReBased linear attention, LayerNorm and feature map included, in time linear in N.

    With q' = gamma_q * LayerNorm(q) + beta_q and k' likewise ("Linear Transformers with Learnable Kernel
    Functions are Better In-Context Models", Aksenov et al., 2024, section 3)::

        sim(i, j) = phi(q'_i) . phi(k'_j)
        y_i = sum_{j<=i} sim(i, j) v_j / (sum_{j<=i} sim(i, j) + eps)

    The defaults are a bare kernel, as scaled_dot_product_attention is. **ReBased proper** is
    ``layer_norm="token"`` with gamma and beta for q and k. The same maths in plain torch:
    `rebased_cuda.reference`.

    Args:
        q: (B, Hq, N, d), d from 1 to 128. float32, float64, float16 or bfloat16; any strides.
        k: (B, Hkv, N, d), same dtype; Hq is a multiple of Hkv, query head h uses kv head h // (Hq / Hkv).
        v: (B, Hkv, N, dv), same dtype, dv from 1 to 256.
        gamma_q, beta_q: (d,) or (Hq, d), optional each; applied with or without LayerNorm, in float32
            (float64 for float64 inputs).
        gamma_k, beta_k: (d,) or (Hkv, d), optional each.
        feature_map: "outer": sim = (scale q'.k')^2, what the authors' released kernel computes; "square":
            sim = sum q'^2 k'^2, the paper's formula read literally; "taylor": sim = 1 + u + u^2/2 with
            u = scale q'.k' (Based); "elu": phi = elu(x) + 1 (Katharopoulos et al., 2020).
        layer_norm: None, "token" (one LayerNorm over all heads' features of a token together, the authors'
            layer) or "head" (each head's d features). Population variance.
        scale: of "outer" and "taylor"; d ** -0.5 when None. The other maps ignore it.
        eps: added to the denominator.
        layer_norm_eps: added to the variance.
        normalize: False leaves out the division.
        initial_state: what came before, as `return_state` gave it; never modified. Gradients flow into it.
        return_state: also return the state after the last token. Gradients flow out of it.
        cu_seqlens: (S + 1,) int32 or int64 on q's device: S sequences packed along N (then B must be 1),
            sequence s in rows cu_seqlens[s] to cu_seqlens[s + 1]. Rows in no sequence give 0. On the CPU the
            values are checked; on a GPU, where that would synchronise, they are clamped. States then have
            first dimension S.

    Returns:
        y (B, Hq, N, dv) in q's dtype, laid out in memory as q is; with return_state, (y, RebasedState).

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what is allowed and what was given.
        RuntimeError: in double backward: there are no second derivatives.

    Under autocast q, k, v are cast to its dtype, gamma and beta are not. torch.func transforms (vmap, jvp)
    are not supported and raise.
    """
    q, k, v = _autocast(q, k, v)
    _check_qkv(q, k, v, "N, ")
    options = _options(feature_map, layer_norm, scale, eps, layer_norm_eps, normalize, q.shape[3])
    parameters = (
        _parameter("gamma_q", gamma_q, q.shape[1], q),
        _parameter("beta_q", beta_q, q.shape[1], q),
        _parameter("gamma_k", gamma_k, k.shape[1], k),
        _parameter("beta_k", beta_k, k.shape[1], k),
    )
    states = q.shape[0]
    if cu_seqlens is not None:
        cu_seqlens = _check_index("cu_seqlens", cu_seqlens, q)
        if q.shape[0] != 1:
            raise _fail("q", "batch size 1 where cu_seqlens is given", f"shape {tuple(q.shape)}")
        if cu_seqlens.shape[0] < 1:
            raise _fail("cu_seqlens", "at least one element", f"shape {tuple(cu_seqlens.shape)}")
        states = cu_seqlens.shape[0] - 1
    initial: tuple[Tensor | None, Tensor | None] = (None, None)
    if initial_state is not None:
        sizes = (states, k.shape[1], num_features(feature_map, q.shape[3]), v.shape[3])
        _check_state("initial_state", initial_state, sizes, "sequences", q)
        initial = (initial_state[0], initial_state[1])
    if not isinstance(return_state, bool):
        raise TypeError(f"return_state: expected a bool, got {type(return_state).__name__}")
    tensors = _distinct([q, k, v, *parameters, *initial])
    # always through the Function: the bare operator would give forward-mode AD silent zeros
    result = Attention.apply(  # type: ignore[no-untyped-call]
        *tensors, cu_seqlens, return_state, *options
    )
    return (result[0], RebasedState(result[1], result[2])) if return_state else result


def rebased_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: RebasedState,
    gamma_q: Tensor | None = None,
    beta_q: Tensor | None = None,
    gamma_k: Tensor | None = None,
    beta_k: Tensor | None = None,
    *,
    feature_map: str = "outer",
    layer_norm: str | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    layer_norm_eps: float = 1e-5,
    normalize: bool = True,
    state_index: Tensor | None = None,
) -> Tensor:
    """One token more: takes (k, v) into `state`, in place, and answers q. For inference.

    Equal to one more row of `rebased_attention` with the same options.

    Args:
        q: (B, Hq, d).
        k: (B, Hkv, d).
        v: (B, Hkv, dv); dtypes, sizes and parameters as in `rebased_attention`.
        state: contiguous, kv and k apart in memory; **updated in place**. (B, Hkv, ...), or with state_index
            a pool (slots, Hkv, ...).
        state_index: (B,) int32 or int64 on q's device: the slot that each sequence uses. -1 skips a sequence:
            y is 0 there and no state changes. Other values outside the pool raise on the CPU, and skip on a
            GPU. The same slot twice is undefined.

    Returns:
        y (B, Hq, dv) in q's dtype.

    Raises:
        ValueError, TypeError: an argument is wrong; the state is untouched.
        RuntimeError: grad mode is on and an input requires grad: call it under torch.no_grad().
    """
    tensors = (gamma_q, beta_q, gamma_k, beta_k, state_index)
    options = (feature_map, layer_norm, scale, eps, layer_norm_eps, normalize)
    if _is_plain(q, state):
        # The operator checks its arguments itself, before it touches the state, and in a tenth of the time;
        # what it refuses is checked again below, in words, or made to fit.
        try:
            return _run_step(q, k, v, state, tensors, _cached_options(*options, q.shape[-1]))
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            checked = _check_step(q, k, v, state, tensors, options)
            if all(x is y for x, y in zip(checked[4], tensors, strict=True)):
                raise error
            return _run_step(*checked)
    return _run_step(*_check_step(q, k, v, state, tensors, options))


def _is_plain(q: Tensor, state: RebasedState) -> bool:
    """Whether the operator can take the arguments of a step as they are, if they are right."""
    return (
        type(q) is Tensor
        and (q.is_cpu or q.is_cuda)
        and q.dim() == 3
        and isinstance(state, tuple)
        and len(state) == 2
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(q.device.type)
        and not torch.compiler.is_compiling()
    )


def _run_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: tuple[Tensor, Tensor],
    tensors: tuple[Tensor | None, ...],
    options: tuple[str, str, float, float, float, bool],
) -> Tensor:
    y: Tensor = ops.step(q, k, v, *state, *tensors, *options)
    # a C++ operator does not do it: without it a state saved for backward would be stale in silence
    torch.autograd.graph.increment_version(state)
    return y


def _check_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: RebasedState,
    tensors: tuple[Tensor | None, ...],
    options: tuple[str, str | None, float | None, float, float, bool],
) -> tuple[Any, ...]:
    """The arguments of _run_step, checked and cast; `tensors` are the four parameters and state_index."""
    gamma_q, beta_q, gamma_k, beta_k, state_index = tensors
    q, k, v = _autocast(q, k, v)
    _check_qkv(q, k, v, "")
    checked = _options(*options, q.shape[2])
    parameters = (
        _parameter("gamma_q", gamma_q, q.shape[1], q),
        _parameter("beta_q", beta_q, q.shape[1], q),
        _parameter("gamma_k", gamma_k, k.shape[1], k),
        _parameter("beta_k", beta_k, k.shape[1], k),
    )
    slots = q.shape[0]
    if state_index is not None:
        state_index = _check_index("state_index", state_index, q)
        if state_index.shape[0] != q.shape[0]:
            raise _fail("state_index", f"shape ({q.shape[0]},)", f"shape {tuple(state_index.shape)}")
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], Tensor) and state[0].dim():
            slots = state[0].shape[0]
    sizes = (slots, k.shape[1], num_features(options[0], q.shape[2]), v.shape[2])
    _check_state("state", state, sizes, "slots" if state_index is not None else "sequences", q)
    kv, state_k = state
    for name, x in (("state.kv", kv), ("state.k", state_k)):
        if not x.is_contiguous():
            raise _fail(name, "a contiguous tensor, since it is updated in place", f"strides {x.stride()}")
    if torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, kv, state_k, *parameters)
    ):
        raise RuntimeError(
            "rebased_attention_step is for inference and has no gradients: call it under torch.no_grad(), or "
            "use rebased_attention with initial_state and return_state to train."
        )
    return q, k, v, (kv, state_k), (*parameters, state_index), checked
