"""The sizes of a run's model, as a checkpoint keeps them, and the model of these sizes with its loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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


class TrainedModel(RebasedForCausalLM):
    """The model with a training loss whose logits never stand in memory all at once.

    The loss is made in forward, since that is what DistributedDataParallel and FSDP wrap.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        targets: Tensor | None = None,
        loss_chunk: int = 0,
        **options: Any,
    ) -> Any:
        """With targets (B, N), the mean cross entropy of the logits in nats; else the model's own output.

        loss_chunk: tokens whose logits are made at once, and made again in backward; 0: all.
        """
        if targets is None:
            return super().forward(input_ids=input_ids, **options)
        hidden = self.model(input_ids=input_ids, use_cache=False).last_hidden_state.flatten(0, 1)
        targets = targets.flatten()
        size = loss_chunk or len(targets)
        if size >= len(targets):
            return self._loss(hidden, targets) / len(targets)
        total = hidden.new_zeros((), dtype=torch.float32)
        for some, wanted in zip(hidden.split(size), targets.split(size), strict=True):
            total = total + checkpoint(self._loss, some, wanted, use_reentrant=False)
        return total / len(targets)

    def _loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.lm_head(hidden).float(), targets, reduction="sum")


def make_model(configuration: ModelConfiguration, *, activation_checkpointing: bool = False) -> TrainedModel:
    """A new model of these sizes, in training mode."""
    model = TrainedModel(configuration.config()).train()
    if activation_checkpointing:
        model.activation_checkpointing_enable()
    return model


def logits_of(model: nn.Module, tokens: Tensor) -> Any:
    """tokens (B, N) -> logits (B, N, vocabulary)."""
    return model(input_ids=tokens, use_cache=False).logits
