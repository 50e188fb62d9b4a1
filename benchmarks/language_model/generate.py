"""Decodes with the recurrent step, and the same by recomputing everything for each token, as its judge."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import Cache

from benchmarks.training import load_checkpoint
from rebased_cuda.models import RebasedForCausalLM

from .sizes import ModelConfiguration, logits_of, make_model


@dataclass(frozen=True)
class Generation:
    """`state_bytes` and `process_bytes`: after the first new token, and after the last one."""

    tokens: Tensor  # (new tokens,)
    seconds: float
    state_bytes: tuple[int, int]
    process_bytes: tuple[int, int]


def load_model(path: Path, device: torch.device) -> tuple[RebasedForCausalLM, Tokenizer]:
    """The trained model of a checkpoint, for inference, and its tokenizer.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: its run had tokens without a tokenizer.
    """
    checkpoint = load_checkpoint(path)
    if checkpoint is None:
        raise FileNotFoundError(f"{path}: no such checkpoint")
    model = make_model(ModelConfiguration(**checkpoint["model_configuration"]))
    model.load_state_dict(checkpoint["model"])
    if not checkpoint["tokenizer"]:
        raise ValueError(f"checkpoint: {path} was trained on tokens without a tokenizer.json")
    return model.to(device).eval(), Tokenizer.from_str(checkpoint["tokenizer"])


def choose(logits: Tensor, temperature: float) -> Tensor:
    """The next tokens (B,) of logits (B, vocabulary): drawn, or the likeliest where temperature is 0."""
    if temperature == 0:
        return logits.argmax(-1)
    return torch.multinomial((logits / temperature).softmax(-1), 1).squeeze(1)


@torch.no_grad()
def by_step(model: RebasedForCausalLM, prompt: Tensor, count: int, temperature: float = 0.0) -> Generation:
    """`count` tokens after prompt (N,): the prompt at once, then the recurrent step."""
    output = model(prompt.unsqueeze(0), use_cache=True, logits_to_keep=1)
    cache = output.cache
    tokens = prompt.new_zeros(count)
    tokens[:1] = choose(output.logits[:, -1], temperature)
    del output
    sizes = [(state_bytes(cache), _process_bytes(prompt.device))]
    start = time.perf_counter()
    for i in range(1, count):
        output = model(tokens[None, i - 1 : i], cache=cache)
        tokens[i : i + 1] = choose(output.logits[:, -1], temperature)
        if i == 1:  # what a step itself needs is there by now
            sizes = [(state_bytes(cache), _process_bytes(prompt.device))]
    if prompt.device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    sizes.append((state_bytes(cache), _process_bytes(prompt.device)))
    (first_state, first_process), (last_state, last_process) = sizes
    return Generation(tokens, seconds, (first_state, last_state), (first_process, last_process))


def state_bytes(cache: Cache) -> int:
    """Memory of what a cache holds: recurrent states, or keys and values."""
    held: list[Tensor | None] = []
    for layer in cache.layers:
        held += (
            layer.recurrent_states.values()
            if hasattr(layer, "recurrent_states")
            else (layer.keys, layer.values)
        )
    return sum(x.numel() * x.element_size() for x in held if x is not None)


@torch.no_grad()
def by_recomputing(model: RebasedForCausalLM, prompt: Tensor, count: int) -> Tensor:
    """`count` likeliest tokens after prompt (N,), each from the whole sequence so far."""
    tokens = prompt.unsqueeze(0)
    for _ in range(count):
        tokens = torch.cat([tokens, logits_of(model, tokens)[:, -1:].argmax(-1)], 1)
    return tokens[0, len(prompt) :]


def _process_bytes(device: torch.device) -> int:
    """What torch has given out on the GPU, or the process' resident set (0 where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) * 1024
    return 0
