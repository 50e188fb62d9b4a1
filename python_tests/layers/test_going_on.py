"""Layers that go on: from a state with any number of tokens, in packed sequences, and in slots of a pool.

Whatever the way, a sequence gives what the layer gives for it alone and whole.
"""

import copy
from itertools import pairwise

import pytest
import torch
from problems import paged, relative_error

from rebased_cuda import GatedShortConvolution, ReBasedAttention, RebasedState

pytestmark = pytest.mark.usefixtures("one_thread")

WIDTH, SEQLEN = 24, 9


def attention(device="cpu", dtype=torch.float64):
    """A layer with grouped heads, whose gamma and beta are not ones and zeros."""
    layer = ReBasedAttention(WIDTH, 4, 5, num_kv_heads=2, head_dim=3, eps=1e-3).to(device, dtype)
    with torch.no_grad():
        for norm in (layer.ln_q, layer.ln_k):
            for parameter in norm.parameters():
                parameter.add_(torch.randn_like(parameter) / 4)
    return layer


def convolution(device="cpu", dtype=torch.float64, kernel_size=4):
    return GatedShortConvolution(WIDTH, kernel_size).to(device, dtype)


LAYERS = {"attention": attention, "convolution": convolution}
every_layer = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def tokens(batch=3, seqlen=SEQLEN, device="cpu", dtype=torch.float64):
    return torch.randn(batch, seqlen, WIDTH, device=device, dtype=dtype)


def parts(state):
    return tuple(state) if isinstance(state, tuple) else (state,)


def whole(values):
    """The state of these parts."""
    return RebasedState(*values) if len(values) == 2 else values[0]


def rows(state, index):
    return whole([part[index] for part in parts(state)])


def copied(state):
    return whole([part.clone() for part in parts(state)])


def assert_close(state, expected):
    for part, value in zip(parts(state), parts(expected), strict=True):
        assert relative_error(part, value) < 1e-11


def equal(state, other):
    return all(torch.equal(a, b) for a, b in zip(parts(state), parts(other), strict=True))


@every_layer
@pytest.mark.parametrize("pieces", [(0, 9), (9, 0), (1, 8), (4, 1, 0, 4), (2, 3, 4)], ids=str)
def test_pieces_are_the_whole(make, pieces, device):
    layer, x = make(device), tokens(device=device)
    expected, last = layer.prefill(x)
    state, ys = None, []
    for piece in x.split(pieces, 1):
        before = None if state is None else copied(state)
        y, following = layer.prefill(piece, state=state)
        assert relative_error(layer(piece, state=state), y) < 1e-11
        assert before is None or equal(state, before)
        state = following
        ys.append(y)
    assert relative_error(torch.cat(ys, 1), expected) < 1e-11
    assert_close(state, last)


@torch.no_grad()
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 12])
@pytest.mark.parametrize("cut", [0, 1, 5])
def test_kernels_of_any_size_go_on(kernel_size, cut):
    layer, x = convolution(kernel_size=kernel_size), tokens()
    y, state = layer.prefill(x[:, :cut])
    rest, last = layer.prefill(x[:, cut:], state=state)
    whole_y, whole_last = layer.prefill(x)
    assert relative_error(torch.cat([y, rest], 1), whole_y) < 1e-11
    assert torch.equal(last, whole_last)
    bounds = [0, cut, SEQLEN, SEQLEN]
    packed, states = layer.prefill(x[:1], cu_seqlens=torch.tensor(bounds))
    for s, (begin, end) in enumerate(pairwise(bounds)):
        y, last = layer.prefill(x[:1, begin:end])
        assert relative_error(packed[:, begin:end], y) < 1e-11
        assert torch.equal(states[s : s + 1], last)


@every_layer
def test_gradients_flow_through_a_state(make):
    """Those of two calls, the first of which only the state connects to the loss, are those of the whole."""
    layer, x, seed = make(), tokens().requires_grad_(), tokens(seqlen=5)
    leaves = [x, *layer.parameters()]
    expected = torch.autograd.grad((layer(x)[:, 4:] * seed).sum(), leaves)
    state = layer.prefill(x[:, :4])[1]
    gradients = torch.autograd.grad((layer(x[:, 4:], state=state) * seed).sum(), leaves)
    for gradient, value in zip(gradients, expected, strict=True):
        assert relative_error(gradient, value) < 1e-9
    assert gradients[0][:, 3].any()


@every_layer
@pytest.mark.parametrize("packing", ["whole", "masked", "packed"])
def test_gradcheck_of_states(make, packing):
    torch.manual_seed(1)
    layer = make()
    x = tokens(1, 6) if packing == "packed" else tokens(2, 4)
    options = {
        "whole": {},
        "masked": {"attention_mask": torch.tensor([[0, 1, 1, 1], [0, 0, 0, 1]])},
        "packed": {"cu_seqlens": torch.tensor([0, 2, 5])},
    }[packing]
    _, state = layer.prefill(tokens(2, 5))
    leaves = [part.detach().requires_grad_() for part in (x, *parts(state))]

    def function(x, *state):
        y, following = layer.prefill(x, state=whole(state), **options)
        return y, *parts(following)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


MASKS = {
    "left": [[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1]],
    "right": [[1] * 9, [1] * 5 + [0] * 4, [1] + [0] * 8],
    "holes": [[1, 0, 1, 1, 0, 0, 1, 1, 1], [0, 1, 0, 1, 0, 1, 0, 1, 0], [0] * 9],
}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@every_layer
@every_mask
def test_a_masked_continuation_is_its_tokens(make, mask, device):
    """Two turns of padded rows, as a conversation has them: each row is its tokens alone."""
    layer, first, second = make(device), tokens(device=device), tokens(device=device)
    mask = torch.tensor(mask, device=device)
    earlier = mask.flip(0)
    _, state = layer.prefill(first, earlier)
    y, last = layer.prefill(second, mask, state=state)
    assert relative_error(layer(second, mask, state=state), y) < 1e-11
    assert not y[mask == 0].any()
    for b in range(3):
        mine = torch.cat([first[b, earlier[b] == 1], second[b, mask[b] == 1]]).unsqueeze(0)
        expected, alone = layer.prefill(mine)
        count = int(mask[b].sum())
        assert relative_error(y[b, mask[b] == 1], expected[0, mine.shape[1] - count :]) < 1e-11
        assert_close(rows(last, slice(b, b + 1)), alone)


BOUNDS = {
    "all rows": [0, 4, 5, 13],
    "rows of none": [2, 2, 6, 11],
    "empty ones": [0, 0, 7, 7, 7, 13, 13],
    "one": [0, 13],
    "none": [3],
}
every_bounds = pytest.mark.parametrize("bounds", BOUNDS.values(), ids=BOUNDS)


@every_layer
@every_bounds
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("with_state", [False, True], ids=["from nothing", "from a state"])
def test_packed_sequences_are_their_own(make, bounds, dtype, with_state, device):
    """As a flattening collator hands them to training: y, gradients and states of each sequence alone."""
    layer, x = make(device), tokens(1, 13, device).requires_grad_()
    seed = tokens(1, 13, device)
    count = len(bounds) - 1
    state = layer.prefill(tokens(count, 4, device))[1] if with_state else None
    state = None if state is None else whole([part.detach().requires_grad_() for part in parts(state)])
    leaves = [x, *layer.parameters(), *(parts(state) if with_state else ())]
    cu_seqlens = torch.tensor(bounds, dtype=dtype, device=device)
    y, last = layer.prefill(x, cu_seqlens=cu_seqlens, state=state)
    assert relative_error(layer(x, cu_seqlens=cu_seqlens, state=state), y) < 1e-11
    assert not y[:, : bounds[0]].any()
    assert not y[:, bounds[-1] :].any()
    assert parts(last)[0].shape[0] == count

    loss = torch.zeros((), dtype=x.dtype, device=device)
    for s, (begin, end) in enumerate(pairwise(bounds)):
        mine = rows(state, slice(s, s + 1)) if with_state else None
        expected, alone = layer.prefill(x[:, begin:end], state=mine)
        assert relative_error(y[:, begin:end], expected) < 1e-11
        assert_close(rows(last, slice(s, s + 1)), alone)
        loss = loss + (expected * seed[:, begin:end]).sum() + sum(part.sum() for part in parts(alone))
    if count == 0:
        return
    gradients = torch.autograd.grad((y * seed).sum() + sum(part.sum() for part in parts(last)), leaves)
    for gradient, value in zip(gradients, torch.autograd.grad(loss, leaves), strict=True):
        assert relative_error(gradient, value) < 1e-9


@every_layer
@pytest.mark.parametrize("bounds", [[-1, 9], [0, 10], [0, 5, 4, 9], [9, 0]], ids=str)
def test_bounds_are_checked_on_the_cpu(make, bounds):
    with pytest.raises(ValueError, match=r"cu_seqlens: must not decrease"):
        make()(tokens(1), cu_seqlens=torch.tensor(bounds))


def pool_of(layer, slots, device="cpu"):
    """States of sequences that nobody asked for, so that what is read or written in error is seen."""
    return layer.prefill(tokens(slots, 5, device))[1]


@torch.no_grad()
@every_layer
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("index", [[3, -1, 1], [-1, 2, 0], [-1, -1, -1], [4, 0, 2]], ids=str)
@pytest.mark.parametrize("memory", ["dense", "paged"])
def test_slots_of_a_pool(make, dtype, index, memory, device):
    """A prompt into its slot, more of it, and steps: each sequence as if alone; no other slot changes."""
    layer, x = make(device), tokens(device=device)
    pool, between = pool_of(layer, 5, device), torch.tensor(float("nan"))
    if memory == "paged" and make is attention:
        pool, between = paged(pool, 3)
    elif memory == "paged":
        pages = x.new_full((5, WIDTH * 3 + 7), float("nan"))
        pages[:, : WIDTH * 3] = pool.flatten(1)
        pool, between = pages[:, : WIDTH * 3].view(5, WIDTH, 3), pages[:, WIDTH * 3 :]
    used = [slot for slot in index if slot >= 0]
    for part in parts(pool):
        part[used] = 0
    before = copied(pool)
    state_index = torch.tensor(index, dtype=dtype, device=device)
    ys = []
    for piece in x[:, :7].split((4, 3), 1):
        y, returned = layer.prefill(piece, state=pool, state_index=state_index)
        assert all(a is b for a, b in zip(parts(returned), parts(pool), strict=True))
        ys.append(y)
    ys.append(layer.step(x[:, 7], pool, state_index=state_index).unsqueeze(1))
    ys.append(layer.step(x[:, 8:], pool, state_index=state_index))
    y = torch.cat(ys, 1)
    expected, last = layer.prefill(x)
    for b, slot in enumerate(index):
        if slot < 0:
            assert not y[b].any()
            continue
        assert relative_error(y[b], expected[b]) < 1e-11
        assert_close(rows(pool, slot), rows(last, b))
    others = [slot for slot in range(5) if slot not in used]
    assert equal(rows(pool, others), rows(before, others))
    assert between.isnan().all()


@torch.no_grad()
@every_layer
def test_packed_prompts_go_into_their_slots(make, device):
    layer, x = make(device), tokens(1, 13, device)
    pool = pool_of(layer, 6, device)
    before = copied(pool)
    bounds, index = [0, 4, 4, 7, 11], [5, 2, -1, 0]
    y, _ = layer.prefill(
        x,
        state=pool,
        cu_seqlens=torch.tensor(bounds, device=device),
        state_index=torch.tensor(index, device=device),
    )
    for s, slot in enumerate(index):
        begin, end = bounds[s], bounds[s + 1]
        if slot < 0:
            assert not y[:, begin:end].any()
            continue
        expected, alone = layer.prefill(x[:, begin:end], state=rows(before, slice(slot, slot + 1)))
        assert relative_error(y[:, begin:end], expected) < 1e-11
        assert_close(rows(pool, slice(slot, slot + 1)), alone)
    assert not y[:, 11:].any()
    assert equal(rows(pool, [1, 3, 4]), rows(before, [1, 3, 4]))


@torch.no_grad()
@every_layer
def test_padded_prompts_go_into_their_slots(make, device):
    layer, x = make(device), tokens(device=device)
    mask = torch.tensor(MASKS["left"], device=device)
    pool = pool_of(layer, 4, device)
    before = copied(pool)
    y, _ = layer.prefill(x, mask, state=pool, state_index=torch.tensor([2, 0, -1], device=device))
    for b, slot in ((0, 2), (1, 0)):
        mine = rows(before, slice(slot, slot + 1))
        expected, alone = layer.prefill(x[b : b + 1, mask[b] == 1], state=mine)
        assert relative_error(y[b, mask[b] == 1], expected[0]) < 1e-11
        assert_close(rows(pool, slice(slot, slot + 1)), alone)
    assert not y[2].any()
    assert equal(rows(pool, [1, 3]), rows(before, [1, 3]))


@torch.no_grad()
@every_layer
def test_a_token_with_a_dimension_of_time_is_the_same_token(make, device):
    layer, x = make(device), tokens(device=device)
    state = layer.prefill(x)[1]
    other = copied(state)
    y = layer.step(x[:, 0], state)
    with_time = layer.step(x[:, :1], other)
    assert with_time.shape == (3, 1, WIDTH)
    assert torch.equal(with_time[:, 0], y)
    assert equal(state, other)


@torch.no_grad()
@every_layer
def test_no_sequences_and_no_slots(make):
    layer = make()
    none, pool = torch.zeros(0, dtype=torch.int64), pool_of(layer, 0)
    y, returned = layer.prefill(tokens(0), state=pool, state_index=none)
    assert y.shape == (0, SEQLEN, WIDTH)
    assert parts(returned)[0].shape[0] == 0
    assert layer.step(tokens(0)[:, 0], pool, state_index=none).shape == (0, WIDTH)
    skip = torch.tensor([-1, -1, -1])
    assert not layer.prefill(tokens(), state=pool, state_index=skip)[0].any()
    assert not layer.step(tokens()[:, 0], pool, state_index=skip).any()


WRONG_INDICES = {
    "twice": [1, 2, 1],
    "behind the pool": [0, 1, 4],
    "before the pool": [0, 1, -2],
    "too few": [0, 1],
    "too many": [0, 1, 2, 3],
    "two dimensions": [[0, 1, 2]],
    "floats": [0.0, 1.0, 2.0],
}


@torch.no_grad()
@every_layer
@pytest.mark.parametrize("index", WRONG_INDICES.values(), ids=WRONG_INDICES)
def test_a_wrong_index_is_named_and_nothing_is_written(make, index):
    layer, x = make(), tokens()
    pool = pool_of(layer, 4)
    before, index = copied(pool), torch.tensor(index)
    for call in (
        lambda: layer.prefill(x, state=pool, state_index=index),
        lambda: layer.step(x[:, 0], pool, state_index=index),
    ):
        with pytest.raises((ValueError, TypeError), match=r"^(rebased_cuda: )?state_index: "):
            call()
        assert equal(pool, before)


WRONG_STATES = {
    "list": lambda state: list(parts(state)),
    "batch": lambda state: rows(state, slice(1, None)),
    "dtype": lambda state: whole([part.float() for part in parts(state)]),
    "width": lambda state: whole([part[:, 1:] for part in parts(state)]),
    "meta": lambda state: whole([part.to("meta") for part in parts(state)]),
}


@torch.no_grad()
@every_layer
@pytest.mark.parametrize("wrong", WRONG_STATES.values(), ids=WRONG_STATES)
def test_a_wrong_state_is_named(make, wrong):
    layer, x = make(), tokens()
    state = wrong(layer.prefill(x)[1])
    with pytest.raises((ValueError, TypeError), match=r"^state(\.kv|\.k)?: "):
        layer(x, state=state)
    with pytest.raises((ValueError, TypeError), match=r"^state(\.kv|\.k)?: "):
        layer(x.view(1, -1, WIDTH), state=state, cu_seqlens=torch.tensor([0, 9, 18, 27]))


@every_layer
def test_arguments_that_do_not_go_together(make):
    layer, x = make(), tokens()
    name = "x" if make is attention else "u"
    bounds, mask = torch.tensor([0, 9]), torch.ones(1, 9)
    with pytest.raises(ValueError, match=rf"^{name}: expected batch size 1 where cu_seqlens"):
        layer(x, cu_seqlens=bounds)
    with pytest.raises(ValueError, match=r"^attention_mask: expected None where cu_seqlens"):
        layer(x[:1], mask.bool(), cu_seqlens=bounds)
    with pytest.raises(TypeError, match=r"^state: expected .*NoneType"):
        layer.prefill(x, state_index=torch.tensor([0, 1, 2]))
    for device_bounds in (bounds.float(), bounds.unsqueeze(0), bounds[:0], bounds.to("meta")):
        with pytest.raises((ValueError, TypeError), match=r"^cu_seqlens: expected"):
            layer(x[:1], cu_seqlens=device_bounds)


@every_layer
def test_a_pool_is_for_inference(make):
    layer, x, index = make(), tokens(), torch.tensor([0, 1, 2])
    with torch.inference_mode():
        made = pool_of(layer, 3)
    pool = copied(made)
    before = copied(pool)
    with pytest.raises(RuntimeError, match=r"prefill with state_index is for inference.*no_grad"):
        layer.prefill(x, state=pool, state_index=index)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"^state(\.kv)?: was made under torch.inference"):
        layer.prefill(x, state=made, state_index=index)
    with torch.inference_mode():
        layer.prefill(x, state=made, state_index=index)
    assert equal(pool, before)


@torch.no_grad()
@every_layer
def test_a_pool_whose_slots_are_one_is_refused(make):
    layer, x = make(), tokens()
    one = pool_of(layer, 1)
    before = copied(one)
    pool = whole([part.expand(3, *part.shape[1:]) for part in parts(one)])
    with pytest.raises(ValueError, match=r"^state(\.kv)?: expected elements apart in memory"):
        layer.prefill(x, state=pool, state_index=torch.tensor([0, 1, 2]))
    assert equal(one, before)


@torch.no_grad()
def test_a_pool_whose_parts_meet_is_refused():
    layer, x = attention(), tokens()
    memory = torch.zeros(4 * 200, dtype=x.dtype)
    kv = memory.as_strided((3, 2, 15, 3), (200, 45, 3, 1))
    for first, apart in ((90, True), (170, True), (89, False), (171, False)):
        k = memory.as_strided((3, 2, 15), (200, 15, 1), first)
        arguments = {"state": RebasedState(kv, k), "state_index": torch.tensor([0, 1, 2])}
        if apart:
            layer.prefill(x, **arguments)
            assert kv.any()
            memory.zero_()
            continue
        with pytest.raises(ValueError, match=r"^state\.kv: expected memory apart from state\.k's"):
            layer.prefill(x, **arguments)
        assert not memory.any()


@every_layer
@pytest.mark.parametrize("use", ["state", "masked", "packed"])
def test_going_on_compiles_into_one_graph(make, use, device):
    layer = make(device)
    x = tokens(1 if use == "packed" else 3, device=device).requires_grad_()
    state = layer.prefill(tokens(2 if use == "packed" else 3, 4, device))[1]
    options = {"state": whole([part.detach() for part in parts(state)])}
    if use == "masked":
        options["attention_mask"] = torch.tensor(MASKS["left"], device=device)
    elif use == "packed":
        options["cu_seqlens"] = torch.tensor([0, 4, 9], device=device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, expected = compiled(x, **options), layer(x, **options)
    assert relative_error(y, expected) < 1e-12
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    (value,) = torch.autograd.grad(expected.square().sum(), x)
    assert relative_error(gradient, value) < 1e-10


@torch.no_grad()
@every_layer
def test_calls_on_a_pool_compile_into_one_graph(make, device):
    layer, x = make(device), tokens(device=device)
    pool = pool_of(layer, 4, device)
    other, index = copied(pool), torch.tensor([2, -1, 0], device=device)
    prefill = torch.compile(layer.prefill, fullgraph=True, backend="aot_eager")
    step = torch.compile(layer.step, fullgraph=True, backend="aot_eager")
    y, expected = (f(x, state=p, state_index=index)[0] for f, p in ((prefill, pool), (layer.prefill, other)))
    assert relative_error(y, expected) < 1e-12
    y, expected = (f(x[:, :1], p, state_index=index) for f, p in ((step, pool), (layer.step, other)))
    assert relative_error(y, expected) < 1e-12
    assert_close(pool, other)


@every_layer
def test_shards_of_a_sequence_take_none_of_it(make):
    layer, x = make(), tokens(1)
    state = layer.prefill(x)[1]
    layer.context_parallel_group = object()
    given = {"state": state, "cu_seqlens": torch.tensor([0, 9]), "state_index": torch.tensor([0])}
    for name, value in given.items():
        with pytest.raises(ValueError, match=rf"^{name}: not supported under context parallelism"):
            layer.prefill(x, **{name: value})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seqlen", [0, 1, 7])
def test_the_depthwise_convolution_is_torch_s(dtype, seqlen, device):
    """Values and gradients are those of nn.Conv1d, rounded once."""
    ours = convolution(device, dtype).conv
    exact = torch.nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH).to(device, torch.float64)
    exact.load_state_dict(ours.state_dict())
    x = torch.randn(2, WIDTH, 3 + seqlen, device=device).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    y = ours(x)
    assert y.dtype == dtype
    assert y.shape == (2, WIDTH, seqlen)
    if seqlen == 0:  # which torch's refuses
        return
    expected = exact(wide)
    rounding = torch.finfo(dtype).eps
    assert relative_error(y, expected) < rounding
    seed = torch.randn_like(y)
    gradients = torch.autograd.grad((y * seed).sum(), [x, *ours.parameters()])
    values = torch.autograd.grad((expected * seed.double()).sum(), [wide, *exact.parameters()])
    for gradient, value in zip(gradients, values, strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, value) < 4 * rounding


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_token_under_autocast_has_its_dtype(dtype, device):
    layer, u = convolution(device, torch.float32), tokens(device=device, dtype=dtype)
    with torch.autocast(device, torch.bfloat16):
        y, state = layer.prefill(u)
        assert y.dtype == state.dtype == dtype
        assert layer.step(u[:, 0], state).dtype == dtype


@torch.no_grad()
def test_a_plain_convolution_in_the_place_of_ours_does(device):
    layer, u = convolution(device), tokens(device=device)
    plain = copy.deepcopy(layer)
    plain.conv = torch.nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH).to(u)
    plain.conv.load_state_dict(layer.conv.state_dict())
    y, state = layer.prefill(u)
    other, other_state = plain.prefill(u)
    assert relative_error(other, y) < 1e-12
    assert relative_error(plain.step(u[:, 0], other_state), layer.step(u[:, 0], state)) < 1e-12
