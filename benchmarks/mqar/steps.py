"""Seconds per training step: a ReBased model with this package's op, and the same one with plain PyTorch.

The same model, batch and optimizer; only what `ReBasedAttention` calls is exchanged, for the chunked forms
that the speed benchmarks measure against (`rebased_cuda.demo.baselines`), each at its best chunk. The methods
take turns, and a ratio is the median of those within a turn.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.training import append_json_line, read_json_lines, seed_everything
from rebased_cuda.demo import baselines, timing

from . import data
from .models import RecallModel
from .report import markdown

LENGTHS = (128, 512, 2048)
WIDTH, VOCABULARY = 128, 8192
TOKENS = {True: 8_192, False: 65_536}  # of a batch, small or not
ROUNDS = 7
NATIVE = "rebased_cuda"
PLAIN = ("chunks in a loop", "chunks at once")


def plain(form: Callable[..., Tensor], chunk: int, q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """A baseline with `rebased_attention`'s arguments; it takes q, k and v as projections give them."""
    if options["layer_norm"] != "token" or options["cu_seqlens"] is not None:
        raise ValueError("the plain versions do ReBased's own settings only")
    names = ("gamma_q", "beta_q", "gamma_k", "beta_k")
    affine = (options[name].view(-1, q.shape[-1]) for name in names)  # a layer hands them over flat
    q, k, v = (x.transpose(1, 2).flatten(2) for x in (q, k, v))
    return form(q, k, v, *affine, feature_map=options["feature_map"], chunk=chunk)


def _step(model: RecallModel, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, Tensor]) -> float:
    optimizer.zero_grad()
    loss = model.loss(*batch)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def measure(seqlen: int, device: torch.device, tokens: int, rounds: int = ROUNDS) -> dict[str, Any]:
    """Seconds per step of the native op and the plain forms, at one length."""
    batch = tuple(
        x.to(device)
        for x in data.batch(data.Task(VOCABULARY, seqlen, seqlen // 8), max(tokens // seqlen, 1), 0)
    )
    forms: dict[str, Callable[..., Any] | None] = {NATIVE: None}
    for name, form in zip(PLAIN, (baselines.chunked_loop, baselines.chunked_cumsum), strict=True):
        forms |= {f"{name} of {c}": partial(plain, form, c) for c in baselines.CHUNKS if c <= seqlen}

    losses = {}
    methods = {}
    for name, form in forms.items():
        seed_everything(0)
        model = RecallModel("rebased", WIDTH, VOCABULARY, seqlen).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

        def run(form: Any = form, model: Any = model, optimizer: Any = optimizer) -> float:
            if form is None:
                return _step(model, optimizer, batch)
            with mock.patch("rebased_cuda.layers.attention.rebased_attention", form):
                return _step(model, optimizer, batch)

        losses[name] = [run() for _ in range(2)]  # warm, and the judge that all do the same
        methods[name] = run
    for name, found in losses.items():
        if not torch.allclose(torch.tensor(found), torch.tensor(losses[NATIVE]), rtol=1e-3):
            raise RuntimeError(f"{name}: losses {found}, this package's {losses[NATIVE]}")
    seconds = timing.interleave(methods, rounds, device.type)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    rest = [name for name in medians if name != NATIVE]
    best = min(rest, key=lambda name: medians[name])
    return {
        "seqlen": seqlen,
        "batch": len(batch[0]),
        "width": WIDTH,
        "vocabulary": VOCABULARY,
        "seconds": {name: round(x, 6) for name, x in medians.items()},
        "best_plain": best,
        "ratio": round(timing.ratio(seconds[best], seconds[NATIVE]), 3),
        "machine": timing.machine(),
    }


def table(lines: list[dict[str, Any]]) -> str:
    columns = ["N", "batch", "this package, ms", "plain PyTorch, ms", "which", "plain / ours"]
    return markdown(
        columns,
        (
            [
                str(line["seqlen"]),
                str(line["batch"]),
                f"{line['seconds'][NATIVE] * 1e3:.0f}",
                f"{line['seconds'][line['best_plain']] * 1e3:.0f}",
                line["best_plain"],
                f"{line['ratio']:.2f}",
            ]
            for line in lines
        ),
    )


def report(folder: Path, device: torch.device, small: bool) -> None:
    """Measures the lengths that the folder has no line of yet, adds theirs, prints all."""
    path = folder / "results.jsonl"
    done = {line["seqlen"] for line in read_json_lines(path)}
    for seqlen in LENGTHS:
        if seqlen not in done:
            append_json_line(path, measure(seqlen, device, TOKENS[small]))
    print(table(read_json_lines(path)))
