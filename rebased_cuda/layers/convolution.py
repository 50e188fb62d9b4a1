"""GatedShortConvolution: what a token and the few before it say."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._checks import check_bounds, fail
from ..state import check_size
from .base import (
    ContextParallelLayer,
    call,
    check_apart,
    check_input,
    check_shape,
    check_token,
    check_writable,
    refuse_gradients,
    refuse_in_shards,
)
from .sequences import Slots, pack, values_at_hand


class DepthwiseConvolution(nn.Conv1d):
    """nn.Conv1d with a group for every channel and bias: the module `conv`.

    nn.Conv1d itself takes twice as long for one token, and longer for many too, since it wants its input
    turned. This is as many multiply-adds as the kernel has entries, over memory that holds the channels
    of a token side by side, in float32 (float64 for float64).
    """

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__(channels, channels, kernel_size, groups=channels)

    def forward(self, input: Tensor) -> Tensor:
        """(B, channels, N) of input (B, channels, kernel_size - 1 + N), in the input's dtype."""
        window = input.mT
        size = self.weight.shape[2]
        rows = window.shape[1] - (size - 1)
        weight, y = self.weight, self.bias
        assert y is not None
        if weight.dtype in (torch.float16, torch.bfloat16):
            weight, y = weight.float(), y.float()
        for i, entry in enumerate(weight.squeeze(1).unbind(1)):
            y = torch.addcmul(y, window[:, i : i + rows], entry)
        return y.to(input.dtype).mT


class GatedShortConvolution(ContextParallelLayer):
    """y = u + conv(u) * proj(u): what a token and the few before it say, without attention.

    conv is a causal depthwise convolution over time with bias, proj a Linear with bias. State-dict names:
    conv.weight (hidden_size, 1, kernel_size), conv.bias, proj.weight, proj.bias.

    A state is the last kernel_size - 1 tokens of u, (B, hidden_size, kernel_size - 1) in u's dtype; zeros
    where nothing came before. One that `prefill` made has a token's entries side by side in memory, which is
    what `step` is fastest with; any other strides do.

    Args:
        hidden_size: width of u.
        kernel_size: how many tokens the convolution sees, the present one included.

    Raises:
        ValueError, TypeError: a size is not an integer of at least 1; the message names it.
    """

    def __init__(self, hidden_size: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.hidden_size = hidden_size = check_size("hidden_size", hidden_size, 1)
        self.kernel_size = kernel_size = check_size("kernel_size", kernel_size, 1)
        self.conv = DepthwiseConvolution(hidden_size, kernel_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self,
        u: Tensor,
        attention_mask: Tensor | None = None,
        *,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor:
        """y (B, N, hidden_size) of u (B, N, hidden_size), in u's dtype.

        Args:
            u: (B, N, hidden_size), float32, float64, float16 or bfloat16.
            attention_mask, cu_seqlens: as in `ReBasedAttention.forward`.
            state: what came before, as `prefill` gave it: (B, hidden_size, kernel_size - 1), or with
                cu_seqlens (S, ...), in u's dtype; never modified. Gradients flow into it.

        Raises:
            ValueError, TypeError: an argument is not as above, or u is not in the weights' dtype (except
                under autocast) or not on their device.
        """
        return self._run(u, attention_mask, state, cu_seqlens, None)[0]

    def prefill(
        self,
        u: Tensor,
        attention_mask: Tensor | None = None,
        *,
        state: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state_index: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`forward`, and the state to go on from: (y, state), with gradients through both.

        state_index is as in `ReBasedAttention.prefill`: then `state` is a pool (slots, hidden_size,
        kernel_size - 1), **updated in place** and returned. It raises what `forward` does, and for a pool
        what `ReBasedAttention.prefill` does.
        """
        return self._run(u, attention_mask, state, cu_seqlens, state_index)

    def step(self, u_t: Tensor, state: Tensor, *, state_index: Tensor | None = None) -> Tensor:
        """One token more for each sequence; `state` is **updated in place**.

        Args:
            u_t: (B, hidden_size) or (B, 1, hidden_size).
            state: (B, hidden_size, kernel_size - 1) in u_t's dtype, from `prefill`, or zeros where nothing
                came before; with state_index a pool (slots, ...). Any strides, but each element in memory of
                its own, apart from u_t's.
            state_index: (B,): the slot that each sequence uses, as in `rebased_attention_step`.

        Returns:
            y_t, shaped as u_t and in its dtype.

        Raises:
            ValueError, TypeError: an argument is not as above; the state is untouched.
            RuntimeError: grad mode is on and u_t, the state or a parameter requires grad: call it under
                torch.no_grad(). Or the state was made under torch.inference_mode(), and this is outside.
        """
        u = check_token("u_t", u_t, self.hidden_size).unsqueeze(1)
        before, slots = self._state_before(state, state_index, u.shape[0], u, "u_t")
        refuse_gradients(self, "step", u, state)
        check_writable("state", state)
        check_apart("state", state, "u_t", u)
        y, after = self._convolve(u, before, "u_t")
        if slots is None:
            state.copy_(after)
        else:
            slots.write((after,))
            y = slots.without_skipped(y)
        return y.view(u_t.shape)

    def _run(
        self,
        u: Tensor,
        attention_mask: Tensor | None,
        state: Tensor | None,
        cu_seqlens: Tensor | None,
        state_index: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        check_input("u", u, ("B", "N", self.hidden_size))
        if self.context_parallel_group is not None:
            from ..context_parallel.halo import Halo  # only where torch.distributed is in use

            refuse_in_shards(
                attention_mask=attention_mask, state=state, cu_seqlens=cu_seqlens, state_index=state_index
            )
            halo, after = Halo.apply(  # type: ignore[no-untyped-call]
                u, self.kernel_size - 1, self.context_parallel_group
            )
            return self._convolve(u, halo.mT)[0], after.mT
        rows = pack("u", u, attention_mask, cu_seqlens)
        before, slots = None, None
        if state is not None or state_index is not None:
            before, slots = self._state_before(state, state_index, rows.sequences, u, "u")
        if slots is not None:
            refuse_gradients(self, "prefill with state_index", u, *slots.pool)
            check_writable("state", *slots.pool)
        if rows.cu_seqlens is None:
            y, last = self._convolve(u, before)
            after = last.mT.clone(memory_format=torch.contiguous_format).mT  # else it holds the whole window
        else:
            y, after = self._convolve_packed(rows.x, rows.cu_seqlens, before)
        if slots is not None:
            slots.write((after,))
            y, (after,) = slots.without_skipped(y, rows.cu_seqlens), slots.pool
        return rows.unpack(y, u), after

    def _state_before(
        self, state: Tensor | None, state_index: Tensor | None, sequences: int, u: Tensor, name: str
    ) -> tuple[Tensor, Slots | None]:
        """What came before each sequence, checked, and with state_index the slots that it was read from."""
        count: int | str = sequences if state_index is None else "slots"
        state = check_shape("state", state, (count, self.hidden_size, self.kernel_size - 1))
        if state.dtype != u.dtype:
            raise TypeError(f"state: expected {name}'s dtype {u.dtype}, got {state.dtype}")
        if state.device != u.device:
            raise fail("state", f"{name}'s device {u.device}", state.device)
        if state_index is None:
            return state, None
        slots = Slots((state,), state_index, sequences, u, name)
        return slots.read()[0], slots

    def _convolve(self, u: Tensor, before: Tensor | None, name: str = "u") -> tuple[Tensor, Tensor]:
        """y of u (B, N, hidden_size) after the tokens `before` (a state, or None: zeros).

        And the next state, a view of all those tokens.
        """
        if before is None:
            before = u.new_zeros(u.shape[0], self.hidden_size, self.kernel_size - 1)
        window = torch.cat([before.mT, u], 1)  # (B, kernel_size - 1 + N, hidden_size)
        (convolved,) = call(name, window.mT, self.conv)
        return self._gate(u, convolved.mT, name), window[:, u.shape[1] :].mT

    def _convolve_packed(self, u: Tensor, cu_seqlens: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """`_convolve` of packed sequences, each with the tokens before it put in front of it.

        The window is: kernel_size - 1 zeros, for rows before the first sequence; then of each sequence the
        tokens before it and its own; then the rows behind the last one.
        """
        count, sequences, size = u.shape[1], cu_seqlens.shape[0] - 1, self.kernel_size - 1
        if before is None:
            before = u.new_zeros(sequences, self.hidden_size, size)
        if values_at_hand(cu_seqlens):
            check_bounds(cu_seqlens.tolist(), count)
        bounds = cu_seqlens.clamp(0, count).cummax(0).values
        row, entry = torch.arange(count, device=u.device), torch.arange(size, device=u.device)
        begun = torch.searchsorted(bounds[:-1].contiguous(), row, right=True)  # sequences, at each row
        # where in the window the tokens before each sequence begin
        first = bounds + size * torch.arange(1, sequences + 2, device=u.device)
        place = torch.cat([entry, (first[:-1, None] + entry).flatten(), row + size * (begun + 1)])
        given = torch.cat([u.new_zeros(size, self.hidden_size), before.mT.flatten(0, 1), u[0]])
        window = torch.empty_like(given).index_copy(0, place, given)
        after = window.index_select(0, (first[1:, None] - size + entry).flatten())
        (convolved,) = call("u", window.mT.unsqueeze(0), self.conv)
        y = self._gate(u, convolved.mT.index_select(1, row + size * begun), "u")
        outside = (row < bounds[0]) | (row >= bounds[-1])
        return y.masked_fill(outside[:, None], 0), after.view(sequences, size, self.hidden_size).mT

    def _gate(self, u: Tensor, convolved: Tensor, name: str) -> Tensor:
        (projected,) = call(name, u, self.proj)
        return torch.addcmul(u, convolved, projected).to(u.dtype)
