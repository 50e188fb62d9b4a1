"""Trains a two-layer hybrid on the Python standard library's own sources, then decodes with it."""

from __future__ import annotations

import math
import sysconfig
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import GatedShortConvolution, ReBasedAttention
from ..state import RebasedState
from .report import Report

WIDTH, HEADS, HEAD_DIM = 256, 4, 64
BATCH, SEQLEN = 8, 512
LEARNING_RATE = 4e-3
MINIMUM_STEPS = 40  # however short the time
MARGIN = 1.0  # nats that the loss on held-out text must fall by
PROMPT, DECODED = 256, 64
CUE = b"self."  # where the prompt ends
# A logit's error by the step, over the logits' range; a smaller gap between the best two is a tie.
LOGIT_BOUND = 1e-4

Cache = tuple[Tensor, RebasedState]


class Hybrid(nn.Module):
    """Bytes -> logits of the next: embedding, gated short convolution, ReBased attention, projection."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.convolution = GatedShortConvolution(WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.attention = ReBasedAttention(WIDTH, HEADS, feature_dim=16, head_dim=HEAD_DIM)
        projection = nn.Linear(WIDTH, 256)
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), projection)
        nn.init.normal_(self.embedding.weight, std=0.5)
        nn.init.zeros_(projection.weight)  # the loss then starts at ln 256

    def forward(self, tokens: Tensor) -> Tensor:
        return self.prefill(tokens)[0]

    def prefill(self, tokens: Tensor) -> tuple[Tensor, Cache]:
        """tokens (B, N) -> logits (B, N, 256) and what `step` goes on from."""
        x, last = self.convolution.prefill(self.embedding(tokens))
        y, state = self.attention.prefill(self.norm(x))
        return self.head(x + y), (last, state)

    def step(self, tokens: Tensor, cache: Cache) -> Tensor:
        """tokens (B,) -> logits (B, 256), the cache updated in place."""
        x = self.convolution.step(self.embedding(tokens), cache[0])
        logits: Tensor = self.head(x + self.attention.step(self.norm(x), cache[1]))
        return logits


def standard_library() -> tuple[Tensor, Tensor]:
    """The sources as bytes: (training text, held-out text: every tenth file)."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    if len(files) < 20:
        raise RuntimeError(f"no sources of the standard library in {folder}, nothing to train on")
    texts = [file.read_bytes() for file in files]
    parts = (
        b"".join(text for index, text in enumerate(texts) if (index % 10 == 9) == held_out)
        for held_out in (False, True)
    )
    training, held_out = (torch.frombuffer(bytearray(part), dtype=torch.uint8).long() for part in parts)
    return training, held_out


def unigram_entropy(text: Tensor) -> float:
    """Nats per byte of a model that knows only how frequent each byte is."""
    p = torch.bincount(text, minlength=256).double() / len(text)
    return float(-(p * p.clamp_min(1e-300).log()).sum())


def _loss(model: Hybrid, rows: Tensor) -> Tensor:
    """Cross entropy in nats per byte of rows (B, N + 1)."""
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def training(report: Report, device: str, seconds: float) -> None:
    torch.manual_seed(0)
    train_text, held_out = standard_library()
    entropy = unigram_entropy(held_out)
    model = Hybrid().to(device)
    parameters = sum(x.numel() for x in model.parameters())
    report.say(
        f"  {len(train_text) / 1e6:.1f} MB of Python sources, {len(held_out) / 1e6:.1f} MB more held out; "
        f"{parameters / 1e6:.2f} M parameters, {seconds:g} s; loss in nats per byte"
    )
    offsets = torch.linspace(0, len(held_out) - SEQLEN - 1, 2 * BATCH).long()
    validation = torch.stack([held_out[i : i + SEQLEN + 1] for i in offsets]).to(device)

    def held_out_loss() -> float:
        with torch.no_grad():
            return float(_loss(model, validation))

    initial = held_out_loss()
    report.say(f"  before: held-out loss {initial:.3f}, entropy of single bytes {entropy:.3f}")
    steps = _train(report, model, train_text, device, seconds)
    final = held_out_loss()
    report.results["training"] = {
        "steps": steps,
        "bytes": steps * BATCH * SEQLEN,
        "initial_loss": initial,
        "final_loss": final,
        "unigram_entropy": entropy,
    }
    after = f"held-out loss after {steps} steps"
    report.check("training: loss falls", final, initial - MARGIN, after)
    report.check("training: better than byte frequencies", final, entropy, after)
    _decode(report, model.eval(), held_out, device)


def _train(report: Report, model: Hybrid, text: Tensor, device: str, seconds: float) -> int:
    """Adam for that long, the learning rate falling with the time spent; returns the steps made."""
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(0)
    start = time.monotonic()
    spoken, step = start, 0
    while True:
        spent = max(time.monotonic() - start, 1e-9)
        done = min(spent / seconds, step / MINIMUM_STEPS) if seconds > 0 else step / MINIMUM_STEPS
        if done >= 1:
            return step
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20) * (0.1 + 0.9 * (1 - done))
        offsets = torch.randint(len(text) - SEQLEN, (BATCH,), generator=generator)
        rows = torch.stack([text[i : i + SEQLEN + 1] for i in offsets.tolist()]).to(device)
        loss = _loss(model, rows)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        report.progress(f"training: step {step}, {spent:.0f} of {seconds:g} s")
        if time.monotonic() - spoken > max(seconds / 5, 1.0):
            spoken = time.monotonic()
            report.say(f"  {spoken - start:5.1f} s  step {step:4d}  training loss {float(loss.detach()):.3f}")


@torch.no_grad()
def _decode(report: Report, model: Hybrid, text: Tensor, device: str) -> None:
    """Greedy decoding by prefill and step against recomputing the whole prefix for every token.

    Judged token by token on the step's own text: as long as all tokens are equal, that is also the text of
    decoding by recomputation. Two logits closer than float32's error are a tie that either may break.
    """
    end = bytes(text.tolist()).index(CUE, len(text) // 2) + len(CUE)
    tokens = text[end - PROMPT : end].unsqueeze(0).to(device)
    start = time.monotonic()
    logits, cache = model.prefill(tokens)
    logits = logits[:, -1]
    by_step = []
    for _ in range(DECODED):
        by_step.append(logits)
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], 1)
        logits = model.step(tokens[:, -1], cache)
    seconds = time.monotonic() - start

    equal, ties, worst = 0, 0, 0.0
    for index, logits in enumerate(by_step):
        report.progress(f"recomputing token {index + 1} of {DECODED}")
        whole = model(tokens[:, : PROMPT + index])[:, -1]
        extent = float(whole.max() - whole.min())
        worst = max(
            worst, float((logits - whole).abs().max()) / extent, key=lambda x: math.inf if x != x else x
        )
        chosen = int(tokens[0, PROMPT + index])
        gap = float(whole.max() - whole[0, chosen]) / extent
        equal += chosen == int(whole.argmax())
        ties += 0 < gap < LOGIT_BOUND
    written = bytes(tokens[0, PROMPT:].tolist()).decode("utf-8", "backslashreplace")
    report.results["decoding"] = {"text": written, "equal": equal, "ties": ties, "logit_error": worst}
    report.say(f"  {DECODED} tokens in {seconds * 1e3:.0f} ms: {CUE.decode()} -> {written!r}")
    told = f"{equal} of {DECODED} equal" + (
        f", {ties} ties within {LOGIT_BOUND:g} of the range" if ties else ""
    )
    report.verdict("decoding: tokens equal to recomputing the whole", equal + ties == DECODED, told)
    report.check("decoding: logits of the step", worst, LOGIT_BOUND, "largest error over the logits' range")
