"""generate, with a cache of any kind, says what recomputing the whole sequence for every token would say."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.24")

from tiny_models import MODELS, prompt, recomputed, tiny_model
from transformers import DynamicCache, StaticCache

from rebased_cuda.models import RebasedForCausalLM

GREEDY: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
pytestmark = pytest.mark.usefixtures("one_thread")


def _left_padded(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Tokens (B, longest) with padding in front, and the mask."""
    longest = max(len(row) for row in rows)
    tokens = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([(torch.arange(longest) >= longest - len(row)).long() for row in rows])
    return tokens, mask


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_greedy_generation_equals_recomputing(name, implementation):
    model, tokens = tiny_model(name), prompt()
    cache = None if implementation == "dynamic" else "static"
    options = {"cache_implementation": cache, "disable_compile": True}  # test_compiling.py compiles it
    said = model.generate(tokens, max_new_tokens=24, **GREEDY, **options)
    assert torch.equal(said, recomputed(model, tokens, 24))
    assert len(set(said[:, 9:].flatten().tolist())) > 5  # a model that says one thing proves nothing


@pytest.mark.parametrize("name", MODELS)
def test_logits_in_any_pieces_equal_those_at_once(name):
    """Prompts, turns of several tokens and single ones, with and without gradients."""
    model = tiny_model(name).double()
    tokens = prompt(2, 20)
    whole = model(tokens, use_cache=False).logits
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            cache, logits = None, []
            for piece in tokens.split([5, 1, 1, 6, 1, 6], 1):
                output = model(piece, cache=cache, use_cache=True)
                cache = output.cache
                logits.append(output.logits)
        torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_a_left_padded_batch_is_each_row_alone(name):
    model = tiny_model(name)
    rows = [prompt(1, n)[0] for n in (9, 4, 1)]
    tokens, mask = _left_padded(rows)
    said = model.generate(tokens, attention_mask=mask, max_new_tokens=20, **GREEDY)
    for row, whole in zip(rows, said, strict=True):
        assert torch.equal(whole[9:], recomputed(model, row[None], 20)[0, len(row) :])


@pytest.mark.parametrize("name", MODELS)
def test_a_padded_turn_goes_on_from_the_cache(name):
    """The second turn's rows differ in length too, so padding stands in the middle of the sequences."""
    model = tiny_model(name).double()
    turns = [[prompt(1, n)[0] for n in lengths] for lengths in ((6, 3), (2, 7), (1, 1))]
    cache, mask = None, torch.zeros(2, 0, dtype=torch.long)
    with torch.no_grad():
        for turn in turns:
            tokens, new = _left_padded(turn)
            mask = torch.cat([mask, new], 1)
            output = model(tokens, attention_mask=mask, cache=cache, use_cache=True)
            cache = output.cache
        for row in range(2):
            whole = torch.cat([turn[row] for turn in turns])[None]
            expected = model(whole, use_cache=False).logits[0, -1]
            torch.testing.assert_close(output.logits[row, -1], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", MODELS)
def test_beams_with_a_cache_are_those_without(name):
    model, tokens = tiny_model(name), prompt(2, 6)
    options = {**GREEDY, "num_beams": 4, "num_return_sequences": 2, "max_new_tokens": 12}
    said = model.generate(tokens, **options)
    assert torch.equal(said, model.generate(tokens, use_cache=False, **options))
    greedy = model.generate(tokens, max_new_tokens=12, **GREEDY)
    assert not torch.equal(said[::2], greedy)  # so that beams were reordered on the way


@pytest.mark.parametrize("name", MODELS)
def test_sampling_with_a_cache_is_that_without(name):
    model, tokens = tiny_model(name, spread=0.15), prompt(2, 6)
    options = {"do_sample": True, "top_p": 0.95, "temperature": 0.9, "num_return_sequences": 3}
    options |= {"max_new_tokens": 10, "eos_token_id": None}
    said = []
    for use_cache in (True, False):
        torch.manual_seed(5)
        said.append(model.generate(tokens, use_cache=use_cache, **options))
    assert torch.equal(*said)
    assert len({tuple(row.tolist()) for row in said[0]}) == 6


@pytest.mark.parametrize("name", MODELS)
def test_several_turns_with_the_returned_cache(name):
    model, tokens = tiny_model(name), prompt()
    cache = None
    for length in (4, 1, 6):
        more = {} if cache is None else {"cache": cache}
        output = model.generate(tokens, max_new_tokens=5, return_dict_in_generate=True, **GREEDY, **more)
        assert torch.equal(output.sequences, recomputed(model, tokens, 5))
        cache = output.cache
        tokens = torch.cat([output.sequences, prompt(3, length)], 1)


def test_a_turn_of_new_tokens_alone():
    """With a mask of the whole sequence, as transformers has it; without one, too few tokens are refused."""
    model, tokens = tiny_model("positions"), prompt()
    first = model.generate(tokens, max_new_tokens=5, return_dict_in_generate=True, **GREEDY)
    new = torch.cat([first.sequences[:, -1:], prompt(3, 4)], 1)  # the last token was said, not read
    whole = torch.cat([first.sequences, new[:, 1:]], 1)
    with pytest.raises(ValueError, match="input_ids: expected the whole sequence, more than the 13 tokens"):
        model.generate(new, cache=first.cache, max_new_tokens=5, **GREEDY)
    mask = torch.ones_like(whole)
    said = model.generate(new, attention_mask=mask, cache=first.cache, max_new_tokens=5, **GREEDY)
    assert torch.equal(said[:, 5:], recomputed(model, whole, 5)[:, whole.shape[1] :])


@pytest.mark.parametrize("name", ["rebased", "positions"])
def test_a_state_does_not_grow(name):
    model, tokens = tiny_model(name), prompt()

    def size(count: int) -> int:
        output = model.generate(tokens, max_new_tokens=count, return_dict_in_generate=True, **GREEDY)
        states = [x for layer in output.cache.layers for x in layer.recurrent_states.values()]
        return sum(x.untyped_storage().nbytes() for x in states if x is not None)

    assert size(2) == size(40) > 0


def test_embeddings_in_place_of_tokens():
    model, tokens = tiny_model(), prompt()
    said = model.generate(inputs_embeds=model.get_input_embeddings()(tokens), max_new_tokens=8, **GREEDY)
    assert torch.equal(said, recomputed(model, tokens, 8)[:, 9:])


def test_the_older_name_of_the_cache():
    model, tokens = tiny_model(), prompt()
    with torch.no_grad():
        cache = model(tokens[:, :5], use_cache=True).cache
        rest = model(tokens[:, 5:], past_key_values=cache)
        assert rest.past_key_values is cache
        expected = model(tokens, use_cache=False).logits
        torch.testing.assert_close(rest.logits, expected[:, 5:], rtol=1e-4, atol=1e-4)
        with pytest.raises(ValueError, match="past_key_values: "):
            model(tokens, cache=cache, past_key_values=cache)


@pytest.mark.parametrize("name", ["positions", "mixed", "attention"])
def test_caches_that_the_caller_makes(name):
    model, tokens = tiny_model(name), prompt()
    expected = recomputed(model, tokens, 6)
    for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=32)):
        said = model.generate(tokens, cache=cache, max_new_tokens=6, disable_compile=True, **GREEDY)
        assert torch.equal(said, expected)
        cache.reset()
        with torch.no_grad():
            logits = model(tokens, cache=cache).logits
        torch.testing.assert_close(logits, model(tokens, use_cache=False).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_generates(dtype):
    model, tokens = tiny_model().to(dtype), prompt()
    output = model.generate(tokens, max_new_tokens=8, return_dict_in_generate=True, **GREEDY)
    assert output.sequences.shape == (3, 17)
    kv, k = (output.cache.layers[1].recurrent_states[i] for i in range(2))
    assert kv.dtype == k.dtype == torch.float32
    with torch.no_grad():
        logits = model(output.sequences[:, :-1], use_cache=False).logits
        exact = tiny_like(model)(output.sequences[:, :-1], use_cache=False).logits
    error = (logits.double() - exact).norm() / exact.norm()
    assert error < (0.1 if dtype == torch.bfloat16 else 0.02)


def tiny_like(model: RebasedForCausalLM) -> RebasedForCausalLM:
    """The same weights in float64."""
    other = RebasedForCausalLM(model.config).double().eval()
    other.load_state_dict(model.state_dict())
    return other


def test_what_a_state_cannot_do_is_refused():
    model, tokens = tiny_model(), prompt(1)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens, assistant_model=tiny_model(), max_new_tokens=4)
    with pytest.raises(ValueError, match="stateful"):
        model.generate(tokens, prompt_lookup_num_tokens=2, max_new_tokens=4)


@pytest.mark.parametrize("name", ["rebased", "mixed", "attention"])
def test_prompts_in_chunks_are_for_softmax_attention_alone(name):
    model, tokens = tiny_model(name), prompt(1)
    settings = copy.deepcopy(model.generation_config)
    settings.update(prefill_chunk_size=4, max_new_tokens=4, do_sample=False)
    if name == "attention":
        whole = recomputed(model, tokens, 4)
        assert torch.equal(model.generate(tokens, settings), whole)
        return
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(tokens, settings)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(tokens, prefill_chunk_size=4, max_new_tokens=4)
