"""The CUDA kernels' own choices: every path, segment count and chunk; low precision; schedules; the plan.

Plans are looked at on every build. The kernels run where CPU tensors go through the emulator, or on a GPU.
"""

import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import EMULATED, needs_kernels
from problems import (
    MAPS,
    NORMS,
    TENSOR_CORE_MAPS,
    Problem,
    laid_out,
    plain_low_precision,
    relative_error,
    run,
    run_reference,
)

from rebased_cuda import RebasedState, rebased_attention, reference, testing


def _results(function, inputs, problem):
    outputs = run(function, inputs, problem)
    leaves = [x for x in inputs if x is not None]
    weights = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view(o.shape).to(o) for o in outputs]
    loss = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, leaves)]


def _wide(inputs):
    return [None if x is None else x.detach().double().requires_grad_() for x in inputs]


@needs_kernels
@pytest.mark.parametrize("chunk", [4, 16, 32])
@pytest.mark.parametrize("segments", [1, 2, 5, 11])
@pytest.mark.parametrize("feature_map", MAPS)
def test_general_path_at_any_cut(feature_map, segments, chunk, override, kernel_device):
    problem = Problem(feature_map, heads=4, kv_heads=2, seqlen=70, with_state=True, device=kernel_device)
    inputs = problem.inputs(requires_grad=True)
    expected = _results(reference.quadratic, inputs, problem)
    override(path="general", segments=segments, chunk=chunk, state_in_shared=chunk % 32 == 0)
    for value, exact in zip(_results(rebased_attention, inputs, problem), expected, strict=True):
        assert relative_error(value, exact) <= 1e-10


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "dim"), [(1, 3), (5, 24), (3, 7), (12, 16), (2, 128), (21, 40)])
def test_token_layer_norm_of_any_width(heads, dim, dtype, override, kernel_device):
    """A warp takes a token's row in pieces of 16 bytes, or element by element where it has none."""
    problem = Problem("square", "token", 2, heads, 1, 5, dim, 16, dtype=dtype, eps=1.0, device=kernel_device)
    inputs = problem.inputs(requires_grad=True)
    override(path="general")
    got = _results(rebased_attention, inputs, problem)
    expected = _results(reference.quadratic, _wide(inputs), problem)
    limit = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for value, exact in zip(got, expected, strict=True):
        assert relative_error(value, exact) <= limit


@needs_kernels
@pytest.mark.parametrize("packed", [(), (0, 3, 40, 40, 69)])
@pytest.mark.parametrize("feature_map", MAPS)
def test_quadratic_path(feature_map, packed, override, kernel_device):
    problem = Problem(feature_map, batch=1 if packed else 2, seqlen=70, packed=packed, device=kernel_device)
    q, k, v, *parameters, _, _ = problem.inputs(requires_grad=True)
    override(path="quadratic")
    gradients = []
    for function in (rebased_attention, reference.quadratic):
        y = function(q, k, v, *parameters, **problem.options())
        gradients.append([y, *torch.autograd.grad(y.square().sum(), [q, k, v, *parameters])])
    for value, exact in zip(*gradients, strict=True):
        assert relative_error(value, exact) <= 1e-10


TENSOR_CORE_VARIANTS = {
    "plain": {},
    "gqa_state": {"heads": 4, "kv_heads": 2, "with_state": True},
    "packed": {"batch": 1, "packed": (2, 70, 70, 200, 230)},
    "wide": {"head_dim": 160, "with_state": True},
    "narrow": {"head_dim": 16},
    "shared_affine": {"affine": "shared"},
    "no_affine": {"affine": "none"},
    "not_normalised": {"normalize": False},
    "scale_zero": {"scale": 0.0, "feature_map": "taylor"},
}
# relative L2 of outputs and gradients; those of gamma and beta sum terms of both signs over all tokens
LIMIT, PARAMETER_LIMIT = 1.2e-2, 3e-2


@needs_kernels
@pytest.mark.parametrize("variant", TENSOR_CORE_VARIANTS)
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize(("feature_map", "dim"), TENSOR_CORE_MAPS)
def test_tensor_core_path(feature_map, dim, segments, variant, override, kernel_device):
    norm = NORMS[(MAPS.index(feature_map) + segments + list(TENSOR_CORE_VARIANTS).index(variant)) % 3]
    problem = Problem(
        feature_map, norm, 2, 2, 2, 250, dim, 64, dtype=torch.bfloat16, device=kernel_device, eps=1e-1
    )
    problem = problem.but(**TENSOR_CORE_VARIANTS[variant])
    if dim != 16 and problem.feature_map != "outer":
        pytest.skip("a variant of another map")
    inputs = problem.inputs(requires_grad=True)
    override(path="tensor_core", segments=segments)
    got = _results(rebased_attention, inputs, problem)
    expected = _results(reference.chunked, _wide(inputs), problem)
    largest = max(e.norm().item() / e.numel() ** 0.5 for e in expected)
    for value, exact in zip(got, expected, strict=True):
        assert value.isfinite().all()
        if exact.norm().item() / max(exact.numel(), 1) ** 0.5 > 1e-3 * largest:
            assert relative_error(value, exact) <= (PARAMETER_LIMIT if exact.dim() < 3 else LIMIT)


@needs_kernels
@pytest.mark.parametrize("layout", ["contiguous", "token major", "padded rows", "offset"])
@pytest.mark.parametrize("head_dim", [1, 5, 12, 21, 42, 64, 130, 255])
@pytest.mark.parametrize(("feature_map", "dim"), TENSOR_CORE_MAPS)
def test_tensor_cores_take_rows_of_any_width_and_stride(
    feature_map, dim, head_dim, layout, override, kernel_device
):
    """In pieces of 2 to 16 bytes; grad y lies as the others do, and the chunk's last rows are missing."""
    problem = Problem(
        feature_map, "head", 1, 4, 2, 101, dim, head_dim, dtype=torch.bfloat16, device=kernel_device, eps=0.5
    )
    inputs = problem.inputs(requires_grad=True)
    weight = laid_out(torch.linspace(-1, 1, 4 * 101 * head_dim).view(1, 4, 101, head_dim), layout)
    override(path="tensor_core", segments=2)
    results = []
    for function, leaves in ((rebased_attention, inputs), (reference.chunked, _wide(inputs))):
        given = [laid_out(x, layout) for x in leaves[:3]]
        y = function(*given, *leaves[3:7], **problem.options())
        gradients = torch.autograd.grad(y, leaves[:7], laid_out(weight.to(y), layout))
        results.append([y, *gradients])
    largest = max(e.norm().item() / e.numel() ** 0.5 for e in results[1])
    for value, exact in zip(*results, strict=True):
        assert value.isfinite().all()
        if exact.norm().item() / exact.numel() ** 0.5 > 1e-3 * largest:
            assert relative_error(value, exact) <= (PARAMETER_LIMIT if exact.dim() < 3 else LIMIT)


@needs_kernels
@pytest.mark.parametrize("head_dim", [10, 64, 130])
@pytest.mark.parametrize("segments", [1, 3])
def test_tensor_cores_take_features_as_they_are(segments, head_dim, override, kernel_device):
    """`identity`; without the division, since features of both signs may sum to nothing."""
    problem = Problem(
        "identity", None, 2, 4, 2, 130, 16, head_dim, dtype=torch.bfloat16, device=kernel_device
    ).but(normalize=False, with_state=True)
    inputs = problem.inputs(requires_grad=True)
    override(path="tensor_core", segments=segments)
    got = _results(rebased_attention, inputs, problem)
    for value, exact in zip(got, _results(reference.chunked, _wide(inputs), problem), strict=True):
        assert relative_error(value, exact) <= LIMIT


@needs_kernels
@pytest.mark.parametrize("segments", [9, 11, 18])
@pytest.mark.parametrize(("feature_map", "with_state"), [("outer", True), ("taylor", False)])
def test_more_segments_than_are_loaded_at_once(feature_map, with_state, segments, override, kernel_device):
    problem = Problem(feature_map, "head", 1, 1, 1, 64 * 18, 16, 64, dtype=torch.bfloat16, eps=1e-1)
    problem = problem.but(with_state=with_state, device=kernel_device)
    inputs = problem.inputs(requires_grad=True)
    override(path="tensor_core", segments=segments)
    got = _results(rebased_attention, inputs, problem)
    override(path="tensor_core", segments=1)
    for cut, whole in zip(got, _results(rebased_attention, inputs, problem), strict=True):
        assert relative_error(cut, whole) <= LIMIT


FLOAT32_VARIANTS = {
    "plain": {},
    "gqa_state": {"heads": 4, "kv_heads": 2, "with_state": True},
    "packed": {"batch": 1, "packed": (2, 70, 70, 200, 230), "with_state": True},
    "wide": {"head_dim": 160, "with_state": True},
    "odd_width": {"head_dim": 36},
    "odd_length": {"seqlen": 97, "with_state": True},
    "shared_affine": {"affine": "shared"},
    "no_affine": {"affine": "none"},
    "not_normalised": {"normalize": False},
    "scale_zero": {"scale": 0.0, "feature_map": "taylor"},
}


@needs_kernels
@pytest.mark.parametrize("variant", FLOAT32_VARIANTS)
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("norm", NORMS, ids=str)
@pytest.mark.parametrize("feature_map", MAPS)
def test_float32_path(feature_map, norm, segments, variant, override, kernel_device):
    """Outputs within 5e-6; gradients within 2e-5, or twice what plain PyTorch in float32 is off by."""
    problem = Problem(feature_map, norm, 2, 2, 2, 250, 16, 64, dtype=torch.float32, device=kernel_device)
    problem = problem.but(**FLOAT32_VARIANTS[variant])
    inputs = problem.inputs(requires_grad=True)
    override(path="float32", segments=segments)
    got = _results(rebased_attention, inputs, problem)
    expected = _results(reference.chunked, _wide(inputs), problem)
    plain = _results(reference.chunked, inputs, problem)
    for index, (value, exact, other) in enumerate(zip(got, expected, plain, strict=True)):
        assert value.isfinite().all()
        if exact.abs().max() == 0:
            assert value.abs().max() == 0
        elif index < 3:
            assert relative_error(value, exact) <= 5e-6
        else:
            assert relative_error(value, exact) <= max(2e-5, 2 * relative_error(other, exact))


@needs_kernels
@pytest.mark.parametrize("segments", [1, 4])
@pytest.mark.parametrize("feature_map", MAPS)
def test_float32_error_does_not_grow_with_length(feature_map, segments, override, kernel_device):
    override(path="float32", segments=segments)
    seqlen = 4096 if kernel_device == "cpu" else 65536
    problem = Problem(feature_map, "head", 1, 1, 1, seqlen, 16, 64, dtype=torch.float32, device=kernel_device)
    inputs = problem.inputs()
    y = run(rebased_attention, inputs, problem)[0]
    expected = run_reference(inputs, problem, reference.chunked)[0]
    assert relative_error(y[:, :, -seqlen // 16 :], expected[:, :, -seqlen // 16 :]) <= 5e-6


@needs_kernels
@pytest.mark.parametrize("head_dim", [64, 80])
@pytest.mark.parametrize("feature_map", MAPS)
def test_blocks_that_sum_segments_give_the_bits_of_a_scan(feature_map, head_dim, override, kernel_device):
    """Few segments' states are summed where they are used, a given state makes it a scan: zeros here."""
    problem = Problem(
        feature_map, "head", 1, 4, 2, 450, 16, head_dim, dtype=torch.bfloat16, device=kernel_device
    )
    leaves = problem.inputs(requires_grad=True)[:7]
    zeros = RebasedState.zeros(1, 2, 16, head_dim, feature_map=feature_map, device=kernel_device)
    override(path="tensor_core", segments=5)
    results = []
    for initial_state in (None, zeros):
        y, state = rebased_attention(
            *leaves, initial_state=initial_state, return_state=True, **problem.options()
        )
        loss = y.float().square().sum()
        if initial_state is not None:  # a gradient of the last state, of zeros
            loss = loss + 0 * (state.kv.sum() + state.k.sum())
        results.append([y, *state, *torch.autograd.grad(loss, leaves)])
    for summed, scanned in zip(*results, strict=True):
        assert torch.equal(summed, scanned)


@needs_kernels
@pytest.mark.parametrize(("feature_map", "dim"), TENSOR_CORE_MAPS)
def test_tensor_core_error_is_that_of_the_precision(feature_map, dim, override, kernel_device):
    """At most 1.25 times the error of plain PyTorch with operands of that precision, median of 20 seeds."""
    override(path="tensor_core", segments=1)
    ratios = []
    for seed in range(20):
        problem = Problem(
            feature_map, "head", 1, 1, 1, 300, dim, 64, dtype=torch.bfloat16, eps=1e-2, seed=seed
        )
        inputs = problem.but(device=kernel_device).inputs()
        expected = run_reference(inputs, problem.but(device=kernel_device), reference.chunked)[0]
        y = run(rebased_attention, inputs, problem.but(device=kernel_device))[0]
        plain = plain_low_precision(*inputs[:7], problem=problem)
        ratios.append(relative_error(y, expected) / relative_error(plain, expected))
    assert statistics.median(ratios) <= 1.25


@needs_kernels
@pytest.mark.parametrize("segments", [1, 4])
@pytest.mark.parametrize(("feature_map", "dim"), TENSOR_CORE_MAPS)
def test_bfloat16_error_does_not_grow_with_length(feature_map, dim, segments, override, kernel_device):
    override(path="tensor_core", segments=segments)
    seqlen = 4096 if kernel_device == "cpu" else 65536
    problem = Problem(
        feature_map, "head", 1, 1, 1, seqlen, dim, 64, dtype=torch.bfloat16, device=kernel_device
    )
    inputs = problem.inputs()
    y = run(rebased_attention, inputs, problem)[0]
    expected = run_reference(inputs, problem, reference.chunked)[0]
    windows = (slice(seqlen // 16, seqlen // 8), slice(seqlen - seqlen // 16, seqlen))
    early, late = (relative_error(y[:, :, rows], expected[:, :, rows]) for rows in windows)
    assert late <= 1.25 * early


@needs_kernels
def test_large_float16_sums_stay_finite(kernel_device):
    """Sums past 65,504, float16's largest number: states and divisions are float32."""
    q = torch.full((1, 1, 3000, 16), 2.0, dtype=torch.float16, device=kernel_device)
    v = torch.randn(1, 1, 3000, 64, device=kernel_device).half()
    y = rebased_attention(q, q, v)
    expected = v.double().cumsum(2) / torch.arange(1, 3001, device=kernel_device).view(1, 1, -1, 1)
    assert relative_error(y, expected) <= 2e-3


@pytest.mark.skipif(not EMULATED, reason="the emulator's limits")
@pytest.mark.parametrize("feature_map", MAPS)
def test_many_query_heads_fit_the_smallest_shared_memory(feature_map, override, monkeypatch):
    """99 KB a block, as of sm_86, sm_89 and sm_120."""
    override(path="tensor_core", segments=2)
    problem = Problem(feature_map, "head", 1, 16, 1, 130, 16, 64, dtype=torch.bfloat16)
    inputs = problem.inputs(requires_grad=True)
    expected = _results(rebased_attention, inputs, problem)
    monkeypatch.setenv("REBASED_EMULATOR_SHARED_MEMORY", "99")
    for value, same in zip(_results(rebased_attention, inputs, problem), expected, strict=True):
        assert torch.equal(value, same)


SCHEDULE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from problems import MAPS, Problem, run
from rebased_cuda import rebased_attention
sums = []
for feature_map in MAPS:
    cases = [(torch.float32, (5, 7)), (torch.float32, (16, 80)), (torch.bfloat16, (16, 64))]
    if feature_map == "outer":
        cases += [(torch.bfloat16, (8, 64)), (torch.bfloat16, (32, 64))]
    for dtype, sizes in cases:
        problem = Problem(feature_map, "token", 1, 2, 1, 130, *sizes, dtype=dtype, with_state=True)
        inputs = problem.inputs(requires_grad=True)
        outputs = run(rebased_attention, inputs, problem)
        leaves = [x for x in inputs if x is not None]
        everything = [*outputs, *torch.autograd.grad(sum(o.float().sum() for o in outputs), leaves)]
        sums += [x.detach().double().sum().item() for x in everything]
print(sums)
"""


@pytest.mark.skipif(not EMULATED, reason="the emulator's schedules")
def test_three_schedules_give_the_same_bits():
    """Threads of a block in order, in reverse and shuffled: what a missing barrier would show."""
    outputs = set()
    for order in ("forward", "reverse", "77"):
        result = subprocess.run(
            [sys.executable, "-c", SCHEDULE, str(Path(__file__).parents[1])],
            env={**os.environ, "REBASED_EMULATOR_ORDER": order},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.add(result.stdout)
    assert len(outputs) == 1
    assert "nan" not in outputs.pop()


# ---- the plan, with no GPU at all ----


def test_plan_takes_tensor_cores_for_bfloat16():
    assert testing.plan("forward")["path"] == "tensor_core"
    assert testing.plan("backward", head_dim=128)["path"] == "tensor_core"
    for direction in ("forward", "backward"):
        for seqlen in (1, 64, 200, 500):  # where fewer operations without a state would not pay for SIMT ones
            assert testing.plan(direction, seqlen=seqlen)["path"] == "tensor_core"
        for head_dim in (1, 5, 16, 42, 64, 208, 255):
            for feature_dim in (8, 16, 32):
                plan = testing.plan(direction, feature_dim=feature_dim, head_dim=head_dim)
                assert plan["path"] == "tensor_core"
    others = (
        {"dtype": "float32"},
        {"dtype": "float16"},
        {"feature_dim": 17},
        *({"feature_dim": d, "feature_map": m} for d in (8, 32) for m in MAPS if m != "outer"),
    )
    for changes in others:
        assert testing.plan("forward", **changes)["path"] != "tensor_core"


def test_plan_takes_long_chunks_where_two_blocks_have_room():
    for direction in ("forward", "backward"):
        for kilobytes, chunk in ((227, 128), (163, 64), (99, 64)):
            for dim, kv_heads in ((16, 12), (8, 12), (8, 4)):
                sizes = {"feature_dim": dim, "kv_heads": kv_heads}
                plan = testing.plan(direction, shared_memory_per_block=kilobytes << 10, **sizes)
                assert (plan["path"], plan["tiles.chunk"]) == ("tensor_core", chunk)
        # with d = 16 the backward's kernels of these would spill
        assert testing.plan(direction, feature_map="taylor")["tiles.chunk"] == 64
        assert testing.plan(direction, kv_heads=4)["tiles.chunk"] == 64
        assert testing.plan(direction, feature_map="square")["tiles.chunk"] == 64


@pytest.mark.parametrize("feature_map", ["outer", "taylor"])
def test_plan_cuts_segments_before_tensor_cores_drift(feature_map):
    """At any number of blocks, also where one block a sequence would fill the device."""
    for batch in (1, 8, 512):
        for seqlen in (4096, 4097, 8192, 100_000, 131_072, 1 << 20):
            plan = testing.plan("forward", batch=batch, seqlen=seqlen, feature_map=feature_map)
            chunk, segments = plan["tiles.chunk"], plan["segments"]
            assert -(-seqlen // (chunk * segments)) * chunk <= 4096


def test_plan_takes_register_tiles_for_float32_with_16_features():
    for direction in ("forward", "backward"):
        for feature_map in MAPS:
            for changes in ({}, {"head_dim": 16}, {"head_dim": 36}, {"head_dim": 256}, {"kv_heads": 3}):
                plan = testing.plan(direction, dtype="float32", feature_map=feature_map, **changes)
                assert plan["path"] == "float32"
                assert plan["tiles.chunk"] == {"forward": 64, "backward": 32}[direction]
        for changes in (
            {"dtype": "float64"},
            {"feature_dim": 15},
            {"feature_dim": 32},
            {"head_dim": 8},
            {"head_dim": 42},
            {"shared_memory_per_block": 64 << 10},
        ):
            plan = testing.plan(direction, **{"dtype": "float32", "state": True, **changes})
            assert plan["path"] == "general"
    assert testing.plan("backward", dtype="float32", heads=34, kv_heads=2)["path"] == "general"


def test_plan_takes_tensor_cores_for_wide_gradients_where_shared_memory_suffices():
    options = {"dtype": "bfloat16", "feature_dim": 32, "seqlen": 8192}
    for kilobytes, backward in ((227, "tensor_core"), (163, "tensor_core"), (99, "general")):
        limit = kilobytes << 10
        assert testing.plan("forward", shared_memory_per_block=limit, **options)["path"] == "tensor_core"
        assert testing.plan("backward", shared_memory_per_block=limit, **options)["path"] == backward


def test_plan_goes_without_a_state_where_that_is_cheaper():
    for sizes, stateful in (({}, "float32"), ({"feature_dim": 17, "head_dim": 65}, "general")):
        short = testing.plan("forward", dtype="float32", seqlen=128, **sizes)
        assert short["path"] == "quadratic"
        assert testing.plan("forward", dtype="float32", seqlen=128, state=True, **sizes)["path"] == stateful
        assert testing.plan("forward", dtype="float32", seqlen=4096, **sizes)["path"] == stateful
    assert testing.plan("forward", dtype="float32", seqlen=4096, feature_dim=64)["path"] == "quadratic"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_plan_fills_the_gpu_from_one_head_and_splits_nothing_when_full(direction, dtype):
    one = testing.plan(direction, heads=1, kv_heads=1, seqlen=131072, dtype=dtype)
    assert one["segments"] >= 64
    assert testing.plan(direction, batch=64, dtype=dtype)["segments"] == 1


@pytest.mark.parametrize(
    ("direction", "feature_map", "resident"),
    [("forward", "outer", 2), ("backward", "outer", 2), ("backward", "square", 3)],
)
def test_plan_starts_no_wave_for_a_few_blocks(direction, feature_map, resident):
    """132 multiprocessors: 12 long heads are one wave, or two where segments have a longest length; of 96
    heads the last wave is half full or more."""
    room = 132 * resident
    options = {
        "dtype": "bfloat16",
        "feature_map": feature_map,
        "multiprocessors": 132,
        "heads": 12,
        "kv_heads": 12,
    }
    long = testing.plan(direction, batch=1, seqlen=131072, **options)["segments"]
    waves = 2 if feature_map == "outer" else 1
    assert 0.9 * room * waves < 12 * long <= room * waves
    blocks = 96 * testing.plan(direction, batch=8, seqlen=4096, **options)["segments"]
    assert (blocks - 1) % room + 1 > room / 2


@pytest.mark.parametrize("shared_memory", [99 << 10, 163 << 10, 227 << 10])
def test_every_shape_of_the_contract_has_a_plan(shared_memory):
    """On the smallest devices too; no plan asks for more than there is."""
    for direction in ("forward", "backward", "step"):
        for dtype in ("float32", "float64", "bfloat16"):
            for feature_map in MAPS:
                for feature_dim in (1, 16, 33, 128):
                    for head_dim in (1, 64, 256):
                        plan = testing.plan(
                            direction,
                            dtype=dtype,
                            feature_map=feature_map,
                            feature_dim=feature_dim,
                            head_dim=head_dim,
                            shared_memory_per_block=shared_memory,
                        )
                        assert plan["error"] == ""
                        assert plan["shared_memory_bytes"] <= shared_memory


needs_launches = pytest.mark.skipif(
    "launches" not in testing.plan("forward"), reason="launches are counted in a build with the emulator"
)


@needs_launches
@pytest.mark.parametrize(
    ("changes", "forward", "backward"),
    [
        ({}, 3, 7),  # statistics, segments' states, sweep; in backward two sweeps, LayerNorm, affine sums
        ({"layer_norm": "head"}, 2, 5),
        ({"batch": 64}, 2, 5),  # enough sequences: none is split
        ({"batch": 64, "layer_norm": "none"}, 1, 3),
        ({"head_dim": 128}, 2, 7),  # in one piece, whose column groups' gradients are summed
        ({"sequences": 4}, 6, 11),  # packed: bounds are clamped, rows of no sequence filled
        ({"dtype": "float32"}, 4, 10),  # a scan sums the states, and delta is a launch of its own
        ({"dtype": "float64", "batch": 64}, 2, 6),
    ],
)
def test_few_launches_a_call(changes, forward, backward):
    """With gamma and beta, without states: 12 heads of 4096 tokens, 8 sequences."""
    batch = 1 if "sequences" in changes else 8
    shape = {"batch": batch, "heads": 12, "kv_heads": 12, "seqlen": 4096} | changes
    assert testing.plan("forward", **shape)["launches"] == forward
    assert testing.plan("backward", **shape)["launches"] == backward


@needs_launches
@pytest.mark.parametrize(
    ("changes", "forward", "backward"),
    [
        ({}, 3, 5),
        ({"layer_norm": "head"}, 2, 4),
        ({"batch": 64}, 2, 4),  # no sequence is split: there are no states
        ({"seqlen": 131072, "batch": 1}, 4, 6),  # a scan sums the states of each direction
        ({"feature_map": "square"}, 3, 5),
        ({"feature_dim": 32}, 2, 4),  # in one piece
        ({"dtype": "float32"}, 4, 9),  # other chunks forward than backward: states are not kept
    ],
)
def test_backward_computes_nothing_again_that_was_kept(changes, forward, backward):
    shape = {"batch": 8, "heads": 12, "kv_heads": 12, "seqlen": 4096, "keep": True} | changes
    assert testing.plan("forward", **shape)["launches"] == forward
    assert testing.plan("backward", **shape)["launches"] == backward


@pytest.mark.parametrize("feature_map", MAPS)
@pytest.mark.parametrize(("batch", "seqlen"), [(8, 4096), (1, 131072), (3, 704), (64, 4096)])
def test_a_forward_that_keeps_is_cut_as_its_backward(feature_map, batch, seqlen):
    shape = {"batch": batch, "seqlen": seqlen, "feature_map": feature_map, "keep": True}
    forward, backward = (testing.plan(direction, **shape) for direction in ("forward", "backward"))
    assert forward["segments"] == backward["segments"]
    assert forward["kept_bytes"] == backward["kept_bytes"] > 0
    with_states = "workspace.states.bytes" in forward
    assert with_states == (forward["segments"] > 1)
    statistics = 2 * batch * seqlen * 2 * 4
    assert (forward["kept_bytes"] > statistics) == with_states


@needs_launches
def test_a_step_is_one_launch():
    assert testing.plan("step", batch=64)["launches"] == 1


def test_plan_names_what_it_does_not_know():
    for changes in ({"dtype": "int8"}, {"feature_map": "relu"}, {"layer_norm": "batch"}):
        with pytest.raises(ValueError, match=next(iter(changes))):
            testing.plan("forward", **changes)
    with pytest.raises(ValueError, match="kv_heads: must be at least 1"):
        testing.plan("forward", kv_heads=0)
    with pytest.raises(ValueError, match="direction"):
        testing.plan("sideways")
