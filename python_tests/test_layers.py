"""The layers: the authors' arithmetic written out again, decoding, masks, and life inside a model."""

import copy
import io
import re

import numpy as np
import pytest
import torch
from problems import MAPS, NORMS, relative_error
from torch.nn import functional as F

from rebased_cuda import GatedShortConvolution, ReBasedAttention, RebasedState, reference

SIZES = ("hidden_size", "num_heads", "feature_dim", "num_kv_heads", "head_dim")
SMALL = {"hidden_size": 24, "num_heads": 4, "feature_dim": 5}
MASKS = {
    "right": [[1] * 9, [1] * 5 + [0] * 4, [0] * 9],
    "left": [[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1]],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1, 0, 1, 0], [1] * 4 + [0] + [1] * 4],
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def attention(device="cpu", dtype=torch.float64, **changes):
    """A small layer whose gamma and beta are not ones and zeros."""
    layer = ReBasedAttention(**{**SMALL, **changes}).to(device, dtype)
    with torch.no_grad():
        for norm in (layer.ln_q, layer.ln_k):
            for parameter in norm.parameters():
                parameter.add_(torch.randn_like(parameter) / 4)
    return layer


def convolution(device="cpu", dtype=torch.float64, kernel_size=3):
    return GatedShortConvolution(SMALL["hidden_size"], kernel_size).to(device, dtype)


LAYERS = {"attention": attention, "convolution": convolution}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def tokens(batch=3, seqlen=9, device="cpu", dtype=torch.float64):
    return torch.randn(batch, seqlen, SMALL["hidden_size"], device=device, dtype=dtype)


def flat(state):
    return torch.cat([part.flatten() for part in state]) if isinstance(state, tuple) else state


def authors_layer(x, weights, heads, feature_dim):
    """x (B, N, hidden) through the layer as its authors wrote it, `weights` named as in their checkpoints."""
    q, k, v = (x @ weights[f"proj_{name}.weight"].T for name in "qkv")
    q = F.layer_norm(q, (heads * feature_dim,), weights["ln_q.weight"], weights["ln_q.bias"])
    k = F.layer_norm(k, (heads * feature_dim,), weights["ln_k.weight"], weights["ln_k.bias"])
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    sim = (feature_dim**-0.5 * q @ k.mT).square().tril()
    y = (sim @ v) / (sim.sum(-1, keepdim=True) + 1e-12)
    return y.transpose(1, 2).flatten(2) @ weights["proj_o.weight"].T


def test_authors_checkpoints_load_and_mean_the_same(device):
    """12 heads of 16 features by default, and a hidden size that 12 does not divide, as in the paper."""
    hidden, heads, feature_dim = 64, 12, 16
    shapes = {
        "proj_q.weight": (192, hidden),
        "proj_k.weight": (192, hidden),
        "proj_v.weight": (60, hidden),
        "proj_o.weight": (hidden, 60),
        "ln_q.weight": (192,),
        "ln_q.bias": (192,),
        "ln_k.weight": (192,),
        "ln_k.bias": (192,),
    }
    checkpoint = {
        name: torch.randn(shape, dtype=torch.float64) / hidden**0.5 + (name in ("ln_q.weight", "ln_k.weight"))
        for name, shape in shapes.items()
    }
    layer = ReBasedAttention(hidden).double()
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == shapes
    layer.load_state_dict(checkpoint, strict=True)
    assert not list(layer.buffers())
    x = torch.randn(2, 13, hidden, dtype=torch.float64)
    y = layer.to(device)(x.to(device)).cpu()
    assert y.shape == x.shape
    assert relative_error(y, authors_layer(x, checkpoint, heads, feature_dim)) < 1e-11


def test_gamma_and_beta_are_768_parameters():
    """Table 4 of the paper: 2 x (gamma, beta) x 12 heads x 16 features, more than Based has."""

    def count(**options):
        return sum(p.numel() for p in ReBasedAttention(128, **options).parameters())

    assert count() - count(use_gamma=False, use_beta=False) == 768
    assert count(use_beta=False) - count(use_gamma=False, use_beta=False) == 384


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("layer_norm", NORMS, ids=str)
@pytest.mark.parametrize("use_gamma", [True, False], ids=["gamma", "no-gamma"])
@pytest.mark.parametrize("use_beta", [True, False], ids=["beta", "no-beta"])
def test_options_reach_the_op(feature_map, layer_norm, use_gamma, use_beta):
    options = {"feature_map": feature_map, "layer_norm": layer_norm}
    options |= {"scale": 0.7, "eps": 1e-2, "layer_norm_eps": 1e-3}
    layer = attention(num_kv_heads=2, head_dim=3, use_gamma=use_gamma, use_beta=use_beta, **options)
    names = {f"proj_{name}.weight" for name in "qkvo"}
    names |= {
        f"ln_{x}.{name}" for x in "qk" for name, used in (("weight", use_gamma), ("bias", use_beta)) if used
    }
    assert set(layer.state_dict()) == names

    x = tokens()
    q = layer.proj_q(x).view(3, 9, 4, 5).transpose(1, 2)
    k = layer.proj_k(x).view(3, 9, 2, 5).transpose(1, 2)
    v = layer.proj_v(x).view(3, 9, 2, 3).transpose(1, 2)
    gammas = [n.weight.view(-1, 5) if use_gamma else None for n in (layer.ln_q, layer.ln_k)]
    betas = [n.bias.view(-1, 5) if use_beta else None for n in (layer.ln_q, layer.ln_k)]
    y = reference.quadratic(q, k, v, gammas[0], betas[0], gammas[1], betas[1], **options)
    expected = layer.proj_o(y.transpose(1, 2).reshape(3, 9, 12))
    assert relative_error(layer(x), expected) < 1e-11


def test_the_convolution_is_its_formula(device):
    layer, u = convolution(device), tokens(device=device)
    weight, bias = layer.conv.weight, layer.conv.bias
    assert {name: tuple(p.shape) for name, p in layer.state_dict().items()} == {
        "conv.weight": (24, 1, 3),
        "conv.bias": (24,),
        "proj.weight": (24, 24),
        "proj.bias": (24,),
    }
    expected = torch.empty_like(u)
    for t in range(9):
        past = sum(weight[:, 0, 2 - lag] * u[:, t - lag] for lag in range(min(t, 2) + 1))
        projected = u[:, t] @ layer.proj.weight.T + layer.proj.bias
        expected[:, t] = u[:, t] + (past + bias) * projected
    assert relative_error(layer(u), expected) < 1e-12


@torch.no_grad()
@every_layer
@pytest.mark.parametrize("prompt", [0, 1, 4])
def test_prefill_and_steps_are_the_whole(make, prompt, device):
    layer, x = make(device), tokens(device=device)
    y, state = layer.prefill(x[:, :prompt])
    ys = [y, *(layer.step(x[:, t], state).unsqueeze(1) for t in range(prompt, 9))]
    whole, last = layer.prefill(x)
    assert relative_error(torch.cat(ys, 1), whole) < 1e-11
    assert relative_error(flat(state), flat(last)) < 1e-11
    assert relative_error(layer(x), whole) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("layer_norm", NORMS, ids=str)
def test_steps_from_nothing_with_grouped_heads(feature_map, layer_norm):
    layer = attention(num_kv_heads=2, feature_map=feature_map, layer_norm=layer_norm, eps=1e-6)
    x = tokens()
    assert layer.head_dim == 24 // 2  # hidden_size // num_kv_heads by default
    state = RebasedState.zeros(3, 2, 5, 12, feature_map=feature_map, dtype=torch.float64)
    y = torch.stack([layer.step(x_t, state) for x_t in x.unbind(1)], 1)
    assert relative_error(y, layer(x)) < 1e-11


@pytest.mark.parametrize("kernel_size", [1, 2, 5])
def test_cache_of_the_convolution(kernel_size):
    layer, u = convolution(kernel_size=kernel_size), tokens(seqlen=3)
    cache = layer.prefill(u)[1]
    zeros = u.new_zeros(3, max(0, kernel_size - 4), 24)
    expected = torch.cat([zeros, u[:, 3 - min(3, kernel_size - 1) :]], 1).transpose(1, 2)
    torch.testing.assert_close(cache, expected, rtol=0, atol=0)


@torch.no_grad()
@every_layer
@every_mask
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64], ids=str)
def test_masked_rows_are_their_tokens_alone(make, mask, dtype, device):
    layer, x = make(device), tokens(device=device)
    mask = torch.tensor(mask, dtype=dtype, device=device)
    kept = mask.bool()
    y, state = layer.prefill(x, mask)
    assert not y[~kept].any()
    assert relative_error(layer(x, mask), y) < 1e-11
    alone = [layer.prefill(x[b, kept[b]].unsqueeze(0)) for b in range(3)]
    for b, (y_alone, _) in enumerate(alone):
        assert relative_error(y[b, kept[b]], y_alone[0]) < 1e-11

    following = tokens(seqlen=1, device=device)[:, 0]
    y = layer.step(following, state)
    for b, (_, state_alone) in enumerate(alone):
        assert relative_error(y[b], layer.step(following[b : b + 1], state_alone)[0]) < 1e-11
        row = [part[b] for part in state] if isinstance(state, tuple) else [state[b]]
        assert relative_error(flat(tuple(row)), flat(state_alone).flatten()) < 1e-11


@every_layer
@every_mask
def test_gradients_through_a_mask(make, mask):
    layer, x, seed = make(), tokens().requires_grad_(), tokens()
    mask = torch.tensor(mask, dtype=torch.bool)
    leaves = [x, *layer.parameters()]
    gradients = torch.autograd.grad((layer(x, mask) * seed).sum(), leaves)
    alone = sum((layer(x[b : b + 1, mask[b]]) * seed[b, mask[b]]).sum() for b in range(3))
    expected = torch.autograd.grad(alone, leaves)
    assert not gradients[0][~mask].any()
    for gradient, value in zip(gradients, expected, strict=True):
        assert relative_error(gradient, value) < 1e-9


@every_layer
def test_nothing_at_all(make):
    layer = make()
    x = tokens()
    assert layer(x[:, :0]).shape == (3, 0, 24)
    assert layer(x[:0]).shape == (0, 9, 24)
    assert layer(x[:0], torch.ones(0, 9, dtype=torch.bool)).shape == (0, 9, 24)
    assert layer(x[:, :0], torch.ones(3, 0, dtype=torch.bool)).shape == (3, 0, 24)


@every_layer
def test_autocast(make, device):
    layer, x = make(device, torch.float32), tokens(device=device, dtype=torch.float32).requires_grad_()
    mask = torch.tensor(MASKS["left"], device=device)
    with torch.autocast(device, torch.bfloat16):
        y, state = layer.prefill(x, mask)
    assert y.dtype == (torch.bfloat16 if make is attention else torch.float32)  # u + ... keeps u's
    assert all(part.dtype == torch.float32 for part in (state if isinstance(state, tuple) else [state]))
    # y is sensitive where a row's sim are all near 0: 5e-2 is for bfloat16 inputs of few tokens
    assert relative_error(y, layer(x, mask)) < 5e-2
    y.float().square().sum().backward()
    for parameter in (x, *layer.parameters()):
        assert parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all()
        assert parameter.grad.any()
    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        y = layer.step(x[:, 0], state)
    assert y.isfinite().all()


@every_layer
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_compiles_into_one_graph(make, masked, device):
    layer, x = make(device), tokens(device=device).requires_grad_()
    mask = torch.tensor(MASKS["left"], device=device) if masked else None
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, mask), layer(x, mask)
    assert relative_error(y, expected) < 1e-12
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    (value,) = torch.autograd.grad(expected.square().sum(), x)
    assert relative_error(gradient, value) < 1e-10


@every_layer
def test_copies_are_equal(make):
    layer, x = make(), tokens()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    loaded = make()
    assert not torch.equal(loaded(x), layer(x))
    loaded.load_state_dict(torch.load(file), strict=True)
    for other in (copy.deepcopy(layer), loaded):
        assert torch.equal(other(x), layer(x))


@every_layer
def test_step_is_for_inference(make):
    layer, x = make(), tokens()
    with torch.no_grad():
        state = layer.prefill(x)[1]
    before = flat(state).clone()
    with pytest.raises(RuntimeError, match=r"torch\.no_grad\(\)"):
        layer.step(x[:, 0], state)
    assert torch.equal(flat(state), before)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"num_heads": 0}, "num_heads"),
        ({"feature_dim": 0}, "feature_dim"),
        ({"feature_dim": 129}, "feature_dim"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"num_kv_heads": 0}, "num_kv_heads"),
        ({"num_kv_heads": 8}, "num_kv_heads"),
        ({"hidden_size": 3}, "head_dim"),
        ({"head_dim": 0}, "head_dim"),
        ({"head_dim": 257}, "head_dim"),
        ({"feature_map": "cube"}, "feature_map"),
        ({"feature_map": 2}, "feature_map"),
        ({"feature_map": None}, "feature_map"),
        ({"feature_map": ["outer"]}, "feature_map"),
        ({"layer_norm": "batch"}, "layer_norm"),
        ({"layer_norm": ["token"]}, "layer_norm"),
        ({"layer_norm": True}, "layer_norm"),
        ({"scale": float("nan")}, "scale"),
        ({"scale": float("inf")}, "scale"),
        ({"eps": -1}, "eps"),
        ({"eps": float("nan")}, "eps"),
        ({"eps": np.float32(-1)}, "eps"),
        ({"layer_norm_eps": -1e-5}, "layer_norm_eps"),
        ({"layer_norm_eps": float("inf")}, "layer_norm_eps"),
    ],
    ids=str,
)
def test_what_a_call_would_refuse_the_constructor_refuses(arguments, name):
    given = re.escape(str(next(iter(arguments.values())))) if name in arguments else ""
    with pytest.raises(ValueError, match=f"^{name}: .*{given}"):
        ReBasedAttention(**{**SMALL, **arguments})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, value) for name in ("scale", "eps", "layer_norm_eps") for value in ("1", [1.0], True, 1j)),
        *((name, None) for name in ("eps", "layer_norm_eps", "use_gamma", "use_beta")),
        *((name, value) for name in ("use_gamma", "use_beta") for value in ("True", 1, [True])),
        *((name, value) for name in SIZES for value in (4.0, "4", True, np.float32(4), np.True_, [4])),
    ],
)
def test_arguments_of_the_wrong_type_are_refused_by_the_constructor(name, value):
    with pytest.raises(TypeError, match=f"^{name}: .*{type(value).__name__}"):
        ReBasedAttention(**{**SMALL, name: value})


def test_numbers_of_numpy_are_taken():
    sizes = {"hidden_size": 24, "num_heads": 4, "feature_dim": 5, "num_kv_heads": 2, "head_dim": 3}
    numbers = {"scale": 0.5, "eps": 0.25, "layer_norm_eps": 0.125}  # exact in every width
    flags = {"use_gamma": True, "use_beta": False}
    plain = ReBasedAttention(**sizes, **numbers, **flags)
    for integer, real in ((np.int64, np.float64), (np.int32, np.float32), (np.uint8, np.float16)):
        layer = ReBasedAttention(
            **{name: integer(size) for name, size in sizes.items()},
            **{name: real(number) for name, number in numbers.items()},
            **{name: np.bool_(flag) for name, flag in flags.items()},
        )
        layer.load_state_dict(plain.state_dict())
        for name, value in {**sizes, **numbers}.items():
            assert type(getattr(layer, name)) is type(value)
            assert getattr(layer, name) == value
        x = tokens(dtype=torch.float32)
        assert torch.equal(layer(x), plain(x))
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), plain(x))
    convolution = GatedShortConvolution(np.int64(24), np.int32(2))
    assert convolution(tokens(dtype=torch.float32)).shape == (3, 9, 24)


@pytest.mark.parametrize(
    ("arguments", "name", "error"),
    [
        ({"hidden_size": 0}, "hidden_size", ValueError),
        ({"kernel_size": 0}, "kernel_size", ValueError),
        ({"hidden_size": 24.0}, "hidden_size", TypeError),
        ({"kernel_size": True}, "kernel_size", TypeError),
        ({"kernel_size": None}, "kernel_size", TypeError),
    ],
    ids=str,
)
def test_bad_sizes_of_the_convolution_are_named(arguments, name, error):
    with pytest.raises(error, match=f"^{name}: "):
        GatedShortConvolution(**{"hidden_size": 24, **arguments})


@torch.no_grad()
@every_layer
def test_bad_inputs_are_named(make):
    layer, x = make(), tokens()
    name = "x" if make is attention else "u"
    with pytest.raises(ValueError, match=rf"^{name}: .*24.*\(3, 9, 23\)"):
        layer(x[..., :23])
    with pytest.raises(ValueError, match=rf"^{name}: .*\(9, 24\)"):
        layer(x[0])
    with pytest.raises(ValueError, match=r"^attention_mask: .*\(3, 9\).*\(3, 8\)"):
        layer(x, torch.ones(3, 8, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"^attention_mask: .*float32"):
        layer(x, torch.ones(3, 9))
    _, state = layer.prefill(x)
    before = flat(state).clone()
    with pytest.raises(ValueError, match=rf"^{name}_t: .*\(3, 9, 24\)"):
        layer.step(x, state)
    with pytest.raises(ValueError, match=r"^(state|cache)"):
        layer.step(x[:2, 0], state)
    assert torch.equal(flat(state), before)


@every_layer
def test_nan_at_padding_reaches_nothing(make):
    layer, x = make(), tokens()
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    mask[1, 3:5] = False
    x[1, 3:5] = float("nan")
    y = layer(x, mask)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)


@every_layer
def test_arguments_of_the_wrong_type_are_named(make):
    layer, x = make(), tokens()
    with pytest.raises(TypeError, match=r"^(x|u): "):
        layer([1.0])
    with pytest.raises(TypeError, match=r"^attention_mask: "):
        layer(x, [[1, 0]])
    with pytest.raises(ValueError, match=r"^attention_mask: expected x's device"):
        layer(x, torch.ones(x.shape[:2], dtype=torch.bool, device="meta"))


def test_attention_matrix_refuses_a_shared_out_sequence():
    layer = ReBasedAttention(24, 2, 4)
    layer.context_parallel_group = object()
    with pytest.raises(RuntimeError, match="attention_matrix: needs the whole sequence"):
        layer.attention_matrix(torch.randn(1, 5, 24))
