"""One training run: a model, a task, a learning rate, a seed. It goes on from its checkpoint if there is one.

AdamW; accuracy on held-out examples every so often;
the run ends early once that reaches `stop_at`. Its result is the best accuracy seen, as the authors report.
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

from benchmarks.training import load_checkpoint, save_checkpoint, seed_everything

from . import data
from .models import RecallModel

CHECKPOINT_SECONDS = 15.0
TEST_SEED = 0  # every run is judged on the same examples


@dataclass(frozen=True)
class Cell:
    """A run's settings, all that its result depends on."""

    mixer: str = "rebased"
    width: int = 48
    seqlen: int = 128
    pairs: int = 16
    vocabulary: int = 8192
    learning_rate: float = 1e-3
    seed: int = 0
    batch: int = 512
    micro_batch: int | None = None  # examples at once on the device, where the memory is small
    steps: int = 12_500
    examples: int | None = 100_000  # to train on, again and again; None: new ones in every batch
    test_examples: int = 3_000
    evaluate_every: int = 195
    weight_decay: float = 0.1
    schedule: str = "cosine"  # from the learning rate to 0 over all steps; or "constant"
    stop_at: float = 0.99
    first: str = "convolution"
    tied: bool = True

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "constant"):
            raise ValueError(f'schedule: expected "cosine" or "constant", got {self.schedule!r}')

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

    def batch_at(self, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The training batch of a step; with `examples`, epochs over the same batches in a new order each."""
        if self.examples is None:
            return data.batch(self.task, self.batch, self.seed, "train", step)
        batches = max(self.examples // self.batch, 1)
        epoch, within = divmod(step, batches)
        order = np.random.default_rng([self.seed, epoch]).permutation(batches)
        return data.batch(self.task, self.batch, self.seed, "train", int(order[within]))


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
    model = RecallModel(cell.mixer, cell.width, cell.vocabulary, cell.seqlen, cell.first, cell.tied).to(
        device
    )
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
        _step(cell, model, optimizer, progress, device)
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
    device: torch.device,
) -> None:
    for group in optimizer.param_groups:
        group["lr"] = cell.learning_rate_at(progress.step)
    inputs, targets = (x.to(device) for x in cell.batch_at(progress.step))
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
    for index in range(math.ceil(cell.test_examples / size)):
        rows = min(size, cell.test_examples - index * size)
        inputs, targets = data.batch(cell.task, size, TEST_SEED, "test", index)
        answers = model.correct(inputs[:rows].to(device), targets[:rows].to(device))
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
