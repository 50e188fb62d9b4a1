"""float32 over long sequences: the error must not grow with their length.

A float32 sum of n numbers of one sign is off by about sqrt(n) roundings, and by much more once a number is
too small to move the sum. All numbers here are positive, so that nothing averages out.
"""

from __future__ import annotations

import functools

import pytest
import torch
from conftest import EMULATED
from problems import relative_error
from torch import Tensor

from rebased_cuda import rebased_attention, reference

EDGE = 64  # rows at the far end of a sum: the last of y and grad q, the first of grad k and grad v
SHORT = 4096
MAPS = ("outer", "square", "taylor", "elu", "identity")
NAMES = ("y", "kv", "k", "grad q", "grad k", "grad v", "grad gamma_q", "grad beta_q", "grad gamma_k")


def inputs(seqlen: int, d: int, dv: int) -> list[Tensor]:
    """q, k, v, gamma_q, beta_q, gamma_k.

    v follows k: where it does not, the terms of grad q cancel all the more the longer the sequence is, and
    its condition grows, whoever computes it.
    """
    generator = torch.Generator().manual_seed(1)

    def positive(*sizes: int) -> Tensor:
        return torch.rand(*sizes, generator=generator)

    q, k, v = positive(1, 1, seqlen, d), positive(1, 1, seqlen, d), positive(1, 1, seqlen, dv)
    v = 0.25 * v + k.square() @ positive(d, dv)
    return [q, k, v, 0.5 + positive(1, d), positive(1, d), 0.5 + positive(1, d)]


def results(function, tensors: list[Tensor], grad_y: Tensor, feature_map: str) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in tensors]
    y, state = function(*leaves, feature_map=feature_map, return_state=True)
    gradients = torch.autograd.grad(y, leaves, grad_y)
    ends = [slice(-EDGE, None), slice(EDGE), slice(EDGE)]
    rows = [x[:, :, end] for x, end in zip(gradients, ends, strict=False)]
    return [y[:, :, -EDGE:].detach(), *(x.detach() for x in state), *rows, *gradients[3:]]


@functools.cache
def errors(feature_map: str, seqlen: int, d: int, dv: int) -> dict[str, float]:
    tensors = inputs(seqlen, d, dv)
    grad_y = torch.rand(1, 1, seqlen, dv, generator=torch.Generator().manual_seed(2))
    ours = results(rebased_attention, tensors, grad_y, feature_map)
    # The reference keeps every chunk for its backward. At millions of tokens the op in float64 stands for it,
    # which test_attention.py and test_gradients.py hold to the reference.
    judge = functools.partial(reference.chunked, chunk=256) if seqlen <= 1 << 17 else rebased_attention
    exact = results(judge, [x.double() for x in tensors], grad_y.double(), feature_map)
    return {name: relative_error(got, want) for name, got, want in zip(NAMES, ours, exact, strict=True)}


def check(feature_map: str, seqlen: int, d: int, dv: int) -> None:
    short, long = errors(feature_map, SHORT, d, dv), errors(feature_map, seqlen, d, dv)
    grown = {
        name: (short[name], error) for name, error in long.items() if not error <= max(1e-6, 3 * short[name])
    }
    assert not grown


@pytest.mark.skipif(EMULATED, reason="of the native backend")
@pytest.mark.parametrize(("d", "dv"), [(4, 4), (16, 64)])
@pytest.mark.parametrize("feature_map", MAPS)
def test_native(feature_map, d, dv, one_thread):
    """One thread: a sequence is then one segment, whose state takes in every token."""
    errors.cache_clear()
    check(feature_map, 1 << 17 if d == 4 else 1 << 16, d, dv)


@pytest.mark.sweep
@pytest.mark.skipif(EMULATED, reason="of the native backend")
@pytest.mark.parametrize(
    ("d", "dv", "seqlen", "feature_map"),
    [*((4, 4, 1 << 22, m) for m in MAPS), (16, 64, 1 << 19, "outer"), (16, 64, 1 << 19, "square")],
)
def test_native_millions(d, dv, seqlen, feature_map, one_thread):
    errors.cache_clear()
    check(feature_map, seqlen, d, dv)


@pytest.mark.sweep
@pytest.mark.skipif(EMULATED, reason="of the native backend")
@pytest.mark.parametrize("feature_map", MAPS)
def test_native_segments(feature_map):
    """Several threads cut a sequence; each segment is long, and so is the pass that makes its start state."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        errors.cache_clear()
        check(feature_map, 3 << 16, 4, 4)
    finally:
        torch.set_num_threads(threads)
        errors.cache_clear()


@pytest.mark.skipif(not EMULATED, reason="the emulator's")
@pytest.mark.parametrize(
    ("path", "d", "dv", "feature_map"),
    [
        *(("general", 4, 4, m) for m in MAPS),
        *(("float32", 16, 64, m) for m in MAPS if m != "identity"),
        ("general", 16, 64, "outer"),
        ("general", 16, 64, "identity"),
    ],
)
@pytest.mark.parametrize("seqlen", [1 << 14, pytest.param(1 << 17, marks=pytest.mark.sweep)])
def test_one_segment_of_the_kernels(path, d, dv, feature_map, seqlen, override):
    override(path=path, segments=1)
    errors.cache_clear()
    check(feature_map, seqlen, d, dv)
    errors.cache_clear()


@pytest.mark.skipif(EMULATED, reason="no kernels in it")
@pytest.mark.parametrize("feature_map", ["outer", "square"])
def test_plain_chunked_form(feature_map):
    def y_error(seqlen: int) -> float:
        tensors = inputs(seqlen, 4, 4)
        options = {"feature_map": feature_map, "chunk": 64}
        y = reference.chunked(*tensors, **options)[:, :, -EDGE:]
        return relative_error(y, reference.chunked(*(x.double() for x in tensors), **options)[:, :, -EDGE:])

    assert y_error(1 << 18) <= max(1e-6, 3 * y_error(SHORT))


@pytest.mark.skipif(not EMULATED, reason="the emulator's")
@pytest.mark.parametrize("feature_map", ["outer", "taylor"])
def test_tensor_cores_that_truncate(feature_map, override, monkeypatch):
    """Positive terms, and tensor cores that cut off their sums: short segments keep a state from drifting."""
    monkeypatch.setenv("REBASED_EMULATOR_TRUNCATES", "1")
    q, k, v, *_ = (x.bfloat16() for x in inputs(1 << 14, 16, 16))

    def bias() -> float:
        _, (kv, _) = rebased_attention(q, k, v, feature_map=feature_map, return_state=True)
        # products as the kernels round them, summed exactly
        phi = reference.key_features(k.float(), feature_map).bfloat16().double()
        exact = phi.transpose(2, 3) @ v.double()
        return float((kv / exact - 1).mean())

    assert abs(bias()) < 6e-5
    override(path="tensor_core", segments=1)
    assert bias() < -1.5e-4
