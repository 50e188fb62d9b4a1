"""The rows just before a shard: what a short convolution needs of the ranks before it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .exchange import Exchange


class Halo(torch.autograd.Function):
    """From u (B, N, C), the rows of this rank: the `width` rows before them and the `width` last rows of all
    ranks together, (B, width, C) each, zero where a sequence has not begun. Only the first has a gradient.

    Every rank sends its last rows and how many they are, at most `width`; shorter shards, empty ones too,
    let the rows of ranks further back through.
    """

    @staticmethod
    def forward(ctx: Any, u: Tensor, width: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        count = min(width, u.shape[1])
        last = u.new_zeros(u.shape[0], width, u.shape[2])
        last[:, width - count :] = u[:, u.shape[1] - count :]
        present = u.new_zeros(width)
        present[width - count :] = 1
        messages = Exchange((last, present), group).wait()
        counts = torch.stack([present for _, present in messages]).sum(1).long()
        ctx.group, ctx.rows, ctx.width, ctx.counts = group, u.shape[1], width, counts

        def before(end: int) -> Tensor:
            total = torch.zeros_like(last)
            for i in range(end):
                total += _shifted(messages[i][0], counts[i + 1 : end].sum())
            return total

        after = before(ranks)
        ctx.mark_non_differentiable(after)
        return before(rank), after

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> Any:
        rank, ranks = dist.get_rank(ctx.group), dist.get_world_size(ctx.group)
        messages = Exchange((gradient.contiguous(),), ctx.group).wait()
        last = torch.zeros_like(gradient)
        for i in range(rank + 1, ranks):
            last += _shifted(messages[i][0], -ctx.counts[rank + 1 : i].sum())
        count = min(ctx.width, ctx.rows)
        gradient_u = gradient.new_zeros(gradient.shape[0], ctx.rows, gradient.shape[2])
        gradient_u[:, ctx.rows - count :] = last[:, ctx.width - count :]
        return gradient_u, None, None


def _shifted(rows: Tensor, distance: Tensor) -> Tensor:
    """Row i + distance of rows (B, width, C) in place i; zero where there is none."""
    width = rows.shape[1]
    index = torch.arange(width, device=rows.device) + distance
    inside = (index >= 0) & (index < width)
    return torch.where(inside[:, None], rows.index_select(1, index.clamp(0, width - 1)), 0)
