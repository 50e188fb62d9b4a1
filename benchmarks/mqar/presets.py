"""The paper's experiments as lists of runs, at full size (a GPU) and small (2 CPU cores, minutes).

Small is another task, not the paper's with fewer steps: a vocabulary of 64, 32 or 64 tokens, 8 or 16 pairs,
new examples in every batch, an output matrix of its own and torch's initial weights (`tied` False), since the
authors' start learns nothing in the steps that a CPU has time for. Nor is there dropout, with which attention
takes longer than that. Every seed has its own examples. Accuracies compare with each other, not with the
paper's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

from .cell import Cell
from .models import ABLATION, SQUARE

LEARNING_RATES = (5e-4, 1e-3, 3e-3, 1e-2)
SEEDS = range(5)
PAIRS = {128: 16, 256: 64, 512: 128, 1024: 256, 2048: 512}  # Table 5
FIGURE1 = ("rebased", "based", "softmax", "hyena", "rwkv", "mamba")
TABLE1 = ("based", *ABLATION, *(name + SQUARE for name in ABLATION))

SMALL: dict[str, Any] = {
    "vocabulary": 64,
    "learning_rate": 3e-3,
    "batch": 64,
    "examples": None,
    "test_examples": 512,
    "evaluate_every": 100,
    "tied": False,
    "embedding_dropout": 0.0,
    "attention_dropout": 0.0,
    "data_seed": None,
}
# By length, steps after which attention, Based and ReBased have learned; most runs stop long before.
SMALL_STEPS = {32: 1400, 64: 2400}


def product(settings: dict[str, Any], **varied: Iterable[Any]) -> list[Cell]:
    """A run for every combination; the seed varies slowest, so that a half-finished grid has all its rows."""
    names = sorted(varied, key=lambda name: name != "seed")
    values = itertools.product(*(list(varied[name]) for name in names))
    return [Cell(**settings | dict(zip(names, chosen, strict=True))) for chosen in values]


def full_batch(seqlen: int) -> dict[str, Any]:
    """512 examples a step, as many at once as the authors' scripts put on a GPU."""
    return {"batch": 512, "micro_batch": None if seqlen < 512 else 256 * 512 // seqlen}


def figure1(small: bool) -> list[Cell]:
    """Accuracy against width, for lengths with a quarter as many pairs (an eighth at 128)."""
    if small:
        lengths = [
            product(
                SMALL | {"seqlen": n, "pairs": n // 4, "batch": 2048 // n, "steps": steps},
                mixer=mixers,
                width=(48, 24),
                learning_rate=rates,
                seed=seeds,
            )
            # RWKV and Mamba, in plain PyTorch, take ten times as long as the others
            for mixers, rates, seeds in (
                ((*FIGURE1[:3], "linear", "hyena"), (3e-3, 1e-2), range(3)),
                (("rwkv", "mamba"), (1e-2,), range(1)),
            )
            for n, steps in SMALL_STEPS.items()
        ]
    else:
        lengths = [
            product(
                {"seqlen": n, "pairs": pairs} | full_batch(n),
                mixer=(*FIGURE1, "linear"),
                width=(64, 128, 256, 512),
                learning_rate=LEARNING_RATES,
                seed=SEEDS,
            )
            for n, pairs in PAIRS.items()
        ]
    return [cell for cells in lengths for cell in cells]


def table1(small: bool) -> list[Cell]:
    """The ablation, and Figure 3: what happens to q and k before the feature map, which squares are taken."""
    if small:  # accuracies where the rows are apart, and how soon each has learned
        schedules = [
            product(SMALL | {"seqlen": 32, "pairs": 8, "width": 24, "steps": steps}, mixer=TABLE1, seed=SEEDS)
            for steps in (1000, 2400)
        ]
        return [cell for cells in schedules for cell in cells]
    lengths = [
        product(
            {"seqlen": n, "pairs": 32} | full_batch(n),
            mixer=TABLE1,
            width=(16, 24, 32, 48),
            learning_rate=LEARNING_RATES,
            seed=SEEDS,
        )
        for n in (256, 2048)
    ]
    return [cell for cells in lengths for cell in cells]


def figure4(small: bool) -> list[Cell]:
    """Every learning rate of the grid, for the expected best of k tries."""
    mixers = ("rebased", "based", "x2", "gamma-beta")
    if small:
        return product(
            SMALL | {"seqlen": 32, "pairs": 8, "steps": SMALL_STEPS[32]},
            mixer=mixers[:3],
            width=(24, 48),
            learning_rate=LEARNING_RATES,
            seed=range(3),
        )
    return product(
        {"seqlen": 2048, "pairs": 32} | full_batch(2048),
        mixer=mixers,
        width=(16, 24, 32, 48),
        learning_rate=LEARNING_RATES,
        seed=SEEDS,
    )


def figure7(small: bool) -> list[Cell]:
    """Every mixer behind a convolution and in both blocks; Mamba, which knows no other block, is left out."""
    mixers = ("softmax", "based", "rebased", "rwkv")
    first = ("convolution", "same")
    if small:
        return product(
            SMALL | {"seqlen": 32, "pairs": 8, "width": 48, "steps": SMALL_STEPS[32]},
            mixer=mixers,
            first=first,
            seed=range(3),
        )
    lengths = [
        product(
            {"seqlen": n, "pairs": pairs} | full_batch(n),
            mixer=mixers,
            first=first,
            width=(64, 128, 256, 512),
            learning_rate=LEARNING_RATES,
            seed=SEEDS,
        )
        for n, pairs in PAIRS.items()
    ]
    return [cell for cells in lengths for cell in cells]


PRESETS = {"figure1": figure1, "table1": table1, "figure4": figure4, "figure7": figure7}
