"""What processes that share a sequence know of each other: who has which rows, whose states one needs, and
the one exchange of states per direction.

Every rank gathers all ranks' messages and adds up the ones it needs by itself, in the order of the rows: the
same bits every time, on every rank that sums the same ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from numbers import Integral

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

Group = dist.ProcessGroup | DeviceMesh | None
State = tuple[Tensor, Tensor]  # kv (states, kv_heads, features, head_dim), k (states, kv_heads, features)


def process_group(group: Group) -> dist.ProcessGroup:
    """The process group of a group, of a DeviceMesh of one dimension, or of all processes.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError: the mesh has several dimensions.
        TypeError: it is none of the three, or a group that this process is not in.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("group: torch.distributed has no process group; call init_process_group first")
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"group: expected a DeviceMesh of one dimension, got {group.ndim}: pass mesh['its name']"
            )
        if group.get_coordinate() is not None:  # one that this process is in
            group = group.get_group()
    if group is None:
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):  # new_group gives a number to processes that are not in it
        raise TypeError(
            f"group: expected a ProcessGroup that this process is in, or a DeviceMesh, got {group!r}"
        )
    return group


def check_shard_lengths(
    lengths: Sequence[int] | None, ranks: int, rank: int, rows: int, cu_seqlens: Tensor | None
) -> list[int]:
    """The first row of every rank's shard, and the end of the last: ranks + 1 numbers.

    Without `lengths` all shards count as equally long. Where cu_seqlens is on the CPU its values are checked.

    Raises:
        TypeError: `lengths` is no sequence of integers; NumPy's are taken.
        ValueError: it has not one number for each rank, this rank's is not `rows`, or cu_seqlens is beyond.
    """
    if lengths is None:
        lengths = [rows] * ranks
        if cu_seqlens is not None and not cu_seqlens.is_cuda and int(cu_seqlens[-1]) != rows * ranks:
            raise ValueError(
                f"shard_lengths: needed, as cu_seqlens ends at {int(cu_seqlens[-1])} and {ranks} shards of "
                f"this one's {rows} rows do not: pass the number of rows of every rank"
            )
    if not isinstance(lengths, Sequence) or isinstance(lengths, (str, bytes)):
        raise TypeError(f"shard_lengths: expected a list of ints, got {type(lengths).__name__}")
    for length in lengths:
        if isinstance(length, bool) or not isinstance(length, Integral):
            raise TypeError(f"shard_lengths: expected a list of ints, got {type(length).__name__} in it")
    lengths = [int(length) for length in lengths]
    if len(lengths) != ranks or min(lengths) < 0:
        raise ValueError(f"shard_lengths: expected {ranks} numbers of rows, one per rank, got {lengths}")
    if lengths[rank] != rows:
        raise ValueError(
            f"shard_lengths: expected {rows} (q's rows) at this rank {rank}, got {lengths[rank]}"
        )
    offsets = [0]
    for length in lengths:
        offsets.append(offsets[-1] + length)
    if cu_seqlens is not None and cu_seqlens.device.type == "cpu":
        bounds = [0, *cu_seqlens.tolist(), offsets[-1]]
        if any(a > b for a, b in pairwise(bounds)):
            raise ValueError(
                f"cu_seqlens: must not decrease and must stay within 0 and all shards' {offsets[-1]} rows, "
                f"got {bounds[1:-1]}"
            )
    return offsets


class Packing:
    """Where packed sequences lie from one rank's point of view. All values stay on cu_seqlens' device, and
    nothing waits for it.

    At most one sequence crosses each border between two ranks. `head` is the one that crosses into this
    rank, `tail` the one that crosses out of it; where there is none, their rows are none and no rank counts.
    """

    def __init__(self, cu_seqlens: Tensor, offsets: list[int], rank: int) -> None:
        start, end = offsets[rank], offsets[rank + 1]
        cu_seqlens = cu_seqlens.cummax(0).values.clamp(0, offsets[-1])
        begins, ends = cu_seqlens[:-1], cu_seqlens[1:]
        self.local = cu_seqlens.clamp(start, end) - start
        """(sequences + 1,): cu_seqlens of this rank's rows; sequences elsewhere have none."""
        last = rank + 2 == len(offsets)
        self.owned = (begins >= start) if last else (begins >= start) & (begins < end)
        """(sequences,): whether the sequence begins on this rank; true on one rank for each."""

        def crossing(row: int) -> tuple[Tensor, Tensor]:
            index = torch.searchsorted(cu_seqlens, torch.full_like(cu_seqlens[:1], row), right=True) - 1
            index = index.clamp(0, begins.shape[0] - 1)
            return index, (begins[index] < row) & (ends[index] > row)

        self.head, enters = crossing(start)
        self.tail, leaves = crossing(end)
        head_end = torch.where(enters, ends[self.head].clamp(start, end) - start, 0)
        tail_begin = torch.where(leaves, begins[self.tail].clamp(start, end) - start, end - start)
        self.head_rows = torch.cat([torch.zeros_like(head_end), head_end])
        """(2,): cu_seqlens of the head sequence alone, as far as it is here."""
        self.tail_rows = torch.cat([tail_begin, torch.full_like(tail_begin, end - start)])
        self.before = torch.stack([enters & (begins[self.head] < stop) for stop in offsets[1:]])
        """(ranks, 1): which ranks before this one have rows of the head sequence."""
        self.after = torch.stack([leaves & (ends[self.tail] > begin) for begin in offsets[:-1]])
        """(ranks, 1): which ranks after this one have rows of the tail sequence."""


class Exchange:
    """One all_gather of every rank's tensors, under way until `wait`."""

    def __init__(self, tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
        tensors = list(tensors)
        self._shapes = [x.shape for x in tensors]
        self._message = torch.cat([x.flatten() for x in tensors])  # alive until it is sent
        self._gathered = [torch.empty_like(self._message) for _ in range(dist.get_world_size(group))]
        self._work = dist.all_gather(self._gathered, self._message, group=group, async_op=True)

    def wait(self) -> list[list[Tensor]]:
        """Every rank's tensors."""
        self._work.wait()
        sizes = [shape.numel() for shape in self._shapes]
        return [
            [x.view(shape) for x, shape in zip(torch.split(row, sizes), self._shapes, strict=True)]
            for row in self._gathered
        ]


def add_states(states: Iterable[State], flags: Iterable[Tensor] | None = None) -> State:
    """The sum of states (at least one) in their order; `flags` (bool, of one element each) leave some out."""
    chosen = list(states)
    if flags is not None:
        chosen = [
            (torch.where(flag, kv, 0), torch.where(flag, k, 0))
            for (kv, k), flag in zip(chosen, flags, strict=True)
        ]
    kv, k = chosen[0]
    for more_kv, more_k in chosen[1:]:
        kv, k = kv + more_kv, k + more_k
    return kv, k
