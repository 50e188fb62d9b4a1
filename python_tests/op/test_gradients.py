"""Gradients: gradcheck in float64, float32 against the reference, states, and what has no gradient."""

import pytest
import torch
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
from test_attention import VARIANTS

from rebased_cuda import RebasedState, rebased_attention, reference


def _gradients(function, inputs, problem, upstream):
    leaves = [x for x in inputs if x is not None]
    outputs = run(function, inputs, problem)
    return torch.autograd.grad(
        outputs, leaves, [u.to(o.dtype) for u, o in zip(upstream, outputs, strict=True)]
    )


def _upstream(problem, inputs):
    generator = torch.Generator().manual_seed(1)
    outputs = run(rebased_attention, inputs, problem)
    return [torch.randn(o.shape, generator=generator, dtype=o.dtype).to(o.device) for o in outputs]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layer_norm", NORMS)
@pytest.mark.parametrize("feature_map", MAPS)
def test_gradcheck(feature_map, layer_norm, variant, device):
    """Every input's gradient, the initial state's and through the final state too."""
    problem = Problem(feature_map, layer_norm, seqlen=9, feature_dim=3, head_dim=2, device=device)
    problem = problem.but(**VARIANTS[variant])
    if problem.packed:
        problem = problem.but(packed=tuple(min(row, 9) for row in problem.packed))
    inputs = problem.inputs(requires_grad=True)
    present = [i for i, x in enumerate(inputs) if x is not None]

    def function(*leaves):
        full = list(inputs)
        for i, leaf in zip(present, leaves, strict=True):
            full[i] = leaf
        return run(rebased_attention, full, problem)

    assert torch.autograd.gradcheck(function, [inputs[i] for i in present], fast_mode=True)


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize("sizes", [(16, 64), (16, 48), (7, 5), (32, 16), (1, 1), (64, 40)])
def test_float64_gradients_agree_with_the_reference(feature_map, sizes, device):
    problem = Problem(feature_map, batch=1, heads=2, kv_heads=1, seqlen=150, with_state=True, device=device)
    problem = problem.but(feature_dim=sizes[0], head_dim=sizes[1])
    if sizes[0] == 1:  # y then depends on q through eps alone: rounding takes 1e-10 of that at the usual 1e-3
        problem = problem.but(eps=0.1)
    inputs = problem.inputs(requires_grad=True)
    upstream = _upstream(problem, inputs)
    got = _gradients(rebased_attention, inputs, problem, upstream)
    expected = _gradients(reference.quadratic, inputs, problem, upstream)
    for g, e in zip(got, expected, strict=True):
        if e.any():
            assert relative_error(g, e) <= 1e-10
        else:  # LayerNorm of a single number does not depend on it; a fused multiply-add leaves its rounding
            assert g.abs().max() <= 1e-10


@pytest.mark.parametrize("layer_norm", NORMS)
@pytest.mark.parametrize("feature_map", MAPS)
def test_float32_bound(feature_map, layer_norm, device):
    """At most 2e-5, or twice what plain float32 PyTorch loses: tiny denominators magnify any rounding."""
    problem = Problem(
        feature_map, layer_norm, 1, 2, 2, 200, 16, 64, dtype=torch.float32, eps=1e-6, device=device
    )
    inputs = problem.inputs(requires_grad=True)
    upstream = _upstream(problem, inputs)
    got = _gradients(rebased_attention, inputs, problem, upstream)
    plain = _gradients(reference.chunked, inputs, problem, upstream)
    wide = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    expected = _gradients(reference.chunked, wide, problem, upstream)
    for g, p, e in zip(got, plain, expected, strict=True):
        assert relative_error(g, e) <= max(2e-5, 2 * relative_error(p, e))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("feature_map", MAPS)
def test_low_precision_gradients(feature_map, dtype, device):
    """Within 1.25 times the error of plain PyTorch of the same precision, median over seeds and inputs.

    PyTorch has float32 inside, or where this backend rounds the operands of its products, does so as well.
    """

    def plain(*inputs, problem):
        if rounds_operands(problem):
            return plain_low_precision(*inputs, problem=problem)
        return reference.chunked(*inputs, **problem.options())

    ratios = []
    for seed in range(20):
        problem = Problem(
            feature_map, "head", 1, 1, 1, 80, 16, 32, dtype=dtype, device=device, seed=seed, eps=1e-2
        )
        inputs = problem.inputs(requires_grad=True)[:7]
        wide = [x.detach().double().requires_grad_() for x in inputs]
        upstream = torch.randn(1, 1, 80, 32, dtype=torch.float64, device=device)

        def gradients(y, leaves, upstream=upstream):
            return torch.autograd.grad(y, leaves[:3], upstream.to(y.dtype))

        got = gradients(rebased_attention(*inputs, **problem.options()), inputs)
        baseline = gradients(plain(*inputs, problem=problem), inputs)
        expected = gradients(reference.chunked(*wide, **problem.options()), wide)
        for g, p, e in zip(got, baseline, expected, strict=True):
            ratios.append(relative_error(g, e) / relative_error(p, e))
    assert sorted(ratios)[len(ratios) // 2] <= 1.25


@pytest.mark.parametrize("feature_map", MAPS)
def test_gradient_through_a_cut(feature_map, device):
    """Two calls joined by a state give the gradients of one call."""
    problem = Problem(feature_map, "head", seqlen=40, device=device)
    inputs = problem.inputs(requires_grad=True)
    leaves = [x for x in inputs if x is not None]
    q, k, v, *parameters = inputs[:7]
    weight = torch.randn(problem.batch, problem.heads, 40, problem.head_dim, dtype=q.dtype).to(device)
    options = problem.options()
    whole = torch.autograd.grad((rebased_attention(q, k, v, *parameters, **options) * weight).sum(), leaves)
    first, state = rebased_attention(
        *(x[:, :, :17] for x in (q, k, v)), *parameters, return_state=True, **options
    )
    second = rebased_attention(
        *(x[:, :, 17:] for x in (q, k, v)), *parameters, initial_state=state, **options
    )
    cut = torch.autograd.grad((torch.cat([first, second], 2) * weight).sum(), leaves)
    for a, b in zip(whole, cut, strict=True):
        assert relative_error(b, a) <= 1e-11


def test_only_the_state_is_used(device):
    problem = Problem(device=device)
    inputs = problem.inputs(requires_grad=True)
    _, kv, _ = run(rebased_attention, inputs, problem)
    got = torch.autograd.grad(kv.square().sum(), inputs[1:3])
    _, kv, _ = run(reference.quadratic, inputs, problem)
    expected = torch.autograd.grad(kv.square().sum(), inputs[1:3])
    assert all(relative_error(g, e) <= 1e-12 for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature_map", MAPS)
def test_memory_order_changes_no_bit(feature_map, dtype, device):
    """(B, N, H, d) or (B, H, N, d): the CPU walks heads that lie within a token side by side."""
    shape = {"heads": 16, "kv_heads": 8, "seqlen": 70, "feature_dim": 16, "head_dim": 64}
    problem = Problem(feature_map, dtype=dtype, with_state=True, device=device).but(**shape)
    results = []
    for token_major in (False, True):
        inputs = problem.inputs()
        if token_major:
            inputs[:3] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
        inputs = [x.requires_grad_() for x in inputs]
        outputs = run(rebased_attention, inputs, problem)
        results.append([*outputs, *torch.autograd.grad(sum(o.square().sum() for o in outputs), inputs)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("layout", ["expanded", "transposed", "strided"])
def test_any_layout_of_the_incoming_gradient(layout, device):
    problem = Problem(device=device)
    inputs = problem.inputs(requires_grad=True)
    leaves = [x for x in inputs if x is not None]
    y = run(rebased_attention, inputs, problem)[0]
    gradient = torch.randn(y.shape, dtype=y.dtype).to(device)
    if layout == "expanded":
        gradient = gradient[:, :1, :1, :1].expand_as(y)
    elif layout == "transposed":
        gradient = gradient.transpose(-1, -2).contiguous().transpose(-1, -2)
    else:
        gradient = torch.stack([gradient, gradient], -1)[..., 0]
    got = torch.autograd.grad(y, leaves, gradient, retain_graph=True)
    expected = torch.autograd.grad(y, leaves, gradient.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_gradients_only_where_wanted(device):
    problem = Problem(device=device)
    inputs = problem.inputs()
    inputs[2].requires_grad_()
    run(rebased_attention, inputs, problem)[0].sum().backward()
    assert inputs[2].grad is not None
    assert inputs[0].grad is None


@pytest.mark.parametrize("reduce", [torch.Tensor.sum, lambda y: y.square().sum()])
def test_no_second_derivative_and_it_says_so(reduce, device):
    problem = Problem(device=device)
    inputs = problem.inputs(requires_grad=True)
    y = run(rebased_attention, inputs, problem)[0]
    (gradient,) = torch.autograd.grad(reduce(y), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivatives"):
        torch.autograd.grad(gradient.square().sum(), inputs[1])


def test_no_forward_mode_and_it_says_so(device):
    import torch.autograd.forward_ad as forward_ad

    problem = Problem(device=device)
    q, k, v, *_ = problem.inputs()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="jvp"):
        rebased_attention(forward_ad.make_dual(q, torch.ones_like(q)), k, v)


def test_stale_state_is_noticed(device):
    """A state saved for backward and then stepped in place must raise, not give wrong gradients."""
    from rebased_cuda import rebased_attention_step

    problem = Problem(with_state=True, layer_norm="head", device=device)
    inputs = problem.inputs()
    inputs[7:] = [x.contiguous() for x in inputs[7:]]
    inputs[0].requires_grad_()
    y = run(rebased_attention, inputs, problem)[0]
    q, k, v, *parameters, kv, k_sum = inputs
    with torch.no_grad():
        options = problem.options()
        rebased_attention_step(
            q[:, :, 0], k[:, :, 0], v[:, :, 0], RebasedState(kv, k_sum), *parameters, **options
        )
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_reference_in_float64_is_what_gradcheck_would_give():
    """The judge itself, once: its own gradcheck on the default problem."""
    problem = Problem(seqlen=5, feature_dim=3, head_dim=2)
    inputs = problem.inputs(requires_grad=True)
    leaves = [x for x in inputs if x is not None]
    assert torch.autograd.gradcheck(
        lambda *x: run_reference([*x, None, None], problem), leaves, fast_mode=True
    )
