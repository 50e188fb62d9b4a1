"""One training run: a model, a task, a learning rate, a seed. It goes on from its checkpoint if there is one.

AdamW; accuracy on held-out examples every so often; the run ends early once that reaches `stop_at`. Its
result is the best accuracy seen, as the authors report. Dropout is drawn anew from the run's seed and the
step, so that a run that goes on from a checkpoint ends as one that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.training import load_checkpoint, save_checkpoint, seed_everything, setting

from . import data
from .models import RecallModel

CHECKPOINT_SECONDS = 15.0
TEST_SEED = 0  # every run is judged on the same examples


@dataclass(frozen=True)
class Cell:
    """A run's settings, all that its result depends on."""

    mixer: str = setting("rebased", "the token mixer under test")
    width: int = setting(48, "of the residual stream")
    seqlen: int = setting(128, "tokens of an example")
    pairs: int = setting(16, "of key and value in an example, each asked for once")
    vocabulary: int = setting(8192, "one half keys, the other half values")
    learning_rate: float = setting(1e-3, "AdamW's, at the first step")
    seed: int = setting(0, "of the initial weights, dropout, and the order of the examples")
    batch: int = setting(512, "examples a step")
    micro_batch: int | None = setting(None, "examples at once on the device, where the memory is small")
    steps: int = setting(12_500, "at most; fewer if stop-at is reached")
    examples: int | None = setting(
        100_000, "to train on, again and again in new orders; none: new ones in every batch"
    )
    data_seed: int | None = setting(42, "of the examples to train on; none: the run's seed")
    test_examples: int = setting(3_000, "held out; the same for all runs")
    evaluate_every: int = setting(195, "steps between two looks at the held-out accuracy")
    weight_decay: float = setting(0.1, "AdamW's, of all parameters")
    schedule: str = setting("cosine", "the learning rate falls to 0 over all steps; or constant")
    stop_at: float = setting(0.99, "held-out accuracy at which a run ends early")
    first: str = setting("paper", "the first block's mixer; paper: a convolution, but RWKV's and Mamba's own")
    tied: bool = setting(
        True, "output tied to the embedding and the authors' initial weights; false: a matrix and torch's"
    )
    embedding_dropout: float = setting(0.1, "share of the embedded tokens' entries, in training")
    attention_dropout: float = setting(0.1, "share of softmax attention's entries, in training")

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f'schedule: expected "cosine" or "constant", got {self.schedule!r}')
        if self.examples is not None and self.examples < self.batch:
            raise ValueError(f"examples: expected at least a batch of {self.batch}, got {self.examples}")

    @property
    def task(self) -> data.Task:
        return data.Task(self.vocabulary, self.seqlen, self.pairs)

    @property
    def name(self) -> str:
        """Short, and different for different settings: the name of the run's files."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.mixer}-w{self.width}-n{self.seqlen}-s{self.seed}-{digest}"

    def learning_rate_at(self, step: int) -> float:
        if self.schedule == "constant":
            return self.learning_rate
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def model(self) -> RecallModel:
        """A new model, drawn from torch's generator."""
        return RecallModel(
            self.mixer,
            self.width,
            self.vocabulary,
            self.seqlen,
            self.first,
            self.tied,
            self.embedding_dropout,
            self.attention_dropout,
        )


class Batches:
    """The training batches of a run, on its device; with `examples`, all of these lie there.

    An epoch goes over all examples but what is left over after whole batches, in a new order each time.
    """

    def __init__(self, cell: Cell, device: torch.device) -> None:
        self.cell, self.device = cell, device
        self.seed = cell.seed if cell.data_seed is None else cell.data_seed
        self.whole: tuple[torch.Tensor, ...] = ()
        if cell.examples is not None:
            whole = data.examples(cell.task, cell.examples, self.seed, "train")
            self.whole = tuple(x.to(device) for x in whole)
        self.epoch, self.order = -1, torch.empty(0, dtype=torch.long)

    def at(self, step: int) -> tuple[torch.Tensor, ...]:
        """Inputs and targets (batch, seqlen) of a step, int64."""
        cell = self.cell
        if cell.examples is None:
            drawn = data.batch(cell.task, cell.batch, self.seed, "train", step)
            return tuple(x.to(self.device) for x in drawn)
        epoch, within = divmod(step, cell.examples // cell.batch)
        if epoch != self.epoch:
            order = np.random.default_rng([cell.seed, epoch]).permutation(cell.examples)
            self.epoch, self.order = epoch, torch.from_numpy(order).to(self.device)
        rows = self.order[within * cell.batch : (within + 1) * cell.batch]
        return tuple(x[rows].long() for x in self.whole)


@dataclass
class Progress:
    """Where a run stands, apart from its tensors."""

    step: int = 0
    seconds: float = 0.0
    loss: float = math.nan  # of the last batch
    accuracy: float = 0.0  # the best
    diverged: bool = False
    history: list[list[float]] = field(default_factory=list)  # step, loss, accuracy
    norms: list[Any] = field(default_factory=list)  # step, {parameter: [mean, deviation]}


def train(
    cell: Cell,
    device: torch.device,
    checkpoint: Path | None = None,
    every: float = CHECKPOINT_SECONDS,
    tell: Callable[[Progress], None] = lambda progress: None,
) -> tuple[RecallModel, Progress]:
    """Trains to the end; `tell` hears of every step. The checkpoint stays behind: the caller removes it."""
    seed_everything(cell.seed)
    model = cell.model().to(device)
    batches = Batches(cell, device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=cell.learning_rate, weight_decay=cell.weight_decay, fused=True
    )
    progress = Progress()
    saved = None if checkpoint is None else load_checkpoint(checkpoint, device)
    if saved is not None:
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        progress = Progress(**saved["progress"])
    start = time.monotonic() - progress.seconds
    last_saved = time.monotonic()
    while progress.step < cell.steps and progress.accuracy < cell.stop_at and not progress.diverged:
        _step(cell, model, optimizer, progress, batches)
        progress.seconds = time.monotonic() - start
        if progress.step % cell.evaluate_every == 0 or progress.step == cell.steps or progress.diverged:
            _note(cell, model, progress, device)
        if checkpoint is not None and time.monotonic() - last_saved >= every:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(checkpoint, state | {"progress": vars(progress)})
            last_saved = time.monotonic()
        tell(progress)
    return model, progress


def _step(
    cell: Cell,
    model: RecallModel,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    batches: Batches,
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = cell.learning_rate_at(progress.step)
    inputs, targets = batches.at(progress.step)
    if cell.embedding_dropout or cell.attention_dropout:
        torch.manual_seed(cell.seed * 1_000_003 + progress.step)
    size = cell.micro_batch or cell.batch
    optimizer.zero_grad()
    total = 0.0
    for piece, wanted in zip(inputs.split(size), targets.split(size), strict=True):
        loss = model.loss(piece, wanted) * (len(piece) / cell.batch)  # every example asks equally often
        loss.backward()
        total += float(loss.detach())
    progress.loss = total
    progress.step += 1
    progress.diverged = not math.isfinite(total)
    if not progress.diverged:
        optimizer.step()


def _note(cell: Cell, model: RecallModel, progress: Progress, device: torch.device) -> None:
    """Accuracy, and gamma and beta, into the run's history."""
    if progress.diverged:
        return
    accuracy = evaluate(cell, model, device)
    progress.accuracy = max(progress.accuracy, accuracy)
    progress.history.append([progress.step, round(progress.loss, 5), round(accuracy, 5)])
    norms = model.norm_parameters()
    if norms:
        rounded = {name: [round(x, 5) for x in pair] for name, pair in norms.items()}
        progress.norms.append([progress.step, rounded])


def evaluate(cell: Cell, model: RecallModel, device: torch.device) -> float:
    """Share of the held-out queries that are answered rightly."""
    model.eval()
    size = cell.micro_batch or cell.batch
    correct, asked = 0, 0
    held_out = data.examples(cell.task, cell.test_examples, TEST_SEED, "test")
    for inputs, targets in zip(*(x.split(size) for x in held_out), strict=True):
        answers = model.correct(inputs.to(device).long(), targets.to(device).long())
        correct += int(answers.sum())
        asked += answers.numel()
    model.train()
    return correct / asked


def result(cell: Cell, model: RecallModel, progress: Progress, device: torch.device) -> dict[str, Any]:
    """The run's line in the results."""
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
    return {
        "cell": cell.name,
        **asdict(cell),
        "accuracy": round(progress.accuracy, 5),
        "diverged": progress.diverged,
        "steps_done": progress.step,
        "seconds": round(progress.seconds, 2),
        "parameters": sum(x.numel() for x in model.parameters()),
        "device": name,
        "history": progress.history,
        "norms": progress.norms,
    }


def cell_of(record: Mapping[str, Any]) -> Cell:
    """The settings that a line of results belongs to."""
    return Cell(**{name: record[name] for name in Cell.__dataclass_fields__})
