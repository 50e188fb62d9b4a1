"""rebased_attention of a sequence that is sharded along N over processes (context parallelism).

Linear attention makes this cheap: what the rows of one rank mean to later ranks is one state. Forward: each
rank computes the state that its rows add, one all_gather, each rank sums those before it in order and answers
its rows from there. Backward the same the other way round, with the reverse state T = sum phi(q') r grad_y^T
(and the denominator's part) of each rank's rows and the sum of those after it. A rank sends one state per
direction, whatever N is.

What hides the exchange: backward's goes on while the gradient of q is computed, which needs no reverse state.
In forward the first rank answers its rows meanwhile. The others cannot: computing without the start state and
adding its part later costs one more product with a state per row, which is far more than there is to hide.
But what is sent is made of keys and values alone: `begin_exchange` sends it, and the queries are projected
while it is on its way.

`context_parallelize` does all that for a model's layers. This package imports no layer: a layer takes part by
having a `context_parallel_group`.
"""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from .attention import StateExchange, begin_exchange, context_parallel_rebased_attention
from .exchange import Group, process_group

__all__ = ["StateExchange", "begin_exchange", "context_parallel_rebased_attention", "context_parallelize"]

LayerModule = TypeVar("LayerModule", bound=nn.Module)


def context_parallelize(module: LayerModule, group: Group = None) -> LayerModule:
    """Makes every ReBasedAttention and GatedShortConvolution in `module` work on shards of sequences.

    Their input is then this rank's rows (B, its N, hidden_size), rank 0 having the first ones. `forward` and
    `prefill` go over the group; `step` stays as it is, on the state that prefill gives to every rank.
    Parameters stay what they are: synchronise their gradients over the group, as for data parallelism.

    A copy of the module (copy.deepcopy, torch.optim.swa_utils.AveragedModel) shares the group, and takes part
    in its exchanges. torch.save of the module leaves the group out: a loaded one takes its input for whole
    sequences, until this function gives it the group of the process that loaded it.

    Args:
        module: changed in place.
        group: as in `context_parallel_rebased_attention`; None takes all processes.

    Returns:
        module.

    Raises:
        ValueError, TypeError: module is no nn.Module, or group is not as above; no layer is changed.
        RuntimeError: torch.distributed is not initialised.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module: expected a torch.nn.Module, got {type(module).__name__}")
    group = process_group(group)
    for layer in module.modules():
        if hasattr(type(layer), "context_parallel_group"):  # of the class: a wrapper hands on attributes
            layer.context_parallel_group = group  # type: ignore[assignment]
    return module
