"""float16 at any size of q and k: y is a ratio, and with eps = 0 their size must not matter.

Squares of small or of large numbers are outside float16's range, sums of them more so; whatever is inside an
implementation has float32's range and precision. So y and grad v are right to their own rounding. grad q and
grad k are, but for two things that a float16 interface brings with it:

* the gradient itself may lie where float16 has few digits (its numbers are 2^-24 apart, however small);
* backward has y as it was returned. Weights c_ij of a row's gradients sum to 0 with the exact y, and to about
  y's rounding with that one; `elu` of a small k is 1 + k, and of sum c_ij (1 + k_j) the second part is the
  gradient. Plain PyTorch with float32 inside that keeps y in float16 has the same error: that is the judge.
"""

import functools

import pytest
import random_shapes
import torch
from conftest import EMULATED
from problems import MAPS, relative_error

from rebased_cuda import RebasedState, rebased_attention, rebased_attention_step, reference

OF_Y, OF_GRADIENTS, OF_STATES = 6e-4, 1.5e-3, 5e-6  # relative L2
SPACING = 2.0**-24  # of float16's smallest numbers
# LayerNorm, and the standard deviation of q and k without it, or gamma with it
SIZES = [(None, size) for size in (1e-3, 1e-2, 0.1, 1.0, 10.0, 30.0)]
SIZES += [(norm, gamma) for norm in ("token", "head") for gamma in (1e-3, 1e-2, 0.03, 1.0, 30.0)]
LONG = pytest.mark.sweep if EMULATED else ()

_plain = functools.partial(random_shapes._plain, chunk=64, operands=None, gradients=None)
_exact = functools.partial(reference.chunked, chunk=256)


def _inputs(seqlen, feature_dim, norm, size, device, heads=2, head_dim=16):
    """q, k, v, grad y in float16, and gamma."""
    generator = torch.Generator().manual_seed(seqlen + feature_dim)
    sizes = [(1, heads, seqlen, width) for width in (feature_dim, feature_dim, head_dim, head_dim)]
    q, k, v, upstream = (torch.randn(shape, generator=generator) for shape in sizes)
    if norm is None:
        q, k = q * size, k * size
    gamma = None if norm is None else torch.full((feature_dim,), size, device=device)
    return [x.half().to(device) for x in (q, k, v, upstream)], gamma


def _results(function, tensors, gamma, **options):
    """y, grad q, grad k, grad v, kv, k."""
    *leaves, upstream = tensors
    leaves = [x.detach().requires_grad_() for x in leaves]
    options = {"eps": 0.0, "initial_state": None, "return_state": True, "normalize": True} | options
    y, state = function(*leaves, gamma, None, gamma, None, **options)
    return [y.detach(), *torch.autograd.grad(y, leaves, upstream), *(x.detach() for x in state)]


def _compared(tensors, gamma, **options):
    """Results of the op, of the reference in float64 and of plain PyTorch."""
    wide = [x.double() for x in tensors]
    return (
        _results(rebased_attention, tensors, gamma, **options),
        _results(_exact, wide, None if gamma is None else gamma.double(), **options),
        _results(_plain, tensors, gamma, **options),
    )


def _gradient_bound(feature_map, exact, plain):
    rms = exact.norm().item() / exact.numel() ** 0.5
    bound = OF_GRADIENTS + 1.1 * SPACING / 12**0.5 / rms
    return max(bound, 1.25 * relative_error(plain, exact)) if feature_map == "elu" else bound


def _check(feature_map, got, exact, plain, rows=slice(None)):
    for value, other in zip(got, plain, strict=True):
        assert value.isfinite()[other.isfinite()].all()
    cut = [x[:, :, rows] if i < 4 else x for i, x in enumerate(exact)]
    got, plain = ([x[:, :, rows] if i < 4 else x for i, x in enumerate(y)] for y in (got, plain))
    of_q, of_k = (_gradient_bound(feature_map, cut[i], plain[i]) for i in (1, 2))
    bounds = (OF_Y, of_q, of_k, OF_Y, OF_STATES, OF_STATES)
    names = ("y", "grad q", "grad k", "grad v", "kv", "k")
    errors = {name: relative_error(g, e) for name, g, e in zip(names, got, cut, strict=True)}
    wrong = {name: errors[name] for name, most in zip(names, bounds, strict=True) if not errors[name] <= most}
    assert not wrong


@pytest.mark.parametrize(("norm", "size"), SIZES)
@pytest.mark.parametrize("feature_dim", [8, 16, 32])
@pytest.mark.parametrize("feature_map", MAPS)
def test_any_size(feature_map, feature_dim, norm, size, device, one_thread):
    tensors, gamma = _inputs(257, feature_dim, norm, size, device)
    _check(feature_map, *_compared(tensors, gamma, feature_map=feature_map, layer_norm=norm))


@pytest.mark.parametrize("seqlen", [pytest.param(1000, marks=LONG), pytest.param(4096, marks=LONG)])
@pytest.mark.parametrize(("norm", "size"), [(None, 1e-3), (None, 30.0), ("token", 1e-3), ("head", 30.0)])
@pytest.mark.parametrize("feature_map", MAPS)
def test_any_size_in_long_sequences(feature_map, norm, size, seqlen, device):
    tensors, gamma = _inputs(seqlen, 16, norm, size, device)
    _check(feature_map, *_compared(tensors, gamma, feature_map=feature_map, layer_norm=norm))


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("feature_dim", [8, 16, 32])
def test_a_size_that_changes_on_the_way(feature_map, feature_dim, device, one_thread):
    """Each half is right by itself: neither is lost beside the other."""
    tensors, _ = _inputs(256, feature_dim, None, 1.0, device)
    for x in tensors[:2]:
        x[:, :, :128] *= 0.05
        x[:, :, 128:] *= 3
    results = _compared(tensors, None, feature_map=feature_map)
    for rows in (slice(0, 128), slice(128, 256)):
        _check(feature_map, *results, rows=rows)


@pytest.mark.parametrize(("norm", "size"), [(None, 1e-3), (None, 30.0), ("token", 1e-3), ("head", 30.0)])
@pytest.mark.parametrize("feature_map", MAPS)
def test_steps_of_any_size(feature_map, norm, size, device, one_thread):
    """Step by step is the whole, y to its rounding and the state to that of float32."""
    tensors, gamma = _inputs(40, 16, norm, size, device)
    q, k, v, _ = tensors
    options = {"feature_map": feature_map, "layer_norm": norm, "eps": 0.0, "gamma_q": gamma, "gamma_k": gamma}
    whole, final = rebased_attention(q, k, v, return_state=True, **options)
    state = RebasedState.zeros(1, 2, 16, 16, feature_map=feature_map, device=device)
    rows = [rebased_attention_step(q[:, :, i], k[:, :, i], v[:, :, i], state, **options) for i in range(40)]
    assert relative_error(torch.stack(rows, 2), whole) <= OF_Y
    for stepped, at_once in zip(state, final, strict=True):
        assert relative_error(stepped, at_once) <= OF_STATES


@pytest.mark.parametrize("large", [16.0, 6e4])
@pytest.mark.parametrize("feature_map", MAPS)
def test_large_entries(feature_map, large, device, one_thread):
    """One entry of every q and k whose square, or whose square's square, float16 does not have."""
    tensors, _ = _inputs(100, 16, None, 1.0, device)
    for x in tensors[:2]:
        x[..., 3] = large
    got, exact, plain = _compared(tensors, None, feature_map=feature_map)
    for index in (0, 3):
        assert relative_error(got[index], exact[index]) <= OF_Y
    for index in (1, 2):  # the entry that is large in every token tells none from another: cancellation
        bound = max(OF_GRADIENTS, 3 * relative_error(plain[index], exact[index]))
        assert relative_error(got[index], exact[index]) <= bound
    assert all(x.isfinite().all() for x in got)


def test_small_scores(device):
    """Of 2.5e-9, the square root of which float16 has and which it has not."""
    q = torch.zeros(1, 1, 200, 16, dtype=torch.float16, device=device)
    q[..., 0] = 1
    y = rebased_attention(q, q * 2e-4, torch.ones_like(q), eps=1e-12)
    assert (y - 1).abs().max() <= 2.0**-11
    assert (y[:, :, 10:] == 1).all()
