"""The models of the recall task: embedding, two blocks, tied output. Sizes are those of the paper's Table 4.

    x = token + position;   twice: x = x + mixer(LN(x)), x = x + LN(x);   logits = LN(x) embedding^T

The second residual is what is left of a block without an MLP. In the hybrid the first mixer is a gated short
convolution of 3 tokens and the second the one under test; RWKV and Mamba stand in both blocks, and a Mamba
block is x + mixer(RMSNorm(x)) alone. All this is the authors' arrangement. Any mixer may also stand in both
blocks, or RWKV behind a convolution: Figure 7 compares the two.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rebased_cuda import GatedShortConvolution, ReBasedAttention

from .data import IGNORED
from .mixers import RWKV, Hyena, PreviousToken, SoftmaxAttention, mamba_block

HEADS, FEATURE_DIM = 12, 16  # of the linear mixers
LAYERS = 2
INITIAL_STD = 0.02

# The rows of the paper's Table 1: what happens to q and k before the feature map.
NO_NORM: dict[str, Any] = {"layer_norm": None, "use_gamma": False, "use_beta": False}
ABLATION: dict[str, dict[str, Any]] = {
    "x2": NO_NORM,
    "norm": {"layer_norm": "token", "use_gamma": False, "use_beta": False},
    "gamma": {"layer_norm": None, "use_gamma": True, "use_beta": False},
    "gamma-beta": {"layer_norm": None, "use_gamma": True, "use_beta": True},
    "rebased": {"layer_norm": "token", "use_gamma": True, "use_beta": True},
}
SQUARE = "-square"  # ending of a name: elementwise squares instead of all products of two
LINEAR: dict[str, dict[str, Any]] = {
    "based": NO_NORM | {"feature_map": "taylor"},
    "linear": NO_NORM | {"feature_map": "elu"},
    **{name: options | {"feature_map": "outer"} for name, options in ABLATION.items()},
    **{name + SQUARE: options | {"feature_map": "square"} for name, options in ABLATION.items()},
}
MIXERS = (*LINEAR, "softmax", "hyena", "rwkv", "mamba")
FIRST_LAYERS = ("paper", "convolution", "shift", "same")
BOTH = ("rwkv", "mamba")  # what the paper's main experiment has in both blocks


class Block(nn.Module):
    """x -> x + mixer(LN(x)) -> that + LN(that)."""

    def __init__(self, width: int, mixer: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mixer = mixer
        self.second_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))
        return x + self.second_norm(x)


class RecallModel(nn.Module):
    """Tokens (B, N) -> what the output embedding is applied to, (B, N, width).

    Args:
        mixer: a name in MIXERS.
        width: of the residual stream; the linear mixers' 12 heads have a head dim of width // 12.
        vocabulary, positions: sizes of the two learned embeddings; positions bounds N.
        first: the first block's mixer: "convolution" (the hybrid), "shift" (fixed weights: the token before)
            or "same" (the second block's); "paper" is "same" for RWKV and Mamba, "convolution" for the
            others. Mamba stands in both blocks or nowhere.
        tied: True is the authors' model: the output is the token embedding's transpose, and all weights start
            at a standard deviation of 0.02. False gives the output a matrix of its own and starts from
            torch's defaults: small models then learn in hundreds of steps what takes the other thousands.
        embedding_dropout: of the sum of both embeddings, in training; Mamba's has none, as the authors'.
        attention_dropout: of softmax attention's matrix, in training.

    Raises:
        ValueError: an unknown mixer or first layer, or a first layer that Mamba cannot have.
    """

    def __init__(
        self,
        mixer: str,
        width: int,
        vocabulary: int,
        positions: int,
        first: str = "paper",
        tied: bool = True,
        embedding_dropout: float = 0.0,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if mixer not in MIXERS:
            raise ValueError(f"mixer: expected one of {', '.join(MIXERS)}, got {mixer!r}")
        if first not in FIRST_LAYERS:
            raise ValueError(f"first: expected one of {', '.join(FIRST_LAYERS)}, got {first!r}")
        if first == "paper":
            first = "same" if mixer in BOTH else "convolution"
        if mixer == "mamba" and first != "same":
            raise ValueError(f'first: mamba stands in both blocks, so expected "same", got {first!r}')
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        nn.init.normal_(self.positions.weight, std=INITIAL_STD)
        self.dropout = nn.Dropout(0.0 if mixer == "mamba" else embedding_dropout)
        mixers = (mixer if first == "same" else first, mixer)
        self.blocks = nn.ModuleList(
            _block(name, width, positions, layer, attention_dropout) for layer, name in enumerate(mixers)
        )
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.output.weight = self.tokens.weight
            for part in (self.tokens, *self.blocks):
                _initialise(part)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def embed(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.dropout(self.tokens(tokens) + self.positions.weight[: tokens.shape[1]])
        return x

    def asked(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (queries, vocabulary) and targets (queries,), of the positions that have a target."""
        asked = targets != IGNORED
        return self.output(self(inputs)[asked]), targets[asked]

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy in nats per query."""
        return F.cross_entropy(*self.asked(inputs, targets))

    @torch.no_grad()
    def correct(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Whether each query is answered rightly: (queries,)."""
        logits, targets = self.asked(inputs, targets)
        return logits.argmax(-1) == targets

    @torch.no_grad()
    def attention(self, tokens: Tensor) -> Tensor:
        """The second mixer's attention (B, heads, N, N) to every token, by every token; rows sum to 1.

        Raises:
            ValueError: the mixer has no such matrix.
        """
        mixer = self.blocks[1].mixer
        if not isinstance(mixer, (ReBasedAttention, SoftmaxAttention)):
            raise ValueError(f"{type(mixer).__name__} has no attention matrix")
        return mixer.attention_matrix(self.blocks[1].norm(self.blocks[0](self.embed(tokens))))

    def norm_parameters(self) -> dict[str, list[float]]:
        """Mean and standard deviation of gamma and beta of the second mixer's q and k, those that it has."""
        mixer = self.blocks[1].mixer if isinstance(self.blocks[1], Block) else None
        if not isinstance(mixer, ReBasedAttention):
            return {}
        held = {
            "gamma_q": mixer.ln_q.weight,
            "beta_q": mixer.ln_q.bias,
            "gamma_k": mixer.ln_k.weight,
            "beta_k": mixer.ln_k.bias,
        }
        return {
            name: [float(x.detach().mean()), float(x.detach().std())]
            for name, x in held.items()
            if x is not None
        }


def _block(mixer: str, width: int, positions: int, layer: int, attention_dropout: float) -> nn.Module:
    if mixer == "mamba":
        return mamba_block(width, layer, LAYERS)
    if mixer == "rwkv":
        made: nn.Module = RWKV(width, layer, LAYERS)
    elif mixer == "convolution":
        made = GatedShortConvolution(width, 3)
    elif mixer == "shift":
        made = PreviousToken()
    elif mixer == "softmax":
        made = SoftmaxAttention(width, dropout=attention_dropout)
    elif mixer == "hyena":
        made = Hyena(width, positions)
    else:
        made = ReBasedAttention(width, HEADS, FEATURE_DIM, **LINEAR[mixer])
    return Block(width, made)


def _initialise(part: nn.Module) -> None:
    """The authors' start: Linears and embeddings alike, convolutions as torch has them, RWKV as it came.

    The last Linear of softmax attention, Hyena and Mamba is smaller by the depth: the authors know it by its
    name, out_proj, which linear attention's does not have. Mamba's time steps lose their own bias to this.
    """
    if isinstance(part, RWKV):
        return
    if isinstance(part, (nn.Linear, nn.Embedding)):
        nn.init.normal_(part.weight, std=INITIAL_STD)
    if isinstance(part, nn.Linear) and part.bias is not None:
        nn.init.zeros_(part.bias)
    if isinstance(part, nn.Conv1d):
        part.reset_parameters()
    for name, child in part.named_children():
        _initialise(child)
        if name == "out_proj":
            nn.init.normal_(child.weight, std=INITIAL_STD / math.sqrt(2 * LAYERS))
