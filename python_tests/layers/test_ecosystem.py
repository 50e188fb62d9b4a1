"""Tools that take hold of a module at its call: offloading, adapters, pruning, hooks, parametrizations.

Each of them keeps the parameters of ln_q and ln_k elsewhere, or changes them, and brings the true ones when
the module is called. So each is held to a layer that has these parameters as its own.
"""

import copy

import accelerate
import peft
import pytest
import torch
from conftest import EMULATED
from problems import relative_error
from torch import nn
from torch.nn.utils import parametrize, prune

from rebased_cuda import GatedShortConvolution, ReBasedAttention, compat
from rebased_cuda.layers import QueryKeyNorm

pytestmark = [
    pytest.mark.skipif(EMULATED, reason="what is tested here is the same on every backend"),
    pytest.mark.usefixtures("one_thread"),
]

HIDDEN, HEADS, FEATURES = 24, 4, 5
AFFINE = {"both": {}, "gamma": {"use_beta": False}, "beta": {"use_gamma": False}}


def attention(**options):
    """A layer whose gamma and beta are not ones and zeros."""
    layer = ReBasedAttention(HIDDEN, HEADS, FEATURES, num_kv_heads=2, eps=1e-3, **options)
    for norm in (layer.ln_q, layer.ln_k):
        for parameter in norm.parameters():
            nn.init.normal_(parameter, 0.5)
    return layer


def tokens():
    return torch.randn(2, 7, HIDDEN)


def step_after(layer, x):
    """The last row's output by one step after a prefill of the others."""
    _, state = layer.prefill(x[:, :-1])
    return layer.step(x[:, -1], state)


USES = {
    "forward": lambda layer, x: layer(x),
    "masked": lambda layer, x: layer(x, torch.tensor([[1] * 7, [0, 0, 1, 1, 0, 1, 1]])),
    "prefill": lambda layer, x: layer.prefill(x)[1].kv,
    "step": step_after,
    "attention_matrix": lambda layer, x: layer.attention_matrix(x),
}
every_use = pytest.mark.parametrize("use", USES.values(), ids=USES)


def offload_to_cpu(layer, folder):
    return accelerate.cpu_offload(layer)


def offload_to_disk(layer, folder):
    return accelerate.disk_offload(layer, folder)


def dispatch(layer, folder):
    on_disk = ("proj_k", "proj_o", "ln_q")
    where = {name: "disk" if name in on_disk else "cpu" for name, _ in layer.named_children()}
    return accelerate.dispatch_model(layer, where, main_device="cpu", offload_dir=folder)


@torch.no_grad()
@every_use
@pytest.mark.parametrize("affine", AFFINE.values(), ids=AFFINE)
@pytest.mark.parametrize("offload", [offload_to_cpu, offload_to_disk, dispatch])
def test_offloaded_parameters_come_back_for_the_call(offload, affine, use, tmp_path):
    layer, x = attention(**affine), tokens()
    expected = use(layer, x)
    offload(layer, tmp_path)
    assert all(p.is_meta for p in layer.ln_q.parameters())
    assert torch.equal(use(layer, x), expected)


CONVOLUTION_USES = {
    "forward": lambda layer, u: layer(u),
    "masked": lambda layer, u: layer(u, torch.tensor([[1] * 7, [0, 0, 1, 1, 0, 1, 1]])),
    "step": step_after,
}


@torch.no_grad()
@pytest.mark.parametrize("use", CONVOLUTION_USES.values(), ids=CONVOLUTION_USES)
@pytest.mark.parametrize("offload", [offload_to_cpu, offload_to_disk])
def test_offloaded_convolutions_come_back_for_the_call(offload, use, tmp_path):
    layer, u = GatedShortConvolution(HIDDEN), tokens()
    expected = use(layer, u)
    offload(layer, tmp_path)
    assert layer.conv.weight.is_meta
    assert torch.equal(use(layer, u), expected)


@torch.no_grad()
@every_use
@pytest.mark.parametrize("use_beta", [True, False], ids=["beta", "no-beta"])
@pytest.mark.parametrize("offload", [offload_to_cpu, offload_to_disk])
def test_scalers_without_normalisation_are_called_too(offload, use_beta, use, tmp_path):
    """The authors' mixer without LayerNorm has modules of its own for gamma and beta."""
    mixer = compat.ReBased(
        HIDDEN, num_heads=HEADS, num_key_value_heads=HEADS, normalize=False, use_beta=use_beta, eps=1e-3
    )
    for scaler in (mixer.ln_q, mixer.ln_k):
        for parameter in scaler.parameters():
            nn.init.normal_(parameter, 0.5)
    x = tokens()
    expected = use(mixer, x)
    offload(mixer, tmp_path)
    assert all(p.is_meta for p in mixer.ln_q.parameters())
    assert torch.equal(use(mixer, x), expected)


def tuned(layer):
    """The layer with PEFT's tuning of norms, and the adapters' parameters moved."""
    model = peft.get_peft_model(nn.Sequential(layer), peft.LNTuningConfig(target_modules=["ln_q", "ln_k"]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.5)
    return model


@torch.no_grad()
@every_use
def test_tuned_norms_are_used(use):
    layer, x = attention(), tokens()
    original = use(layer, x)
    moved = copy.deepcopy(layer)
    for norm in (moved.ln_q, moved.ln_k):
        for parameter in norm.parameters():
            parameter.add_(0.5)
    model = tuned(layer)
    assert torch.equal(use(model.base_model.model[0], x), use(moved, x))
    with model.disable_adapter():
        assert torch.equal(use(model.base_model.model[0], x), original)
    merged = model.merge_and_unload()[0]
    assert type(merged.ln_q) is QueryKeyNorm
    assert torch.equal(use(merged, x), use(moved, x))


def test_tuning_norms_trains_what_it_says_and_nothing_else():
    layer, x = attention(), tokens()
    kept = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    model = tuned(layer)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 4
    before = {name: p.detach().clone() for name, p in trained.items()}
    optimizer = torch.optim.SGD(trained.values(), lr=1.0)
    model(x).square().sum().backward()
    optimizer.step()
    assert not any(torch.equal(p, before[name]) for name, p in trained.items())
    for name, parameter in model.unload()[0].named_parameters():
        assert torch.equal(parameter, kept[name])


def test_saved_modules_of_an_adapter_are_used():
    layer, x = attention(), tokens()
    original = layer(x)
    configuration = peft.LoraConfig(target_modules=["proj_q", "proj_v"], modules_to_save=["ln_q", "ln_k"])
    model = peft.get_peft_model(nn.Sequential(layer), configuration)
    assert relative_error(model(x), original) < 1e-6
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(0.5)
    assert relative_error(model(x), original) > 1e-2
    with model.disable_adapter():
        assert relative_error(model(x), original) < 1e-6


@torch.no_grad()
@every_use
@pytest.mark.parametrize("name", ["ln_q", "ln_k"])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_pruned_parameters_are_used(parameter, name, use):
    """Also after a training step, which moves what the mask is applied to."""
    layer, x = attention(), tokens()
    expected = copy.deepcopy(layer)
    norm = getattr(layer, name)
    prune.random_unstructured(norm, parameter, amount=0.5)
    for _ in range(2):
        values, mask = getattr(norm, f"{parameter}_orig"), getattr(norm, f"{parameter}_mask")
        getattr(getattr(expected, name), parameter).copy_(values * mask)
        assert torch.equal(use(layer, x), use(expected, x))
        values.mul_(2)


@torch.no_grad()
@every_use
@pytest.mark.parametrize("name", ["ln_q", "ln_k"])
def test_parametrizations_are_used(name, use):
    class Doubled(nn.Module):
        def forward(self, x):
            return 2 * x

    layer, x = attention(), tokens()
    expected = copy.deepcopy(layer)
    for parameter in ("weight", "bias"):
        getattr(getattr(expected, name), parameter).mul_(2)
        parametrize.register_parametrization(getattr(layer, name), parameter, Doubled())
    assert torch.equal(use(layer, x), use(expected, x))


@torch.no_grad()
@every_use
def test_hooks_run_and_may_change_gamma_and_beta(use):
    layer, x = attention(), tokens()
    expected = copy.deepcopy(layer)
    seen = []
    for name in ("ln_q", "ln_k"):
        norm = getattr(layer, name)
        norm.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
        norm.register_forward_hook(lambda module, given, result: (2 * result[0], result[1] + 1))
        getattr(expected, name).weight.mul_(2)
        getattr(expected, name).bias.add_(1)
    y = use(layer, x)
    assert seen[:2] == ["ln_q", "ln_k"]
    assert torch.equal(y, use(expected, x))


def test_parameters_freed_after_the_call_are_not_read():
    """As sharding does: what the call returned must not be the parameter's own memory."""
    layer, x = attention(), tokens()
    expected = layer(x)

    def spoil(module, given, result):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(float("nan"))

    layer.ln_q.register_forward_hook(spoil)
    assert torch.equal(layer(x), expected)


@torch.no_grad()
@pytest.mark.parametrize("use_gamma", [True, False], ids=["gamma", "no-gamma"])
@pytest.mark.parametrize("use_beta", [True, False], ids=["beta", "no-beta"])
@pytest.mark.parametrize("layer_norm", ["token", "head", None])
def test_a_norm_called_with_a_tensor_is_what_the_layer_does_to_it(layer_norm, use_gamma, use_beta):
    layer = attention(layer_norm=layer_norm, use_gamma=use_gamma, use_beta=use_beta)
    x = tokens()
    assert isinstance(layer.ln_q, nn.LayerNorm)
    normalised = copy.deepcopy(layer)
    normalised.layer_norm = None
    for norm in (normalised.ln_q, normalised.ln_k):
        norm.register_parameter("weight", None)
        norm.register_parameter("bias", None)
    normalised.proj_q.register_forward_hook(lambda module, given, result: layer.ln_q(result))
    normalised.proj_k.register_forward_hook(lambda module, given, result: layer.ln_k(result))
    assert relative_error(layer(x), normalised(x)) < 1e-5
    if layer_norm == "token":  # then it is nn.LayerNorm
        q = layer.proj_q(x)
        plain = nn.functional.layer_norm(q, (HEADS * FEATURES,), layer.ln_q.weight, layer.ln_q.bias)
        assert torch.equal(layer.ln_q(q), plain)


def test_norms_are_made_and_reset_as_layer_norms_are():
    for affine in ({}, {"use_gamma": False}, {"use_beta": False}, {"use_gamma": False, "use_beta": False}):
        layer = attention(**affine)
        layer.ln_q.reset_parameters()
        assert layer.ln_q.weight is None or torch.equal(layer.ln_q.weight, torch.ones(HEADS * FEATURES))
        assert layer.ln_q.bias is None or torch.equal(layer.ln_q.bias, torch.zeros(HEADS * FEATURES))


def test_a_plain_layer_norm_in_the_place_of_one_is_read():
    layer, x = attention(), tokens()
    plain = copy.deepcopy(layer)
    for name in ("ln_q", "ln_k"):
        norm = getattr(layer, name)
        replacement = nn.LayerNorm(norm.normalized_shape)
        replacement.load_state_dict(norm.state_dict())
        setattr(plain, name, replacement)
    assert torch.equal(plain(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_parameters_are_used_in_float32(dtype):
    """They give what the same numbers give in float32, where finer ones than 16 bits hold count too."""
    layer, x = attention().to(dtype), tokens().to(dtype)
    finer = copy.deepcopy(layer)
    finer.ln_q.float()
    finer.ln_k.float()
    assert torch.equal(layer(x), finer(x))
    with torch.no_grad():
        finer.ln_q.weight.mul_(1 + 2**-12)
    assert torch.equal(finer.ln_q.weight.to(dtype), layer.ln_q.weight)
    assert not torch.equal(finer(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_gamma_and_beta_arrive_in_the_operators_own_dtype(dtype):
    layer, seen = attention().to(dtype), []
    layer.ln_q.register_forward_hook(lambda module, given, result: seen.extend(result))
    layer(tokens().to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        layer(tokens().to(dtype))
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert [x.dtype for x in seen] == [expected] * 4
    assert layer.ln_q.weight.dtype == dtype


def by_every_module(norm, seen):
    return nn.modules.module.register_module_forward_pre_hook(
        lambda module, given: seen.append(module) if module is norm else None
    )


def by_another_forward(norm, seen):
    forward = norm.forward
    norm.forward = lambda input: (seen.append(norm), forward(input))[1]


def by_a_class_of_its_own(norm, seen):
    class Watched(QueryKeyNorm):
        def forward(self, input):
            seen.append(self)
            return super().forward(input)

    norm.__class__ = Watched


WATCHES = {
    "hook-before": lambda norm, seen: norm.register_forward_pre_hook(lambda *_: seen.append(norm)),
    "hook-after": lambda norm, seen: norm.register_forward_hook(lambda *_: seen.append(norm)),
    "hook-of-every-module": by_every_module,
    "another-forward": by_another_forward,
    "another-class": by_a_class_of_its_own,
}


@torch.no_grad()
@pytest.mark.parametrize("watch", WATCHES.values(), ids=WATCHES)
def test_whatever_waits_for_the_call_of_a_norm_gets_it(watch):
    """Where nothing waits the layer reads gamma and beta, as it does here before the watch and after it."""
    layer, x, seen = attention(), tokens(), []
    expected = layer(x)
    handle = watch(layer.ln_k, seen)
    try:
        assert torch.equal(layer(x), expected)
    finally:
        if hasattr(handle, "remove"):
            handle.remove()
    assert seen == [layer.ln_k]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_hooks_on_the_gradients_of_a_norm_run():
    layer, x, seen = attention(), tokens(), []
    layer.ln_q.register_full_backward_hook(lambda module, *_: seen.append(module))
    layer(x).sum().backward()
    assert seen == [layer.ln_q]
