"""RebasedModel and RebasedForCausalLM: the decoder, as transformers knows models.

    x = E[tokens] (+ P[positions])
    x = x + mixer(LayerNorm(x)) ;  x = x + MLP(LayerNorm(x))        for every layer
    logits = LayerNorm(x) E^T

The configuration says which layer has a gated short convolution, linear attention or softmax attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .configuration import SOFTMAX, RebasedConfig
from .mixers import COUNTS, ResidualLinear, make_mixer, mix, remember


class RebasedMLP(nn.Module):
    """fc1, GELU, fc2, both with a bias."""

    def __init__(self, config: RebasedConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = ResidualLinear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.fc2(nn.functional.gelu(self.fc1(x)))
        return output


class RebasedBlock(GradientCheckpointingLayer):
    """A mixer over time and an MLP, each added to what it reads."""

    def __init__(self, config: RebasedConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.mixer_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mixer = make_mixer(config, layer_idx)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = RebasedMLP(config) if config.intermediate_size else nn.Identity()

    def forward(
        self, x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        """x (B, N, hidden_size) of the same; the other arguments as in `mixers.mix`."""
        x = x + mix(self.mixer, self.layer_idx, self.mixer_norm(x), mask, cu_seqlens, cache)
        output: Tensor = x + self.mlp(self.mlp_norm(x))
        return output


class RebasedPreTrainedModel(PreTrainedModel):
    """What transformers asks of every model: how it starts, what must not be split, rounded or cropped."""

    config_class = RebasedConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("RebasedBlock",)
    _keep_in_fp32_modules_strict = ("ln_q", "ln_k")  # bfloat16 would round their steps in training away
    _is_stateful = True  # a recurrent state cannot be cropped, which assisted decoding asks for
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """As the authors start their models.

        Linears and embeddings have initializer_range; the last Linear of softmax attention and of an MLP is
        smaller by the depth. The authors know these by the names out_proj and fc2, which the last one of
        linear attention, proj_o, does not have: it starts as every other Linear. Convolutions start as torch
        has them.
        """
        std = self.config.initializer_range
        if isinstance(module, (nn.Linear, nn.Embedding)):
            if isinstance(module, ResidualLinear):
                std /= math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Conv1d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            init.uniform_(module.weight, -bound, bound)
            if module.bias is not None:
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.LayerNorm):
            if module.weight is not None:
                init.ones_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)


class RebasedModel(RebasedPreTrainedModel):
    """The decoder without its output: tokens -> hidden states."""

    def __init__(self, config: RebasedConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        positions = config.max_position_embeddings
        self.embed_positions = None if positions is None else nn.Embedding(positions, config.hidden_size)
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(RebasedBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        """The embedding of tokens."""
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Puts another in its place, as resizing the vocabulary does."""
        self.embed_tokens = value

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Any = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states (B, N, hidden_size) of tokens.

        Args:
            input_ids: (B, N); or inputs_embeds (B, N, hidden_size), in place of their embeddings.
            attention_mask: (B, what came before + N) bool or integers, 0 for padding, which may stand
                anywhere. A single token of a row is never taken for padding. Or what `generate` prepares for
                a static cache: a mask by kind of layer.
            position_ids: (B, N) or (1, N), where tokens stand, for a model with learned positions. By
                default tokens are counted, padding left out, on from what the cache has seen.
            cache: a transformers cache made for this configuration, which goes on from what it holds and is
                updated; no gradients flow through it. past_key_values is its older name.
            use_cache: whether to make a cache where none is given; by default as the configuration says,
                but not in training and not for packed sequences. Never where layers are checkpointed.
            output_hidden_states: also return the input of every layer and the output of the last.
            cu_seq_lens_q: (S + 1,): sequences packed along N with B = 1, as transformers'
                DataCollatorWithFlattening hands in with return_flash_attn_kwargs.
            kwargs: what a loss or a data collator hands on: without effect here.

        Raises:
            ValueError: an argument that the model cannot follow; the message names it.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids: expected either these or inputs_embeds, got both or neither")
        if output_attentions:
            raise ValueError("output_attentions: linear attention makes no such matrix; see attention_matrix")
        if cache is not None and past_key_values is not None:
            raise ValueError("past_key_values: is the older name of cache; give one of them")
        cache = past_key_values if cache is None else cache
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training and cu_seq_lens_q is None
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            if cache is not None:  # the second run of a layer would go on from what the first has left
                raise ValueError("cache: expected none where layers are checkpointed in training")
            use_cache = False
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if cu_seq_lens_q is not None and cache is not None:
            raise ValueError("cu_seq_lens_q: expected none with a cache, since packed sequences leave none")
        masks = self._masks(x, attention_mask, position_ids, cache, cu_seq_lens_q)
        past = self._count(x, masks, cache)
        if self.embed_positions is not None:
            if position_ids is None:
                position_ids = self._positions(x, masks, attention_mask, cache, past, cu_seq_lens_q)
            x = x + self._embed_positions(position_ids)
        x = self.dropout(x)
        states = [x]
        for block, kind in zip(self.layers, self.config.layer_types, strict=True):
            x = block(x, masks[kind], cu_seq_lens_q, cache=cache)
            states.append(x)
        x = self.norm(x)
        output = BaseModelOutputWithPast(last_hidden_state=x, cache=cache)
        if self.config.output_hidden_states if output_hidden_states is None else output_hidden_states:
            output.hidden_states = (*states[:-1], x)
        return output

    def _masks(
        self,
        x: Tensor,
        attention_mask: Tensor | dict[str, Tensor] | None,
        position_ids: Tensor | None,
        cache: Any,
        cu_seqlens: Tensor | None,
    ) -> dict[str, Tensor | None]:
        """The mask for every kind of layer."""
        kinds = set(self.config.layer_types)
        if isinstance(attention_mask, dict):
            return {kind: attention_mask.get(kind) for kind in kinds}
        if kinds == {SOFTMAX} and attention_mask is not None and attention_mask.dim() == 4:
            return {SOFTMAX: attention_mask}
        if attention_mask is not None and attention_mask.dim() != 2:
            given = f"shape {tuple(attention_mask.shape)}"
            raise ValueError(
                f"attention_mask: expected shape (B, N), since linear attention is causal, got {given}"
            )
        if cu_seqlens is not None and attention_mask is not None:
            raise ValueError("attention_mask: expected none with cu_seq_lens_q, which says what is padding")
        arguments = {
            "config": self.config,
            "inputs_embeds": x,
            "attention_mask": attention_mask,
            "cache": cache,
        }
        recurrent = create_recurrent_attention_mask(**arguments)
        masks: dict[str, Tensor | None] = dict.fromkeys(kinds - {SOFTMAX}, recurrent)
        if SOFTMAX in kinds:
            if cu_seqlens is not None:
                rows, first = _packed_rows(x, cu_seqlens)
                masks[SOFTMAX] = (first[:, None] == first) & (rows[:, None] >= rows)
            else:
                masks[SOFTMAX] = create_causal_mask(**arguments, position_ids=position_ids)
        return masks

    def _count(self, x: Tensor, masks: dict[str, Tensor | None], cache: Any) -> Tensor | None:
        """Counts x, (B, 2) tokens and columns (padding too) of each row; what was counted before.

        Recurrent layers know no position. The first of them keeps the counts in the cache, as a state that is
        moved and reordered as the others are. None: nothing came before, or there is no such layer.
        """
        index = _first_recurrent(self.config)
        if cache is None or index is None:
            return None
        layer, mask = cache.layers[index], masks[self.config.layer_types[index]]
        past = layer.recurrent_states[COUNTS].clone() if layer.has_previous_state[COUNTS] else None
        new = torch.full((x.shape[0], 2), x.shape[1], dtype=torch.long, device=x.device)
        if mask is not None:
            new[:, 0] = (mask != 0).sum(1)
        remember(layer, [new if past is None else past + new], COUNTS)
        return past

    def _positions(
        self,
        x: Tensor,
        masks: dict[str, Tensor | None],
        attention_mask: Tensor | dict[str, Tensor] | None,
        cache: Any,
        past: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        """Where the tokens of x stand, (B or 1, N): padding is left out of the count."""
        rows = torch.arange(x.shape[1], device=x.device)
        if cu_seqlens is not None:
            return (rows - _packed_rows(x, cu_seqlens)[1]).unsqueeze(0)
        index = _first_recurrent(self.config)
        if index is None:
            if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
                return (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, -x.shape[1] :]
            return (rows + (0 if cache is None else cache.get_seq_length())).unsqueeze(0)
        mask = masks[self.config.layer_types[index]]
        found = rows.unsqueeze(0) if mask is None else (mask != 0).long().cumsum(1) - 1
        return (found if past is None else found + past[:, :1]).clamp(min=0)

    def _embed_positions(self, position_ids: Tensor) -> Tensor:
        assert self.embed_positions is not None
        longest, seqlen = self.embed_positions.num_embeddings, position_ids.shape[-1]
        if seqlen > longest:
            raise ValueError(
                f"input_ids: expected up to {longest} tokens, as many as positions, got {seqlen}"
            )
        if position_ids.device.type == "cpu" and not torch.compiler.is_compiling() and seqlen:
            last = int(position_ids.max())  # on a GPU this would be a wait
            if last >= longest:
                raise ValueError(f"position_ids: expected positions up to {longest - 1}, got {last}")
        output: Tensor = self.embed_positions(position_ids)
        return output


def _first_recurrent(config: RebasedConfig) -> int | None:
    """The first layer that is not softmax attention."""
    return next((i for i, kind in enumerate(config.layer_types) if kind != SOFTMAX), None)


def _packed_rows(x: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Rows 0 to N of x (1, N, ...), and the first row of the sequence that each belongs to."""
    rows = torch.arange(x.shape[1], device=x.device)
    bounds = cu_seqlens.to(torch.long)
    sequences = torch.searchsorted(bounds, rows, right=True) - 1
    return rows, bounds[sequences]


class RebasedForCausalLM(RebasedPreTrainedModel, GenerationMixin):
    """The decoder with its output, the embedding's transpose unless tie_word_embeddings is False."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: RebasedConfig) -> None:
        super().__init__(config)
        self.model = RebasedModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        """The Linear that makes logits."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        """Puts another in its place."""
        self.lm_head = value

    def generate(
        self, inputs: Any = None, generation_config: Any = None, *arguments: Any, **kwargs: Any
    ) -> Any:
        """transformers' `generate`, which says in the model's words what a recurrent state does not do.

        Raises:
            ValueError: `prefill_chunk_size` is set, and a layer is not softmax attention: transformers asks
                such a cache how many keys it has. A whole prompt takes memory linear in its length, and parts
                of it can be read by calling the model with `cache`.
        """
        settings = self.generation_config if generation_config is None else generation_config
        chunk = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
        if chunk is not None and _first_recurrent(self.config) is not None:
            raise ValueError(
                f"prefill_chunk_size: expected None where layers keep states, got {chunk}; prefill the whole "
                "prompt, or call the model on parts of it with cache="
            )
        return super().generate(inputs, generation_config, *arguments, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """What `generate` calls the model with: of a whole sequence only what the cache has not seen.

        transformers sees to it where a cache has keys and values to count; recurrent states alone are counted
        here, at the beginning of a call of `generate`.

        Raises:
            ValueError: input_ids are a whole sequence, and the cache has seen more.
        """
        cache, index = kwargs.get("cache"), _first_recurrent(self.config)
        if is_first_iteration and next_sequence_length is None and cache is not None and index is not None:
            layer = cache.layers[index]
            seen = int(layer.recurrent_states[COUNTS][0, 1]) if layer.has_previous_state[COUNTS] else 0
            positions = kwargs.get("position_ids")
            length = (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
            # more positions than tokens: the mask was of the whole sequence, the tokens are the new ones
            if seen and (positions is None or positions.shape[-1] == length):
                if length <= seen:
                    raise ValueError(
                        f"input_ids: expected the whole sequence, more than the {seen} tokens that the cache "
                        f"has seen, or new tokens with an attention_mask of the whole; got {length} tokens"
                    )
                next_sequence_length = length - seen
        prepared: dict[str, Any] = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        return prepared

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        position_ids: Tensor | None = None,
        cache: Any = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Any = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, N, vocab_size) of the next tokens, and with labels (B, N) the loss.

        Args:
            labels: the tokens themselves, which are shifted here; -100 where there is none to predict.
            logits_to_keep: only those of the last tokens, this many (0: all), or of the rows in a tensor.
            kwargs: for the loss, as num_items_in_batch.
            The others: as in `RebasedModel.forward`, which also raises.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            past_key_values=past_key_values,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            cu_seq_lens_q=cu_seq_lens_q,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            cache=outputs.cache,
        )
