"""Language models small enough to be made in a moment, with weights that make them say many things."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rebased_cuda.models import RebasedConfig, RebasedForCausalLM

VOCABULARY = 97
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "feature_dim": 8,
    "tie_word_embeddings": False,  # a tied output likes to repeat the token before
}
ALL_KINDS = ["conv", "linear_attention", "full_attention", "linear_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "rebased": ("rebased", {}),
    "tied": ("rebased", {"tie_word_embeddings": True}),
    "positions": ("rebased", {"max_position_embeddings": 64}),
    "based": ("based", {}),
    "linear_transformer": ("linear_transformer", {"max_position_embeddings": 64}),
    "attention": ("attention", {"max_position_embeddings": 64}),
    "mixed": ("rebased", {"layer_types": ALL_KINDS, "max_position_embeddings": 64}),
    "grouped": ("rebased", {"num_attention_heads": 4, "num_key_value_heads": 2, "conv_kernel": 4}),
}
"""Names in tests: the mixer, and what is beside SIZES."""


def tiny_config(name: str = "rebased", **changes: Any) -> RebasedConfig:
    mixer, settings = MODELS[name]
    return RebasedConfig.of(mixer, **{**SIZES, **settings, **changes})


def tiny_model(name: str = "rebased", spread: float = 0.3, **changes: Any) -> RebasedForCausalLM:
    """In evaluation mode, with matrices of deviation `spread`: initial ones say one token again and again."""
    model = RebasedForCausalLM(tiny_config(name, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=spread)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def prompt(batch: int = 3, seqlen: int = 9) -> Tensor:
    """Tokens (batch, seqlen)."""
    return torch.randint(VOCABULARY, (batch, seqlen))


@torch.no_grad()
def recomputed(model: RebasedForCausalLM, tokens: Tensor, count: int) -> Tensor:
    """`tokens` (B, N) and `count` likeliest ones behind them, each from the whole sequence so far."""
    for _ in range(count):
        logits = model(tokens, use_cache=False).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
    return tokens
