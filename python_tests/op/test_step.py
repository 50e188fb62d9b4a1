"""The one-token decode step: equal to one more row of the whole, in place, slots, no allocation."""

import pytest
import torch
from conftest import EMULATED
from problems import MAPS, NORMS, Problem, paged, relative_error, run_reference
from torch.autograd import forward_ad

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


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("gap", [0, 1, 4, 64])
@pytest.mark.parametrize(
    ("feature_map", "heads", "feature_dim", "head_dim"),
    # whole quads of a state, quads that the pages leave unaligned, ragged ones, more than shared memory holds
    [("outer", 4, 16, 64), ("square", 4, 6, 20), ("taylor", 2, 5, 7), ("taylor", 2, 45, 66)],
)
def test_slots_in_pages(feature_map, heads, feature_dim, head_dim, gap, dtype, device):
    """Slots as far apart as pages are: equal to the dense pool to the bit, and nothing else is touched."""
    problem = Problem(feature_map, heads=heads, kv_heads=2, batch=3, seqlen=2, feature_dim=feature_dim)
    problem = problem.but(head_dim=head_dim, dtype=dtype, device=device)
    inputs = problem.inputs()
    q, k, v, *parameters, _, _ = inputs
    shape = RebasedState.zeros(5, 2, feature_dim, head_dim, feature_map=feature_map)
    dense = RebasedState(*(torch.rand_like(x, dtype=problem.accumulator, device=device) for x in shape))
    pages, between = paged(dense, gap)
    before = dense.clone()
    slots = torch.tensor([4, -1, 1], device=device)
    for i in range(2):
        results = [
            rebased_attention_step(
                *(x[:, :, i] for x in (q, k, v)), pool, *parameters, **problem.options(), state_index=slots
            )
            for pool in (pages, dense)
        ]
        assert torch.equal(*results)
    for part, expected, original in zip(pages, dense, before, strict=True):
        assert torch.equal(part, expected)
        assert torch.equal(part[[0, 2, 3]], original[[0, 2, 3]])
        assert not torch.equal(part[4], original[4])
    assert between.isnan().all()


def test_states_in_pages_without_an_index(device):
    """The sequences' own states, of which one alone may have any stride at all."""
    row = _row(device=device)
    for batch in (1, 2):
        dense = RebasedState.zeros(batch, 2, 5, 7, device=device)
        pages, between = paged(dense, 3)
        mine = [x[:batch] if i < 3 else x for i, x in enumerate(row)]
        results = [rebased_attention_step(*mine[:3], pool, *mine[3:]) for pool in (pages, dense)]
        assert torch.equal(*results)
        assert torch.equal(pages.kv, dense.kv)
        assert between.isnan().all()
    kv, k = RebasedState.zeros(1, 2, 5, 7, device=device)
    alone = RebasedState(kv.as_strided(kv.shape, (3, *kv.stride()[1:])), k.as_strided(k.shape, (0, 15, 1)))
    rebased_attention_step(*(x[:1] for x in row[:3]), alone)
    assert kv.any()


@pytest.mark.parametrize("grad", [True, False])  # the operator looks either way
def test_parts_of_pages_that_meet_are_refused(grad, device):
    """kv and k in the same pages are apart only if all slots of the one are apart from all of the other."""
    row = _row(device=device)[:3]
    sizes = (2, 2, 15, 7), (2, 2, 15)
    memory = torch.zeros(4 * 300, device=device)

    def part(size, first, pitch):
        dense = torch.empty(size[1:]).stride()
        return memory.as_strided(size, (pitch, *dense), first)

    for first, pitch, apart in (
        (210, 300, True),  # k behind kv in each page
        (270, 300, True),  # k at the end of each page
        (209, 300, False),  # k begins on the last entry of kv
        (271, 300, False),  # k ends on the first entry of the next page's kv
        (300, 300, False),  # k at the beginning of the second page
        (510, 300, True),  # in the pages behind those of kv
        (210, 301, False),  # pages of two sizes are not looked into
    ):
        state = RebasedState(part(sizes[0], 0, 300), part(sizes[1], first, pitch))
        with torch.set_grad_enabled(grad):
            if apart:
                rebased_attention_step(*row, state)
                assert memory.any()
                memory.zero_()
            else:
                with pytest.raises(ValueError, match=r"state\.kv: shares memory with state\.k"):
                    rebased_attention_step(*row, state)
        assert not memory.any()


@pytest.mark.parametrize("grad", [True, False])
def test_slots_that_are_not_in_one_piece_are_refused(grad, device):
    row = _row(device=device)[:3]
    good = RebasedState.zeros(2, 2, 5, 7, device=device)
    for part, bad in (
        ("kv", torch.zeros(2, 2, 15, 8, device=device)[..., :7]),
        ("kv", torch.zeros(2, 2, 16, 7, device=device)[:, :, :15]),
        ("kv", torch.zeros(2, 2, 7, 15, device=device).mT),
        ("kv", torch.zeros(2, 15, 2, 7, device=device).transpose(1, 2)),
        ("kv", torch.zeros(419, device=device).as_strided((2, 2, 15, 7), (209, 105, 7, 1))),
        ("k", torch.zeros(2, 2, 16, device=device)[..., :15]),
        ("k", torch.zeros(2, 15, 2, device=device).mT),
        ("k", torch.zeros(30, device=device).as_strided((2, 2, 15), (0, 15, 1))),
    ):
        words = rf"^state\.{part}: expected contiguous slots, apart from each other"
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=words):
            rebased_attention_step(*row, good._replace(**{part: bad}))
        assert not bad.any()
        assert not good.kv.any()


def test_what_is_read_may_lie_between_the_slots(device):
    """But not in them: of pages only the slots are the state's."""
    dense = RebasedState.zeros(2, 2, 5, 7, device=device)
    pages, between = paged(dense, 20)
    q, k, v = _row(device=device)[:3]
    expected = rebased_attention_step(q, k, v, dense)
    between.copy_(q.flatten(1))
    assert torch.equal(rebased_attention_step(between.view(2, 4, 5), k, v, pages), expected)
    assert torch.equal(pages.kv, dense.kv)
    for part in pages:
        before = pages.clone()
        inside = part.flatten(1)[:, :20].view(2, 4, 5)
        with pytest.raises(ValueError, match=r"state\.(kv|k): shares memory with q"):
            rebased_attention_step(inside, k, v, pages)
        assert torch.equal(pages.kv, before.kv)


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


def _row(batch=2, device="cpu"):
    """q, k, v of one token, and gamma, beta of (heads, d) for q and (d,) for k."""
    sizes = ((batch, 4, 5), (batch, 2, 5), (batch, 2, 7), (4, 5), (4, 5), (5,), (5,))
    return [torch.randn(size, device=device) for size in sizes]


# what _row makes
READ = ("q", "k", "v", "gamma_q", "beta_q", "gamma_k", "beta_k")


@pytest.mark.parametrize("grad", [True, False])  # the operator looks either way
@pytest.mark.parametrize("part", ["kv", "k"])
@pytest.mark.parametrize("name", READ)
def test_a_state_shares_no_memory_with_what_is_read(name, part, grad, device):
    arguments = dict(zip(READ, _row(device=device), strict=True))
    shape, size = arguments[name].shape, arguments[name].numel()
    for last in (True, False):  # the state's last element is the argument's first, or the other way round
        state = RebasedState.zeros(2, 2, 5, 7, device=device)
        held = getattr(state, part)
        memory = torch.zeros(held.numel() + size - 1, device=device)
        first, second = (held.numel(), size) if last else (size, held.numel())
        pieces = [memory[:first], memory[memory.numel() - second :]]
        in_state, in_argument = pieces if last else reversed(pieces)
        state = state._replace(**{part: in_state.view(held.shape)})
        arguments[name] = in_argument.view(shape)
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=rf"state\.{part}: .*{name}"):
            rebased_attention_step(**arguments, state=state)
        assert not state.kv.any()
        assert not state.k.any()


def test_a_state_shares_no_memory_with_itself(device):
    memory = torch.zeros(2 * 2 * 15 * 8 - 1, device=device)
    row = _row(device=device)
    for kv, k in (
        (memory[: 2 * 2 * 15 * 7], memory[2 * 2 * 15 * 7 - 1 :]),
        (memory[2 * 2 * 15 - 1 :], memory[: 2 * 2 * 15]),
    ):
        state = RebasedState(kv.view(2, 2, 15, 7), k.view(2, 2, 15))
        with torch.no_grad(), pytest.raises(ValueError, match=r"state\.kv: .*state\.k"):
            rebased_attention_step(*row[:3], state)
    for state in (
        RebasedState(torch.zeros(1, 2, 15, 7, device=device).expand(2, 2, 15, 7), memory[:60].view(2, 2, 15)),
        RebasedState(memory[:420].view(2, 2, 15, 7), torch.zeros(2, 2, 1, device=device).expand(2, 2, 15)),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=r"state.*contiguous"):
            rebased_attention_step(*row[:3], state)
    assert not memory.any()


def test_a_pool_does_not_hold_its_own_index(device):
    pool = RebasedState.zeros(2, 2, 5, 7, dtype=torch.float64, device=device)
    row = [x.double() for x in _row(device=device)]
    index = pool.kv.view(torch.int64).view(-1)[4:6].copy_(torch.tensor([0, 1]))
    with torch.no_grad(), pytest.raises(ValueError, match=r"state\.kv: .*state_index"):
        rebased_attention_step(*row[:3], RebasedState(pool.kv, torch.zeros_like(pool.k)), state_index=index)


def test_memory_side_by_side_is_taken(device):
    """A state between the rows of q in one buffer: no element of it is q's."""
    buffer = torch.randn(2, 20 + 420 + 60, device=device)
    _, k, v = _row(device=device)[:3]
    buffer[:, 20:] = 0
    kv = buffer[0, 20:440].view(2, 2, 15, 7)
    state_k = buffer[0, 440:].view(2, 2, 15)
    other = RebasedState.zeros(2, 2, 5, 7, device=device)
    with torch.no_grad():
        y = rebased_attention_step(buffer[:, :20].view(2, 4, 5), k, v, RebasedState(kv, state_k))
        expected = rebased_attention_step(buffer[:, :20].reshape(2, 4, 5), k, v, other)
    assert torch.equal(y, expected)
    assert torch.equal(kv, other.kv)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("slots", [[1, 1, 2], [2, 0, 2], [0, 2, 2], [0, 0, 0]])
def test_a_slot_twice_is_refused_on_the_cpu(slots, dtype):
    pool = RebasedState.zeros(3, 2, 5, 7)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"state_index: .*once"):
            rebased_attention_step(*_row(3)[:3], pool, state_index=torch.tensor(slots, dtype=dtype))
    assert not pool.kv.any()
    rebased_attention_step(*_row(3)[:3], pool, state_index=torch.tensor([-1, 2, -1], dtype=dtype))
    assert pool.kv[2].any()


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("name", [*READ, "kv", "k of the state"])
def test_a_tangent_is_refused_not_dropped(name, grad, device):
    state = RebasedState.zeros(2, 2, 5, 7, device=device)
    arguments = dict(zip(READ, _row(device=device), strict=True))
    with forward_ad.dual_level(), torch.set_grad_enabled(grad):
        rebased_attention_step(**arguments, state=state.clone())  # no tangent, nothing to drop
        dual = state
        if name in arguments:
            arguments[name] = forward_ad.make_dual(arguments[name], torch.ones_like(arguments[name]))
        else:
            part = name.split()[0]
            x = getattr(state, part)
            dual = state._replace(**{part: forward_ad.make_dual(x, torch.ones_like(x))})
        with pytest.raises(RuntimeError, match="forward-mode"):
            rebased_attention_step(**arguments, state=dual)
    assert not state.kv.any()


@pytest.mark.parametrize("grad", [True, False])
def test_torch_func_transforms_are_refused(grad, device):
    q, k, v = _row(device=device)[:3]
    state = RebasedState.zeros(2, 2, 5, 7, device=device)

    def function(q):
        return rebased_attention_step(q, k, v, state)

    with torch.set_grad_enabled(grad):
        for transformed in (
            lambda: torch.func.jvp(function, (q,), (q,)),
            lambda: torch.vmap(function)(torch.stack([q, q])),
            lambda: torch.func.vjp(function, q),
            lambda: torch.func.jacfwd(function)(q),
            lambda: torch.func.functionalize(function)(q),
        ):
            with pytest.raises(RuntimeError, match="rebased_attention_step is for inference"):
                transformed()
    assert not state.kv.any()


@pytest.mark.parametrize("part", ["kv", "k"])
def test_inference_tensors_are_updated_only_in_inference_mode(part, device):
    """As torch's own in-place operators; a normal state is updated anywhere."""
    row = _row(device=device)[:3]
    with torch.inference_mode():
        made = RebasedState.zeros(2, 2, 5, 7, device=device)
    state = RebasedState.zeros(2, 2, 5, 7, device=device)._replace(**{part: getattr(made, part)})
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match=r"state: .*inference_mode"):
            rebased_attention_step(*row, state)
    assert not state.kv.any()
    with torch.inference_mode():
        y = rebased_attention_step(*row, state)
        expected = rebased_attention_step(*row, RebasedState.zeros(2, 2, 5, 7, device=device))
    assert torch.equal(y, expected)


def test_a_state_with_the_negative_bit_is_refused():
    """torch gives the operator a copy of such a tensor, and the other part would be updated alone."""
    state = RebasedState.zeros(2, 2, 5, 7)
    for bad in (state._replace(kv=torch._neg_view(state.kv)), state._replace(k=torch._neg_view(state.k))):
        with torch.no_grad(), pytest.raises(ValueError, match=r"state: .*negative bit"):
            rebased_attention_step(*_row()[:3], bad)
    assert not state.kv.any()
    assert not state.k.any()
