"""The training loop: AdamW, warm-up and cosine, clipping, mixed precision, checkpoints to resume from.

A step's rows follow from seed and step alone and nothing else is random after the initialisation, so a run
that was killed and resumed has the losses of one that was not, bit for bit on the same machine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.training import append_json_line, load_checkpoint, save_checkpoint, seed_everything, setting

from . import parallel, text
from .evaluate import Perplexity, perplexity
from .sizes import ModelConfiguration, make_model

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BETAS = (0.9, 0.95)
FINAL = 0.1  # of the learning rate, where the cosine ends
# may change when a run is resumed
FREE = ("compile", "activation_checkpointing", "checkpoint_every", "validate_every", "loss_chunk")


@dataclass(frozen=True)
class TrainingConfiguration:
    """One run. `batch` rows of `context` tokens a step, over all processes, in `accumulate` pieces."""

    steps: int = setting(20_000, "optimizer steps of the whole run")
    batch: int = setting(1024, "rows a step, over all processes and pieces")
    context: int = setting(4096, "tokens of a row")
    learning_rate: float = setting(1e-3, "the highest, after the warm-up")
    warmup: int = setting(200, "steps of a linear rise before the cosine")
    weight_decay: float = setting(0.1, "of matrices and filters; embeddings and vectors have none")
    clip: float = setting(1.0, "the gradient's largest norm")
    accumulate: int = setting(1, "pieces that a step's rows are trained on in, one after the other")
    loss_chunk: int = setting(4096, "tokens whose logits are in memory at once; 0: all of a piece")
    seed: int = setting(0, "of the initial weights and of the rows' places in the text")
    precision: str = setting("float32", "of matrix products and activations (autocast); weights are float32")
    compile: bool = setting(False, "torch.compile for the model")
    activation_checkpointing: bool = setting(False, "computes a block anew in backward: less memory")
    checkpoint_every: int = setting(100, "steps between two checkpoints")
    validate_every: int = setting(
        0, "steps between two looks at the held-out perplexity; 0: at the end alone"
    )

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.batch % self.accumulate:
            raise ValueError(f"batch: expected a multiple of accumulate {self.accumulate}, got {self.batch}")


def learning_rate(configuration: TrainingConfiguration, step: int) -> float:
    """Of step 0, 1, ...: a linear rise over the warm-up, then half a cosine down to FINAL of the peak."""
    if step < configuration.warmup:
        return configuration.learning_rate * (step + 1) / configuration.warmup
    progress = (step - configuration.warmup) / max(configuration.steps - configuration.warmup, 1)
    return configuration.learning_rate * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * progress)) / 2)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices and filters, none for embeddings, biases, LayerNorms, gamma and beta.

    The output is the tokens' embedding, and has none either: Based's optimizer sees it so.
    """
    embeddings = {
        x for module in model.modules() if isinstance(module, nn.Embedding) for x in module.parameters()
    }
    decayed = [x for x in model.parameters() if x.dim() > 1 and x not in embeddings]
    spared = [x for x in model.parameters() if x.dim() <= 1 or x in embeddings]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": spared, "weight_decay": 0.0}]


class Trainer:
    """A model with its optimiser, somewhere on its way: `step` trains on, `save` and `restore` move it."""

    def __init__(
        self,
        model: ModelConfiguration,
        training: TrainingConfiguration,
        stream: Tensor,
        processes: parallel.OneProcess,
        adapt: Callable[[nn.Module], None] | None = None,
    ) -> None:
        """`stream` holds the training tokens; `adapt` may change the new model before it is wrapped."""
        seed_everything(training.seed)
        self.model_configuration, self.configuration = model, training
        self.stream, self.processes = stream, processes
        plain = make_model(model, activation_checkpointing=training.activation_checkpointing)
        if adapt is not None:
            adapt(plain)
        self.model = processes.wrap(plain.to(processes.device))
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, training.weight_decay), lr=training.learning_rate, betas=BETAS
        )
        self.call = torch.compile(self.model) if training.compile else self.model
        self.losses: list[float] = []

    @property
    def done(self) -> int:
        """Steps behind us."""
        return len(self.losses)

    def autocast(self) -> torch.autocast:
        precision = PRECISIONS[self.configuration.precision]
        return torch.autocast(self.processes.device.type, precision, enabled=precision != torch.float32)

    def step(self) -> float:
        """One step; the mean loss of its batch in nats per token."""
        configuration = self.configuration
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(configuration, self.done)
        rows = text.batch(
            self.stream, self.done, configuration.seed, configuration.batch, configuration.context
        )
        total = torch.zeros((), device=self.processes.device)
        for index, piece in enumerate(rows.chunk(configuration.accumulate)):
            part = self.processes.part(piece).to(self.processes.device)
            with self.processes.accumulating(self.model, index == configuration.accumulate - 1):
                with self.autocast():
                    loss = self.call(
                        input_ids=part[:, :-1], targets=part[:, 1:], loss_chunk=configuration.loss_chunk
                    )
                loss = loss / configuration.accumulate
                loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(self.model.parameters(), configuration.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(float(self.processes.total(total)) / self.processes.world)
        return self.losses[-1]

    def save(self, path: Path, **extra: Any) -> None:
        """A checkpoint, written by rank 0. All processes call it."""
        state = parallel.gather_state(self.model, self.optimizer)
        if self.processes.rank == 0:
            save_checkpoint(
                path,
                state
                | extra
                | {
                    "model_configuration": asdict(self.model_configuration),
                    "configuration": asdict(self.configuration),
                    "losses": self.losses,
                },
            )

    def restore(self, path: Path) -> bool:
        """Goes on from the checkpoint, if there is one. All processes call it.

        Raises:
            ValueError: it is of a run with other settings.
        """
        checkpoint = load_checkpoint(path)
        if checkpoint is None:
            return False
        mine = asdict(self.model_configuration) | asdict(self.configuration)
        theirs = checkpoint["model_configuration"] | checkpoint["configuration"]
        different = [name for name in mine if name not in FREE and theirs.get(name) != mine[name]]
        if different:
            told = ", ".join(f"{name} {theirs.get(name)} (now {mine[name]})" for name in different)
            raise ValueError(f"{path} is of another run: {told}. Choose another --output or --name.")
        parallel.scatter_state(self.model, self.optimizer, checkpoint)
        self.losses = list(checkpoint["losses"])
        return True


def run(trainer: Trainer, path: Path, held_out: Tensor, **extra: Any) -> tuple[Perplexity, float | None]:
    """Trains to the end, from the checkpoint at `path` where there is one: (perplexity, seconds a step).

    `held_out` (rows, N + 1) is what the perplexity is of, `extra` is kept in the checkpoints. With
    validate_every, validation.jsonl beside the checkpoint gets a line each time. No seconds where the
    checkpoint was at the end already.
    """
    configuration = trainer.configuration
    trainer.restore(path)
    rows = max(configuration.batch // configuration.accumulate // trainer.processes.world, 1)
    if configuration.loss_chunk:
        rows = min(rows, max(configuration.loss_chunk // configuration.context, 1))
    held_out = held_out.to(trainer.processes.device)

    def validate() -> Perplexity:
        return perplexity(trainer.model, held_out, rows, trainer.autocast(), trainer.processes)

    begun, start = trainer.done, time.perf_counter()
    with tqdm(
        total=configuration.steps,
        initial=begun,
        desc=path.parent.name,
        unit="step",
        disable=trainer.processes.rank != 0,
        mininterval=1,
    ) as bar:
        while trainer.done < configuration.steps:
            loss = trainer.step()
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
            if trainer.done % configuration.checkpoint_every == 0 or trainer.done == configuration.steps:
                trainer.save(path, **extra)
            if configuration.validate_every and trainer.done % configuration.validate_every == 0:
                found = validate()
                if trainer.processes.rank == 0:
                    line = {"step": trainer.done, "loss": loss, **asdict(found)}
                    append_json_line(path.with_name("validation.jsonl"), line)
    seconds = (time.perf_counter() - start) / (trainer.done - begun) if trainer.done > begun else None
    return validate(), seconds
