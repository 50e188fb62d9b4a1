"""The mixers that are not this package's: softmax attention, Hyena, and Mamba and RWKV from `transformers`.

Each maps (B, N, width) to (B, N, width), causally.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PreviousToken(nn.Module):
    """x of the token before, 0 for the first: a short convolution whose weights are fixed."""

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :-1], (0, 0, 1, 0))


class SoftmaxAttention(nn.Module):
    """Causal scaled_dot_product_attention with biases: one head, as in Zoology's experiments.

    `dropout` is of the attention matrix's entries, in training.
    """

    def __init__(self, width: int, heads: int = 1, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.proj_qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v (B, heads, N, width / heads)."""
        return self.proj_qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()

    def forward(self, x: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(*self._heads(x), dropout_p=dropout, is_causal=True)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def attention_matrix(self, x: Tensor) -> Tensor:
        """A (B, heads, N, N) of y = A v."""
        q, k, _ = self._heads(x)
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)
        return scores.masked_fill(future, -math.inf).softmax(-1)


class Hyena(nn.Module):
    """The Hyena operator of order 2 (Poli et al. 2023): y = out(x2 * (h conv (x1 * v))), h as long as x.

    x1, x2 and v are projections after a depthwise convolution of 3 tokens. The filter h is a small network of
    three features of a position, damped exponentially, each channel at its own rate. The features are learned
    and start as Zoology's do: the position as a share of the longest input, and cosine and sine of an angle
    that turns by next to nothing (1e-4 of a turn over that length). The long convolution is a product of
    Fourier transforms over twice the length, so nothing wraps around.
    """

    FILTER_WIDTH = 64
    FREQUENCY = 1.0  # of the sine activations, at the start
    TURNS = 1e-4
    DECAY = (
        0.3,
        1.5,
    )  # after this share of the longest input a channel's filter is down to 1 %: fastest, slowest

    def __init__(self, width: int, longest: int) -> None:
        super().__init__()
        self.longest = longest
        self.proj_in = nn.Linear(width, 3 * width)
        self.short = nn.Conv1d(3 * width, 3 * width, 3, groups=3 * width)
        self.layers = nn.ModuleList(
            nn.Linear(a, self.FILTER_WIDTH) for a in (3, self.FILTER_WIDTH, self.FILTER_WIDTH)
        )
        self.frequency = nn.Parameter(torch.full((self.FILTER_WIDTH,), self.FREQUENCY))
        self.last = nn.Linear(self.FILTER_WIDTH, width, bias=False)
        self.skip = nn.Parameter(torch.randn(width))
        self.out_proj = nn.Linear(width, width)
        fastest, slowest = (math.log(100) / share for share in self.DECAY)
        self.register_buffer("rates", torch.linspace(slowest, fastest, width), persistent=False)
        self.register_buffer("times", torch.linspace(0, 1, longest), persistent=False)
        angles = 2 * math.pi * self.TURNS / longest * torch.arange(longest)
        self.features = nn.Parameter(torch.stack([self.times, angles.cos(), -angles.sin()], 1))

    def filter(self, seqlen: int) -> Tensor:
        """h (width, seqlen)."""
        h = self.features[:seqlen]
        for layer in self.layers:
            h = torch.sin(self.frequency * layer(h))
        return (self.last(h) * torch.exp(-self.times[:seqlen].unsqueeze(1) * self.rates)).T

    def forward(self, x: Tensor) -> Tensor:
        seqlen = x.shape[1]
        if seqlen > self.longest:
            raise ValueError(f"x: expected at most {self.longest} tokens, got {seqlen}")
        x1, x2, v = self.short(F.pad(self.proj_in(x).mT, (2, 0))).chunk(3, 1)  # (B, width, N)
        v = v * x1
        spectrum = torch.fft.rfft(v, 2 * seqlen) * torch.fft.rfft(self.filter(seqlen), 2 * seqlen)
        y = torch.fft.irfft(spectrum, 2 * seqlen)[..., :seqlen] + v * self.skip.unsqueeze(1)
        return self.out_proj((x2 * y).mT)


class RWKV(nn.Module):
    """RWKV-4's time mixing, by `transformers`, with the authors' initial weights.

    Decay, first and mixes start as in RWKV-4. The authors' mixer is a compiled module, so that neither RWKV's
    own start of its matrices nor that of the other models reaches it: its Linears keep torch's.
    """

    def __init__(self, width: int, layer: int, layers: int) -> None:
        super().__init__()
        from transformers import RwkvConfig
        from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention

        config = RwkvConfig(hidden_size=width, num_hidden_layers=layers, context_length=1)
        self.attention = RwkvSelfAttention(config, layer)
        depth, channels = layer / (layers - 1), torch.arange(width)
        share = channels / width
        starts = {
            "time_decay": -5 + 8 * (channels / (width - 1)) ** (0.7 + 1.3 * depth),
            "time_first": math.log(0.3) + 0.5 * ((channels + 1) % 3 - 1),
            "time_mix_key": share ** (1 - layer / layers),
            "time_mix_value": share ** (1 - layer / layers) + 0.3 * depth,
            "time_mix_receptance": share ** (0.5 * (1 - layer / layers)),
        }
        with torch.no_grad():
            for name, start in starts.items():
                getattr(self.attention, name).copy_(start)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)[0]


def mamba_block(width: int, layer: int, layers: int) -> nn.Module:
    """x -> x + Mamba(RMSNorm(x)), with its own initialisation, by `transformers`."""
    from transformers import MambaConfig, MambaModel

    # without mamba_ssm's kernels, mambapy's parallel scan; without that too, a loop over the tokens
    config = MambaConfig(
        vocab_size=1, hidden_size=width, num_hidden_layers=layers, state_size=16, use_mambapy=True
    )
    return MambaModel(config).layers[layer]
