"""The calls that people make today, over this package's op: change the import and nothing else.

    from fla.ops.rebased import parallel_rebased        from rebased_cuda.compat import parallel_rebased
    from fla.ops.based import parallel_based            from rebased_cuda.compat import parallel_based
    from fla.ops.linear_attn import chunk_linear_attn   from rebased_cuda.compat import chunk_linear_attn
    from src.mixers.rebased import ReBased              from rebased_cuda.compat import ReBased

Signatures, defaults, layouts, scale, eps and normalisation of the functions are flash-linear-attention
0.6.0's, those of ReBased are those of the paper's repository. They differ from each other:

    ============================  ==============  ========  =======  =====================================
                                  layout          scale     eps      sim
    ============================  ==============  ========  =======  =====================================
    parallel_rebased              (B, T, H, D)    D^-0.5    1e-5     (scale q.k)^2
    parallel_based,               (B, T, H, D)    D^-0.5    1e-6     1 + u + u^2 / 2, u = scale q.k
      fused_chunk_based
    chunk_linear_attn,            (B, T, H, D)    D^-0.5    1e-10    scale q.k: q and k are features
      fused_chunk_linear_attn,
      fused_recurrent_linear_attn
    ReBased                       (B, T, width)   D^-0.5    1e-12    (scale q'.k')^2, LayerNorm over a token
    ============================  ==============  ========  =======  =====================================

Calls that differ only in how their originals compute (parallel, in chunks, token by token) are one and the
same here, except for their defaults. Sums, states and the division are float32 inside (float64 for float64),
where the originals round them to q's dtype. What cannot be mapped raises an error that names the argument.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from ._checks import check_bool, check_call, check_number, check_tensor, fail
from .attention import rebased_attention
from .autograd import accumulator
from .layers import ReBasedAttention
from .state import (
    IDENTITY,
    MAX_FEATURE_DIM,
    MAX_HEAD_DIM,
    RebasedState,
    check_layout,
    check_memory,
    check_size,
)

__all__ = [
    "ReBased",
    "chunk_linear_attn",
    "fused_chunk_based",
    "fused_chunk_linear_attn",
    "fused_recurrent_linear_attn",
    "parallel_based",
    "parallel_rebased",
]


def parallel_rebased(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    eps: float = 1e-5,
    use_scale: bool = True,
    use_normalize: bool = True,
    return_both: bool = False,
    head_first: bool = False,
) -> Any:
    """fla's parallel_rebased: causal attention with sim = (scale q.k)^2, in time linear in T.

    Args:
        q, k: (B, T, H, K), K up to 128. fla has no LayerNorm here, nor gamma and beta.
        v: (B, T, H, V), V up to 256.
        eps: added to the sum of sim.
        use_scale: scale = K ** -0.5; False: 1.
        use_normalize: divide by the sum of sim.
        return_both: return the sums instead: o (B, H, T, V) without the division, and z (B, H, T), the sum
            of sim. Head-first whatever the inputs are, as fla has it.
        head_first: inputs and output are (B, H, T, ...): an argument of fla's releases before 0.6.

    Returns:
        o (B, T, H, V) in q's dtype, or (o, z).

    Raises:
        ValueError, TypeError: as `rebased_attention`; also v: return_both takes V up to 255.
    """
    check_bool("use_scale", use_scale)
    check_bool("return_both", return_both)
    head_first = check_bool("head_first", head_first)
    use_normalize = check_bool("use_normalize", use_normalize)
    q, k, v = (_head_first(name, x, head_first) for name, x in (("q", q), ("k", k), ("v", v)))
    options: dict[str, Any] = {"scale": None if use_scale else 1.0, "eps": eps}
    if return_both:
        if v.shape[-1] == MAX_HEAD_DIM:
            raise ValueError(
                f"v: expected a width up to {MAX_HEAD_DIM - 1} with return_both, got {v.shape[-1]}"
            )
        # the sum of sim is the sum over values of 1
        both = rebased_attention(q, k, nn.functional.pad(v, (0, 1), value=1.0), normalize=False, **options)
        return both[..., :-1], both[..., -1]
    o = rebased_attention(q, k, v, normalize=use_normalize, **options)
    return o if head_first else o.transpose(1, 2)


def parallel_based(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    use_norm: bool = True,
    head_first: bool = False,
) -> Tensor:
    """fla's parallel_based: causal attention with sim = 1 + u + u^2 / 2, u = scale q.k, in time linear in T.

    Args:
        q, k: (B, T, H, K), K up to 128.
        v: (B, T, H, V), V up to 256.
        scale: K ** -0.5 when None. fla's layer hands in 1.
        use_norm: divide by the sum of sim + 1e-6.
        head_first: inputs and output are (B, H, T, ...): an argument of fla's releases before 0.6.

    Returns:
        o (B, T, H, V) in q's dtype.

    Raises:
        ValueError, TypeError: as `rebased_attention`.
    """
    head_first, use_norm = check_bool("head_first", head_first), check_bool("use_norm", use_norm)
    q, k, v = (_head_first(name, x, head_first) for name, x in (("q", q), ("k", k), ("v", v)))
    o = rebased_attention(q, k, v, feature_map="taylor", scale=scale, eps=1e-6, normalize=use_norm)
    assert isinstance(o, Tensor)
    return o if head_first else o.transpose(1, 2)


def fused_chunk_based(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    use_norm: bool = True,
    head_first: bool = False,
) -> Tensor:
    """fla's fused_chunk_based, which is its `parallel_based` computed another way; K up to 128, not 16."""
    return parallel_based(q, k, v, scale, use_norm, head_first)


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """fla's chunk_linear_attn: causal attention with sim = scale q.k, where q and k are features already.

    Args:
        q, k: (B, T, H, K). More than 128 features, as fla's layers make of 16 (136 for ReBased, 153 for
            Based), are taken in groups, which takes longer and rounds less in bf16 and fp16 (the groups are
            float32). They need not be made: `parallel_rebased` and `parallel_based` take q and k of width 16.
        v: (B, T, H, V), V up to 256; up to 255 with normalize and more than 128 features.
        scale: K ** -0.5 when None.
        initial_state: without normalize (B, H, K, V); with it (kv, z), z (B, 1, H, K), either of them None
            for zeros, or kv alone. In any floating-point dtype, on q's device.
        output_final_state: also return the state after the last token, of the same shape, float32.
        normalize: divide by the sum of sim + 1e-10.
        cu_seqlens: (S + 1,): S sequences packed along T; B must be 1, and states have first dimension S.

    Returns:
        (o, final state): o (B, T, H, V) in q's dtype; None without output_final_state.

    Raises:
        ValueError, TypeError: as `rebased_attention`.
    """
    q, k, v = (_head_first(name, x, False) for name, x in (("q", q), ("k", k), ("v", v)))
    scale = q.shape[-1] ** -0.5 if scale is None else check_number("scale", scale)
    normalize = check_bool("normalize", normalize)
    output_final_state = check_bool("output_final_state", output_final_state)
    feature_dim = q.shape[-1]
    wide = feature_dim > MAX_FEATURE_DIM
    if wide and k.shape[-1] != feature_dim:
        raise fail("k", f"q's {feature_dim} features", k.shape[-1])
    if wide and normalize and v.shape[-1] >= MAX_HEAD_DIM:
        raise fail("v", f"a width up to {MAX_HEAD_DIM - 1} with {feature_dim} features", v.shape[-1])
    initial = None
    if initial_state is not None:
        # what the state is held to must itself be right, and the operator has no more features at once
        checked = (q[..., :MAX_FEATURE_DIM], k[..., :MAX_FEATURE_DIM], v)
        check_call((*checked, *[None] * 4), (IDENTITY, None, 1.0, 1e-10, 0.0, normalize), None, cu_seqlens)
        initial = _initial_state(initial_state, q, k, v, normalize, cu_seqlens)
    attend = _attend_in_groups if wide else _attend
    o, state = attend(q, k, v, scale, initial, output_final_state, normalize, cu_seqlens)
    if state is None:
        return o.transpose(1, 2), None
    return o.transpose(1, 2), (state.kv, state.k.unsqueeze(1)) if normalize else state.kv


def fused_chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """fla's fused_chunk_linear_attn, which is its `chunk_linear_attn` computed another way."""
    return chunk_linear_attn(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens)


def fused_recurrent_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | tuple[Tensor | None, Tensor | None] | None = None,
    output_final_state: bool = False,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Any]:
    """fla's fused_recurrent_linear_attn: `chunk_linear_attn`, which divides only where normalize asks for it.

    Raises:
        ValueError, TypeError: as `chunk_linear_attn`; also reverse: only False is taken.
    """
    if check_bool("reverse", reverse):
        raise ValueError("reverse: expected False, got True; flip q, k, v and o along T instead")
    return chunk_linear_attn(q, k, v, scale, initial_state, output_final_state, normalize, cu_seqlens)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    initial: RebasedState | None,
    return_state: bool,
    normalize: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, RebasedState | None]:
    """Head-first linear attention of features (scale q, k), as gamma_q scales them."""
    gamma = torch.full((q.shape[-1],), scale, dtype=accumulator(q.dtype), device=q.device)
    options: dict[str, Any] = {
        "feature_map": IDENTITY,
        "eps": 1e-10,
        "normalize": normalize,
        "initial_state": initial,
        "return_state": return_state,
        "cu_seqlens": cu_seqlens,
    }
    result = rebased_attention(q, k, v, gamma_q=gamma, **options)
    return result if isinstance(result, tuple) else (result, None)


def _attend_in_groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    initial: RebasedState | None,
    return_state: bool,
    normalize: bool,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, RebasedState | None]:
    """`_attend` for more features than the operator takes: sim is a sum over features, so y is over groups.

    With normalize a value of 1 goes along with every token, and its sum is that of sim.
    """
    dtype, groups = q.dtype, -(-q.shape[-1] // MAX_FEATURE_DIM)
    q, k, v = (x.to(accumulator(dtype)) for x in (q, k, v))
    if normalize:
        v = nn.functional.pad(v, (0, 1), value=1.0)
    if initial is None:
        initials: list[RebasedState | None] = [None] * groups
    else:
        kv = torch.cat([initial.kv, initial.k.unsqueeze(-1)], -1) if normalize else initial.kv
        parts = zip(kv.tensor_split(groups, 2), initial.k.tensor_split(groups, 2), strict=True)
        initials = [RebasedState(*(x.contiguous() for x in part)) for part in parts]
    q_groups, k_groups = (x.tensor_split(groups, -1) for x in (q, k))
    results = [
        _attend(q_group, k_group, v, scale, start, return_state, False, cu_seqlens)
        for q_group, k_group, start in zip(q_groups, k_groups, initials, strict=True)
    ]
    o = torch.stack([y for y, _ in results]).sum(0)
    if normalize:
        o = o[..., :-1] / (o[..., -1:] + 1e-10)
    states = [state for _, state in results if state is not None]
    if not states:
        return o.to(dtype), None
    kv = torch.cat([state.kv for state in states], 2)
    state = RebasedState(kv[..., :-1] if normalize else kv, torch.cat([state.k for state in states], 2))
    return o.to(dtype), state


def _initial_state(
    given: Tensor | tuple[Tensor | None, Tensor | None],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    normalize: bool,
    cu_seqlens: Tensor | None,
) -> RebasedState | None:
    """`given` as the operator takes it; q, k, v and cu_seqlens are checked."""
    if isinstance(given, tuple) and not normalize:
        raise TypeError("initial_state: expected one tensor (B, H, K, V) without normalize, got a tuple")
    parts = given if isinstance(given, tuple) else (given, None)
    if len(parts) != 2 or not all(x is None or isinstance(x, Tensor) for x in parts):
        kinds = ", ".join(type(x).__name__ for x in parts)
        raise TypeError(f"initial_state: expected a tensor, or (kv, z) with normalize, got {kinds}")
    states = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    shapes = ((states, k.shape[1], q.shape[-1], v.shape[-1]), (states, 1, k.shape[1], q.shape[-1]))
    sums = accumulator(q.dtype)
    made = []
    for part, x, shape in zip(("kv", "z"), parts, shapes, strict=True):
        if x is None:
            made.append(q.new_zeros(shape, dtype=sums))
            continue
        check_layout("initial_state", x)
        if tuple(x.shape) != shape:
            raise fail("initial_state", f"{part} of shape {shape}", tuple(x.shape))
        if not x.is_floating_point():
            raise TypeError(f"initial_state: expected {part} of a floating-point dtype, got {x.dtype}")
        if x.device != q.device:
            raise fail("initial_state", f"{part} on q's device {q.device}", x.device)
        check_memory("initial_state", x)
        made.append(x.to(sums))
    return RebasedState(made[0], made[1].squeeze(1))


def _head_first(name: str, x: Tensor, already: bool) -> Tensor:
    """(B, H, T, width) of x (B, T, H, width), or of one that is so `already`."""
    check_tensor(name, x, 4, "(B, H, T, width)" if already else "(B, T, H, width)")
    check_memory(name, x)  # torch may be the next to touch it
    return x if already else x.transpose(1, 2)


FACTORY_KEYWORDS = ("layer_idx", "parallel_implementation", "silent", "train_view")
"""What Zoology's and Based's factories hand to every mixer: which layer it is, and which of their own kernels
to run and whether to say so. (l_max and feature_name are arguments of the original's own.)"""
FORWARD_KEYWORDS = ("cache_position", "layer_idx", "position_embeddings", "position_ids")
"""What decoder blocks hand to every mixer: where tokens stand, which linear attention does not ask."""


def _refuse_others(function: str, given: dict[str, Any], ignored: tuple[str, ...]) -> None:
    for name in given:
        if name not in ignored:
            raise TypeError(
                f"{name}: unexpected keyword of {function}, which ignores only {', '.join(ignored)}"
            )


class ReBased(ReBasedAttention):
    """The mixer of the paper's repository: its constructor, its forward, its state dict.

    Args:
        d_model: width of hidden_states.
        l_max, feature_name: without effect, as in the original.
        feature_dim, num_heads, eps: as in `ReBasedAttention`; num_key_value_heads must equal num_heads, since
            the original splits v into num_heads.
        causal, mode: True and "parallel", which is all that the original runs.
        use_beta, use_gamma, normalize: all three: LayerNorm over a token with gamma and beta (ln_q.weight and
            .bias). Without normalize: gamma alone or gamma and beta (ln_q.gamma and .beta, both in the state
            dict), or none of the three.
        **factory: what factories hand to whichever mixer they make (`FACTORY_KEYWORDS`) is without effect.

    Raises:
        ValueError, TypeError: an argument is not as above, or a combination that the original cannot run
            either; the message names the argument.
    """

    def __init__(
        self,
        d_model: int,
        l_max: int = 2048,
        feature_dim: int = 16,
        num_key_value_heads: int = 12,
        num_heads: int = 12,
        feature_name: str = "taylor_exp",
        eps: float = 1e-12,
        causal: bool = True,
        mode: str = "parallel",
        use_beta: bool = True,
        use_gamma: bool = True,
        normalize: bool = True,
        **factory: Any,
    ) -> None:
        _refuse_others("ReBased", factory, FACTORY_KEYWORDS)
        d_model = check_size("d_model", d_model, 1)
        num_heads = check_size("num_heads", num_heads, 1)
        num_key_value_heads = check_size("num_key_value_heads", num_key_value_heads, 1)
        causal, normalize = check_bool("causal", causal), check_bool("normalize", normalize)
        use_beta, use_gamma = check_bool("use_beta", use_beta), check_bool("use_gamma", use_gamma)
        if num_key_value_heads != num_heads:
            raise ValueError(
                f"num_key_value_heads: expected num_heads {num_heads}, got {num_key_value_heads}; "
                "ReBasedAttention has grouped heads"
            )
        if not causal:
            raise ValueError("causal: expected True, got False: the op is causal, and so is the original")
        if not isinstance(mode, str) or mode != "parallel":
            raise ValueError(f'mode: expected "parallel", got {mode!r}')
        if normalize and not (use_gamma and use_beta):
            raise ValueError(
                f"normalize: expected use_gamma and use_beta with it, got {use_gamma} and {use_beta}; "
                "ReBasedAttention has LayerNorm without them"
            )
        if use_beta and not use_gamma:
            raise ValueError("use_beta: expected use_gamma with it; ReBasedAttention has beta alone")
        super().__init__(
            d_model,
            num_heads,
            feature_dim,
            layer_norm="token" if normalize else None,
            use_gamma=use_gamma,
            use_beta=use_beta,
            eps=eps,
        )
        if use_gamma and not normalize:
            self.ln_q = _Scaler(num_heads * feature_dim, use_beta)  # type: ignore[assignment]
            self.ln_k = _Scaler(num_heads * feature_dim, use_beta)  # type: ignore[assignment]

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **others: Any
    ) -> Tensor:
        """`ReBasedAttention.forward`; the keywords of `FORWARD_KEYWORDS` have no effect, as in the original.

        Raises:
            ValueError, TypeError: hidden_states or attention_mask as there; any other keyword, by its name.
        """
        _refuse_others("ReBased.forward", others, FORWARD_KEYWORDS)
        try:
            return super().forward(hidden_states, attention_mask)
        except (ValueError, TypeError) as error:  # which calls hidden_states x
            kind, message = type(error), re.sub(r"\bx(?=:|'s)", "hidden_states", str(error))
        raise kind(message)


class _Scaler(nn.Module):
    """gamma and beta under the names of the original, called by the layer as its own `QueryKeyNorm` is."""

    def __init__(self, width: int, use_beta: bool) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))
        self.beta = nn.Parameter(torch.zeros(width))
        self.use_beta = use_beta

    def forward(self, input: Tensor | None) -> Tensor | tuple[Tensor, Tensor | None]:
        """gamma * input + beta; of None, copies of gamma and beta, None for a beta that has no effect."""
        gamma, beta = self.gamma, self.beta if self.use_beta else None
        if input is None:
            return gamma.clone(), None if beta is None else beta.clone()
        return input * gamma if beta is None else input * gamma + beta
