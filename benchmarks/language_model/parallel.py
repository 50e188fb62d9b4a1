"""One process, or several that share a training step: what the loop asks of them, and nothing more.

    torchrun --nproc-per-node 2 -m benchmarks.language_model train --small --parallel ddp     (or fsdp)

Every process draws the whole batch of a step and trains on its part, so a run has the same losses (up to the
order of a sum) on any number of processes. Checkpoints hold whole tensors under the names of the plain model:
what two processes wrote, one reads, and the other way round.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from rebased_cuda.context_parallel import context_parallelize


class OneProcess:
    """No communication; also the interface: a strategy overrides what it does differently.

    The loop feeds the first N of a part's N + 1 columns to the model and asks for the last N, so a part may
    also be a run of columns with the next token behind it, for models that share out the sequence.
    """

    rank = 0
    world = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wrap(self, model: nn.Module) -> nn.Module:
        """What the loop calls in place of the model, whose parameters then are the ones to optimise."""
        return model

    def part(self, rows: Tensor) -> Tensor:
        """Of a batch (rows, N + 1), what this process trains on."""
        return rows

    def columns(self, rows: Tensor) -> Tensor:
        """Of held-out rows (rows, N + 1), what this process computes: all, unless columns are shared out."""
        return rows

    def total(self, x: Tensor) -> Tensor:
        """The sum of all processes' x."""
        return x

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a piece of a step: gradients are exchanged after the last alone."""
        return nullcontext()


class DataParallel(OneProcess):
    """Every process has the whole model and some rows; gradients are averaged in the backward pass."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()

    def wrap(self, model: nn.Module) -> nn.Module:
        return DistributedDataParallel(model)

    def part(self, rows: Tensor) -> Tensor:
        if len(rows) % self.world:
            raise ValueError(f"batch: expected a multiple of {self.world} processes, got {len(rows)} rows")
        return rows.chunk(self.world)[self.rank]

    def total(self, x: Tensor) -> Tensor:
        total = x.clone()
        distributed.all_reduce(total)
        return total

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else model.no_sync()


class ShardedDataParallel(DataParallel):
    """FSDP2: parameters, gradients and moments are shared out, a block is gathered while it computes."""

    def wrap(self, model: nn.Module) -> nn.Module:
        for block in model.model.layers:
            fully_shard(block)
        return fully_shard(model)

    def accumulating(self, model: nn.Module, last: bool) -> AbstractContextManager[None]:
        model.set_requires_gradient_sync(last)
        return nullcontext()


class ContextParallel(DataParallel):
    """Every process has the whole model and a run of each row's tokens; gradients are averaged as in DDP."""

    def wrap(self, model: nn.Module) -> nn.Module:
        if model.model.embed_positions is not None:
            raise ValueError("parallel: context wants the mixer rebased or based without learned positions")
        # a group of its own: the layers' exchanges must not wait for the gradients'
        return super().wrap(context_parallelize(model, distributed.new_group()))

    def part(self, rows: Tensor) -> Tensor:
        return self.columns(rows)

    def columns(self, rows: Tensor) -> Tensor:
        seqlen, rest = divmod(rows.shape[1] - 1, self.world)
        if rest:
            raise ValueError(
                f"context: expected a multiple of {self.world} processes, got {rows.shape[1] - 1} tokens"
            )
        return rows[:, self.rank * seqlen : (self.rank + 1) * seqlen + 1]


STRATEGIES = {
    "none": OneProcess,
    "ddp": DataParallel,
    "fsdp": ShardedDataParallel,
    "context": ContextParallel,
}


@contextmanager
def processes(name: str, device: torch.device) -> Iterator[OneProcess]:
    """The strategy of that name, with a process group around it where it wants one and there is none yet.

    Several runs want one group around all: torchrun's store has no room for a second one after the first.

    The wrapped model must be gone at the end of the block. It holds the process group, whose gloo threads
    still want the GIL to let go of the last tensors they sent, and get it neither while
    DistributedDataParallel frees the group (deadlock) nor while the interpreter ends (abort).

    Raises:
        ValueError: torchrun did not start this process, or it did and the strategy is "none".
    """
    started = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    if name == "none":
        if started and int(os.environ["WORLD_SIZE"]) > 1:
            raise ValueError(
                "parallel: several processes would each train the same model: add --parallel ddp"
            )
        yield OneProcess(device)
        return
    if not started:
        raise ValueError(
            f"parallel: {name} wants several processes: torchrun --nproc-per-node N "
            f"-m benchmarks.language_model train --parallel {name}"
        )
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    outermost = not distributed.is_initialized()
    if outermost:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield STRATEGIES[name](device)
        gc.collect()  # what a dead model leaves in cycles
        distributed.barrier()  # waits without the GIL
    finally:
        if outermost:
            distributed.destroy_process_group()


WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def gather_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Whole tensors on the CPU, by the plain model's names: complete on rank 0. All processes call it."""
    model_state, optimizer_state = get_state_dict(model, optimizer, options=WHOLE)
    return {"model": model_state, "optimizer": optimizer_state}


def scatter_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes up what `gather_state` gave, on any number of processes. All processes call it."""
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=StateDictOptions(full_state_dict=True),
    )
