"""Perplexity over all tokens, over associative-recall (AR) tokens, and over the others.

A token is AR where the bigram that it completes has occurred before in the context that the model sees, so
that the model can look up what followed last time; the paper speaks of tokens that recur within a text and
takes the measure from Arora et al. (2023), where it is the repeated bigram's second token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parallel import OneProcess
from .sizes import logits_of


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood; `recall_share` is the part of the tokens that are AR."""

    all: float
    recall: float
    other: float
    recall_share: float
    tokens: int


def recall_tokens(rows: Tensor) -> Tensor:
    """rows (B, N + 1) -> bool (B, N): whether the target rows[:, i + 1] is an AR token.

    It is where the bigram (rows[:, i], rows[:, i + 1]) also stands further left in the same row.
    """
    bigrams = rows[:, :-1] * (int(rows.max()) + 1 if rows.numel() else 1) + rows[:, 1:]
    ordered, order = bigrams.sort(dim=1, stable=True)  # equal bigrams side by side, the first one first
    again = F.pad(ordered[:, 1:] == ordered[:, :-1], (1, 0))
    return torch.zeros_like(again).scatter(1, order, again)


@torch.no_grad()
def perplexity(
    model: nn.Module, rows: Tensor, batch: int, autocast: torch.autocast, processes: OneProcess
) -> Perplexity:
    """Of `model` on rows (count, N + 1) on the model's device, `batch` rows at a time."""
    training = model.training
    model.eval()
    sums = torch.zeros(2, 2, dtype=torch.float64, device=rows.device)  # (loss, tokens) of (others, AR)
    for some in rows.split(batch):
        part = processes.columns(some)
        is_recall = processes.columns(F.pad(recall_tokens(some), (1, 0)))[:, 1:]
        with autocast:
            logits = logits_of(model, part[:, :-1])
        losses = F.cross_entropy(logits.float().mT, part[:, 1:], reduction="none").double()
        for kind, chosen in enumerate((losses[~is_recall], losses[is_recall])):
            sums[0, kind] += chosen.sum()
            sums[1, kind] += chosen.numel()
    model.train(training)
    losses, tokens = processes.total(sums)
    other, recall = (losses / tokens).exp().tolist()
    everything = math.exp(losses.sum() / tokens.sum())
    return Perplexity(everything, recall, other, float(tokens[1] / tokens.sum()), rows[:, 1:].numel())
