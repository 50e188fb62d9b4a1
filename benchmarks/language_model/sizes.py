"""The sizes of a run's model, as a checkpoint keeps them, and the model of these sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from rebased_cuda.models import RebasedConfig, RebasedForCausalLM

MIXERS = ("rebased", "based", "attention")


@dataclass(frozen=True)
class ModelConfiguration:
    """`layers` counts the convolutions too; `context` is the longest sequence that learned positions allow.

    `positions`: whether ReBased and Based have learned positions; attention always has.
    """

    mixer: str
    vocabulary: int
    width: int = 768
    layers: int = 18
    heads: int = 12
    feature_dim: int = 16
    context: int = 4096
    positions: bool = False

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer: expected one of {', '.join(MIXERS)}, got {self.mixer!r}")
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads {self.heads}, got {self.width}")

    def config(self) -> RebasedConfig:
        """The same for `rebased_cuda.models`."""
        positions = self.positions or self.mixer == "attention"
        return RebasedConfig.of(
            self.mixer,
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            feature_dim=self.feature_dim,
            max_position_embeddings=self.context if positions else None,
        )


def make_model(
    configuration: ModelConfiguration, *, activation_checkpointing: bool = False
) -> RebasedForCausalLM:
    """A new model of these sizes, in training mode."""
    model = RebasedForCausalLM(configuration.config()).train()
    if activation_checkpointing:
        model.activation_checkpointing_enable()
    return model


def logits_of(model: nn.Module, tokens: Tensor) -> Any:
    """tokens (B, N) -> logits (B, N, vocabulary)."""
    return model(input_ids=tokens, use_cache=False).logits
