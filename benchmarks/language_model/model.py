"""The decoder: tokens -> logits of the next token, by blocks of a mixer over time and an MLP.

    x = E[tokens] (+ P[positions])
    x = x + mixer(LayerNorm(x)) ;  x = x + MLP(LayerNorm(x))        for every block
    logits = LayerNorm(x) E^T

Of the mixers `rebased` and `based`, every odd block (the first, the third, ...) has a gated short convolution
instead, as the paper's models do; `attention` has softmax attention in every block. Order reaches the first
two through the convolutions and the recurrence, so only `attention` has learned positions, and only it is
bound to a longest context. `prefill` and `step` decode: a prompt at once, then token by token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rebased_cuda import GatedShortConvolution, ReBasedAttention, RebasedState

MIXERS = ("rebased", "based", "attention")


@dataclass(frozen=True)
class ModelConfiguration:
    """Sizes. `layers` counts the convolutions too; `context` is the longest that `attention` can read."""

    mixer: str
    vocabulary: int
    width: int = 768
    layers: int = 18
    heads: int = 12
    feature_dim: int = 16
    context: int = 4096

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            raise ValueError(f"mixer: expected one of {', '.join(MIXERS)}, got {self.mixer!r}")
        if self.width % self.heads:
            raise ValueError(f"width: expected a multiple of heads {self.heads}, got {self.width}")


@dataclass
class KeyValueCache:
    """What softmax attention remembers: k and v (B, heads, tokens so far, width / heads). It grows."""

    k: Tensor
    v: Tensor


@dataclass
class DecodingState:
    """One entry per block: a RebasedState, a convolution's last tokens, or a KeyValueCache; all in place."""

    layers: list[Any]
    position: int

    def bytes(self) -> int:
        """Memory of all tensors."""
        tensors = (x for layer in self.layers for x in _tensors(layer))
        return sum(x.numel() * x.element_size() for x in tensors)


def _tensors(layer: RebasedState | KeyValueCache | Tensor) -> tuple[Tensor, ...]:
    if isinstance(layer, KeyValueCache):
        return layer.k, layer.v
    return (layer,) if isinstance(layer, Tensor) else tuple(layer)


class SoftmaxAttention(nn.Module):
    """Causal multi-head softmax attention: the paper's baseline."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.proj_qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj_o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.prefill(x)[0]

    def prefill(self, x: Tensor) -> tuple[Tensor, KeyValueCache]:
        """x (B, N, width) -> y (B, N, width), and the cache to go on from."""
        q, k, v = self.proj_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj_o(y.transpose(1, 2).flatten(2)), KeyValueCache(k, v)

    def step(self, x_t: Tensor, cache: KeyValueCache) -> Tensor:
        """x_t (B, width) -> y_t (B, width); `cache` is longer by one token afterwards."""
        q, k, v = self.proj_qkv(x_t).unflatten(-1, (3, self.heads, 1, -1)).unbind(1)
        cache.k, cache.v = torch.cat([cache.k, k], 2), torch.cat([cache.v, v], 2)
        y = F.scaled_dot_product_attention(q, cache.k, cache.v)
        output: Tensor = self.proj_o(y.flatten(1))
        return output


def make_mixer(configuration: ModelConfiguration, layer: int) -> nn.Module:
    """The mixer of block `layer`, counted from 0."""
    width, heads, feature_dim = configuration.width, configuration.heads, configuration.feature_dim
    if configuration.mixer == "attention":
        return SoftmaxAttention(width, heads)
    if layer % 2 == 0:  # odd, counted from 1
        return GatedShortConvolution(width)
    if configuration.mixer == "based":
        return ReBasedAttention(
            width, heads, feature_dim, feature_map="taylor", layer_norm=None, use_gamma=False, use_beta=False
        )
    return ReBasedAttention(width, heads, feature_dim)


class Block(nn.Module):
    def __init__(self, configuration: ModelConfiguration, layer: int) -> None:
        super().__init__()
        width = configuration.width
        self.mixer_norm = nn.LayerNorm(width)
        self.mixer = make_mixer(configuration, layer)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self._finish(x, self.mixer(self.mixer_norm(x)))

    def prefill(self, x: Tensor) -> tuple[Tensor, Any]:
        y, state = self.mixer.prefill(self.mixer_norm(x))
        return self._finish(x, y), state

    def step(self, x_t: Tensor, state: Any) -> Tensor:
        return self._finish(x_t, self.mixer.step(self.mixer_norm(x_t), state))

    def _finish(self, x: Tensor, y: Tensor) -> Tensor:
        x = x + y
        return x + self.mlp(self.mlp_norm(x))


class LanguageModel(nn.Module):
    def __init__(self, configuration: ModelConfiguration, *, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.configuration = configuration
        self.activation_checkpointing = activation_checkpointing
        self.embedding = nn.Embedding(configuration.vocabulary, configuration.width)
        self.positions = (
            nn.Embedding(configuration.context, configuration.width)
            if configuration.mixer == "attention"
            else None
        )
        self.blocks = nn.ModuleList(Block(configuration, layer) for layer in range(configuration.layers))
        self.norm = nn.LayerNorm(configuration.width)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's: normal with deviation 0.02, smaller by the depth where a block adds to x."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                last = name.endswith(("proj_o", "mlp.2"))
                nn.init.normal_(module.weight, std=0.02 / math.sqrt(2 * len(self.blocks)) if last else 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) -> logits (B, N, vocabulary)."""
        x = self._embed(tokens, 0)
        for block in self.blocks:
            if self.activation_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self._logits(x)

    def prefill(self, tokens: Tensor) -> tuple[Tensor, DecodingState]:
        """`forward`, and the state to go on from."""
        x = self._embed(tokens, 0)
        states = []
        for block in self.blocks:
            x, state = block.prefill(x)
            states.append(state)
        return self._logits(x), DecodingState(states, tokens.shape[1])

    def step(self, tokens: Tensor, state: DecodingState) -> Tensor:
        """tokens (B,) -> logits (B, vocabulary) of what comes next; `state` is updated in place."""
        x = self._embed(tokens.unsqueeze(1), state.position).squeeze(1)
        for block, layer in zip(self.blocks, state.layers, strict=True):
            x = block.step(x, layer)
        state.position += 1
        return self._logits(x)

    def _embed(self, tokens: Tensor, first: int) -> Tensor:
        """x (B, N, width) of tokens (B, N) that stand at `first` and after."""
        x: Tensor = self.embedding(tokens)
        if self.positions is None:
            return x
        last = first + tokens.shape[1]
        if last > self.configuration.context:
            raise ValueError(
                f"tokens: attention has {self.configuration.context} learned positions, got {last} tokens"
            )
        return x + self.positions(torch.arange(first, last, device=tokens.device))

    def _logits(self, x: Tensor) -> Tensor:
        return F.linear(self.norm(x), self.embedding.weight)
