"""The op over the rows of one rank: what is sent, what is answered, and the gradients of both.

The package's docstring says how it works.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
import torch.distributed as dist
from torch import Tensor

from .._checks import GivenOptions, Options, check_bool, check_call
from ..autograd import AttentionBackward, AttentionWithState, ops
from ..state import RebasedState
from .exchange import Exchange, Group, Packing, State, add_states, check_shard_lengths, process_group


class _Call(NamedTuple):
    """What a call is beyond its tensors."""

    group: dist.ProcessGroup
    rank: int
    ranks: int
    packing: Packing | None
    return_state: bool
    options: Options

    @property
    def cu_seqlens(self) -> Tensor | None:
        """Of this rank's rows."""
        return None if self.packing is None else self.packing.local

    @property
    def crossing(self) -> Packing | None:
        """Given where a message is the state of the one sequence that crosses a border, not of every one."""
        return None if self.return_state else self.packing

    def before(self, states: list[State]) -> State:
        """What the rows of the ranks before this one add to the state of each sequence, in order."""
        states = states[: self.rank]
        if self.crossing is None:
            return add_states(states)
        return _place(
            add_states(states, self.crossing.before[: self.rank]), self.crossing.head, self.crossing
        )

    def after(self, states: list[State]) -> State:
        """What the rows of the ranks after this one add to the reverse state, the last rank's first."""
        states = states[: self.rank : -1]
        if self.crossing is None:
            return add_states(states)
        flags = self.crossing.after[self.rank + 1 :].flip(0)
        return _place(add_states(states, flags), self.crossing.tail, self.crossing)

    def owned_initial(self, kv: Tensor, k: Tensor) -> State:
        """The gradient of the initial state as far as its sequences begin on this rank, else zero."""
        if self.packing is not None:
            owned = self.packing.owned
            return torch.where(owned[:, None, None, None], kv, 0), torch.where(owned[:, None, None], k, 0)
        return (kv, k) if self.rank == 0 else (torch.zeros_like(kv), torch.zeros_like(k))


def _place(state: State, sequence: Tensor, packing: Packing) -> State:
    """The state of one sequence among those of all, zero for the others."""
    sequences = packing.local.shape[0] - 1
    kv, k = (x.new_zeros(sequences, *x.shape[1:]).index_copy(0, sequence, x) for x in state)
    return kv, k


def _send_state(call: _Call, k: Tensor, v: Tensor, gamma_k: Tensor | None, beta_k: Tensor | None) -> Exchange:
    """Sends what this rank's rows add to the state."""
    feature_map, layer_norm, _, _, layer_norm_eps, _ = call.options
    rows = call.cu_seqlens if call.crossing is None else call.crossing.tail_rows
    if call.rank + 1 == call.ranks and not call.return_state:
        # nobody reads the last rank's message: it is the state of no rows
        k, v, rows = k[:, :, :0], v[:, :, :0], None if rows is None else rows * 0
    own = ops.forward_state(k, v, gamma_k, beta_k, rows, feature_map, layer_norm, layer_norm_eps)
    return Exchange(own, call.group)


class _Attention(torch.autograd.Function):
    """A rank's rows, from the state that the rows of the ranks before it leave behind."""

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
        initial_kv: Tensor | None,
        initial_k: Tensor | None,
        call: _Call,
        begun: Exchange | None,
    ) -> Any:
        exchange = _send_state(call, k, v, gamma_k, beta_k) if begun is None else begun
        initial = [] if initial_kv is None or initial_k is None else [(initial_kv, initial_k)]

        def answer(start_kv: Tensor | None, start_k: Tensor | None) -> Any:
            inputs = (q, k, v, gamma_q, beta_q, gamma_k, beta_k, start_kv, start_k, call.cu_seqlens)
            y, r, *_ = ops.forward_with_state(*inputs, *call.options, False)
            ctx.save_for_backward(*inputs, y, r)
            return y

        if call.rank == 0:  # needs no message
            y = answer(initial_kv, initial_k)
            states = [(kv, k) for kv, k in exchange.wait()]
        else:
            states = [(kv, k) for kv, k in exchange.wait()]
            y = answer(*add_states([*initial, call.before(states)]))
        ctx.call = call
        ctx.set_materialize_grads(False)
        return (y, *add_states([*initial, *states])) if call.return_state else y

    @staticmethod
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_kv: Tensor | None = None, grad_k: Tensor | None = None
    ) -> Any:
        *inputs, y, r = ctx.saved_tensors
        grad_y = torch.zeros_like(y) if grad_y is None else grad_y
        gradients: Any = _AttentionBackward.apply(  # type: ignore[no-untyped-call]
            ctx.call, ctx.needs_input_grad[7], grad_y, grad_kv, grad_k, *inputs, y, r
        )
        wanted = ctx.needs_input_grad[:9]
        return *(g if needed else None for g, needed in zip(gradients, wanted, strict=True)), None, None


class _AttentionBackward(AttentionBackward):
    """The gradients of a rank's rows, from the reverse state that the rows of the ranks after it leave."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        of_initial: bool,
        grad_y: Tensor,
        grad_kv: Tensor | None,
        grad_k: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *rest: Any,
    ) -> Any:
        *parameters, start_kv, start_k, cu_seqlens, y, r = rest

        def part(name: str, grad_end: Any, start: Any, bounds: Tensor | None, rows: int = q.shape[2]) -> Any:
            grad_y_, q_, k_, v_, y_, r_ = (x[:, :, :rows] for x in (grad_y, q, k, v, y, r))
            inputs = (q_, k_, v_, *parameters, *start, bounds, y_, r_)
            return ops.backward_with_state(grad_y_, *grad_end, *inputs, *call.options, name)

        none, start = (None, None), (start_kv, start_k)
        bounds = cu_seqlens if call.crossing is None else call.crossing.head_rows
        if call.rank > 0:
            own = part("reverse_state", none, none, bounds)[7:]
        else:  # nobody reads the first rank's message: it is the reverse state of no rows
            own = part("reverse_state", none, none, None if bounds is None else bounds * 0, 0)[7:]
        of_copy: list[Tensor] = []  # the gradient of this rank's copy of the final state
        if call.return_state:
            given = zip((grad_kv, grad_k), own, strict=True)
            of_copy = [torch.zeros_like(x) if g is None else g for g, x in given]
        exchange = Exchange((*own, *of_copy), call.group)

        of_queries: Any = part("queries", none, start, cu_seqlens)  # needs no message
        messages = exchange.wait()
        ends: list[State] = [(kv, k) for *_, kv, k in messages] if call.return_state else []
        if call.rank + 1 < call.ranks:
            ends.append(call.after([(kv, k) for kv, k, *_ in messages]))
        grad_end: Any = add_states(ends) if ends else none
        gradients = list(part("keys", grad_end, start if of_initial else none, cu_seqlens))
        for i in (0, 3, 4):  # q, gamma_q, beta_q
            gradients[i] = of_queries[i]
        if of_initial:
            gradients[7:] = call.owned_initial(gradients[7], gradients[8])
        return tuple(gradients)


@overload
def context_parallel_rebased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma_q: Tensor | None = None,
    beta_q: Tensor | None = None,
    gamma_k: Tensor | None = None,
    beta_k: Tensor | None = None,
    *,
    group: Group = None,
    feature_map: str = "outer",
    layer_norm: str | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    layer_norm_eps: float = 1e-5,
    normalize: bool = True,
    initial_state: RebasedState | None = None,
    return_state: Literal[False] = False,
    cu_seqlens: Tensor | None = None,
    shard_lengths: Sequence[int] | None = None,
    exchange: StateExchange | None = None,
) -> Tensor: ...


@overload
def context_parallel_rebased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma_q: Tensor | None = None,
    beta_q: Tensor | None = None,
    gamma_k: Tensor | None = None,
    beta_k: Tensor | None = None,
    *,
    group: Group = None,
    feature_map: str = "outer",
    layer_norm: str | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    layer_norm_eps: float = 1e-5,
    normalize: bool = True,
    initial_state: RebasedState | None = None,
    return_state: Literal[True],
    cu_seqlens: Tensor | None = None,
    shard_lengths: Sequence[int] | None = None,
    exchange: StateExchange | None = None,
) -> tuple[Tensor, RebasedState]: ...


def context_parallel_rebased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gamma_q: Tensor | None = None,
    beta_q: Tensor | None = None,
    gamma_k: Tensor | None = None,
    beta_k: Tensor | None = None,
    *,
    group: Group = None,
    feature_map: str = "outer",
    layer_norm: str | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
    layer_norm_eps: float = 1e-5,
    normalize: bool = True,
    initial_state: RebasedState | None = None,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    shard_lengths: Sequence[int] | None = None,
    exchange: StateExchange | None = None,
) -> Tensor | tuple[Tensor, RebasedState]:
    """`rebased_attention` of a sequence whose rows are spread over the processes of a group.

    Rank 0 has the first rows, rank 1 those that follow, and so on; shards may differ in length and may be
    empty. Every rank calls it with the same options and takes part in the backward. Losses are taken to be
    each rank's own and to count together: gradients are those of their sum over the ranks. The gradients of
    what all ranks have alike (gamma, beta, initial_state) are each rank's share, to be summed over the ranks
    as those of any other parameter are.

    Args:
        q, k, v: this rank's rows (B, heads, its N, ...), otherwise as in `rebased_attention`, and so are
            gamma_q to beta_k, feature_map, layer_norm, scale, eps, layer_norm_eps and normalize.
        group: a ProcessGroup, a DeviceMesh of one dimension (``mesh["context"]``), or None: all processes.
        initial_state: what came before the first rank's rows, the same on every rank. Its gradient is on the
            rank where its sequence begins, and zero on the others.
        return_state: also return the state after the last rank's rows, on every rank.
        cu_seqlens: of the packed sequences over all shards, the same on every rank.
        shard_lengths: the number of rows of every rank. Only needed with cu_seqlens, and there only if shards
            differ in length.
        exchange: what `begin_exchange` returned for these k, v, gamma_k and beta_k and the same options, on
            every rank; good for one call.

    Returns:
        y (B, Hq, its N, dv) of this rank's rows; with return_state, (y, RebasedState).

    Raises:
        ValueError, TypeError: as `rebased_attention`, and for group, shard_lengths and exchange.
        RuntimeError: torch.distributed is not initialised; in double backward.

    Each direction is one all_gather to which a rank adds one state (kv, k) of B sequences, in float32. Of
    packed sequences it is the state of the one that crosses to the next rank; with return_state it is that
    of all of them, and in backward the gradient of the returned state goes with it.
    """
    given = (k, v, gamma_k, beta_k, cu_seqlens)
    tensors, cu_seqlens, call = _checked(
        (q, k, v, gamma_q, beta_q, gamma_k, beta_k),
        (feature_map, layer_norm, scale, eps, layer_norm_eps, normalize),
        (initial_state, return_state, cu_seqlens),
        (group, shard_lengths),
    )
    begun = None if exchange is None else _taken(exchange, given, call)
    if call.cu_seqlens is None and cu_seqlens is not None:  # no sequence: nothing to tell the others
        result: Any = AttentionWithState.apply(  # type: ignore[no-untyped-call]
            call.return_state, call.options, torch.is_grad_enabled(), *tensors, torch.zeros_like(cu_seqlens)
        )
    else:
        result = _Attention.apply(*tensors, call, begun)  # type: ignore[no-untyped-call]
    return (result[0], RebasedState(result[1], result[2])) if call.return_state else result


def _checked(
    inputs: tuple[Any, ...],
    options: GivenOptions,
    of_sequences: tuple[RebasedState | None, bool, Tensor | None],
    of_processes: tuple[Group, Sequence[int] | None],
) -> tuple[list[Tensor | None], Tensor | None, _Call]:
    """The inputs, checked; cu_seqlens; the rest. With cu_seqlens of no sequence the call has none."""
    initial_state, return_state, cu_seqlens = of_sequences
    tensors, cu_seqlens, checked = check_call(inputs, options, initial_state, cu_seqlens)
    return_state = check_bool("return_state", return_state)
    group, shard_lengths = process_group(of_processes[0]), of_processes[1]
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    offsets = check_shard_lengths(shard_lengths, ranks, rank, inputs[0].shape[2], cu_seqlens)
    packing = None
    if cu_seqlens is not None and cu_seqlens.shape[0] > 1:
        packing = Packing(cu_seqlens, offsets, rank)
    return tensors, cu_seqlens, _Call(group, rank, ranks, packing, return_state, checked)


class StateExchange:
    """An exchange of states under way: `begin_exchange` gives it, a call of the function takes it."""

    def __init__(self, given: tuple[Any, ...], call: _Call, exchange: Exchange | None) -> None:
        self._given, self._call, self._exchange = given, call, exchange
        self._taken = False


def begin_exchange(
    k: Tensor,
    v: Tensor,
    gamma_k: Tensor | None = None,
    beta_k: Tensor | None = None,
    *,
    group: Group = None,
    feature_map: str = "outer",
    layer_norm: str | None = None,
    layer_norm_eps: float = 1e-5,
    return_state: bool = False,
    cu_seqlens: Tensor | None = None,
    shard_lengths: Sequence[int] | None = None,
) -> StateExchange:
    """Sends what this rank's keys and values mean to the ranks after it, and does not wait.

    Until the result is handed to `context_parallel_rebased_attention` as `exchange`, with the same arguments,
    the message is on its way: compute there what needs no answer, such as the projection of the queries. On
    every rank or on none. Not differentiable itself: the gradients are that call's.

    Args, Raises: as in `context_parallel_rebased_attention`.
    """
    given = (k, v, gamma_k, beta_k, cu_seqlens)
    with torch.no_grad():
        try:
            tensors, cu_seqlens, call = _checked(
                (k, k, v, None, None, gamma_k, beta_k),
                (feature_map, layer_norm, None, 0.0, layer_norm_eps, True),
                (None, return_state, cu_seqlens),
                (group, shard_lengths),
            )
        except (ValueError, TypeError) as error:  # k stood for the queries that are not there yet
            raise type(error)(re.sub(r"\bq\b", "k", str(error)).replace("Hq", "Hkv")) from None
        _, keys, values, _, _, gamma, beta, _, _ = tensors
        assert keys is not None
        assert values is not None
        nothing = call.cu_seqlens is None and cu_seqlens is not None
        exchange = None if nothing else _send_state(call, keys, values, gamma, beta)
    return StateExchange(given, call, exchange)


def _taken(begun: StateExchange, given: tuple[Any, ...], call: _Call) -> Exchange | None:
    """The exchange that was begun, if it is that of this call; it can be taken once."""
    if not isinstance(begun, StateExchange):
        raise TypeError(f"exchange: expected what begin_exchange returned, got {type(begun).__name__}")

    def described(of: _Call) -> tuple[Any, ...]:
        feature_map, layer_norm, _, _, layer_norm_eps, _ = of.options
        return of.group, of.return_state, feature_map, layer_norm, layer_norm_eps

    if begun._taken:
        raise ValueError("exchange: was given to a call before; begin one for each")
    same = all(a is b for a, b in zip(begun._given, given, strict=True))
    if not same or described(begun._call) != described(call):
        raise ValueError("exchange: was begun with other k, v, parameters or options than this call's")
    begun._taken = True
    return begun._exchange
