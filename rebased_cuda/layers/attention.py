"""ReBasedAttention, the paper's layer, and QueryKeyNorm, which holds its gamma and beta."""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn

from .._checks import check_bool, check_options, check_state, fail, untraced
from ..attention import rebased_attention, rebased_attention_step
from ..reference import attention_matrix
from ..state import (
    MAX_FEATURE_DIM,
    MAX_HEAD_DIM,
    RebasedState,
    check_layout,
    check_memory,
    check_size,
    num_features,
)
from .base import (
    ContextParallelLayer,
    call,
    check_input,
    check_slots_apart,
    check_token,
    check_writable,
    is_plain_call,
    refuse_gradients,
    refuse_in_shards,
)
from .sequences import Rows, Slots, pack

_ACCUMULATORS = (torch.float32, torch.float64)


class QueryKeyNorm(nn.LayerNorm):
    """gamma and beta of a layer's queries or keys: the module `ln_q` or `ln_k`.

    The operator does the LayerNorm and the affine itself, so the layer calls this module with None and gets
    gamma and beta from it. It calls, and does not read the attributes, because whatever takes hold of a
    module does so at its call: hooks, offloading, sharding, adapters and pruning. It is an nn.LayerNorm,
    because optimisers that spare norms from weight decay look for one.

    Args:
        heads, feature_dim: gamma and beta have heads * feature_dim entries.
        layer_norm: "token", "head" or None, as in `ReBasedAttention`.
        eps: added to the variance.
        use_gamma, use_beta: False leaves gamma (weight) or beta (bias) out.
    """

    def __init__(
        self,
        heads: int,
        feature_dim: int,
        layer_norm: str | None,
        eps: float,
        use_gamma: bool,
        use_beta: bool,
    ) -> None:
        super().__init__(heads * feature_dim, eps, use_gamma or use_beta, use_beta)
        self.feature_dim = feature_dim
        self.layer_norm = layer_norm
        if not use_gamma:
            self.register_parameter("weight", None)

    def reset_parameters(self) -> None:
        """gamma = 1 and beta = 0, as far as there are any."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @overload
    def forward(self, input: None) -> tuple[Tensor | None, Tensor | None]: ...

    @overload
    def forward(self, input: Tensor) -> Tensor: ...

    def forward(self, input: Tensor | None) -> Tensor | tuple[Tensor | None, Tensor | None]:
        """What the layer does to its queries or keys, or, of None, the parameters to do it with.

        Args:
            input: (..., heads * feature_dim), what proj_q or proj_k gives; or None. An argument must be
                given: wrappers, such as PEFT's for the tuning of norms, hand on the first one.

        Returns:
            Of a tensor: (..., heads * feature_dim), gamma * LayerNorm(input) + beta, with the LayerNorm over
            all entries for "token" (that of nn.LayerNorm), over each head's for "head", and none for None.
            Of None: (gamma, beta), (heads * feature_dim,) each, float32 or float64, None where it is left
            out. They are copies, because what is hooked to the call may free the parameters when it returns,
            before the operator reads them, as fully_shard does.
        """
        if input is None:
            gamma, beta = (None if x is None else x.clone() for x in (self.weight, self.bias))
            return _converted(gamma), _converted(beta)
        if self.layer_norm == "token":
            return super().forward(input)
        if self.layer_norm == "head":
            heads = input.reshape(*input.shape[:-1], -1, self.feature_dim)
            input = nn.functional.layer_norm(heads, (self.feature_dim,), eps=self.eps).flatten(-2)
        if self.weight is not None:
            input = input * self.weight
        return input if self.bias is None else input + self.bias


def _affine(norm: nn.LayerNorm) -> tuple[Tensor | None, Tensor | None]:
    """gamma and beta (heads * feature_dim,) of ln_q or ln_k, or of what was put in their place.

    Where nothing else would happen at the call they are read: a call, and the copies that it gives, take as
    long as a Linear of one token.
    """
    if (type(norm) is QueryKeyNorm and is_plain_call(norm)) or type(norm).forward is nn.LayerNorm.forward:
        return _converted(norm.weight), _converted(norm.bias)
    gamma, beta = norm(None)
    return gamma, beta


def _converted(parameter: Tensor | None) -> Tensor | None:
    """In float32, or in float64 of float64: what the operator computes in."""
    if parameter is None or parameter.dtype in _ACCUMULATORS:
        return parameter
    return parameter.float()


class ReBasedAttention(ContextParallelLayer):
    """Multi-head ReBased attention: projections, LayerNorm and affine of q and k, linear attention.

    With the defaults it is the authors' layer, in arithmetic and in the names of its state dict, so that
    their checkpoints load with a strict load_state_dict: proj_q, proj_k, proj_v, proj_o (.weight), ln_q and
    ln_k (.weight = gamma, .bias = beta, one entry per head and feature).

    gamma and beta come from calling ln_q and ln_k (`QueryKeyNorm`), so that hooks, offloading, sharding and
    adapters of these modules work. A plain nn.LayerNorm put in the place of one is read instead. The operator
    takes gamma and beta in float32 whatever dtype they have (float64 for float64 inputs).

    Args:
        hidden_size: width of x.
        num_heads: query heads.
        feature_dim: d, the width of one head's q and k, 1 to 128.
        num_kv_heads: heads of k and v, a divisor of num_heads; num_heads when None. Query head h uses kv head
            h // (num_heads / num_kv_heads).
        head_dim: dv, the width of one head's v, 1 to 256; when None
            hidden_size // (num_kv_heads or num_heads), which need not divide evenly.
        feature_map, scale, eps, layer_norm_eps: as in `rebased_attention`.
        layer_norm: "token" (over all heads' features of a token together, the authors'), "head" or None.
        use_gamma, use_beta: False leaves gamma (ln_q.weight, ln_k.weight) or beta (the .bias) out.

    NumPy's numbers are taken as Python's are.

    Raises:
        ValueError, TypeError: an argument is not as above; the message names it.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int = 12,
        feature_dim: int = 16,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        feature_map: str = "outer",
        layer_norm: str | None = "token",
        use_gamma: bool = True,
        use_beta: bool = True,
        scale: float | None = None,
        eps: float = 1e-12,
        layer_norm_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        hidden_size = check_size("hidden_size", hidden_size, 1)
        num_heads = check_size("num_heads", num_heads, 1)
        feature_dim = check_size("feature_dim", feature_dim, 1, MAX_FEATURE_DIM)
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        num_kv_heads = check_size("num_kv_heads", num_kv_heads, 1, num_heads)
        if num_heads % num_kv_heads != 0:
            raise fail("num_kv_heads", f"a divisor of num_heads {num_heads}", num_kv_heads)
        head_dim = hidden_size // num_kv_heads if head_dim is None else head_dim
        head_dim = check_size("head_dim", head_dim, 1, MAX_HEAD_DIM)
        options = check_options(feature_map, layer_norm, scale, eps, layer_norm_eps, True, feature_dim)
        _, _, checked_scale, eps, layer_norm_eps, _ = options
        use_gamma, use_beta = check_bool("use_gamma", use_gamma), check_bool("use_beta", use_beta)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.feature_dim = feature_dim
        self.head_dim = head_dim
        self.feature_map = feature_map
        self.layer_norm = layer_norm
        self.scale = None if scale is None else checked_scale
        self.eps = eps
        self.layer_norm_eps = layer_norm_eps

        self.proj_q = nn.Linear(hidden_size, num_heads * feature_dim, bias=False)
        self.proj_k = nn.Linear(hidden_size, num_kv_heads * feature_dim, bias=False)
        self.proj_v = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.proj_o = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        norm = (feature_dim, layer_norm, layer_norm_eps, use_gamma, use_beta)
        self.ln_q = QueryKeyNorm(num_heads, *norm)
        self.ln_k = QueryKeyNorm(num_kv_heads, *norm)

    def extra_repr(self) -> str:
        return (
            f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, feature_dim={self.feature_dim}, "
            f"head_dim={self.head_dim}, feature_map={self.feature_map!r}, layer_norm={self.layer_norm!r}"
        )

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        state: RebasedState | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """Causal attention of every token to itself and those before it.

        Args:
            x: (B, N, hidden_size), float32, float64, float16 or bfloat16.
            attention_mask: (B, N) bool or integers, nonzero for tokens, 0 for padding, on x's device. Padding
                may stand anywhere: the tokens of a row count as one sequence, as if nothing were between
                them. It is packed away inside with no synchronisation and no shape that depends on the mask.
            state: what came before, of B sequences, as `prefill` gave it; never modified. Gradients flow into
                it. float32 (float64 for float64).
            cu_seqlens: (S + 1,) int32 or int64 on x's device: S sequences packed along N (then B is 1, and
                the state of S sequences), sequence s in rows cu_seqlens[s] to cu_seqlens[s + 1]. On the CPU
                the values are checked, on a GPU clamped. Not together with attention_mask.

        Returns:
            y (B, N, hidden_size), 0 at padding and in rows of no sequence.

        Raises:
            ValueError, TypeError: an argument is not as above, or x is not in the weights' dtype (under
                autocast any dtype but float64 may meet any other) or not on their device.
        """
        return self._attend(x, attention_mask, state, cu_seqlens, None, False)[0]

    def prefill(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        *,
        state: RebasedState | None = None,
        cu_seqlens: Tensor | None = None,
        state_index: Tensor | None = None,
    ) -> tuple[Tensor, RebasedState]:
        """`forward`, and the state to go on from, with `step` or with more tokens at once.

        Args:
            x, attention_mask, state, cu_seqlens: as in `forward`.
            state_index: (B,), or with cu_seqlens (S,), int32 or int64 on x's device. Then `state` is a pool
                (slots, ...), **updated in place**: sequence b goes on from slot state_index[b], and what it
                leaves is written there. A sequence that begins needs a slot of zeros: whoever hands a slot on
                empties it with ``state.kv[slot] = 0`` and ``state.k[slot] = 0``. -1 skips a sequence, as in
                `rebased_attention_step`: y is 0 there and nothing is written.

        Returns:
            (y, state), of B sequences, or S with cu_seqlens; with state_index the pool itself. The state is
            float32 (float64 for float64). Gradients flow out of it; for decoding call this under
            torch.no_grad().

        Raises:
            ValueError, TypeError: as `forward`, or state_index is not as above; a pool is untouched.
            RuntimeError: with state_index, grad mode is on and x, the pool or a parameter requires grad: a
                pool is for inference. Or it was made under torch.inference_mode(), and this is outside.
        """
        y, state = self._attend(x, attention_mask, state, cu_seqlens, state_index, True)
        assert state is not None
        return y, state

    def step(self, x_t: Tensor, state: RebasedState, *, state_index: Tensor | None = None) -> Tensor:
        """One token more for each sequence.

        Args:
            x_t: (B, hidden_size) or (B, 1, hidden_size).
            state: of B sequences, from `prefill`, or `RebasedState.zeros` for none; **updated in place**.
                With state_index a pool (slots, ...). Slots may lie apart in memory, each in one piece.
            state_index: (B,): the slot that each sequence uses, as in `rebased_attention_step`.

        Returns:
            y_t, shaped as x_t: what `forward` of the whole gives in its last row.

        Raises:
            ValueError, TypeError: an argument is not as above; the state is untouched.
            RuntimeError: grad mode is on and x_t, the state or a parameter requires grad: call it under
                torch.no_grad().
        """
        x = check_token("x_t", x_t, self.hidden_size)
        refuse_gradients(self, "step", x)
        q, k, v = self._projected(x, "x_t")
        y = rebased_attention_step(q, k, v, state, **self._options(), state_index=state_index)
        output: Tensor = self.proj_o(y.flatten(1))
        return output if x is x_t else output.unsqueeze(1)

    def attention_matrix(self, x: Tensor) -> Tensor:
        """Where each token of x (B, N, hidden_size) attends: (B, num_heads, N, N), in O(N^2).

        See `rebased_cuda.attention_matrix`; times v it is what proj_o is applied to. Raises RuntimeError
        where the sequence is shared out over processes: no rank has all of it.
        """
        if self.context_parallel_group is not None:
            raise RuntimeError(
                "attention_matrix: needs the whole sequence, which context_parallelize shares out"
            )
        check_input("x", x, ("B", "N", self.hidden_size))
        q, k, _ = self._projected(x)
        return attention_matrix(q.transpose(1, 2), k.transpose(1, 2), **self._options())

    def _attend(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        state: RebasedState | None,
        cu_seqlens: Tensor | None,
        state_index: Tensor | None,
        return_state: bool,
    ) -> tuple[Tensor, RebasedState | None]:
        check_input("x", x, ("B", "N", self.hidden_size))
        options = self._options()
        options["return_state"] = return_state
        initial, slots = state, None
        if self.context_parallel_group is None:
            rows = pack("x", x, attention_mask, cu_seqlens)
            q, k, v = self._projected(rows.x)
            if state_index is not None:
                initial, slots = self._slots(state, state_index, rows, q)
            try:
                result = rebased_attention(
                    q.transpose(1, 2),
                    k.transpose(1, 2),
                    v.transpose(1, 2),
                    **options,
                    initial_state=initial,
                    cu_seqlens=rows.cu_seqlens,
                )
            except (ValueError, TypeError):
                if state is not None and slots is None:  # the op would call it by another name
                    self._check_state(state, "sequences", rows.sequences, q)
                raise
        else:
            refuse_in_shards(
                attention_mask=attention_mask, state=state, cu_seqlens=cu_seqlens, state_index=state_index
            )
            rows = Rows(x)
            result = self._attend_over_ranks(x, options)
        final: Any
        y, final = result if return_state else (result, None)
        output: Tensor = self.proj_o(y.transpose(1, 2).flatten(2))
        if slots is not None:
            slots.write(final)
            output, final = slots.without_skipped(output, rows.cu_seqlens), RebasedState(*slots.pool)
        return rows.unpack(output, x), final

    def _check_state(self, state: Any, counted: str, count: int, q: Tensor) -> RebasedState:
        """The state of `count` sequences or slots."""
        sizes = (count, self.num_kv_heads, num_features(self.feature_map, self.feature_dim), self.head_dim)
        untraced(check_state, "state", state, sizes, counted, q)
        for name, part in zip(("state.kv", "state.k"), state, strict=True):
            check_memory(name, part)
        return RebasedState(*state)

    def _slots(
        self, state: RebasedState | None, state_index: Tensor, rows: Rows, q: Tensor
    ) -> tuple[RebasedState, Slots]:
        """What came before each sequence, and the slots of the pool `state` that it was read from."""
        count = rows.sequences
        if isinstance(state, tuple) and len(state) == 2 and isinstance(state[0], Tensor):
            check_layout("state.kv", state[0])  # a nested tensor has no shape
            count = state[0].shape[0] if state[0].dim() else 0
        pool = self._check_state(state, "slots", count, q)
        refuse_gradients(self, "prefill with state_index", q, *pool)
        check_writable("state.kv", pool.kv)
        check_writable("state.k", pool.k)
        check_slots_apart("state.kv", pool.kv, "state.k", pool.k)
        slots = Slots(pool, state_index, rows.sequences, q, "x")
        return RebasedState(*slots.read()), slots

    def _attend_over_ranks(self, x: Tensor, options: dict[str, Any]) -> Any:
        """The queries are projected while the state of the keys is on its way."""
        # only where torch.distributed is in use: not every torch has it
        from ..context_parallel import begin_exchange, context_parallel_rebased_attention

        def heads(x: Tensor, count: int) -> Tensor:
            return torch.unflatten(x, -1, (count, -1)).transpose(1, 2)

        k, v = (heads(part, self.num_kv_heads) for part in call("x", x, self.proj_k, self.proj_v))
        names = ("gamma_k", "beta_k", "feature_map", "layer_norm", "layer_norm_eps", "return_state")
        group = self.context_parallel_group
        exchange = begin_exchange(k, v, **{name: options[name] for name in names}, group=group)
        (q,) = (heads(part, self.num_heads) for part in call("x", x, self.proj_q))
        return context_parallel_rebased_attention(q, k, v, **options, group=group, exchange=exchange)

    def _projected(self, x: Tensor, name: str = "x") -> tuple[Tensor, Tensor, Tensor]:
        """q (..., num_heads, feature_dim), and k and v likewise with num_kv_heads, of x (..., hidden_size).

        Errors call x `name`.
        """
        q, k, v = call(name, x, self.proj_q, self.proj_k, self.proj_v)
        rows = x.shape[:-1]
        return (
            q.view(*rows, self.num_heads, self.feature_dim),
            k.view(*rows, self.num_kv_heads, self.feature_dim),
            v.view(*rows, self.num_kv_heads, self.head_dim),
        )

    def _options(self) -> dict[str, Any]:
        gamma_q, beta_q = _affine(self.ln_q)
        gamma_k, beta_k = _affine(self.ln_k)
        return {
            "gamma_q": gamma_q,
            "beta_q": beta_q,
            "gamma_k": gamma_k,
            "beta_k": beta_k,
            "feature_map": self.feature_map,
            "layer_norm": self.layer_norm,
            "scale": self.scale,
            "eps": self.eps,
            "layer_norm_eps": self.layer_norm_eps,
        }
