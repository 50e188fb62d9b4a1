"""Training over processes, by torch's own means and by sharding sequences, follows training on one."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as distributed_checkpoint
from conftest import EMULATED
from problems import relative_error
from processes import Processes
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from rebased_cuda import GatedShortConvolution, ReBasedAttention
from rebased_cuda.context_parallel import context_parallelize

pytestmark = pytest.mark.skipif(EMULATED, reason="what is tested here is the same on every backend")

WAYS = ["data ddp", "data fsdp", "data leaf fsdp", "context ddp", "context fsdp", "context leaf fsdp"]
BATCH, SEQLEN, VOCABULARY, WIDTH, STEPS = 4, 21, 17, 12, 3


class LanguageModel(nn.Module):
    def __init__(self, with_checkpoints: bool) -> None:
        super().__init__()
        self.with_checkpoints = with_checkpoints
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(
            [
                GatedShortConvolution(WIDTH),
                ReBasedAttention(WIDTH, 2, 4, eps=1e-3),
                nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)),
                ReBasedAttention(WIDTH, 3, 4, eps=1e-3, feature_map="square"),
            ]
        )
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            more = checkpoint(block, x, use_reentrant=False) if self.with_checkpoints else block(x)
            x = x + more
        return self.head(x)


def make_model(with_checkpoints: bool = False) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(with_checkpoints).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(VOCABULARY, (BATCH, SEQLEN + 1), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def loss_of(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    """This rank's part of the mean over the whole batch."""
    logits = model(tokens)
    total = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return total / (BATCH * SEQLEN)


def train(how: str, with_checkpoints: bool, path: Path | None = None) -> list[float]:
    """Losses of every step and after the last. `how` is "one process", or how a batch and how parameters are
    dealt with: data or context, ddp, fsdp (block by block) or leaf fsdp (every module with parameters alone).
    """
    model = make_model(with_checkpoints)
    alone = how == "one process"
    rank, ranks = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    mine: tuple[slice, slice] = (slice(None), slice(None))
    if "data" in how:
        mine = (slice(BATCH // ranks * rank, BATCH // ranks * (rank + 1)), slice(None))
    if "context" in how:
        ends = [0, 8, SEQLEN] if ranks == 2 else [SEQLEN * i // ranks for i in range(ranks + 1)]
        mine = (slice(None), slice(ends[rank], ends[rank + 1]))
        context_parallelize(model)
    wrapped: nn.Module = model
    if "ddp" in how:
        wrapped = DistributedDataParallel(model)
    if "fsdp" in how:
        leaves = (module for module in model.modules() if list(module.parameters(recurse=False)))
        for block in list(leaves) if "leaf" in how else model.blocks:
            fully_shard(block)
        fully_shard(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-2)
    losses = []
    for step in range(STEPS + 1):
        loss = loss_of(wrapped, *(x[mine] for x in batch(step)))
        total = loss.detach().clone()
        if not alone:
            dist.all_reduce(total)
        losses.append(float(total))
        if step == STEPS:
            break
        (ranks * loss).backward()  # DDP and FSDP take the mean of the ranks' gradients
        optimizer.step()
        optimizer.zero_grad()
    if path is not None:
        distributed_checkpoint.save(get_model_state_dict(model), checkpoint_id=path)
    return losses


@pytest.fixture(scope="module")
def two_processes() -> Iterator[Processes]:
    processes = Processes(2)
    yield processes
    processes.stop()


@pytest.fixture(scope="module")
def expected() -> list[float]:
    losses = train("one process", False)
    assert losses[0] != pytest.approx(losses[-1], rel=1e-2)
    return losses


@pytest.mark.parametrize("with_checkpoints", [False, True], ids=["", "activation checkpointing"])
@pytest.mark.parametrize("how", WAYS)
def test_losses_are_those_of_one_process(two_processes, expected, how, with_checkpoints):
    for losses in two_processes.run(train, how, with_checkpoints):
        assert losses == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("how", ["data fsdp", "context ddp"])
def test_a_checkpoint_of_two_processes_loads_into_one(two_processes, expected, how, tmp_path):
    two_processes.run(train, how, False, tmp_path)
    model = make_model()
    before: dict[str, Any] = {name: x.clone() for name, x in model.state_dict().items()}
    state = model.state_dict()
    distributed_checkpoint.load(state, checkpoint_id=tmp_path)
    model.load_state_dict(state)
    assert not any(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    with torch.no_grad():
        assert loss_of(model, *batch(STEPS)).item() == pytest.approx(expected[-1], rel=1e-10)


def _copies_share_the_group() -> None:
    """A copy works over the processes as the original does; what is loaded takes whole sequences again."""
    model = make_model()
    x = torch.randn(2, 8, WIDTH, dtype=torch.float64)
    layers = nn.Sequential(*model.blocks)
    whole = layers(x)
    context_parallelize(layers)
    rows = slice(4 * dist.get_rank(), 4 * dist.get_rank() + 4)
    for other in (copy.deepcopy(layers), copy.copy(layers), AveragedModel(layers).module):
        groups = [layer.context_parallel_group for layer in other if hasattr(layer, "context_parallel_group")]
        assert groups == [dist.group.WORLD] * 3
        assert relative_error(other(x[:, rows]), whole[:, rows]) <= 1e-12

    averaged = AveragedModel(layers)
    averaged.update_parameters(layers)
    assert relative_error(averaged(x[:, rows]), whole[:, rows]) <= 1e-12

    file = io.BytesIO()
    torch.save(layers, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (loaded, pickle.loads(pickle.dumps(layers)), copy.deepcopy(loaded)):
        assert not any(getattr(layer, "context_parallel_group", None) for layer in other)
        assert relative_error(other(x), whole) <= 1e-12
        context_parallelize(other)
        assert relative_error(other(x[:, rows]), whole[:, rows]) <= 1e-12
    assert relative_error(layers(x[:, rows]), whole[:, rows]) <= 1e-12  # the original kept its own


def test_copies_share_the_group(two_processes):
    two_processes.run(_copies_share_the_group)
