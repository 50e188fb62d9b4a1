"""What is asked: one function per question, each giving rows. `quick` asks less, for two minutes in all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from . import decode, peers
from .ceilings import Ceilings
from .harness import DIRECTIONS, OURS, Preparer, Row, Shape, floor_seconds, measure

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Run:
    """What one invocation has: where, how much, and the machine's ceilings."""

    device: str
    quick: bool
    ceilings: Ceilings
    tell: Tell

    @property
    def methods(self) -> tuple[str, ...]:
        """All that may run; compilers take a minute, so a quick run goes without."""
        names = peers.GPU_METHODS if self.device == "cuda" else peers.CPU_METHODS
        return tuple(name for name in names if not (self.quick and name in peers.COMPILED))

    @property
    def few(self) -> tuple[str, ...]:
        """The op, softmax attention and eager chunked PyTorch: for questions of many shapes."""
        names = (peers.LOOP, peers.CUMSUM)
        return tuple(x for x in self.methods if x == OURS or x.startswith(peers.SDPA) or x in names)

    @property
    def budget(self) -> float:
        """Seconds of timing for one shape and direction."""
        return 1.5 if self.quick else 4.0


def _ask(
    run: Run,
    question: str,
    shapes: Sequence[Shape],
    methods: Sequence[str] | None = None,
    directions: Sequence[str] = DIRECTIONS,
) -> Iterator[Row]:
    for shape in shapes:
        for direction in directions:
            preparers: dict[str, Preparer] = {
                name: functools.partial(peers.prepare, name, shape, direction, run.device)
                for name in methods or run.methods
            }
            floor = floor_seconds(shape, direction, run.ceilings)
            yield from measure(question, shape, direction, preparers, run.device, run.budget, floor, run.tell)


def length(run: Run) -> Iterator[Row]:
    """Against N, at 12 heads where that fits and fewer where it would take minutes."""
    dtype = "bfloat16" if run.device == "cuda" else "float32"
    for feature_map in ("outer", "square"):
        full = [Shape(1, 12, 4096, feature_map, dtype)]
        if run.quick:
            yield from _ask(run, "length", [Shape(1, 12, 1024, feature_map, dtype), *full])
            continue
        short = [Shape(1, 12, n, feature_map, dtype) for n in (256, 1024)]
        yield from _ask(run, "length", short, run.few)
        yield from _ask(run, "length", full)
        long = [Shape(1, 4, 16384, feature_map, dtype), Shape(1, 1, 131072, feature_map, dtype)]
        yield from _ask(run, "length", long, run.few)


def batch_heads(run: Run) -> Iterator[Row]:
    """Against batch x heads, the total work about the same."""
    sizes = [(1, 1, 16384), (8, 1, 2048), (4, 12, 1024), (512, 1, 128)]
    shapes = [Shape(*size, feature_map) for feature_map in ("outer", "square") for size in sizes]
    yield from _ask(run, "batch_heads", shapes[:2] if run.quick else shapes, run.few)


def dtypes(run: Run) -> Iterator[Row]:
    """float64, bfloat16 and float16 at the reference shape."""
    names = ("bfloat16",) if run.quick else ("float32", "bfloat16", "float16", "float64")
    for feature_map in ("outer", "square"):
        shapes = [Shape(1, 12, 4096, feature_map, dtype) for dtype in names]
        yield from _ask(run, "dtypes", shapes, (OURS,) if run.quick else (OURS, peers.LOOP, peers.CUMSUM))


def feature_maps(run: Run) -> Iterator[Row]:
    """All four, and other feature dims."""
    shapes = [Shape(1, 12, 4096, feature_map) for feature_map in ("outer", "square", "taylor", "elu")]
    if not run.quick:
        shapes += [Shape(1, 12, 4096, "outer", feature_dim=d) for d in (8, 32)]
        shapes += [Shape(1, 12, 4096, "square", feature_dim=64), Shape(1, 12, 4096, head_dim=128)]
    yield from _ask(run, "feature_maps", shapes, (OURS,))


def threads(run: Run) -> Iterator[Row]:
    """Scaling over threads: many heads, and one long sequence."""
    if run.device == "cuda":
        return
    counts = [1 << i for i in range(16) if 1 << i <= torch.get_num_threads()]
    sizes = [(1, 12, 4096)] if run.quick else [(1, 12, 4096), (1, 1, 131072)]
    for feature_map in ("outer", "square"):
        base = [Shape(*size, feature_map) for size in sizes]
        shapes = [replace(shape, threads=count) for shape in base for count in counts]
        yield from _ask(run, "threads", shapes, (OURS,))


def decoding(run: Run) -> Iterator[Row]:
    """One token more for 256 sequences, and what a call costs at one."""
    for feature_map in ("outer", "square"):
        for sequences in (256, 1):
            yield from decode.rows(run.device, sequences, feature_map, run.budget, run.tell)


def hand_over(run: Run) -> Iterator[Row]:
    """Prefill of a prompt of 4096 tokens, then 64 steps."""
    for feature_map in ("outer", "square"):
        yield from decode.hand_over(run.device, feature_map, run.budget, run.tell)


QUESTIONS: dict[str, Callable[[Run], Iterator[Row]]] = {
    question.__name__: question
    for question in (length, batch_heads, dtypes, feature_maps, threads, decoding, hand_over)
}


def ask(names: Sequence[str], run: Run) -> Iterator[Row]:
    for name in names:
        yield from QUESTIONS[name](run)


def describe() -> dict[str, Any]:
    return {name: (question.__doc__ or "").split("\n")[0] for name, question in QUESTIONS.items()}
