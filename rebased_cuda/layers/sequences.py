"""Where a call's sequences lie in its rows, and where their states lie in a pool; for both layers."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .._checks import check_index, fail, untraced
from .base import check_shape


class Rows(NamedTuple):
    """The rows of a call as the layers take them: B sequences of equal length, or packed."""

    x: Tensor
    """(B, N, hidden_size), or packed (1, rows, hidden_size), where rows of no sequence give 0"""
    cu_seqlens: Tensor | None = None
    """(sequences + 1,) int64: where the packed sequences begin, and the last one ends"""
    order: Tensor | None = None
    """(rows,): the row of x.flatten(0, 1) that each packed row was, where a mask was packed away"""

    @property
    def sequences(self) -> int:
        return self.x.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    def unpack(self, y: Tensor, like: Tensor) -> Tensor:
        """y of the packed rows, each where `like`, the layer's input, has it."""
        if self.order is None:
            return y
        return torch.empty_like(y[0]).index_copy(0, self.order, y[0]).view(like.shape)


def pack(name: str, x: Tensor, attention_mask: Tensor | None, cu_seqlens: Tensor | None) -> Rows:
    """The rows of x (B, N, hidden_size), which errors call `name`.

    A mask's padding goes behind the last sequence, with no synchronisation and no shape that depends on the
    mask.
    """
    if attention_mask is None:
        if cu_seqlens is None:
            return Rows(x)
        cu_seqlens = untraced(check_index, "cu_seqlens", cu_seqlens, x, None, name)
        if x.shape[0] != 1:
            raise fail(name, "batch size 1 where cu_seqlens is given", f"shape {tuple(x.shape)}")
        return Rows(x, cu_seqlens)
    if cu_seqlens is not None:
        raise ValueError("attention_mask: expected None where cu_seqlens says which rows are tokens")
    tokens = token_mask(attention_mask, name, x)
    order = tokens.logical_not().flatten().to(torch.uint8).argsort(stable=True)
    # whatever stands at padding, NaN too, must not reach the projections' gradients
    x = x.masked_fill(tokens.logical_not().unsqueeze(-1), 0)
    packed = x.flatten(0, 1).index_select(0, order).unsqueeze(0)
    return Rows(packed, nn.functional.pad(tokens.sum(1).cumsum(0), (1, 0)), order)


def token_mask(attention_mask: Tensor, name: str, x: Tensor) -> Tensor:
    """The mask as bool (B, N): True for tokens."""
    check_shape("attention_mask", attention_mask, tuple(x.shape[:2]))
    if attention_mask.device != x.device:
        raise fail("attention_mask", f"{name}'s device {x.device}", attention_mask.device)
    if attention_mask.is_floating_point() or attention_mask.is_complex():
        raise TypeError(f"attention_mask: expected bool or an integer dtype, got {attention_mask.dtype}")
    return attention_mask != 0


def values_at_hand(index: Tensor) -> bool:
    """Whether reading them costs no synchronisation, and they are not yet to come, as for a compiler."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return False
    return index.is_cpu and type(index) is Tensor


class Slots:
    """The slots of a pool that a call's sequences use, read and written with no synchronisation.

    Args:
        pool: the parts of a state, (slots, ...) each, checked.
        state_index: (sequences,) int32 or int64, as `rebased_attention_step` takes it.
        sequences: how many there are.
        x: has the device; errors call it `name`.

    Raises:
        ValueError, TypeError: state_index is not as above; on the CPU, where it costs no synchronisation,
            also for its values.
    """

    def __init__(
        self, pool: tuple[Tensor, ...], state_index: Tensor, sequences: int, x: Tensor, name: str
    ) -> None:
        index = untraced(check_index, "state_index", state_index, x, sequences, name)
        slots = pool[0].shape[0]
        if values_at_hand(index):
            _check_slots(index.tolist(), slots)
        self.pool = pool
        self.used = (index >= 0) & (index < slots)
        self.index = index.clamp(0, max(slots - 1, 0))

    def read(self) -> tuple[Tensor, ...]:
        """(sequences, ...): copies of the sequences' slots, of any slot for those that skip."""
        if self.pool[0].shape[0] == 0:
            return tuple(part.new_zeros(self.index.shape[0], *part.shape[1:]) for part in self.pool)
        return tuple(part.index_select(0, self.index) for part in self.pool)

    def write(self, values: tuple[Tensor, ...]) -> None:
        """Puts each sequence's values into its slot, unless it skips.

        Which ones skip is known on the device alone, so all of them write: one that skips writes what the
        first one that does not skip writes, to the same slot. Where all skip, they write what is there.
        """
        if self.index.shape[0] == 0 or self.pool[0].shape[0] == 0:
            return
        here = torch.arange(self.index.shape[0], device=self.index.device)
        source = torch.where(self.used, here, self.used.to(torch.uint8).argmax())
        target, used = self.index.index_select(0, source), self.used.index_select(0, source)
        for part, value in zip(self.pool, values, strict=True):
            writes = used.view(-1, *(1 for _ in part.shape[1:]))
            new = torch.where(writes, value.index_select(0, source), part.index_select(0, target))
            part.index_copy_(0, target, new)

    def without_skipped(self, y: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        """y (sequences, ...), or with cu_seqlens (1, rows, ...), and 0 for sequences that skip."""
        skipped = self.used.logical_not()
        if cu_seqlens is not None:
            if self.used.shape[0] == 0:
                return y
            rows = torch.arange(y.shape[1], device=y.device)
            number = torch.searchsorted(cu_seqlens[1:].contiguous(), rows, right=True)
            skipped = skipped.index_select(0, number.clamp(max=self.used.shape[0] - 1)).unsqueeze(0)
        return y.masked_fill(skipped.view(*skipped.shape, *(1 for _ in y.shape[skipped.dim() :])), 0)


def _check_slots(index: list[int], slots: int) -> None:
    """The values of state_index, in the words of the operator's step."""
    used = [slot for slot in index if slot != -1]
    for slot in used:
        if not 0 <= slot < slots:
            raise ValueError(f"state_index: must lie in -1 (skip) to {slots - 1}, got {slot}")
    if len(set(used)) != len(used):
        raise ValueError(f"state_index: must name each slot once (-1, skip, may repeat), got {index}")
