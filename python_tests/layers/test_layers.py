"""The layers: the authors' arithmetic written out again, decoding, masks, and life inside a model."""

import copy
import io
import re
import warnings

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
    with pytest.raises(ValueError, match=r"^state"):
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


def freed(x):
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def jagged(x):
    return torch.nested.nested_tensor(list(x.unbind()), layout=torch.jagged)


WRONG_TENSORS = {
    "list": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "none": lambda x: None,
    "integers": lambda x: x.long(),
    "bool": lambda x: x.bool(),
    "complex": lambda x: x.to(torch.complex128),
    "another dtype": lambda x: x.float(),
    "half": lambda x: x.half(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "sparse": lambda x: x.to_sparse(),
    "compressed": lambda x: x.reshape(-1, 24).to_sparse_csr(),
    "mkldnn": lambda x: x.float().to_mkldnn(),
    "nested": jagged,
    "quantized": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "meta": lambda x: x.to("meta"),
    "freed": freed,
    "flat": lambda x: x.flatten(),
    "narrow": lambda x: x[..., 1:],
}
OPERATIONS = {
    "forward": lambda layer, x: layer(x),
    "masked": lambda layer, x: layer(x, torch.ones(3, 9, dtype=torch.bool, device=device_of(x))),
    "prefill": lambda layer, x: layer.prefill(x),
    "attention_matrix": lambda layer, x: layer.attention_matrix(x),
}


def device_of(x):
    return x.device if isinstance(x, torch.Tensor) else "cpu"


@pytest.mark.filterwarnings("ignore::UserWarning")  # prototypes of torch: sparse and nested tensors
@every_layer
@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS)
@pytest.mark.parametrize("wrong", WRONG_TENSORS.values(), ids=WRONG_TENSORS)
@pytest.mark.parametrize("grad", [True, False])
def test_a_wrong_input_is_named(make, operation, wrong, grad):
    if operation is OPERATIONS["attention_matrix"] and make is convolution:
        pytest.skip("a convolution has none")
    layer = make()
    name = "x" if make is attention else "u"
    with (
        torch.set_grad_enabled(grad),
        pytest.raises((TypeError, ValueError), match=rf"^{name}: (expected|its storage)"),
    ):
        operation(layer, wrong(tokens()))


@pytest.mark.filterwarnings("ignore::UserWarning")
@torch.no_grad()
@every_layer
@pytest.mark.parametrize("wrong", WRONG_TENSORS.values(), ids=WRONG_TENSORS)
def test_a_wrong_token_is_named_and_nothing_is_written(make, wrong):
    """A token of another dtype or device than cache and weights is as well the cache that is wrong."""
    layer = make()
    _, state = layer.prefill(tokens())
    before = flat(state).clone()
    name = "x_t" if make is attention else "(u_t|state: expected u_t's)"
    with pytest.raises((TypeError, ValueError), match=f"^{name}"):
        layer.step(wrong(tokens()[:, 0]), state)
    assert torch.equal(flat(state), before)


@every_layer
def test_autocast_decides_which_dtypes_meet(make):
    layer, x = make(dtype=torch.float32), tokens(dtype=torch.float32)
    words = rf"^{'x' if make is attention else 'u'}: expected the weights' dtype torch.float32, got torch."
    with torch.autocast("cpu", torch.bfloat16):
        expected = layer(x)
        assert relative_error(layer(x.bfloat16()), expected) < 5e-2
        with pytest.raises(TypeError, match=words + "float64"):
            layer(x.double())
    with pytest.raises(TypeError, match=words + "bfloat16"):
        layer(x.bfloat16())


@every_layer
def test_an_error_that_does_not_lie_in_the_input_stays_what_it_is(make):
    layer = make()

    def fail(*_):
        raise RuntimeError("of the hook")

    layer.get_submodule("proj_v" if make is attention else "conv").register_forward_hook(fail)
    with pytest.raises(RuntimeError, match=r"^of the hook$"):
        layer(tokens())


WRONG_MASKS = {
    "list": lambda mask: mask.tolist(),
    "numpy": lambda mask: mask.numpy(),
    "float": lambda mask: mask.float(),
    "complex": lambda mask: mask.to(torch.complex64),
    "short": lambda mask: mask[:, 1:],
    "one row": lambda mask: mask[0],
    "four dimensions": lambda mask: mask[:, None, None],
    "meta": lambda mask: mask.to("meta"),
    "sparse": lambda mask: mask.to_sparse(),
    "nested": jagged,
    "quantized": lambda mask: torch.quantize_per_tensor(mask.float(), 1.0, 0, torch.quint8),
    "freed": freed,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@every_layer
@pytest.mark.parametrize("wrong", WRONG_MASKS.values(), ids=WRONG_MASKS)
def test_a_wrong_mask_is_named(make, wrong):
    with pytest.raises((TypeError, ValueError), match=r"^attention_mask: (expected|its storage)"):
        make()(tokens(), wrong(torch.ones(3, 9, dtype=torch.int64)))


def interleaved(cache):
    """Memory in which rows of a batch overlap, as sliding windows do."""
    return torch.zeros(200, dtype=cache.dtype).as_strided(cache.shape, (1, 2, 1))


WRONG_CACHES = {
    "none": lambda cache: None,
    "numpy": lambda cache: cache.numpy(),
    "tuple": lambda cache: (cache, cache),
    "dtype": lambda cache: cache.float(),
    "integers": lambda cache: cache.long(),
    "short": lambda cache: cache[..., 1:],
    "batch": lambda cache: cache[1:],
    "transposed": lambda cache: cache.mT,
    "meta": lambda cache: cache.to("meta"),
    "sparse": lambda cache: cache.to_sparse(),
    "nested": jagged,
    "freed": freed,
    "one row for all": lambda cache: cache[:1].expand(3, -1, -1),
    "one channel for all": lambda cache: cache[:, :1].expand(-1, 24, -1),
    "one token for all": lambda cache: cache[..., :1].expand(-1, -1, 2),
    "windows": interleaved,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@torch.no_grad()
@pytest.mark.parametrize("wrong", WRONG_CACHES.values(), ids=WRONG_CACHES)
def test_a_wrong_cache_is_named_and_not_written(wrong):
    layer = convolution()
    cache = layer.prefill(tokens())[1]
    before = cache.clone()
    given = wrong(cache)
    with pytest.raises((TypeError, ValueError), match=r"^state: (expected|its storage)"):
        layer.step(tokens()[:, 0], given)
    assert torch.equal(cache, before)
    if wrong is interleaved:
        assert not given.any()


@torch.no_grad()
def test_any_strides_of_a_cache_do_as_long_as_its_elements_are_apart():
    layer, u_t = convolution(), tokens()[:, 0]
    cache = layer.prefill(tokens())[1]
    expected = cache.clone()
    y = layer.step(u_t, expected)
    pool = cache.new_zeros(7, 30, 5)
    for given in (
        cache.clone(memory_format=torch.contiguous_format),
        torch.empty(2, 24, 3, dtype=cache.dtype).permute(2, 1, 0),
        pool[1:7:2, 2:26, 1:5:2],
        pool[:3, :24, :2],
    ):
        given.copy_(cache)
        assert torch.equal(layer.step(u_t, given), y)
        assert torch.equal(given, expected)


@torch.no_grad()
def test_a_cache_and_a_token_may_lie_in_one_buffer_but_not_on_each_other():
    layer, u_t = convolution(), tokens()[:, 0]
    cache = layer.prefill(tokens())[1]
    expected = cache.clone()
    y = layer.step(u_t, expected)
    buffer = cache.new_empty(3, 24, 3)  # side by side, so that the ranges of their addresses cross
    buffer[..., :2], buffer[..., 2] = cache, u_t
    assert torch.equal(layer.step(buffer[..., 2], buffer[..., :2]), y)
    assert torch.equal(buffer[..., :2], expected)
    assert torch.equal(buffer[..., 2], u_t)
    for column in (0, 1):
        before = buffer.clone()
        with pytest.raises(ValueError, match=r"^state: expected memory apart from u_t's"):
            layer.step(buffer[..., column], buffer[..., :2])
        assert torch.equal(buffer, before)


def test_a_cache_of_inference_mode_stays_there():
    layer, u = convolution(), tokens()
    with torch.inference_mode():
        cache = layer.prefill(u)[1]
        layer.step(u[:, 0], cache)
    before = cache.clone()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"^state: was made under torch\.inference_mode"):
        layer.step(u[:, 0], cache)
    assert torch.equal(cache, before)
    with torch.no_grad():
        layer.step(u[:, 0], before)  # a clone is an ordinary tensor


WRONG_STATES = {
    "none": lambda state: None,
    "tensor": lambda state: state.kv,
    "list": list,
    "swapped": lambda state: (state.k, state.kv),
    "dtype": lambda state: RebasedState(*(part.float() for part in state)),
    "batch": lambda state: RebasedState(*(part[1:] for part in state)),
    "meta": lambda state: RebasedState(*(part.to("meta") for part in state)),
    "expanded": lambda state: RebasedState(state.kv[:1].expand(3, -1, -1, -1), state.k),
    "half meta": lambda state: RebasedState(state.kv, state.k.to("meta")),
}


@torch.no_grad()
@pytest.mark.parametrize("wrong", WRONG_STATES.values(), ids=WRONG_STATES)
def test_a_wrong_state_is_named_and_not_written(wrong):
    layer = attention()
    state = layer.prefill(tokens())[1]
    before = flat(state).clone()
    with pytest.raises((TypeError, ValueError), match=r"^(rebased_cuda: )?state(\.kv|\.k)?: "):
        layer.step(tokens()[:, 0], wrong(state))
    assert torch.equal(flat(state), before)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
@every_layer
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_traces(make, masked, grad):
    """With no warning that a trace may not be good for other inputs, and good for them."""
    layer = make()

    def inputs(mask):
        return (tokens(), torch.tensor(MASKS[mask])) if masked else (tokens(),)

    with torch.set_grad_enabled(grad), warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(layer, inputs("left"))
        for mask in ("left", "right", "holes"):
            given = inputs(mask)
            assert torch.equal(traced(*given), layer(*given))


def test_attention_matrix_refuses_a_shared_out_sequence():
    layer = ReBasedAttention(24, 2, 4)
    layer.context_parallel_group = object()
    with pytest.raises(RuntimeError, match="attention_matrix: needs the whole sequence"):
        layer.attention_matrix(torch.randn(1, 5, 24))
