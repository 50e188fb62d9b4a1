"""Attention against the truth, and the runs that are judged by it.

For a query the truth is 1 at the value's position and 0 elsewhere: with the token before mixed in, that is
the position that knows the key. Attention is the mean over heads. An example's overlap is that of two fuzzy
sets,

    IoU = sum min(attention, truth) / sum max(attention, truth)      over its queries and all positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.mqar import data
from benchmarks.mqar.cell import TEST_SEED, Cell
from benchmarks.mqar.models import RecallModel
from benchmarks.mqar.presets import LEARNING_RATES, PAIRS, SEEDS, SMALL, full_batch, product
from benchmarks.mqar.report import TITLES, Score, markdown

MIXERS = ("softmax", "based", "rebased")
# Table 3: IoU and accuracy.
PAPER = {"softmax": (0.999, 1.0), "based": (0.157, 0.956), "rebased": (0.173, 0.957)}
SHOWN = 2  # examples whose attention is kept for pictures
SEQLEN = {True: 32, False: 128}  # of Table 3, small or not


def cells(small: bool) -> list[Cell]:
    """Table 3's runs, and ReBased at further lengths for Figure 10."""
    if small:
        settings = SMALL | {"first": "shift", "steps": 600, "width": 48}
        table = product(settings | {"seqlen": 32, "pairs": 8}, mixer=MIXERS, seed=range(3))
        return table + [
            Cell(**settings | {"seqlen": n, "pairs": n // 4, "batch": 2048 // n}, seed=seed)
            for seed in range(3)
            for n in (16, 64)
        ]
    settings = {"first": "shift", "width": 64}
    table = product(
        settings | {"seqlen": 128, "pairs": 32} | full_batch(128),
        mixer=MIXERS,
        learning_rate=LEARNING_RATES,
        seed=SEEDS,
    )
    return table + [
        cell
        for n, pairs in PAIRS.items()
        for cell in product(settings | {"seqlen": n, "pairs": pairs} | full_batch(n), seed=SEEDS)
    ]


def at_queries(attention: Tensor, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Attention of every query, mean over heads, (B, queries, N), and where the value is: (B, queries)."""
    rows, positions, found = data.answers(inputs, targets)
    queries = len(rows) // len(inputs)
    return attention.mean(1)[rows, positions].unflatten(0, (-1, queries)), found.unflatten(0, (-1, queries))


def overlap(attention: Tensor, found: Tensor) -> Tensor:
    """IoU of each example: attention (B, queries, N) against the positions `found` (B, queries)."""
    truth = torch.zeros_like(attention).scatter(-1, found.unsqueeze(-1), 1.0)
    both, either = torch.minimum(attention, truth), torch.maximum(attention, truth)
    return both.sum((-2, -1)) / either.sum((-2, -1))


def judge(cell: Cell, model: RecallModel, device: torch.device, examples: int) -> dict[str, Any]:
    """IoU over that many held-out examples, and what of the pairs the first ones attend to, for pictures."""
    model.eval()
    size = min(64, examples)
    found: list[float] = []
    shown: list[dict[str, Any]] = []
    while len(found) < examples:
        inputs, targets = data.batch(cell.task, size, TEST_SEED, "test", 1_000_000 + len(found) // size)
        inputs, targets = inputs.to(device), targets.to(device)
        attention, positions = at_queries(model.attention(inputs), inputs, targets)
        if not found:
            context = attention[:SHOWN, :, : 2 * cell.pairs].cpu()
            shown = [
                {"attention": [[round(x, 4) for x in row] for row in a.tolist()], "truth": p.tolist()}
                for a, p in zip(context, positions[:SHOWN].cpu(), strict=True)
            ]
        found += overlap(attention, positions).tolist()
    return {
        "iou": round(sum(found[:examples]) / examples, 5),
        "iou_examples": examples,
        "shown": shown if cell.seed == 0 else [],
    }


def table(lines: Iterable[Mapping[str, Any]]) -> str:
    """Table 3: each mixer at the learning rate that is the most accurate on average."""
    rates: dict[str, dict[float, list[Mapping[str, Any]]]] = {}
    lines = list(lines)
    for line in lines:
        rates.setdefault(line["mixer"], {}).setdefault(line["learning_rate"], []).append(line)
    rows = []
    for mixer in (name for name in MIXERS if name in rates):
        of_mixer = rates[mixer].values()
        best = max(of_mixer, key=lambda runs: sum(run["accuracy"] for run in runs) / len(runs))
        iou, accuracy = (Score(tuple(run[name] for run in best), 0.0) for name in ("iou", "accuracy"))
        cells_of_row = [f"{PAPER[mixer][0]:.3f}", f"{PAPER[mixer][1]:.3f}"]
        cells_of_row += [f"{score.mean:.3f} ± {score.deviation:.3f}" for score in (iou, accuracy)]
        rows.append([TITLES[mixer], *cells_of_row])
    return markdown(["mixer", "paper, IoU", "paper, accuracy", "IoU", "accuracy"], rows)
