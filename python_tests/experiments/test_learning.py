"""Models learn through the op: recall is learned where it should be, and as it is with the reference."""

import statistics
from dataclasses import replace

import pytest
import torch

from benchmarks.mqar.cell import Cell, train
from rebased_cuda import reference
from rebased_cuda.layers import attention as layer

# Fixed first layer: the token before. 1,500 steps of 32 examples of 64 tokens, 16 pairs each.
CELL = Cell(
    width=48,
    seqlen=64,
    pairs=16,
    vocabulary=128,
    learning_rate=1e-3,
    batch=32,
    steps=1500,
    examples=None,
    test_examples=256,
    evaluate_every=250,
    weight_decay=0.01,
    schedule="constant",
    data_seed=None,
    first="shift",
    tied=False,
    embedding_dropout=0.0,
    attention_dropout=0.0,
)
CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixer", "least", "most"),
    [("rebased", 0.98, 1.0), ("rebased-square", 0.0, 0.6)],
    ids=["outer", "square"],
)
def test_recall_is_learned(mixer: str, least: float, most: float) -> None:
    accuracies = [train(replace(CELL, mixer=mixer, seed=seed), CPU)[1].accuracy for seed in range(3)]
    assert least <= statistics.median(accuracies) <= most, accuracies


def _losses(cell: Cell) -> list[float]:
    losses: list[float] = []
    train(cell, CPU, tell=lambda progress: losses.append(progress.loss))
    return losses


@pytest.mark.parametrize("mixer", ["rebased", "rebased-square", "based", "linear"])
def test_the_loss_falls_as_with_the_reference(mixer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cell = replace(CELL, mixer=mixer, steps=50, evaluate_every=50, test_examples=32)
    native = _losses(cell)
    monkeypatch.setattr(layer, "rebased_attention", reference.chunked)
    judge = _losses(cell)
    assert len(native) == len(judge) == 50
    assert native != judge  # the reference did run
    assert native == pytest.approx(judge, rel=1e-3)
    assert native[-1] < native[0]
