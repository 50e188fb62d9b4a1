"""Between the public functions and the C++ operators: autograd, and shapes for the compiler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import _load as _load  # registers the operators
from ._plan import EMULATED, given_call, limits_of
from .state import num_features

ops = torch.ops.rebased_cuda  # in hot paths with .default: to find the overload takes half a microsecond


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _empty_rows(like: Tensor, heads: int, width: int) -> Tensor:
    """(batch, heads, rows, width) in like's memory order: csrc/bindings/tensors.h has the same rule."""
    batch, _, rows, _ = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(batch, rows, heads, width).transpose(1, 2)
    return like.new_empty(batch, heads, rows, width)


def _require_one_device(q: Tensor, *others: Any) -> None:
    """One tensor on "meta" brings a call here that would otherwise compute something."""
    for x in others:
        if isinstance(x, Tensor) and x.device != q.device:
            raise ValueError(f"rebased_cuda: all tensors must be on q's device {q.device}, got {x.device}")


def _fake_outputs(q: Tensor, *others: Any, head_dim: Any) -> tuple[Tensor, Tensor]:
    _require_one_device(q, *others)
    batch, heads, seqlen, _ = q.shape
    return _empty_rows(q, heads, head_dim), q.new_empty(batch, heads, seqlen, dtype=accumulator(q.dtype))


@torch.library.register_fake("rebased_cuda::forward")
def _(q, k, v, gamma_q, beta_q, gamma_k, beta_k, cu_seqlens, *options):  # type: ignore[no-untyped-def]
    return _fake_outputs(q, k, v, gamma_q, beta_q, gamma_k, beta_k, cu_seqlens, head_dim=v.shape[3])


def _keeps(q: Tensor) -> bool:
    """Whether a forward on q's device has something to keep for backward: the CPU backend has not."""
    return EMULATED or not q.is_cpu


def _kept_bytes(inputs: Any, initial_kv: Any, cu_seqlens: Any, options: Any, with_states: Any) -> Any:
    """What forward_kept keeps, as csrc/cuda/plan/workspace.cpp lays it out."""
    q, layer_norm, (return_state, keep_states) = inputs[0], options[1], with_states
    if not _keeps(q):
        return 0
    if keep_states and (limits := limits_of(q.device)):
        state = {"initial_state": initial_kv is not None, "return_state": return_state}
        return given_call(inputs, options, cu_seqlens, limits, keep=True, **state).forward()["kept_bytes"]
    batch, heads, seqlen, _ = q.shape
    if layer_norm != "token" or heads == 1:
        return 0
    statistics = 2 * batch * seqlen * accumulator(q.dtype).itemsize  # two numbers a token, of q and of k
    return 2 * ((statistics + 63) // 64 * 64)


@torch.library.register_fake("rebased_cuda::forward_with_state")
def _fake_with_state(q, k, v, *rest):  # type: ignore[no-untyped-def]
    cu_seqlens, feature_map, return_state = rest[6], rest[7], rest[-1]
    y, r = _fake_outputs(q, k, v, *rest[:7], head_dim=v.shape[3])
    if not return_state:
        return y, r, r.new_empty(0), r.new_empty(0)
    states = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = (states, k.shape[1], num_features(feature_map, q.shape[3]))
    return y, r, r.new_empty(*sizes, v.shape[3]), r.new_empty(sizes)


@torch.library.register_fake("rebased_cuda::forward_kept")
def _(*arguments):  # type: ignore[no-untyped-def]
    inputs, (initial_kv, _, cu_seqlens), options = arguments[:7], arguments[7:10], arguments[10:16]
    kept = _kept_bytes(inputs, initial_kv, cu_seqlens, options, arguments[16:])
    return *_fake_with_state(*arguments[:-1]), inputs[0].new_empty(kept, dtype=torch.uint8)


@torch.library.register_fake("rebased_cuda::forward_state")
def _(k, v, gamma_k, beta_k, cu_seqlens, feature_map, *options):  # type: ignore[no-untyped-def]
    states = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = (states, k.shape[1], num_features(feature_map, k.shape[3]))
    sums = accumulator(k.dtype)
    return k.new_empty(*sizes, v.shape[3], dtype=sums), k.new_empty(*sizes, dtype=sums)


@torch.library.register_fake("rebased_cuda::backward")
def _(grad_y, q, k, v, gamma_q, beta_q, gamma_k, beta_k, *rest):  # type: ignore[no-untyped-def]
    rows = (_empty_rows(x, x.shape[1], x.shape[3]) for x in (q, k, v))
    sizes = (0 if x is None else x.shape for x in (gamma_q, beta_q, gamma_k, beta_k))
    return *rows, *(q.new_empty(size, dtype=accumulator(q.dtype)) for size in sizes)


@torch.library.register_fake("rebased_cuda::backward_with_state")
def _(grad_y, grad_kv, grad_k, q, k, v, *rest):  # type: ignore[no-untyped-def]
    parameters, initial_kv, cu_seqlens, feature_map, part = rest[:4], rest[4], rest[6], rest[9], rest[15]
    queries, keys = part in ("queries", "all"), part in ("keys", "all")

    def rows(like: Tensor, wanted: bool) -> Tensor:
        return _empty_rows(like, like.shape[1], like.shape[3]) if wanted else like.new_empty(0)

    def sums(shape: Any, wanted: bool) -> Tensor:
        return q.new_empty(shape if wanted else 0, dtype=accumulator(q.dtype))  # type: ignore[no-any-return]

    states = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = (states, k.shape[1], num_features(feature_map, q.shape[3]))
    of_state = part == "reverse_state" or (keys and initial_kv is not None)
    of_parameters = zip(parameters, (queries, queries, keys, keys), strict=True)
    return (
        rows(q, queries),
        rows(k, keys),
        rows(v, keys),
        *(sums(0 if x is None else x.shape, wanted) for x, wanted in of_parameters),
        sums((*sizes, v.shape[3]), of_state),
        sums(sizes, of_state),
    )


@torch.library.register_fake("rebased_cuda::step")
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    _require_one_device(q, k, v, *rest)
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2])


def _present(gradients: Any, inputs: Any) -> list[Any]:
    """The operators return tensors without elements for the gradients of what was absent."""
    return [None if x is None else gradient for gradient, x in zip(gradients, inputs, strict=False)]


class Attention(torch.autograd.Function):
    """y as one differentiable function of q, k, v and the parameters.

    Saved for backward: the inputs, y, r (one number a row) and, where the backend has it, what forward kept.
    There is no setup_context, so torch.func transforms (vmap, jacrev, forward mode) raise instead of giving
    wrong numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gamma_q: Tensor | None,
        beta_q: Tensor | None,
        gamma_k: Tensor | None,
        beta_k: Tensor | None,
        cu_seqlens: Tensor | None,
        options: tuple[Any, ...],
        grad_mode: bool,
    ) -> Tensor:
        inputs = (q, k, v, gamma_q, beta_q, gamma_k, beta_k)
        kept = None
        if grad_mode and _keeps(q) and any(ctx.needs_input_grad):
            rest = (None, None, cu_seqlens, *options, False, not torch.compiler.is_compiling())
            y, r, _, _, kept = ops.forward_kept.default(*inputs, *rest)
        else:
            y, r = ops.forward.default(*inputs, cu_seqlens, *options)
        ctx.save_for_backward(*inputs, cu_seqlens, y, r, kept)
        ctx.options = options
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        *saved, kept = ctx.saved_tensors
        # without create_graph there is no second derivative to refuse
        function: Any = AttentionBackward.apply if torch.is_grad_enabled() else ops.backward.default
        gradients = function(grad_y, *saved, *ctx.options, kept)
        _, _, _, gamma_q, beta_q, gamma_k, beta_k, *_ = saved
        if gamma_q is None or beta_q is None or gamma_k is None or beta_k is None:
            gradients = _present(gradients, saved)
        return *gradients, None, None, None


class AttentionWithState(torch.autograd.Function):
    """y, and with return_state the state, as a function of the initial state too."""

    @staticmethod
    def forward(
        ctx: Any,
        return_state: bool,
        options: tuple[Any, ...],
        grad_mode: bool,
        q: Tensor,
        *rest: Tensor | None,
    ) -> Any:
        kept = None
        if grad_mode and _keeps(q) and any(ctx.needs_input_grad):
            states = (return_state, not torch.compiler.is_compiling())
            y, r, kv, state_k, kept = ops.forward_kept.default(q, *rest, *options, *states)
        else:
            y, r, kv, state_k = ops.forward_with_state.default(q, *rest, *options, return_state)
        ctx.save_for_backward(q, *rest, y, r, kept)
        ctx.options = options
        ctx.state_shape = kv.shape
        ctx.set_materialize_grads(False)  # an unused state costs no gradient of zeros
        return (y, kv, state_k) if return_state else y

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_kv: Tensor | None = None, grad_k: Tensor | None = None
    ) -> Any:
        *inputs, y, r, kept = ctx.saved_tensors
        if grad_y is None:
            grad_y = torch.zeros_like(y)
        if grad_kv is not None or grad_k is not None:
            grad_kv = y.new_zeros(ctx.state_shape, dtype=r.dtype) if grad_kv is None else grad_kv
            grad_k = y.new_zeros(ctx.state_shape[:3], dtype=r.dtype) if grad_k is None else grad_k
        given = (grad_y, grad_kv, grad_k, *inputs, y, r, *ctx.options, "all", kept)
        function: Any = AttentionBackward.apply
        if not torch.is_grad_enabled():
            function = ops.backward_with_state.default
        return None, None, None, *_present(function(*given), inputs), None


class AttentionBackward(torch.autograd.Function):
    """A backward operator as a function of its own, whose backward says that there is none.

    once_differentiable looks only at the incoming gradients: behind y.sum(), which hands in a constant, a
    second derivative would run through it and be wrong.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        with_state = arguments[-2] == "all"  # the part stands before what was kept
        return (ops.backward_with_state if with_state else ops.backward).default(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            "rebased_attention has no second derivatives: its backward is a fused kernel. "
            "Use rebased_cuda.reference for double backward."
        )
