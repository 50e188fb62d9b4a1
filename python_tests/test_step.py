"""The one-token decode step: equal to one more row of the whole, in place, slots, no allocation."""

import pytest
import torch
from conftest import EMULATED
from problems import MAPS, NORMS, Problem, relative_error, run_reference

from rebased_cuda import RebasedState, rebased_attention, rebased_attention_step

TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def _steps(problem, inputs, state):
    """y of every row, one step at a time."""
    q, k, v, *parameters, _, _ = inputs
    options = problem.options()
    rows = [
        rebased_attention_step(q[:, :, i], k[:, :, i], v[:, :, i], state, *parameters, **options)
        for i in range(problem.seqlen)
    ]
    return torch.stack(rows, 2)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("layer_norm", NORMS)
@pytest.mark.parametrize("feature_map", MAPS)
def test_steps_equal_the_whole(feature_map, layer_norm, dtype, device):
    problem = Problem(feature_map, layer_norm, heads=6, kv_heads=2, seqlen=12, dtype=dtype, device=device)
    problem = problem.but(feature_dim=16, head_dim=20, with_state=True)
    inputs = problem.inputs()
    state = RebasedState(inputs[7].clone(), inputs[8].clone())
    y = _steps(problem, inputs, state)
    expected = run_reference(inputs, problem)
    assert relative_error(y, expected[0]) <= TOLERANCE[dtype]
    assert relative_error(state.kv, expected[1]) <= TOLERANCE[dtype]
    assert relative_error(state.k, expected[2]) <= TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("feature_dim", "head_dim"), [(1, 1), (3, 2), (16, 64), (7, 33), (128, 8), (16, 256)]
)
@pytest.mark.parametrize("feature_map", MAPS)
def test_sizes(feature_map, feature_dim, head_dim, device):
    problem = Problem(feature_map, seqlen=3, feature_dim=feature_dim, head_dim=head_dim, device=device)
    inputs = problem.inputs()
    state = RebasedState.zeros(
        2, 4, feature_dim, head_dim, feature_map=feature_map, dtype=torch.float64, device=device
    )
    assert relative_error(_steps(problem, inputs, state), run_reference(inputs, problem)[0]) <= 1e-11


@pytest.mark.parametrize("layer_norm", ["token", "head"])
@pytest.mark.parametrize(("heads", "feature_dim"), [(40, 16), (3, 40), (70, 5), (2, 128)])
def test_statistics_of_any_row(heads, feature_dim, layer_norm, device):
    """More elements than a warp loads at once, heads wider than a warp, lanes that have no head."""
    problem = Problem("square", layer_norm, heads=heads, kv_heads=heads, seqlen=2, feature_dim=feature_dim)
    problem = problem.but(device=device)
    inputs = problem.inputs()
    sizes = (2, heads, feature_dim, problem.head_dim)
    state = RebasedState.zeros(*sizes, feature_map="square", dtype=torch.float64, device=device)
    assert relative_error(_steps(problem, inputs, state), run_reference(inputs, problem)[0]) <= 1e-11


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("heads", [2, 10])
@pytest.mark.parametrize("head_dim", [64, 66])
def test_states_larger_than_shared_memory(head_dim, heads, dtype, device):
    """Taken in parts; ten query heads of two kv heads read them twice, 66 columns are not aligned."""
    problem = Problem("taylor", heads=heads, kv_heads=2, seqlen=2, feature_dim=45, head_dim=head_dim)
    problem = problem.but(with_state=True, dtype=dtype, device=device)
    inputs = problem.inputs()
    state = RebasedState(inputs[7].clone(), inputs[8].clone())
    y = _steps(problem, inputs, state)
    for result, expected in zip((y, *state), run_reference(inputs, problem), strict=True):
        assert relative_error(result, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("feature_map", MAPS)
def test_first_token_is_its_value(feature_map, device):
    """With eps 0 the first y is v, however small sim is: it must not be a sum of signed features."""
    q, k = (torch.randn(2000, 1, 32, device=device) for _ in range(2))
    v = torch.randn(2000, 1, 8, device=device)
    state = RebasedState.zeros(2000, 1, 32, 8, feature_map=feature_map, device=device)
    y = rebased_attention_step(q, k, v, state, feature_map=feature_map, eps=0.0)
    assert relative_error(y, v) <= 1e-6


def test_prefill_then_decode(device):
    problem = Problem("taylor", "head", seqlen=30, device=device)
    inputs = problem.inputs()
    q, k, v, *parameters, _, _ = inputs
    whole = rebased_attention(q, k, v, *parameters, **problem.options())
    _, state = rebased_attention(
        *(x[:, :, :20] for x in (q, k, v)), *parameters, return_state=True, **problem.options()
    )
    for i in range(20, 30):
        y = rebased_attention_step(
            q[:, :, i], k[:, :, i], v[:, :, i], state, *parameters, **problem.options()
        )
        assert relative_error(y, whole[:, :, i]) <= 1e-11


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
def test_slots_of_a_pool(index_dtype, device):
    """Only the named slots change; -1 skips: y = 0 and nothing is touched."""
    problem = Problem(batch=4, seqlen=1, device=device)
    inputs = problem.inputs()
    q, k, v, *parameters, _, _ = inputs
    pool = RebasedState(
        torch.randn(6, 4, 15, 7, dtype=torch.float64).to(device),
        torch.rand(6, 4, 15, dtype=torch.float64).to(device),
    )
    before = RebasedState(pool.kv.clone(), pool.k.clone())
    slots = torch.tensor([5, -1, 0, 2], dtype=index_dtype, device=device)
    y = rebased_attention_step(
        q[:, :, 0], k[:, :, 0], v[:, :, 0], pool, *parameters, **problem.options(), state_index=slots
    )
    assert not y[1].any()
    for slot in (1, 3, 4):
        assert torch.equal(pool.kv[slot], before.kv[slot])
        assert torch.equal(pool.k[slot], before.k[slot])
    for b, slot in ((0, 5), (2, 0), (3, 2)):
        alone = RebasedState(before.kv[slot : slot + 1].clone(), before.k[slot : slot + 1].clone())
        expected = rebased_attention_step(
            *(x[b : b + 1, :, 0] for x in (q, k, v)), alone, *parameters, **problem.options()
        )
        assert torch.equal(y[b : b + 1], expected)
        assert torch.equal(pool.kv[slot : slot + 1], alone.kv)


def test_strided_slots(device):
    """A column of a scheduler's table."""
    problem = Problem(batch=3, seqlen=1, device=device)
    q, k, v = (x[:, :, 0] for x in problem.inputs()[:3])
    table = torch.tensor([[2, 9], [0, 9], [1, 9]], device=device)
    results = []
    for index in (table[:, 0], table[:, 0].clone()):
        state = RebasedState.zeros(3, 4, 5, 7, dtype=torch.float64, device=device)
        results.append([rebased_attention_step(q, k, v, state, state_index=index), *state])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_needs_no_grad(device):
    problem = Problem(seqlen=1, device=device)
    q, k, v = (x[:, :, 0] for x in problem.inputs()[:3])
    state = RebasedState.zeros(2, 4, 5, 7, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match=r"torch.no_grad\(\)"):
        rebased_attention_step(q.requires_grad_(), k, v, state)
    assert not state.kv.any()
    with torch.no_grad():
        rebased_attention_step(q, k, v, state)
    with torch.inference_mode():
        rebased_attention_step(q, k, v, RebasedState(*(x.clone() for x in state)))


@pytest.mark.skipif(EMULATED, reason="the emulator's own memory would be counted")
def test_allocates_nothing_but_y():
    problem = Problem("outer", "token", 256, 12, 12, 1, 16, 64, dtype=torch.float32)
    q, k, v, *parameters, _, _ = problem.inputs()
    q, k, v = (x[:, :, 0] for x in (q, k, v))
    state = RebasedState.zeros(256, 12, 16, 64)
    with torch.profiler.profile(profile_memory=True) as profile:
        y = rebased_attention_step(q, k, v, state, *parameters, layer_norm="token")
    allocated = sum(max(0, e.self_cpu_memory_usage) for e in profile.key_averages())
    assert allocated == y.numel() * y.element_size()
