"""torch's machinery: opcheck, compile, autocast, checkpoint, export, deepcopy of states."""

import copy

import pytest
import torch
from problems import MAPS, Problem, relative_error, run
from torch._dynamo.testing import CompileCounterWithBackend

from rebased_cuda import RebasedState, rebased_attention, rebased_attention_step

OPTIONS = ("outer", "token", 0.25, 1e-3, 1e-5, True)
ops = torch.ops.rebased_cuda


def _inputs(variant):
    problem = Problem(batch=2, heads=4, kv_heads=2, seqlen=13, feature_dim=5, head_dim=7, with_state=True)
    if variant == "packed":
        problem = problem.but(batch=1, packed=(0, 4, 13))
    if variant == "bare":
        problem = problem.but(affine="none", with_state=False)
    inputs = problem.inputs()
    if variant == "transposed":
        inputs[:3] = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs[:3]]
    cu_seqlens = torch.tensor(problem.packed) if problem.packed else None
    return [*inputs, cu_seqlens]


VARIANTS = ("plain", "packed", "bare", "transposed")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("return_state", [False, True])
def test_opcheck_forward(variant, return_state):
    *given, kv, k_sum, cu_seqlens = _inputs(variant)
    torch.library.opcheck(ops.forward.default, (*given, cu_seqlens, *OPTIONS))
    given += [kv, k_sum, cu_seqlens]
    torch.library.opcheck(ops.forward_with_state.default, (*given, *OPTIONS, return_state))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("return_state", "keep_states"), [(False, False), (False, True), (True, True)])
def test_opcheck_forward_kept(variant, return_state, keep_states):
    inputs = _inputs(variant)
    torch.library.opcheck(ops.forward_kept.default, (*inputs, *OPTIONS, return_state, keep_states))
    y, r, *_, kept = ops.forward_kept(*inputs, *OPTIONS, False, keep_states)
    *given, kv, k_sum, cu_seqlens = inputs
    torch.library.opcheck(
        ops.backward_with_state.default,
        (torch.ones_like(y), None, None, *given, kv, k_sum, cu_seqlens, y, r, *OPTIONS, "all", kept),
    )
    if kv is None:
        torch.library.opcheck(
            ops.backward.default, (torch.ones_like(y), *given, cu_seqlens, y, r, *OPTIONS, kept)
        )


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck_backward(variant):
    inputs = _inputs(variant)
    y, r, kv, k = ops.forward_with_state(*inputs, *OPTIONS, True)
    grad_y, *grad_end = [torch.randn_like(x) for x in (y, kv, k)]
    *given, _, _, cu_seqlens = inputs
    torch.library.opcheck(ops.backward.default, (grad_y, *given, cu_seqlens, y, r, *OPTIONS))
    for end in (grad_end, [None, None]):
        arguments = (grad_y, *end, *inputs, y, r, *OPTIONS, "all")
        torch.library.opcheck(ops.backward_with_state.default, arguments)


@pytest.mark.parametrize("index", [None, [1, -1]])
def test_opcheck_step(index):
    q, k, v, *parameters, kv, k_sum, _ = _inputs("plain")
    index = None if index is None else torch.tensor(index)
    row = [x[:, :, 0].contiguous() for x in (q, k, v)]
    kv, k_sum = kv.contiguous(), k_sum.contiguous()
    torch.library.opcheck(ops.step.default, (*row, *parameters, kv, k_sum, index, *OPTIONS))


def _loss(q, k, v, gamma, beta, kv, k_sum):
    y, state = rebased_attention(
        q,
        k,
        v,
        gamma,
        beta,
        gamma,
        beta,
        layer_norm="head",
        initial_state=RebasedState(kv, k_sum),
        return_state=True,
    )
    return y.square().sum() + state.kv.sum()


def _compile_inputs(seqlen=13):
    problem = Problem(kv_heads=4, affine="shared", with_state=True, seqlen=seqlen, dtype=torch.float32)
    q, k, v, gamma, beta, _, _, kv, k_sum = problem.inputs(requires_grad=True)
    return [q, k, v, gamma, beta, kv, k_sum]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_break(backend, dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(_loss, fullgraph=True, backend=backend, dynamic=dynamic)
    for seqlen in (13, 20):
        inputs = _compile_inputs(seqlen)
        expected = torch.autograd.grad(_loss(*inputs), inputs)
        got = torch.autograd.grad(compiled(*inputs), inputs)
        for g, e in zip(got, expected, strict=True):
            assert relative_error(g, e) <= 1e-5


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_of_a_call_without_a_state(dynamic):
    """Of dynamic shapes no new graph for another length, what forward keeps for backward included."""
    torch._dynamo.reset()

    def loss(q, k, v, gamma, beta):
        return rebased_attention(q, k, v, gamma, None, gamma, beta, layer_norm="token").square().sum()

    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, fullgraph=True, backend=counted, dynamic=dynamic)
    graphs = []
    for seqlen in (13, 20, 35):
        inputs = _compile_inputs(seqlen)[:5]
        expected = torch.autograd.grad(loss(*inputs), inputs)
        got = torch.autograd.grad(compiled(*inputs), inputs)
        for g, e in zip(got, expected, strict=True):
            assert relative_error(g, e) <= 1e-5
        graphs.append(counted.frame_count)
    assert (graphs[0] == graphs[-1]) == dynamic


def test_compile_of_the_step():
    torch._dynamo.reset()
    q, k, v, *_ = Problem(seqlen=1, dtype=torch.float32).inputs()
    row = [x[:, :, 0] for x in (q, k, v)]
    states = [RebasedState.zeros(2, 4, 5, 7) for _ in range(2)]

    def two_steps(state):
        rebased_attention_step(*row, state)
        return rebased_attention_step(*row, state)

    with torch.no_grad():
        y = torch.compile(two_steps, fullgraph=True, backend="aot_eager")(states[0])
        assert torch.equal(y, two_steps(states[1]))
    assert torch.equal(states[0].kv, states[1].kv)


def test_bad_argument_under_compile_is_still_ours():
    torch._dynamo.reset()
    q, k, v, *_ = Problem(dtype=torch.float32).inputs()
    with pytest.raises(ValueError, match="feature_map"):
        torch.compile(lambda: rebased_attention(q, k, v, feature_map="x"), backend="eager")()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, device):
    q, k, v, *_ = Problem(dtype=torch.float32, device=device).inputs()
    gamma = torch.randn(5, requires_grad=True, device=device)
    with torch.autocast(device, dtype=dtype):
        y = rebased_attention(q, k, v, gamma, layer_norm="token")
        state = RebasedState.zeros(2, 4, 5, 7, device=device)
        with torch.no_grad():
            step = rebased_attention_step(*(x[:, :, 0] for x in (q, k, v)), state, gamma)
        wide = rebased_attention(q.double(), k.double(), v.double())
    assert y.dtype == step.dtype == dtype
    assert wide.dtype == torch.float64
    expected = rebased_attention(*(x.to(dtype) for x in (q, k, v)), gamma, layer_norm="token")
    assert torch.equal(y, expected)
    y.sum().backward()
    assert gamma.grad.dtype == torch.float32


def test_parameters_of_a_low_precision_module(device):
    """model.to(bfloat16) also casts gamma; the op widens it, and its gradient comes back in bfloat16."""
    q, k, v, *_ = Problem(dtype=torch.bfloat16, device=device).inputs()
    gamma = torch.ones(5, dtype=torch.bfloat16, device=device, requires_grad=True)
    rebased_attention(q, k, v, gamma, layer_norm="token").sum().backward()
    assert gamma.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant, device):
    from torch.utils.checkpoint import checkpoint

    problem = Problem(device=device)
    inputs = problem.inputs(requires_grad=True)
    leaves = [x for x in inputs if x is not None]

    def function(*x):
        return run(rebased_attention, [*x, None, None], problem)[0].square().sum()

    expected = torch.autograd.grad(function(*leaves), leaves)
    checkpoint(function, *leaves, use_reentrant=reentrant).backward()
    assert all(torch.equal(x.grad, e) for x, e in zip(leaves, expected, strict=True))


class _Module(torch.nn.Module):
    def forward(self, q, k, v, state: RebasedState):
        return rebased_attention(q, k, v, layer_norm="token", initial_state=state, return_state=True)


def test_export_keeps_the_operator():
    q, k, v, *_ = Problem(dtype=torch.float32).inputs()
    state = RebasedState.zeros(2, 4, 5, 7)
    seqlen = torch.export.Dim("seqlen", min=2, max=4096)
    dynamic = {name: {2: seqlen} for name in ("q", "k", "v")}
    program = torch.export.export(
        _Module(), (q, k, v, state), dynamic_shapes={**dynamic, "state": RebasedState({}, {})}
    )
    assert "rebased_cuda.forward" in program.graph_module.code
    longer = [torch.cat([x, x], 2) for x in (q, k, v)]
    got, expected = program.module()(*longer, state), _Module()(*longer, state)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1].kv, expected[1].kv)


@pytest.mark.parametrize("feature_map", MAPS)
def test_meta_tensors_have_the_right_shapes(feature_map):
    problem = Problem(feature_map)
    inputs = [None if x is None else x.to("meta") for x in problem.inputs()]
    for meta, real in zip(
        run(rebased_attention, inputs, problem),
        run(rebased_attention, problem.inputs(), problem),
        strict=True,
    ):
        assert (meta.shape, meta.dtype, meta.stride()) == (real.shape, real.dtype, real.stride())


def test_states_copy_and_pickle(tmp_path):
    state = RebasedState.zeros(1, 2, 3, 4)
    torch.save(copy.deepcopy(state)._asdict(), tmp_path / "state.pt")
    loaded = RebasedState(**torch.load(tmp_path / "state.pt"))
    assert torch.equal(loaded.kv, state.kv)


def test_vmap_is_refused_not_wrong():
    q, k, v, *_ = Problem(dtype=torch.float32).inputs()
    with pytest.raises(RuntimeError, match=r"vmap|functorch|setup_context"):
        torch.vmap(lambda x: rebased_attention(x, k, v))(torch.stack([q, q]))
