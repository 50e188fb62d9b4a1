"""Converted weights against what their originals compute, written out here from their formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from problems import relative_error
from torch import Tensor, nn

pytest.importorskip("transformers", minversion="5.24")

from transformers import AutoModelForCausalLM

from rebased_cuda import ReBasedAttention
from rebased_cuda.models import RebasedForCausalLM
from rebased_cuda.models.convert import convert, convert_back, main

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, HEADS, FEATURES = 24, 3, 5
LIMIT = 1e-11  # of float64: first tokens without LayerNorm are ill-conditioned


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    return {name: torch.randn(shape, dtype=torch.float64) * 0.3 for name, shape in shapes.items()}


def _projections(names: str, output: str) -> dict[str, tuple[int, ...]]:
    """Shapes of q, k, v and the output, whose names are made from `names` and `output`."""
    rows = {"q": HEADS * FEATURES, "k": HEADS * FEATURES, "v": WIDTH}
    return {names.format(part): (size, WIDTH) for part, size in rows.items()} | {output: (WIDTH, WIDTH)}


def _attend(q: Tensor, k: Tensor, v: Tensor, based: bool, scale: float, eps: float) -> Tensor:
    """(B, N, heads, d) and (B, N, heads, dv) -> (B, N, heads * dv)."""
    u = scale * torch.einsum("bnhd,bmhd->bhnm", q, k)
    sim = (1 + u + u * u / 2 if based else u * u).tril()
    y = torch.einsum("bhnm,bmhv->bhnv", sim, v) / (sim.sum(-1, keepdim=True) + eps)
    return y.transpose(1, 2).flatten(2)


def _heads(x: Tensor, *weights: Tensor) -> list[Tensor]:
    return [(x @ weight.T).unflatten(-1, (HEADS, -1)) for weight in weights]


def _input(length: int = 13) -> Tensor:
    return torch.randn(2, length, WIDTH, dtype=torch.float64)


# ---- flash-linear-attention's layers


def _fla_rebased(x: Tensor, state: dict[str, Tensor], normalize: bool, mode: str) -> Tensor:
    q, k, v = _heads(x, *(state[f"{name}_proj.weight"] for name in "qkv"))
    gamma, beta = (state.get(f"feature_map.{name}") for name in ("gamma", "beta"))
    mapped = []
    for y in (q, k):
        if normalize:
            y = (y - y.mean(-1, keepdim=True)) / (y.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()
        y = y if gamma is None else y * gamma
        mapped.append(y if beta is None else y + beta)
    if mode == "parallel":
        return _attend(*mapped, v, False, FEATURES**-0.5, 1e-5) @ state["o_proj.weight"].T
    i, j = torch.triu_indices(FEATURES, FEATURES, 1)  # their features, whose product is taken
    features = [
        torch.cat([y * y * FEATURES**-0.5, y[..., i] * y[..., j] * (2 / FEATURES) ** 0.5], -1) for y in mapped
    ]
    sim = torch.einsum("bnhf,bmhf->bhnm", *features).tril()
    o = torch.einsum("bhnm,bmhv->bnhv", sim, v) / (sim.sum(-1).mT[..., None] + 1e-10)
    return o.flatten(2) @ state["o_proj.weight"].T


@pytest.mark.parametrize("mode", ["parallel", "chunk"])
@pytest.mark.parametrize(
    ("normalize", "parts"),
    [
        (True, ("gamma", "beta")),
        (True, ("gamma",)),
        (True, ()),
        (False, ("gamma", "beta")),
        (False, ("gamma",)),
    ],
)
def test_fla_rebased(normalize, parts, mode):
    shapes = _projections("{}_proj.weight", "o_proj.weight") | {
        f"feature_map.{x}": (FEATURES,) for x in parts
    }
    state, x = _random(shapes), _input()
    layer = convert(state, "fla-rebased", HEADS, mode=mode, normalize=normalize)
    assert isinstance(layer, ReBasedAttention)
    assert layer.layer_norm == ("head" if normalize else None)
    assert relative_error(layer(x), _fla_rebased(x, state, normalize, mode)) <= LIMIT
    back = convert_back(layer, "fla-rebased")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_fla_rebased_has_one_gamma():
    layer = ReBasedAttention(WIDTH, HEADS, FEATURES, layer_norm="head")
    convert_back(layer, "fla-rebased")
    with torch.no_grad():
        layer.ln_k.weight[7] = 2
    with pytest.raises(ValueError, match="gamma: fla-rebased has one for q, k and all heads"):
        convert_back(layer, "fla-rebased")


def _fla_based_features(x: Tensor) -> Tensor:
    """Their TaylorFeatureMap."""
    i, j = torch.triu_indices(FEATURES, FEATURES, 1)
    root = math.sqrt(FEATURES)
    parts = [torch.ones_like(x[..., :1]), x / math.sqrt(root), x * x / (root * math.sqrt(2))]
    return torch.cat([*parts, x[..., i] * x[..., j] / root], -1)


@pytest.mark.parametrize("mode", ["parallel", "chunk", "fused_chunk"])
def test_fla_based(mode):
    state, x = _random(_projections("{}_proj.weight", "o_proj.weight")), _input()
    layer = convert(state, "fla-based", HEADS, mode=mode)
    q, k, v = _heads(x, *(state[f"{name}_proj.weight"] for name in "qkv"))
    if mode == "parallel":
        y = _attend(q, k, v, True, 1.0, 1e-6)
    else:
        sim = torch.einsum("bnhf,bmhf->bhnm", _fla_based_features(q), _fla_based_features(k)).tril()
        y = (torch.einsum("bhnm,bmhv->bnhv", sim, v) / (sim.sum(-1).mT[..., None] + 1e-10)).flatten(2)
    assert relative_error(layer(x), y @ state["o_proj.weight"].T) <= LIMIT
    back = convert_back(layer, "fla-based")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


# ---- HazyResearch's Based


@pytest.mark.parametrize("output", ["out_proj.weight", "proj_o.weight"])
def test_hazyresearch_based(output):
    """Based's repository has out_proj, Zoology's proj_o."""
    state, x = _random(_projections("proj_{}.weight", output)), _input()
    larger = {f"transformer.layers.3.mixer.{name}": y for name, y in state.items()} | {"other": x}
    layer = convert(larger, "hazyresearch-based", HEADS, prefix="transformer.layers.3.mixer.")
    q, k, v = _heads(x, *(state[f"proj_{name}.weight"] for name in "qkv"))
    features = []
    for y in (q, k):  # their TaylorExp, all products of two entries
        second = (y.unsqueeze(-1) * y.unsqueeze(-2)).flatten(-2) / math.sqrt(2) / math.sqrt(FEATURES)
        features.append(torch.cat([torch.ones_like(y[..., :1]), y / FEATURES**0.25, second], -1))
    sim = torch.einsum("bnhf,bmhf->bhnm", *features).tril()
    y = torch.einsum("bhnm,bmhv->bnhv", sim, v) / (sim.sum(-1).mT[..., None] + 1e-12)
    assert relative_error(layer(x), y.flatten(2) @ state[output].T) <= LIMIT
    back = convert_back(layer, "hazyresearch-based")
    assert back.keys() == {name.replace("proj_o", "out_proj") for name in state}
    assert torch.equal(back["out_proj.weight"], state[output])


# ---- the authors' layers and models


WAYS: dict[str, tuple[str, ...]] = {
    "layer norm": ("weight", "bias"),
    "gamma and beta": ("gamma", "beta"),
    "none": (),
    "based": (),
}


def _authors_mixer(x: Tensor, state: dict[str, Tensor], way: str) -> Tensor:
    q, k, v = (x @ state[f"proj_{name}.weight"].T for name in "qkv")
    if way == "layer norm":
        q, k = (
            nn.functional.layer_norm(y, y.shape[-1:], state[f"ln_{side}.weight"], state[f"ln_{side}.bias"])
            for y, side in ((q, "q"), (k, "k"))
        )
    elif way == "gamma and beta":
        q, k = (y * state[f"ln_{side}.gamma"] + state[f"ln_{side}.beta"] for y, side in ((q, "q"), (k, "k")))
    q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in (q, k, v))
    y = _attend(q, k, v, way == "based", FEATURES**-0.5, 1e-12)
    return y @ state["proj_o.weight"].T


def _authors_layer(way: str) -> dict[str, Tensor]:
    shapes = _projections("proj_{}.weight", "proj_o.weight")
    shapes |= {f"ln_{side}.{part}": (HEADS * FEATURES,) for side in "qk" for part in WAYS[way]}
    return _random(shapes)


@pytest.mark.parametrize("way", WAYS)
def test_the_authors_layers(way):
    state, x = _authors_layer(way), _input()
    layer = convert(state, "authors", HEADS, feature_map="outer" if way == "none" else None)
    assert relative_error(layer(x), _authors_mixer(x, state, way)) <= LIMIT
    back = convert_back(layer, "authors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def _linear(name: str, rows: int, columns: int = WIDTH) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}


def _authors_checkpoint(kinds: list[str], mlp: bool) -> dict[str, Tensor]:
    """Under the names of the LanguageModel of the authors' repository."""
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.embeddings.word_embeddings.weight": (31, WIDTH),
        "backbone.embeddings.position_embeddings.weight": (20, WIDTH),
    }
    state = {}
    for i, kind in enumerate(kinds):
        start = f"backbone.layers.{i}."
        mixer = f"{start}sequence_mixer." + ("mixer." if len(set(kinds)) > 1 else "")
        for norm in ("norm1", "norm2"):
            shapes |= {f"{start}{norm}.weight": (WIDTH,), f"{start}{norm}.bias": (WIDTH,)}
        if mlp:
            shapes |= _linear(f"{start}state_mixer.fc1", 40) | _linear(f"{start}state_mixer.fc2", WIDTH, 40)
        if kind == "convolution":
            shapes |= _linear(f"{mixer}projection", WIDTH)
            shapes |= {f"{mixer}conv.conv.weight": (WIDTH, 1, 3), f"{mixer}conv.conv.bias": (WIDTH,)}
        elif kind == "attention":
            shapes |= _linear(f"{mixer}Wqkv", 3 * WIDTH) | _linear(f"{mixer}out_proj", WIDTH)
        else:
            state |= {f"{mixer}{name}": x for name, x in _authors_layer(kind).items()}
    shapes |= {"backbone.ln_f.weight": (WIDTH,), "backbone.ln_f.bias": (WIDTH,)}
    state |= _random(shapes)
    return state | {"lm_head.weight": state["backbone.embeddings.word_embeddings.weight"]}


def _authors_model(state: dict[str, Tensor], tokens: Tensor, kinds: list[str], mlp: bool) -> Tensor:
    """Logits: residuals as they pass them on, LayerNorms of eps 1e-5."""

    def part(prefix: str) -> dict[str, Tensor]:
        return {name[len(prefix) :]: x for name, x in state.items() if name.startswith(prefix)}

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    embeddings = state["backbone.embeddings.word_embeddings.weight"]
    hidden = embeddings[tokens] + state["backbone.embeddings.position_embeddings.weight"][: tokens.shape[1]]
    residual = torch.zeros_like(hidden)
    for i, kind in enumerate(kinds):
        start = f"backbone.layers.{i}."
        residual = residual + hidden
        x = norm(residual, f"{start}norm1")
        mixer = part(f"{start}sequence_mixer." + ("mixer." if len(set(kinds)) > 1 else ""))
        if kind == "convolution":
            window = nn.functional.pad(x.mT, (2, 0))
            taps = mixer["conv.conv.weight"][:, 0]
            convolved = sum(window[..., j : j + x.shape[1]] * taps[:, j, None] for j in range(3))
            convolved = (convolved + mixer["conv.conv.bias"][:, None]).mT
            hidden = convolved * (x @ mixer["projection.weight"].T + mixer["projection.bias"]) + x
        elif kind == "attention":
            qkv = (x @ mixer["Wqkv.weight"].T + mixer["Wqkv.bias"]).unflatten(-1, (3, HEADS, -1))
            q, k, v = qkv.unbind(2)
            scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / math.sqrt(q.shape[-1])
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf")).softmax(-1)
            y = torch.einsum("bhnm,bmhd->bnhd", scores, v).flatten(2)
            hidden = y @ mixer["out_proj.weight"].T + mixer["out_proj.bias"]
        else:
            hidden = _authors_mixer(x, mixer, kind)
        residual = residual + hidden
        hidden = norm(residual, f"{start}norm2")
        if mlp:
            fc = part(f"{start}state_mixer.")
            hidden = nn.functional.gelu(hidden @ fc["fc1.weight"].T + fc["fc1.bias"])
            hidden = hidden @ fc["fc2.weight"].T + fc["fc2.bias"]
    return norm(residual + hidden, "backbone.ln_f") @ embeddings.T


@pytest.mark.parametrize(
    ("kinds", "mlp"),
    [
        (["convolution", "layer norm"], False),
        (["convolution", "based", "convolution", "based"], True),
        (["convolution", "gamma and beta"], True),
        (["attention", "attention"], False),
        (["layer norm", "layer norm", "attention"], True),
    ],
)
def test_the_authors_models(kinds, mlp):
    state = _authors_checkpoint(kinds, mlp)
    tokens = torch.randint(31, (2, 20))
    model = convert(state, "authors", HEADS, bos_token_id=1)
    assert isinstance(model, RebasedForCausalLM)
    assert model.config.bos_token_id == 1
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        logits = model(tokens).logits
    assert relative_error(logits, _authors_model(state, tokens, kinds, mlp)) <= 1e-10
    back = convert_back(model, "authors")
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


# ---- what is refused, and the command


def test_state_dicts_that_are_refused():
    state = _authors_layer("layer norm")
    model = _authors_checkpoint(["convolution", "layer norm"], True)
    unknown = {
        name.replace("projection", "other").replace("conv.conv", "long"): x for name, x in model.items()
    }
    for match, arguments in {
        "source: expected one of": (state, "mamba", HEADS),
        "num_heads: expected a divisor of proj_q.weight's 15 rows, got 4": (state, "authors", 4),
        "num_heads: expected at least 1": (state, "authors", 0),
        "state: no proj_q.weight under": (state | {}, "fla-based", HEADS),
        "state: is not that of the source": (state | {"more": state["ln_q.bias"]}, "authors", HEADS),
        "state: the mixer of layer 0 is not known": (unknown, "authors", HEADS),
        "state: no backbone.embeddings": (
            {name: x for name, x in model.items() if "embeddings" not in name},
            "authors",
            HEADS,
        ),
    }.items():
        given = arguments
        if match.startswith("state: no proj_q"):
            given = ({name.replace("proj_q", "query"): x for name, x in state.items()}, "fla-based", HEADS)
        with pytest.raises(ValueError, match=f"^{match}"):
            convert(*given)
    for match, more in {
        "prefix: no name": {"prefix": "layers.0."},
        "mode: expected one of": {"mode": "recurrent"},
        "bos_token_id: is a setting of a whole model": {"bos_token_id": 1},
    }.items():
        with pytest.raises(ValueError, match=f"^{match}"):
            convert(state, "authors", HEADS, **more)


@pytest.mark.parametrize(
    ("match", "target", "options"),
    [
        ("target: expected one of", "mamba", {}),
        ("feature_map: fla-based has taylor, the layer outer", "fla-based", {}),
        ("feature_map: authors has outer and taylor, the layer elu", "authors", {"feature_map": "elu"}),
        ("num_kv_heads: authors has as many", "authors", {"num_kv_heads": 1}),
        ("layer_norm: the authors have a token's", "authors", {"layer_norm": "head"}),
        ("layer_norm: the authors have a token's", "authors", {"use_beta": False}),
        ("layer_norm: fla-rebased has one over a head", "fla-rebased", {}),
        ("layer_norm: hazyresearch-based has no LayerNorm", "hazyresearch-based", {"feature_map": "taylor"}),
    ],
)
def test_layers_that_the_other_side_cannot_hold(match, target, options):
    layer = ReBasedAttention(WIDTH, HEADS, FEATURES, **options)
    with pytest.raises(ValueError, match=f"^{match}"):
        convert_back(layer, target)


def test_the_command(tmp_path, capsys):
    state = _authors_checkpoint(["convolution", "layer norm"], True)
    checkpoint, folder, back = tmp_path / "best.pt", tmp_path / "model", tmp_path / "back.pt"
    torch.save({"state_dict": state}, checkpoint)
    assert main(["authors", str(checkpoint), str(folder), "--heads", str(HEADS)]) == 0
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    tokens = torch.randint(31, (2, 20))
    expected = _authors_model(state, tokens, ["convolution", "layer norm"], True)
    assert relative_error(model(tokens).logits, expected) <= 1e-10
    assert main(["authors", str(folder), str(back), "--back"]) == 0
    again: dict[str, Any] = torch.load(back, weights_only=True)
    assert again.keys() == state.keys()

    layer, output = tmp_path / "layer.pt", tmp_path / "ours.pt"
    torch.save(_random(_projections("attn.{}_proj.weight", "attn.o_proj.weight")), layer)
    arguments = ["fla-based", str(layer), str(output), "--heads", str(HEADS), "--prefix", "attn."]
    assert main([*arguments, "--mode", "chunk"]) == 0
    printed = capsys.readouterr().out
    made = eval(printed.split("state dict of ")[1], {"ReBasedAttention": ReBasedAttention})  # as it was told
    made.double().load_state_dict(torch.load(output, weights_only=True))
    assert made.eps == 1e-10
    assert main(["authors", str(layer), str(output), "--heads", "3"]) == 1
    assert "state: no proj_q.weight" in capsys.readouterr().err
