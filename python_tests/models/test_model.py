"""The models as transformers holds them: sizes, initial weights, dtypes, files, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from problems import relative_error
from torch import nn

pytest.importorskip("transformers", minversion="5.24")

from tiny_models import MODELS, VOCABULARY, prompt, tiny_config, tiny_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rebased_cuda import GatedShortConvolution, ReBasedAttention
from rebased_cuda.models import NAMED, RebasedConfig, RebasedForCausalLM, RebasedModel

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("rebased-157m", 156_992_256), ("based-157m", 156_955_392), ("attention-127m", 126_807_552)],
)
def test_the_papers_models_have_its_parameter_counts(name, parameters):
    """Table 9, to the unit."""
    with torch.device("meta"):
        model = RebasedForCausalLM(RebasedConfig.named(name))
    assert sum(x.numel() for x in model.parameters()) == parameters
    assert len(NAMED) == 3


def test_what_stands_in_the_layers():
    model = tiny_model("mixed").model
    kinds = [type(block.mixer).__name__ for block in model.layers]
    assert kinds == ["GatedShortConvolution", "ReBasedAttention", "SoftmaxAttention", "ReBasedAttention"]
    based = tiny_model("based").model.layers[1].mixer
    assert (based.feature_map, based.layer_norm, based.ln_q.weight, based.ln_k.bias) == (
        "taylor",
        None,
        None,
        None,
    )
    assert tiny_model("linear_transformer").model.layers[1].mixer.feature_map == "elu"
    assert tiny_model("grouped").model.layers[1].mixer.num_kv_heads == 2


def _written_out(model: RebasedForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """The logits by the formulas of the model's docstring, the layers' own forward aside."""
    model_ = model.model
    x = model_.embed_tokens.weight[tokens]
    if model_.embed_positions is not None:
        x = x + model_.embed_positions.weight[: tokens.shape[1]]
    for block in model_.layers:
        x = x + block.mixer(block.mixer_norm(x))
        hidden = nn.functional.gelu(block.mlp_norm(x) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
        x = x + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    return model_.norm(x) @ model.lm_head.weight.T


@pytest.mark.parametrize("name", MODELS)
def test_the_model_is_its_formula_and_causal(name):
    model = tiny_model(name).double()
    tokens = prompt(2, 20)
    with torch.no_grad():
        logits = model(tokens).logits
        assert relative_error(logits, _written_out(model, tokens)) <= 1e-12
        changed = tokens.clone()
        changed[:, 12:] = changed[:, 12:] % (VOCABULARY - 1) + 1
        after = model(changed).logits
    torch.testing.assert_close(after[:, :12], logits[:, :12], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(after[:, 12], logits[:, 12])


def test_softmax_attention_is_its_formula():
    model = tiny_model("attention").double()
    attention = model.model.layers[0].mixer
    x = torch.randn(2, 7, 48, dtype=torch.float64)
    q, k, v = (y.unflatten(-1, (3, 16)) for y in (x @ attention.proj_qkv.weight.T).chunk(3, -1))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / 4
    scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), float("-inf")).softmax(-1)
    y = torch.einsum("bhnm,bmhd->bnhd", scores, v).flatten(2)
    expected = y @ attention.proj_o.weight.T + attention.proj_o.bias
    assert relative_error(attention(x), expected) <= 1e-12


def test_initial_weights_are_the_authors():
    sizes = {"hidden_size": 256, "num_hidden_layers": 8, "vocab_size": 300, "num_attention_heads": 4}
    config = tiny_config("tied", **sizes)
    config.layer_types[3] = "full_attention"
    model = RebasedForCausalLM(config)
    small = 0.02 / math.sqrt(2 * 8)
    model.requires_grad_(False)
    for block in model.model.layers:
        assert float(block.mlp.fc1.weight.std()) == pytest.approx(0.02, rel=0.05)
        assert float(block.mlp.fc2.weight.std()) == pytest.approx(small, rel=0.05)
        assert float(block.mlp.fc1.bias.abs().sum() + block.mlp.fc2.bias.abs().sum()) == 0
        mixer = block.mixer
        if isinstance(mixer, ReBasedAttention):
            for linear in (mixer.proj_q, mixer.proj_k, mixer.proj_v, mixer.proj_o):
                assert float(linear.weight.std()) == pytest.approx(0.02, rel=0.05)
            assert torch.equal(mixer.ln_q.weight, torch.ones(32))
            assert torch.equal(mixer.ln_k.bias, torch.zeros(32))
        elif isinstance(mixer, GatedShortConvolution):
            bound = 1 / math.sqrt(3)  # torch's own, of three entries
            assert float(mixer.conv.weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
            assert float(mixer.conv.bias.abs().max()) == pytest.approx(bound, rel=0.1)
            assert float(mixer.proj.weight.std()) == pytest.approx(0.02, rel=0.05)
        else:
            assert float(mixer.proj_o.weight.std()) == pytest.approx(small, rel=0.05)
    assert float(model.model.embed_tokens.weight.std()) == pytest.approx(0.02, rel=0.05)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_weights_made_without_memory_start_the_same():
    with torch.device("meta"):
        model = RebasedForCausalLM(tiny_config("mixed"))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.constant_(parameter, float("nan"))
    model.init_weights()
    assert all(bool(x.isfinite().all()) for x in model.parameters())
    assert torch.equal(model.model.layers[1].mixer.ln_q.weight, torch.ones(24))


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded_by_the_auto_classes(name, tmp_path):
    model, tokens = tiny_model(name), prompt()
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, RebasedConfig)
    different = {k for k, v in model.config.to_dict().items() if config.to_dict()[k] != v}
    assert different <= {"architectures", "dtype", "_name_or_path"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is RebasedForCausalLM
    assert type(AutoModel.from_pretrained(tmp_path)) is RebasedModel
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == (name == "tied")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gamma_and_beta_stay_in_float32(dtype, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    made = AutoModelForCausalLM.from_config(tiny_config(), dtype=dtype)
    for model in (loaded, made):
        for name, parameter in model.named_parameters():
            kept = ".ln_q." in name or ".ln_k." in name
            assert parameter.dtype == (torch.float32 if kept else dtype), name
        assert model(prompt()).logits.dtype == dtype


def test_gamma_trains_under_bfloat16():
    """A step of 1e-4 from 1 is lost in bfloat16, whose next number is 1.0078."""
    model = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    tokens = prompt()
    for _ in range(3):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
    gamma = model.model.layers[1].mixer.ln_q.weight
    assert float((gamma - 1).detach().abs().median()) > 1e-4


def test_the_loss_is_of_the_next_token():
    model, tokens = tiny_model(), prompt()
    labels = tokens.clone()
    labels[0, 4:] = -100
    output = model(tokens, labels=labels)
    expected = nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100
    )
    torch.testing.assert_close(output.loss, expected)
    last = model(tokens, logits_to_keep=2).logits
    torch.testing.assert_close(last, output.logits[:, -2:])
    torch.testing.assert_close(
        model(tokens, logits_to_keep=torch.tensor([1, 3])).logits, output.logits[:, [1, 3]]
    )


def test_hidden_states_and_tuples():
    model, tokens = tiny_model(), prompt()
    output = model(tokens, output_hidden_states=True)
    assert len(output.hidden_states) == 5
    torch.testing.assert_close(output.hidden_states[-1] @ model.lm_head.weight.T, output.logits)
    assert torch.equal(output.hidden_states[0], model.model.embed_tokens(tokens))
    assert torch.equal(model(tokens, return_dict=False)[0], output.logits)


@pytest.mark.parametrize("name", ["positions", "mixed", "attention"])
def test_packed_sequences_are_each_alone(name):
    """As a flattening data collator hands them in."""
    model = tiny_model(name).double()
    rows = [prompt(1, n) for n in (5, 1, 9)]
    bounds = torch.tensor([0, 5, 6, 15], dtype=torch.int32)
    packed = torch.cat(rows, 1)
    positions = torch.cat([torch.arange(n) for n in (5, 1, 9)])[None]
    expected = torch.cat([model(row, use_cache=False).logits for row in rows], 1)
    more = {"cu_seq_lens_k": bounds, "max_length_q": 9, "max_length_k": 9}
    for position_ids in (None, positions):
        logits = model(packed, position_ids=position_ids, cu_seq_lens_q=bounds, **more).logits
        torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)


def test_embedding_dropout_is_of_training_alone():
    model, tokens = tiny_model(embedding_dropout=0.5), prompt()
    assert torch.equal(model(tokens).logits, model(tokens).logits)
    model.train()
    assert not torch.equal(model(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    ("match", "make"),
    [
        (
            "layer_types: expected conv, linear_attention or full_attention, got 'mamba'",
            {"layer_types": ["mamba"] * 4},
        ),
        ("layer_types: expected 4, one for each layer, got 1", {"layer_types": ["conv"]}),
        (
            "num_attention_heads: expected a divisor of hidden_size 48, got 5",
            {"layer_types": ["full_attention"] * 4, "num_attention_heads": 5},
        ),
        ("feature_dim: expected from 1 to 128, got 129", {"feature_dim": 129}),
        ("feature_map: must be one of", {"feature_map": "cubic"}),
    ],
)
def test_configurations_that_are_refused(match, make):
    with pytest.raises(ValueError, match=match):
        RebasedForCausalLM(tiny_config(**make))


def test_names_that_are_refused():
    with pytest.raises(ValueError, match="mixer: expected one of rebased, based, "):
        RebasedConfig.of("mamba")
    with pytest.raises(ValueError, match="name: expected one of rebased-157m, "):
        RebasedConfig.named("rebased-7b")


def test_calls_that_are_refused():
    model, tokens = tiny_model("positions"), prompt()
    embedded = model.model.embed_tokens(tokens)
    bounds = torch.tensor([0, 9])
    for match, arguments in {
        "input_ids: expected either": {"input_ids": tokens, "inputs_embeds": embedded},
        "input_ids: expected up to 64 tokens": {"input_ids": prompt(1, 65)},
        "position_ids: expected positions up to 63, got 64": {
            "input_ids": tokens,
            "position_ids": torch.full((1, 9), 64),
        },
        "output_attentions: ": {"input_ids": tokens, "output_attentions": True},
        "attention_mask: expected shape": {"input_ids": tokens, "attention_mask": torch.ones(3, 1, 9, 9)},
        "attention_mask: expected none with cu_seq_lens_q": {
            "input_ids": tokens[:1],
            "cu_seq_lens_q": bounds,
            "attention_mask": torch.ones(1, 9),
            "use_cache": False,
        },
        "cu_seq_lens_q: ": {"input_ids": tokens[:1], "cu_seq_lens_q": bounds, "use_cache": True},
    }.items():
        with pytest.raises(ValueError, match=f"^{match}"):
            model(**arguments)
    with torch.no_grad():
        cache = model(prompt(1, 60)).cache
        with pytest.raises(ValueError, match="position_ids: expected positions up to 63, got 64"):
            model(prompt(1, 5), cache=cache)
