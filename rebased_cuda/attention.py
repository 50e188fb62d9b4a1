"""The two public functions.

A call that is right costs microseconds, so it goes straight to the operator, which checks its arguments in a
tenth of the time that Python would take. A call that the operator refuses, or whose arguments must be cast
first, goes through `check_call`, which says in words what is wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._checks import GivenOptions, Options, check_bool, check_call, check_options, fail, untraced
from .autograd import Attention, AttentionWithState, ops
from .state import RebasedState

# what an operator, or the options' checks before it, raise for arguments that are wrong
_REFUSALS = (ValueError, TypeError, RuntimeError, IndexError, ZeroDivisionError, AttributeError)
# in calls of microseconds a look-up counts
_functorch_is_active = torch._C._are_functorch_transforms_active
_autocast_is_on = torch._C._is_any_autocast_enabled
_increment_version = torch._C._increment_version  # what torch.autograd.graph.increment_version calls
# `typed` keeps True and 1 apart; what cannot be hashed raises a TypeError
_cached_options = functools.lru_cache(maxsize=256, typed=True)(check_options)
_NO_STATE = (None, None)


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
    Functions are Better In-Context Models", Aksenov et al., 2024, section 3):

        sim(i, j) = phi(q'_i) . phi(k'_j)
        y_i = sum_{j<=i} sim(i, j) v_j / (sum_{j<=i} sim(i, j) + eps)

    The defaults are a bare kernel, as scaled_dot_product_attention is. **ReBased proper** is
    ``layer_norm="token"`` with gamma and beta for q and k. The same maths in plain torch:
    `rebased_cuda.reference`.

    Args:
        q: (B, Hq, N, d), d from 1 to 128. float32, float64, float16 or bfloat16; any strides.
        k: (B, Hkv, N, d), same dtype; Hq is a multiple of Hkv, query head h uses kv head h // (Hq / Hkv).
        v: (B, Hkv, N, dv), same dtype, dv from 1 to 256.
        gamma_q, beta_q: (d,), (Hq, d) or flat (Hq * d,), optional each; applied with or without LayerNorm, in
            float32 (float64 for float64 inputs).
        gamma_k, beta_k: (d,), (Hkv, d) or (Hkv * d,), optional each.
        feature_map: "outer": sim = (scale q'.k')^2, what the authors' released kernel computes; "square":
            sim = sum q'^2 k'^2, the paper's formula read literally; "taylor": sim = 1 + u + u^2/2 with
            u = scale q'.k' (Based); "elu": phi = elu(x) + 1 (Katharopoulos et al., 2020);
            "identity": phi = x, for q and k that are features already.
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
    are not supported and raise. What torch.jit.trace makes of a call is for inference: it has no gradients.
    """
    inputs = (q, k, v, gamma_q, beta_q, gamma_k, beta_k)
    options = (feature_map, layer_norm, scale, eps, layer_norm_eps, normalize)
    if _is_plain(q, 4) and (return_state is False or return_state is True):
        try:
            if (
                (initial_state is None or _is_state(initial_state))
                and (cu_seqlens is None or cu_seqlens.is_contiguous())
                and type(width := q.shape[3]) is int  # it is a tensor while torch.jit.trace follows
            ):
                checked = _cached_options(*options, width)
                return _attend(inputs, initial_state or _NO_STATE, cu_seqlens, checked, return_state)
        except _REFUSALS:
            pass  # check_call says why, or casts what the operator does not
    tensors, cu_seqlens, checked = untraced(check_call, inputs, options, initial_state, cu_seqlens)
    return_state = check_bool("return_state", return_state)
    return _attend(tensors[:7], tensors[7:], cu_seqlens, checked, return_state)


def _attend(
    inputs: Sequence[Any], state: Sequence[Any], cu_seqlens: Any, options: Options, return_state: bool
) -> Tensor | tuple[Tensor, RebasedState]:
    result: Any
    with_state = return_state or state[0] is not None
    grad_mode = torch.is_grad_enabled()
    if (
        # a trace holds the operator itself, or it could be neither checked nor saved; it has no gradients
        (grad_mode and (torch.compiler.is_compiling() or not torch._C._is_tracing()))
        or forward_ad._current_level >= 0  # where the bare operator would give silent zeros
        or _functorch_is_active()
        or torch.compiler.is_compiling()
    ):
        if not with_state:
            result = Attention.apply(*inputs, cu_seqlens, options, grad_mode)  # type: ignore[no-untyped-call]
            return result  # type: ignore[no-any-return]
        result = AttentionWithState.apply(  # type: ignore[no-untyped-call]
            return_state, options, grad_mode, *inputs, *state, cu_seqlens
        )
        y, *final = result if return_state else (result,)
    elif with_state:
        y, _, *final = ops.forward_with_state.default(*inputs, *state, cu_seqlens, *options, return_state)
    else:
        y, _ = ops.forward.default(*inputs, cu_seqlens, *options)
    return (y, RebasedState(*final)) if return_state else y


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
        state: **updated in place**. (B, Hkv, ...), or with state_index a pool (slots, Hkv, ...). The entries
            of one slot are contiguous. Slots may lie apart, with other things between them, as in the pages
            of a serving engine. All of it lies apart in memory from all other arguments, and kv from k.
        state_index: (B,) int32 or int64 on q's device: the slot that each sequence uses. -1 skips a sequence:
            y is 0 there and no state changes, for as many sequences as wanted. Other values outside the pool
            raise on the CPU, and skip on a GPU. The same slot twice raises on the CPU, and is undefined on a
            GPU, where to read the values would synchronise.

    Returns:
        y (B, Hq, dv) in q's dtype.

    Raises:
        ValueError, TypeError: an argument is wrong; the state is untouched.
        RuntimeError: grad mode is on and an input requires grad: call it under torch.no_grad(). An input has
            a forward-mode tangent, or a torch.func transform is active. The state was made under
            inference_mode and this is outside of it.
    """
    inputs = (q, k, v, gamma_q, beta_q, gamma_k, beta_k)
    options = (feature_map, layer_norm, scale, eps, layer_norm_eps, normalize)
    if _is_plain(q, 3) and _is_state(state) and not torch.is_grad_enabled():
        # the operator looks at everything before it touches the state
        try:
            if type(width := q.shape[2]) is int:
                kv, k_sum = state
                # what _refuse_modes looks at, for in calls of microseconds a function counts
                if (
                    _functorch_is_active()
                    or forward_ad._current_level >= 0
                    or kv.is_inference()
                    or k_sum.is_inference()
                    or kv.is_neg()
                    or k_sum.is_neg()
                ):
                    _refuse_modes(inputs, state, state_index)
                return _run_step(inputs, state, state_index, _cached_options(*options, width))
        except _REFUSALS:
            pass  # as in rebased_attention
    checked = untraced(_check_step, inputs, options, state, state_index)
    if not torch.compiler.is_compiling():
        _refuse_modes(*checked[:3])
    return _run_step(*checked)


def _check_step(
    inputs: Sequence[Any], options: GivenOptions, state: RebasedState, state_index: Tensor | None
) -> tuple[list[Tensor | None], tuple[Any, Any], Tensor | None, Options]:
    """The arguments of _run_step, checked and cast."""
    tensors, state_index, checked = check_call(inputs, options, state, state_index, of_step=True)
    for name, x in zip(("state.kv", "state.k"), state, strict=True):
        if not _has_contiguous_slots(x):
            allowed = "contiguous slots, apart from each other, since they are updated in place"
            raise fail(name, allowed, f"strides {x.stride()} for shape {tuple(x.shape)}")
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors):
        raise RuntimeError(
            "rebased_attention_step is for inference and has no gradients: call it under torch.no_grad(), or "
            "use rebased_attention with initial_state and return_state to train."
        )
    *inputs, kv, k_sum = tensors
    return inputs, (kv, k_sum), state_index, checked


def _has_contiguous_slots(part: Tensor) -> bool:
    """Whether each slot of kv or k is contiguous, and no two of them meet."""
    slots, entries = part.shape[0], 1
    for size, stride in zip(reversed(part.shape[1:]), reversed(part.stride()[1:]), strict=True):
        if size != 1 and stride != entries and slots != 0:
            return False
        entries *= size
    return slots <= 1 or part.stride(0) >= entries


def _refuse_modes(inputs: Sequence[Any], state: tuple[Any, ...], state_index: Tensor | None) -> None:
    """What the operator cannot see of its tensors, and torch's own in-place operators refuse."""
    if _functorch_is_active() or (
        forward_ad._current_level >= 0
        and any(
            x is not None and forward_ad.unpack_dual(x).tangent is not None  # type: ignore[no-untyped-call]
            for x in (*inputs, *state, state_index)
        )
    ):
        raise RuntimeError(
            "rebased_attention_step is for inference: it has no forward-mode derivatives and takes part in "
            "no torch.func transform (vmap, jvp, grad). Use rebased_cuda.reference.step."
        )
    kv, k_sum = state
    if (kv.is_inference() or k_sum.is_inference()) and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            "state: was made under torch.inference_mode() and is updated in place, which torch allows only "
            "there: step under inference_mode too, or on state.clone()."
        )
    if kv.is_neg() or k_sum.is_neg():  # torch would hand the operator a copy
        raise ValueError("state: expected tensors without the negative bit: pass their resolve_neg()")


def _run_step(
    inputs: Sequence[Any], state: tuple[Any, Any], state_index: Tensor | None, options: Options
) -> Tensor:
    y: Tensor = ops.step.default(*inputs, *state, state_index, *options)
    # a C++ operator does not do it: without it a state saved for backward would be stale in silence
    _increment_version(state)
    return y


def _is_plain(q: Any, dims: int) -> bool:
    """Whether an operator can take the arguments as they are, if they are right."""
    return (
        type(q) is Tensor
        and (q.is_cpu or q.is_cuda)
        and q.dim() == dims
        and not _autocast_is_on()
        and not torch.compiler.is_compiling()
    )


def _is_state(state: Any) -> bool:
    return isinstance(state, tuple) and len(state) == 2 and state[0] is not None and state[1] is not None
