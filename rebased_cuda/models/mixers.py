"""The mixers of a decoder's layers, and how each goes on from a layer of a transformers cache.

Softmax attention keeps keys and values there. The others keep tensors of one size: a `RebasedState`'s kv and
k, or a convolution's last tokens. They stand among the cache layer's recurrent states, which transformers
reorders for beams, moves between devices and resets.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import GatedShortConvolution, ReBasedAttention
from ..state import RebasedState
from .configuration import CONVOLUTION, SOFTMAX, RebasedConfig

COUNTS = 2
"""Which state of a cache's layer counts what each row has had; those before it are the mixer's."""


class ResidualLinear(nn.Linear):
    """A Linear whose output is added to its block's input and starts smaller by the depth."""


class SoftmaxAttention(nn.Module):
    """Causal multi-head softmax attention, the paper's baseline: proj_qkv, then proj_o with a bias."""

    def __init__(self, config: RebasedConfig, layer_idx: int) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        if width % heads:
            raise ValueError(f"num_attention_heads: expected a divisor of hidden_size {width}, got {heads}")
        self.num_heads, self.layer_idx = heads, layer_idx
        self.proj_qkv = nn.Linear(width, 3 * width, bias=config.attention_bias)
        self.proj_o = ResidualLinear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
        """x (B, N, width) -> y (B, N, width).

        Args:
            mask: (B, 1, N, keys) as scaled_dot_product_attention takes it, for all keys that the cache holds
                afterwards; None: every token sees those before it, and a single token everything.
            cache: a transformers cache, which is given the keys and values of x; None: x is all there is.
        """
        q, k, v = self.proj_qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)
        causal = mask is None and x.shape[1] > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        output: Tensor = self.proj_o(y.transpose(1, 2).flatten(2))
        return output


def make_mixer(config: RebasedConfig, layer_idx: int) -> nn.Module:
    """The mixer of layer `layer_idx`, counted from 0."""
    kind = config.layer_types[layer_idx]
    if kind == SOFTMAX:
        return SoftmaxAttention(config, layer_idx)
    if kind == CONVOLUTION:
        return GatedShortConvolution(config.hidden_size, config.conv_kernel)
    mixer = ReBasedAttention(
        config.hidden_size,
        config.num_attention_heads,
        config.feature_dim,
        config.num_key_value_heads,
        config.head_dim,
        feature_map=config.feature_map,
        layer_norm=config.layer_norm,
        use_gamma=config.use_gamma,
        use_beta=config.use_beta,
        eps=config.attention_eps,
    )
    for norm in (mixer.ln_q, mixer.ln_k):  # whose steps in training bfloat16 would round away
        if next(norm.parameters(), torch.empty(0)).dtype in (torch.bfloat16, torch.float16):
            norm.float()
    return mixer


def mix(
    mixer: nn.Module,
    layer_idx: int,
    x: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    cache: Any,
) -> Tensor:
    """What the mixer of layer `layer_idx` makes of x (B, N, width), after what the cache holds of that layer.

    Args:
        mask: of softmax attention as there, of the others (B, N), nonzero for tokens.
        cu_seqlens: (S + 1,), sequences packed along N, for the mixers that have no mask then.
        cache: a transformers cache, which afterwards holds x too, or None: x is all there is. Gradients do
            not flow through it.
    """
    if isinstance(mixer, SoftmaxAttention):
        return mixer(x, mask, cache)  # type: ignore[no-any-return]
    if cache is None:
        return mixer(x, mask, cu_seqlens=cu_seqlens)  # type: ignore[no-any-return]
    assert isinstance(mixer, (ReBasedAttention, GatedShortConvolution))
    layer = cache.layers[layer_idx]
    count = 2 if isinstance(mixer, ReBasedAttention) else 1
    state: Any = None
    if layer.has_previous_state[0]:
        held = [layer.recurrent_states[i] for i in range(count)]
        state = RebasedState(*held) if count == 2 else held[0]
        if x.shape[1] == 1 and mask is None and not torch.is_grad_enabled():
            return mixer.step(x, state)  # in place, and so in the cache
    y, state = mixer.prefill(x, mask, state=state, cu_seqlens=cu_seqlens)
    remember(layer, state if count == 2 else [state])
    return y


def remember(layer: Any, states: Iterable[Tensor], first: int = 0) -> None:
    """Puts states into a cache's layer, from its state `first` on.

    A layer of transformers' own says that something came before, and on which device, when it is given a
    convolution's state; for recurrent states that is left to the model.
    """
    for i, state in enumerate(states, first):
        layer.update_recurrent_state(state.detach(), state_idx=i)
        layer.has_previous_state[i] = True
        layer.device = state.device
