"""Multi-query associative recall: pairs of key and value, then the keys again, each asking for its value.

    position   0  1  2  3  4  5 | 6  7  8  9 10 11 12 13 ...
    input      k1 v1 k2 v2 k3 v3| 0  0  k2 0  k1 0  0  0 ...
    target      .  .  .  .  .  .| .  .  v2 .  v1 .  .  . ...

Keys are tokens 1 .. vocabulary/2 - 1, values the upper half, each at most once in an example. Token 0 fills
the rest, or, with `random_fill`, any token does. Queries stand at even distances 2g behind the pairs, gaps
g drawn without replacement with probability proportional to (g + 1)^(power - 1): the distribution of Zoology
(Arora et al. 2023), whose 0.01 puts most queries soon after the pairs.

The examples of one batch are a function of (seed, split, index) alone, so that nothing about the data has to
be in a checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

IGNORED = -100  # the target of positions that ask for nothing; cross_entropy's ignore_index
SPLITS = ("train", "test")
BLOCK = 256  # examples that are drawn at once


@dataclass(frozen=True)
class Task:
    """What the examples look like. Sizes in tokens; `pairs` is also the number of queries."""

    vocabulary: int = 8192
    seqlen: int = 128
    pairs: int = 16
    power: float = 0.01
    random_fill: bool = False

    def __post_init__(self) -> None:
        if self.seqlen % 2 or self.seqlen < 4 * self.pairs or self.pairs < 1:
            raise ValueError(
                f"seqlen: expected an even number of at least 4 tokens a pair, got {self.seqlen} tokens for "
                f"{self.pairs} pairs"
            )
        if self.vocabulary // 2 - 1 < self.pairs:
            raise ValueError(f"vocabulary: {self.vocabulary} has fewer keys than pairs ({self.pairs})")


def gap_probabilities(task: Task) -> np.ndarray:
    """Of the first query, for gaps 0, 1, ...: (places,)."""
    places = (task.seqlen - 2 * task.pairs) // 2
    weights = np.arange(1, places + 1) ** (task.power - 1.0)
    return np.asarray(weights / weights.sum())


def batch(task: Task, size: int, seed: int, split: str = "train", index: int = 0) -> tuple[Tensor, Tensor]:
    """Inputs and targets (size, seqlen), int64."""
    generator = np.random.default_rng([seed, SPLITS.index(split), index])
    half, context = task.vocabulary // 2, 2 * task.pairs
    keys = 1 + _distinct(generator, size, half - 1, task.pairs)
    values = half + _distinct(generator, size, task.vocabulary - half, task.pairs)
    # the largest of log p + Gumbel noise: a draw without replacement, one gap after the other
    noise = generator.gumbel(size=(size, (task.seqlen - context) // 2))
    gaps = (-(np.log(gap_probabilities(task)) + noise)).argsort(1)[:, : task.pairs]

    inputs = np.zeros((size, task.seqlen), np.int64)
    if task.random_fill:
        inputs[:, context:] = generator.integers(task.vocabulary, size=(size, task.seqlen - context))
    inputs[:, 0:context:2], inputs[:, 1:context:2] = keys, values
    targets = np.full_like(inputs, IGNORED)
    np.put_along_axis(inputs, context + 2 * gaps, keys, 1)
    np.put_along_axis(targets, context + 2 * gaps, values, 1)
    return torch.from_numpy(inputs), torch.from_numpy(targets)


@lru_cache(maxsize=2)
def examples(task: Task, count: int, seed: int, split: str) -> tuple[Tensor, Tensor]:
    """Inputs and targets (count, seqlen), int16 if the vocabulary allows it: a whole data set.

    The last two are kept, since the runs of a grid share theirs: don't write into them.
    """
    dtype = torch.int16 if task.vocabulary <= 2**15 else torch.int32
    drawn = [batch(task, BLOCK, seed, split, index) for index in range(-(-count // BLOCK))]
    inputs, targets = (torch.cat([x.to(dtype) for x in kind])[:count] for kind in zip(*drawn, strict=True))
    return inputs, targets


def _distinct(generator: np.random.Generator, size: int, among: int, count: int) -> np.ndarray:
    """`count` of the numbers below `among` in random order, for each of `size` rows."""
    draws = generator.random((size, among))
    chosen = draws.argpartition(count - 1, 1)[:, :count]
    # argpartition leaves an order that depends on where the numbers stood; their draws don't
    order = np.take_along_axis(draws, chosen, 1).argsort(1)
    return np.take_along_axis(chosen, order, 1)


def answers(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, positions of the queries, and positions of the values that they ask for, each (queries,)."""
    rows, positions = (targets != IGNORED).nonzero(as_tuple=True)
    # a value stands once among the pairs, before any query
    found = (inputs[rows] == targets[rows, positions].unsqueeze(1)).to(torch.uint8).argmax(1)
    return rows, positions, found
