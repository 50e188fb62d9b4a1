"""RebasedConfig: the sizes of a language model, and which mixer stands in which of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

CONVOLUTION, LINEAR, SOFTMAX = "conv", "linear_attention", "full_attention"
"""The kinds of layers, under transformers' names: its caches ask for them."""
_PLAIN: dict[str, Any] = {"layer_norm": None, "use_gamma": False, "use_beta": False}
MIXERS: dict[str, dict[str, Any]] = {
    "rebased": {},
    "based": {"feature_map": "taylor", **_PLAIN},
    "linear_transformer": {"feature_map": "elu", **_PLAIN},
    "attention": {},
}
"""The models of the paper's comparison, by what they set; `attention` is softmax attention in every layer."""
_PAPER: dict[str, Any] = {"vocab_size": 50304, "hidden_size": 768, "max_position_embeddings": 4096}
_PAPER_HYBRID: dict[str, Any] = {**_PAPER, "num_hidden_layers": 18, "num_attention_heads": 64}
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "rebased-157m": ("rebased", _PAPER_HYBRID),
    "based-157m": ("based", _PAPER_HYBRID),
    "attention-127m": ("attention", {**_PAPER, "num_hidden_layers": 12, "num_attention_heads": 12}),
}
"""The language models of the paper's Table 9: the mixer and the sizes that give its parameter counts."""


class RebasedConfig(PreTrainedConfig):
    """A decoder of ReBased, Based, Linear Transformer or softmax attention layers and short convolutions.

    `RebasedConfig.of` makes the one of a mixer, `RebasedConfig.named` one of the paper's.

    Args:
        vocab_size, hidden_size, num_hidden_layers: sizes; the layers count the convolutions too.
        intermediate_size: width of the MLPs; four times hidden_size when None. 0: no MLPs, and a layer adds
            the LayerNorm of its mixer's output alone, as the authors' recall models do.
        max_position_embeddings: learned positions, and so the longest sequence. None: no positions and no
            longest sequence, since order reaches the model through the convolutions and the recurrence.
        layer_types: the mixer of every layer: "conv" (`GatedShortConvolution`), "linear_attention"
            (`ReBasedAttention`) or "full_attention" (softmax). When None, the paper's hybrid: a convolution,
            linear attention, a convolution, ...
        num_attention_heads, num_key_value_heads: num_heads and num_kv_heads of `ReBasedAttention`. Softmax
            attention has num_attention_heads heads of hidden_size in all.
        feature_dim, head_dim, feature_map, layer_norm, use_gamma, use_beta: as in `ReBasedAttention`.
        attention_eps: eps of `ReBasedAttention`.
        attention_bias: whether the softmax attention's q, k and v have a bias.
        conv_kernel: tokens that a convolution sees.
        norm_eps: of the LayerNorms before mixers, before MLPs and at the end.
        initializer_range: standard deviation of the initial weights.
        embedding_dropout: of the embeddings, in training; the authors' recall models have 0.1.
        use_cache, tie_word_embeddings, pad_token_id, bos_token_id, eos_token_id: as in all of transformers.

    Raises:
        ValueError: layer_types has an unknown entry or not one for every layer. (Sizes are checked where the
            model is made.)
    """

    model_type = "rebased"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 - Trainer adds to the list

    def __init__(
        self,
        vocab_size: int = 50304,
        hidden_size: int = 768,
        num_hidden_layers: int = 18,
        intermediate_size: int | None = None,
        max_position_embeddings: int | None = None,
        layer_types: Sequence[str] | None = None,
        num_attention_heads: int = 12,
        num_key_value_heads: int | None = None,
        feature_dim: int = 16,
        head_dim: int | None = None,
        feature_map: str = "outer",
        layer_norm: str | None = "token",
        use_gamma: bool = True,
        use_beta: bool = True,
        attention_eps: float = 1e-12,
        attention_bias: bool = False,
        conv_kernel: int = 3,
        norm_eps: float = 1e-5,
        initializer_range: float = 0.02,
        embedding_dropout: float = 0.0,
        use_cache: bool = True,
        tie_word_embeddings: bool = True,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.feature_dim = feature_dim
        self.head_dim = head_dim
        self.feature_map = feature_map
        self.layer_norm = layer_norm
        self.use_gamma = use_gamma
        self.use_beta = use_beta
        self.attention_eps = attention_eps
        self.attention_bias = attention_bias
        self.conv_kernel = conv_kernel
        self.norm_eps = norm_eps
        self.initializer_range = initializer_range
        self.embedding_dropout = embedding_dropout
        self.use_cache = use_cache
        hybrid = [(CONVOLUTION, LINEAR)[layer % 2] for layer in range(num_hidden_layers)]
        self.layer_types = hybrid if layer_types is None else list(layer_types)
        unknown = sorted(set(self.layer_types) - {CONVOLUTION, LINEAR, SOFTMAX})
        if unknown:
            raise ValueError(
                f"layer_types: expected {CONVOLUTION}, {LINEAR} or {SOFTMAX}, got {unknown[0]!r}"
            )
        if len(self.layer_types) != num_hidden_layers:
            raise ValueError(
                f"layer_types: expected {num_hidden_layers}, one for each layer, got {len(self.layer_types)}"
            )
        super().__init__(
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )

    @property
    def number_of_conv_states(self) -> int:
        """Transformers' word for how many tensors a cache's layer has: kv, k and a position."""
        return 3

    @classmethod
    def of(cls, mixer: str, **settings: Any) -> RebasedConfig:
        """The configuration of a mixer in `MIXERS`, with other settings as the constructor takes them.

        Raises:
            ValueError: an unknown mixer, or as the constructor.
        """
        if mixer not in MIXERS:
            raise ValueError(f"mixer: expected one of {', '.join(MIXERS)}, got {mixer!r}")
        config = cls(**{**MIXERS[mixer], **settings})
        if mixer == "attention" and "layer_types" not in settings:
            config.layer_types = [SOFTMAX] * config.num_hidden_layers
        return config

    @classmethod
    def named(cls, name: str, **changes: Any) -> RebasedConfig:
        """A configuration of `NAMED`, the paper's language models, with changes to it.

        Raises:
            ValueError: an unknown name, or as the constructor.
        """
        if name not in NAMED:
            raise ValueError(f"name: expected one of {', '.join(NAMED)}, got {name!r}")
        mixer, sizes = NAMED[name]
        return cls.of(mixer, **{**sizes, **changes})
