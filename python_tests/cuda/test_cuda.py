"""What only a GPU can show: streams, graph capture, a second device, sizes past 2^31 and 65,535."""

import copy

import pytest
import torch
from problems import MAPS, Problem, relative_error, run, run_reference

import rebased_cuda
from rebased_cuda import ReBasedAttention, RebasedState, rebased_attention, rebased_attention_step

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and rebased_cuda.build_info()["cuda"]),
    reason="needs a GPU and a CUDA build",
)


def _needs_memory(gigabytes: float) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory")


def test_runs_on_the_current_stream():
    """Work on a second stream waits for that stream's producer and not for the default stream."""
    problem = Problem(seqlen=512, feature_dim=16, head_dim=64, dtype=torch.float32, device="cuda")
    inputs = problem.inputs()
    expected = run(rebased_attention, inputs, problem)[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        q = inputs[0] * 1
        y = run(rebased_attention, [q, *inputs[1:]], problem)[0]
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_capture_of_forward_backward_and_step(dtype):
    problem = Problem(kv_heads=2, seqlen=300, feature_dim=16, head_dim=64, dtype=dtype, device="cuda")
    q, k, v, *parameters, _, _ = problem.inputs(requires_grad=True)
    state = RebasedState.zeros(2, 2, 16, 64, device="cuda")

    def work():
        y = rebased_attention(q, k, v, *parameters, **problem.options())
        gradients = torch.autograd.grad(y.float().square().sum(), [q, k, v, *parameters])
        with torch.no_grad():
            row = [x[:, :, 0] for x in (q, k, v)]
            step = rebased_attention_step(*row, state, *parameters, **problem.options())
        # y would keep its graph alive and with it the inputs' gradient nodes, which belong to the stream that
        # made them: a capture on another stream may not use those
        return [y.detach(), step, *gradients]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    for x in state:
        x.zero_()
    expected = work()
    for x in state:
        x.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = work()
    for x in state:
        x.zero_()
    graph.replay()
    for a, b in zip(captured, expected, strict=True):
        assert torch.equal(a, b)


def test_graphed_callables():
    """A layer whose forward and backward are replayed as graphs computes what it computes eagerly."""
    layer = ReBasedAttention(192, 12).cuda()
    eager = copy.deepcopy(layer)
    sample, x, grad_y = (torch.randn(2, 100, 192, device="cuda") for _ in range(3))
    graphed = torch.cuda.make_graphed_callables(layer, (sample.requires_grad_(),))
    results = []
    for module in (graphed, eager):
        leaves = [x.clone().requires_grad_(), *module.parameters()]
        y = module(leaves[0])
        results.append([y.detach().clone(), *(g.clone() for g in torch.autograd.grad(y, leaves, grad_y))])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_backward_in_the_calling_thread():
    problem = Problem(seqlen=300, feature_dim=16, head_dim=64, dtype=torch.float32, device="cuda")
    inputs = [x for x in problem.inputs(requires_grad=True)[:7] if x is not None]

    def gradients():
        y = rebased_attention(*inputs, **problem.options())
        return torch.autograd.grad(y.square().sum(), inputs)

    expected = gradients()
    with torch.autograd.set_multithreading_enabled(False):
        got = gradients()
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_second_device():
    problem = Problem(seqlen=100, dtype=torch.float32, device="cuda:1")
    inputs = problem.inputs()
    y = run(rebased_attention, inputs, problem)[0]
    assert y.device == torch.device("cuda:1")
    assert relative_error(y, run_reference(inputs, problem)[0]) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_more_than_2_to_the_31_elements(dtype):
    """v of 2.2e9 elements: the last head's rows must equal those of the last head alone."""
    _needs_memory(30)
    heads, seqlen, head_dim = 264, 65536, 128
    q, k = (torch.randn(1, heads, seqlen, 16, dtype=dtype, device="cuda") for _ in range(2))
    v = torch.randn(1, heads, seqlen, head_dim, dtype=dtype, device="cuda")
    assert v.numel() > 2**31
    y = rebased_attention(q, k, v, layer_norm="head")
    alone = rebased_attention(*(x[:, -1:].clone() for x in (q, k, v)), layer_norm="head")
    assert relative_error(y[:, -1:], alone) <= 2e-2


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("feature_map", MAPS)
def test_more_than_65535_heads(feature_map, dtype):
    batch, heads = 70_000, 1
    q, k = (torch.randn(batch, heads, 3, 16, dtype=dtype, device="cuda") for _ in range(2))
    v = torch.randn(batch, heads, 3, 16, dtype=dtype, device="cuda")
    y = rebased_attention(q, k, v, feature_map=feature_map, eps=1e-2)
    alone = rebased_attention(*(x[-2:] for x in (q, k, v)), feature_map=feature_map, eps=1e-2)
    assert torch.equal(y[-2:], alone)
    state = RebasedState.zeros(batch, heads, 16, 16, feature_map=feature_map, device="cuda")
    step = rebased_attention_step(*(x[:, :, 0] for x in (q, k, v)), state, feature_map=feature_map, eps=1e-2)
    assert relative_error(step[-2:], alone[:, :, 0]) <= 2e-2


def test_bad_sequences_and_slots_are_clamped_not_followed():
    q, k = (torch.randn(1, 2, 50, 16, device="cuda") for _ in range(2))
    v = torch.randn(1, 2, 50, 64, device="cuda")
    bounds = torch.tensor([-7, 20, 10, 4000], device="cuda")
    y = rebased_attention(q, k, v, cu_seqlens=bounds)
    expected = rebased_attention(q, k, v, cu_seqlens=torch.tensor([0, 20, 20, 50], device="cuda"))
    assert torch.equal(y, expected)
    state = RebasedState.zeros(3, 2, 16, 64, device="cuda")
    row = [x.expand(4, -1, -1, -1)[:, :, 0] for x in (q, k, v)]
    slots = torch.tensor([0, -1, 3, 99], device="cuda")
    y = rebased_attention_step(*row, state, state_index=slots)
    assert y[0].any()
    assert not y[1:].any()
    assert not state.kv[1:].any()


def test_a_cpu_state_feeds_a_gpu_and_back():
    problem = Problem("taylor", "head", seqlen=40, feature_dim=16, head_dim=64, dtype=torch.float32)
    q, k, v, *parameters, _, _ = problem.inputs()
    options = problem.options()
    whole = rebased_attention(q, k, v, *parameters, **options)
    first = [x[:, :, :25] for x in (q, k, v)]
    _, state = rebased_attention(*first, *parameters, return_state=True, **options)
    gpu = [x[:, :, 25:].cuda() for x in (q, k, v)]
    parameters = [x.cuda() for x in parameters]
    moved = RebasedState(*(x.cuda() for x in state))
    y = rebased_attention(*gpu, *parameters, initial_state=moved, **options)
    assert relative_error(y.cpu(), whole[:, :, 25:]) <= 1e-4
