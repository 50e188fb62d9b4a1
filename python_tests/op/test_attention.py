"""The op's values against the float64 reference: every map, normalisation, dtype, layout and edge."""

import functools
import statistics

import pytest
import torch
from conftest import EMULATED
from problems import (
    MAPS,
    NORMS,
    Problem,
    plain_low_precision,
    relative_error,
    rounds_operands,
    run,
    run_reference,
)

from rebased_cuda import RebasedState, build_info, rebased_attention, reference

LONG_REFERENCE = functools.partial(reference.chunked, chunk=256)  # fewer, larger products

VARIANTS = {
    "plain": {},
    "gqa": {"heads": 6, "kv_heads": 2},
    "packed": {"batch": 1, "packed": (0, 8, 8, 20, 21)},
    "packed_gqa_state": {"batch": 1, "heads": 4, "kv_heads": 2, "packed": (2, 5, 17), "with_state": True},
    "state": {"with_state": True},
    "shared_affine": {"affine": "shared"},
    "mixed_affine": {"affine": "mixed", "heads": 6, "kv_heads": 2},
    "no_affine": {"affine": "none"},
    "not_normalised": {"normalize": False, "with_state": True},
    "scaled": {"scale": 0.7},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layer_norm", NORMS)
@pytest.mark.parametrize("feature_map", MAPS)
def test_float64_agrees_to_rounding(feature_map, layer_norm, variant, device):
    problem = Problem(feature_map, layer_norm, device=device).but(**VARIANTS[variant])
    inputs = problem.inputs()
    for value, expected in zip(
        run(rebased_attention, inputs, problem), run_reference(inputs, problem), strict=True
    ):
        assert value.dtype == torch.float64
        assert relative_error(value, expected) <= 1e-12


SIZES = [
    (1, 1),
    (2, 3),
    (3, 1),
    (8, 8),
    (16, 64),
    (16, 42),
    (16, 128),
    (32, 16),
    (17, 5),
    (64, 33),
    (128, 256),
]


@pytest.mark.parametrize(("feature_dim", "head_dim"), SIZES)
@pytest.mark.parametrize("feature_map", MAPS)
def test_sizes_of_the_contract(feature_map, feature_dim, head_dim, device):
    problem = Problem(feature_map, feature_dim=feature_dim, head_dim=head_dim, seqlen=70, device=device)
    problem = problem.but(batch=1, heads=2, kv_heads=1)
    inputs = problem.inputs()
    for value, expected in zip(
        run(rebased_attention, inputs, problem), run_reference(inputs, problem), strict=True
    ):
        assert relative_error(value, expected) <= 1e-12


@pytest.mark.parametrize(
    "seqlen", [1, 2, 15, 16, 17, 63, 64, 65, 200, 500] + ([] if EMULATED else [4096, 16384])
)
@pytest.mark.parametrize("feature_map", MAPS)
def test_float32_bound(feature_map, seqlen, device):
    heads = 2 if seqlen < 4096 else 1
    problem = Problem(
        feature_map, batch=1, heads=heads, kv_heads=heads, seqlen=seqlen, feature_dim=16, head_dim=64
    )
    problem = problem.but(dtype=torch.float32, device=device, eps=1e-6)
    inputs = problem.inputs()
    form = reference.quadratic if seqlen < 4096 else LONG_REFERENCE
    y, kv, k = run(rebased_attention, inputs, problem)
    expected = run_reference(inputs, problem, form)
    assert relative_error(y, expected[0]) <= 5e-6
    assert relative_error(kv, expected[1]) <= 5e-6
    assert relative_error(k, expected[2]) <= 5e-6


def _low_precision_error(problem: Problem, function) -> float:
    inputs = problem.inputs()
    y = run(function, inputs, problem)[0]
    return relative_error(y, run_reference(inputs, problem, reference.chunked)[0])


@pytest.mark.skipif(EMULATED, reason="tensor cores round operands: test_kernels.py has their bound")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature_map", MAPS)
def test_low_precision_bound(feature_map, dtype):
    """Error at most 1.25 times that of plain PyTorch with the same dtype in and out.

    Inside, PyTorch has float32, or where this backend rounds the operands of its products, does so as well.
    """
    problem = Problem(feature_map, batch=1, heads=2, kv_heads=2, seqlen=150, feature_dim=16, head_dim=64)
    problem = problem.but(dtype=dtype, eps=1e-6)

    def plain_error(problem):
        if not rounds_operands(problem):
            return _low_precision_error(problem, reference.chunked)
        inputs = problem.inputs()
        expected = run_reference(inputs, problem, reference.chunked)[0]
        return relative_error(plain_low_precision(*inputs[:7], problem=problem), expected)

    ratios = [
        _low_precision_error(problem.but(seed=seed), rebased_attention) / plain_error(problem.but(seed=seed))
        for seed in range(20)
    ]
    assert statistics.median(ratios) <= 1.25


@pytest.mark.skipif(EMULATED, reason="long sequences take minutes on the emulator")
@pytest.mark.parametrize("feature_map", MAPS)
def test_bfloat16_error_is_flat_in_length(feature_map, device):
    problem = Problem(feature_map, "head", 1, 1, 1, 65536, 16, 64, dtype=torch.bfloat16, device=device)
    inputs = problem.inputs()
    y = run(rebased_attention, inputs, problem)[0]
    expected = run_reference(inputs, problem, LONG_REFERENCE)[0]
    before_4k, last = (slice(2048, 4096), slice(-2048, None))
    early, late = (relative_error(y[:, :, rows], expected[:, :, rows]) for rows in (before_4k, last))
    assert late <= 1.1 * early


def test_transposed_layout_costs_no_copy_and_comes_back(device):
    """The usual (B, N, H, d) projection: y has the same memory order, so heads merge without a copy."""
    problem = Problem(device=device)
    q, k, v, *parameters, _, _ = problem.inputs()
    transposed = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    y = rebased_attention(*transposed, *parameters, **problem.options())
    assert y.transpose(1, 2).is_contiguous()
    assert torch.equal(y, rebased_attention(q, k, v, *parameters, **problem.options()))


@pytest.mark.parametrize("empty", [{"batch": 0}, {"seqlen": 0}, {"batch": 1, "packed": (0,)}])
@pytest.mark.parametrize("feature_map", MAPS)
def test_nothing_in_gives_nothing_out(feature_map, empty, device):
    problem = Problem(feature_map, device=device).but(**empty)
    inputs = problem.inputs(requires_grad=True)
    y, kv, k = run(rebased_attention, inputs, problem)
    expected = Problem(feature_map).but(**empty)
    assert y.shape == (expected.batch, expected.heads, expected.seqlen, expected.head_dim)
    assert not y.any()
    assert not kv.any()
    (y.sum() + kv.sum() + k.sum()).backward()
    assert all(x.grad is None or not x.grad.any() for x in inputs if x is not None)


def test_empty_sequence_hands_its_state_on(device):
    problem = Problem(seqlen=0, with_state=True, device=device)
    inputs = problem.inputs()
    _, kv, k = run(rebased_attention, inputs, problem)
    assert torch.equal(kv, inputs[7])
    assert torch.equal(k, inputs[8])


def test_initial_state_is_never_modified(device):
    problem = Problem(with_state=True, device=device)
    inputs = problem.inputs()
    before = [x.clone() for x in inputs[7:]]
    run(rebased_attention, inputs, problem)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs[7:], strict=True))


def test_rows_outside_every_sequence_are_zero(device):
    problem = Problem(batch=1, packed=(3, 9, 15), device=device)
    y = run(rebased_attention, problem.inputs(), problem)[0]
    assert not y[:, :, :3].any()
    assert not y[:, :, 15:].any()
    assert y[:, :, 3:15].all()


@pytest.mark.parametrize("feature_map", MAPS)
def test_finite_inputs_give_finite_outputs(feature_map, device):
    """Zeros, constant rows (variance 0), an exactly vanishing denominator with eps 0 excepted."""
    problem = Problem(feature_map, affine="none", dtype=torch.float32, device=device)
    q, k, v, *_ = problem.inputs()
    for scale in (0.0, 1e-20, 1e4):
        x = [(t * 0 + scale).requires_grad_() for t in (q, k, v)]
        y = rebased_attention(*x, feature_map=feature_map, layer_norm="token")
        y.sum().backward()
        assert all(t.isfinite().all() for t in (y, *(t.grad for t in x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_in_and_out(dtype, device):
    problem = Problem(dtype=dtype, device=device)
    y, kv, k = run(rebased_attention, problem.inputs(), problem)
    assert y.dtype == dtype
    assert kv.dtype == k.dtype == problem.accumulator


def test_state_does_not_depend_on_scale(device):
    problem = Problem(device=device)
    one, two = (run(rebased_attention, problem.inputs(), problem.but(scale=s))[1:] for s in (1.0, 0.1))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_state_helpers():
    state = RebasedState.zeros(3, 2, 5, 7, feature_map="taylor")
    assert state.kv.shape == (3, 2, 21, 7)
    assert state.k.shape == (3, 2, 21)
    state.kv[1] = 1
    picked = state.index_select(torch.tensor([1, 1, 0]))
    assert picked.kv[0].all()
    assert picked.kv[1].all()
    assert not picked.kv[2].any()
    for repeated, one in zip(state.repeat_interleave(2), state, strict=True):
        assert torch.equal(repeated, one[[0, 0, 1, 1, 2, 2]])
    assert state.repeat_interleave(0).k.shape == (0, 2, 21)
    with pytest.raises(ValueError, match="feature_map"):
        RebasedState.zeros(1, 1, 1, 1, feature_map="cosine")
    with pytest.raises(ValueError, match="dtype"):
        RebasedState.zeros(1, 1, 1, 1, dtype=torch.bfloat16)


@pytest.mark.skipif(not build_info()["emulator"], reason="a build without poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_what_a_call_allocates_is_poisoned_in_test_builds(dtype, device):
    """Every other test relies on this: an entry that no kernel writes comes out as NaN."""
    rows = torch.ops.rebased_cuda.unwritten(torch.ones(2, 3, 5, 7, dtype=dtype, device=device))
    assert rows.shape == (2, 3, 5, 7)
    assert rows.isnan().all()
