"""What a training run needs, without running it: memory, tokens, and a bound on its time on this machine.

The bound is that of the matrix products alone, 6 operations for each parameter and token (8 where activations
are computed anew), at the rate that a product of large matrices reaches here: a run takes longer.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from benchmarks.speed.report import duration

from .sizes import ModelConfiguration, make_model
from .train import PRECISIONS, TrainingConfiguration

# Of a block, in widths a token: what its LayerNorms, mixer, MLP (4 widths, twice) and residuals keep, about.
ACTIVATIONS = 20


def parameters(model: ModelConfiguration) -> int:
    """The model's, each counted once."""
    with torch.device("meta"):
        return sum(x.numel() for x in make_model(model).parameters())


def memory(model: ModelConfiguration, training: TrainingConfiguration) -> dict[str, int]:
    """Bytes of one process that trains alone, by what they hold; activations are an estimate."""
    size = PRECISIONS[training.precision].itemsize
    tokens = training.batch // training.accumulate * training.context
    logits = min(training.loss_chunk or tokens, tokens)
    kept = 1 if training.activation_checkpointing else ACTIVATIONS
    return {
        "weights, gradients and AdamW's moments": 16 * parameters(model),
        "activations, about": tokens * model.width * model.layers * kept * size,
        "logits and their gradient": logits * model.vocabulary * (4 + size) * 2,
    }


def product_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Operations a second of the best of three products of square matrices."""
    if device.type == "cpu":
        size //= 2
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        begun = time.perf_counter()
        product = nn.functional.linear(a, a)
        product[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best


def told(model: ModelConfiguration, training: TrainingConfiguration, device: torch.device) -> str:
    """All that, in lines."""
    count, pieces = parameters(model), training.accumulate
    a_step = training.batch * training.context
    parts = memory(model, training)
    rate = product_rate(device, PRECISIONS[training.precision])
    seconds = (8 if training.activation_checkpointing else 6) * count * a_step / rate
    lines = [
        f"{model.mixer}: {count:,} parameters",
        f"{training.steps:,} steps of {training.batch:,} x {training.context:,} tokens in {pieces:,} pieces: "
        f"{a_step:,} a step, {a_step * training.steps:,} in all",
        f"memory of one process: {sum(parts.values()) / 2**30:.2f} GiB",
        *(f"  {name}: {size / 2**30:.2f} GiB" for name, size in parts.items()),
        f"time: more than {duration(seconds)} a step, {duration(seconds * training.steps)} in all, at the "
        f"{rate / 1e12:.3g} TFLOP/s of a product of matrices in {training.precision} on this {device.type}",
    ]
    return "\n".join(lines)
