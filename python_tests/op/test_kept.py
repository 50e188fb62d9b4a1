"""What forward keeps for backward beyond y and r: when, that it changes nothing, and what guards it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import DEVICES, EMULATED, KERNEL_DEVICES, needs_kernels
from problems import NORMS, Problem, run
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from rebased_cuda import rebased_attention
from rebased_cuda.autograd import ops

PROBLEMS = {
    "general": Problem(kv_heads=2),
    "quadratic": Problem(seqlen=9, dtype=torch.float32),
    "float32": Problem(kv_heads=2, seqlen=70, feature_dim=16, head_dim=64, dtype=torch.float32),
    "tensor_core": Problem(kv_heads=2, seqlen=150, feature_dim=16, head_dim=64, dtype=torch.bfloat16),
    "packed": Problem(batch=1, seqlen=150, feature_dim=16, head_dim=64, dtype=torch.bfloat16).but(
        packed=(2, 70, 70, 140)
    ),
    "state": Problem(seqlen=150, feature_dim=16, head_dim=64, dtype=torch.bfloat16, with_state=True),
}


def _arguments(problem: Problem) -> tuple[list[Tensor | None], tuple[Any, ...]]:
    """The inputs of forward_kept up to cu_seqlens, and the options."""
    given = problem.options()
    scale = problem.feature_dim**-0.5
    options = (problem.feature_map, problem.layer_norm or "none", scale, problem.eps, 1e-5, problem.normalize)
    return [*problem.inputs(), given.get("cu_seqlens")], options


def _saved(y: Tensor) -> list[Tensor | None]:
    return list(y.grad_fn.saved_tensors)  # type: ignore[union-attr]


@needs_kernels
@pytest.mark.parametrize("segments", [0, 2])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("layer_norm", NORMS, ids=str)
def test_a_kept_call_is_the_same_call(name, layer_norm, segments, override, kernel_device):
    problem = PROBLEMS[name].but(layer_norm=layer_norm, device=kernel_device)
    inputs, options = _arguments(problem)
    override(segments=segments)
    *expected, kept = ops.forward_kept(*inputs, *options, True, True)
    for value, other in zip(ops.forward_with_state(*inputs, *options, True), expected, strict=True):
        assert torch.equal(value, other)
    y, r, *_ = expected
    gradient = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    given = (gradient, None, None, *inputs, y, r, *options, "all")
    again = ops.backward_with_state(*given)
    for value, other in zip(ops.backward_with_state(*given, kept), again, strict=True):
        assert torch.equal(value, other)
    if not problem.with_state:
        without = (gradient, *inputs[:7], inputs[9], y, r, *options)
        for value, other in zip(ops.backward(*without, kept), again, strict=False):
            assert torch.equal(value, other)


@needs_kernels
@pytest.mark.parametrize("layer_norm", ["token", "head"])
def test_backward_uses_what_was_kept(layer_norm, override, kernel_device):
    """Statistics that are not those of q and k, and states that are not theirs: other gradients."""
    problem = PROBLEMS["tensor_core"].but(device=kernel_device, layer_norm=layer_norm)
    inputs, options = _arguments(problem)
    override(segments=2)
    y, r, *_, kept = ops.forward_kept(*inputs, *options, False, True)
    given = (torch.ones_like(y), None, None, *inputs, y, r, *options, "all")
    grad_q, grad_k, *_ = ops.backward_with_state(*given)
    other_q, other_k, *_ = ops.backward_with_state(*given, kept * 0)
    assert not torch.equal(other_q, grad_q)
    assert not torch.equal(other_k, grad_k)  # its deltas come from the sweep that starts from the states


@needs_kernels
def test_states_of_another_cut_are_not_used(override, kernel_device):
    inputs, options = _arguments(PROBLEMS["tensor_core"].but(device=kernel_device))
    override(segments=3)
    y, r, *_, kept = ops.forward_kept(*inputs, *options, False, True)
    override(segments=2)
    given = (torch.ones_like(y), None, None, *inputs, y, r, *options, "all")
    for value, other in zip(
        ops.backward_with_state(*given, kept), ops.backward_with_state(*given), strict=True
    ):
        assert torch.equal(value, other)


@needs_kernels
@pytest.mark.parametrize("keep_states", [False, True])
@pytest.mark.parametrize("segments", [0, 2])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("transposed", [False, True])
def test_fake_tensors_keep_as_much(name, segments, keep_states, transposed, override, kernel_device):
    inputs, options = _arguments(PROBLEMS[name].but(device=kernel_device))
    if transposed:
        inputs[:3] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
    override(segments=segments)
    kept = ops.forward_kept(*inputs, *options, True, keep_states)[-1]
    with FakeTensorMode() as mode:
        fakes = [x if x is None else mode.from_tensor(x) for x in inputs]
        fake = ops.forward_kept(*fakes, *options, True, keep_states)[-1]
    assert (fake.shape, fake.dtype) == (kept.shape, kept.dtype)


@pytest.mark.parametrize("with_state", [False, True])
def test_nothing_is_kept_where_nothing_needs_it(device, with_state):
    """Without a gradient, and on the CPU backend, which has no use for it."""
    problem = PROBLEMS["float32"].but(device=device, with_state=with_state)
    q, k, v, *_ = problem.inputs(requires_grad=True)
    keeps = device != "cpu" or EMULATED
    y = run(rebased_attention, [q, k, v, *problem.inputs()[3:]], problem)[0]
    assert (_saved(y)[-1] is not None) == keeps
    calls = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function.name())
            return function(*args, **(kwargs or {}))

    with Watch():
        run(rebased_attention, [x if x is None else x.detach() for x in problem.inputs()], problem)
        with torch.no_grad():
            run(rebased_attention, [q, k, v, *problem.inputs()[3:]], problem)
        assert not any("kept" in name for name in calls)
        run(rebased_attention, [q, k, v, *problem.inputs()[3:]], problem)
    assert any("kept" in name for name in calls) == keeps


@pytest.mark.parametrize("device", DEVICES)
def test_the_cpu_backend_keeps_nothing(device):
    inputs, options = _arguments(PROBLEMS["general"].but(device=device))
    kept = ops.forward_kept(*inputs, *options, False, True)[-1]
    assert (kept.numel() == 0) == (device == "cpu" and not EMULATED)


@needs_kernels
def test_hooks_on_saved_tensors_may_move_it(kernel_device):
    """What they give back may lie at any address."""
    problem = PROBLEMS["tensor_core"].but(device=kernel_device)
    inputs = problem.inputs(requires_grad=True)
    leaves = [x for x in inputs if x is not None]

    def unaligned(x: Tensor) -> Tensor:
        if x.dtype != torch.uint8:
            return x
        place = x.new_empty(x.numel() + 1)[1:].view(x.shape)
        return place.copy_(x)

    def gradients() -> tuple[Tensor, ...]:
        y = run(rebased_attention, inputs, problem)[0]
        return torch.autograd.grad(y.float().square().sum(), leaves)

    expected = gradients()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unaligned):
        moved = gradients()
    assert all(torch.equal(a, b) for a, b in zip(expected, moved, strict=True))


@pytest.mark.parametrize("device", KERNEL_DEVICES or DEVICES)
def test_what_was_not_kept_is_refused(device):
    inputs, options = _arguments(PROBLEMS["general"].but(device=device))
    y, r, *_, kept = ops.forward_kept(*inputs, *options, False, True)
    given = (torch.ones_like(y), None, None, *inputs, y, r, *options, "all")
    wrong = [kept.float(), kept[None]]
    if device in KERNEL_DEVICES:
        wrong.append(kept[:64])
    for other in wrong:
        with pytest.raises(ValueError, match="kept: must be what forward_kept returned"):
            ops.backward_with_state(*given, other)
