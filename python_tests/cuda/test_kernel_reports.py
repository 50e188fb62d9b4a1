"""The reports of benchmarks.kernels: what they must say of the kernels, and that they would say otherwise."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from benchmarks.kernels import instructions, marks, profile, registers, same_code, toolchain
from benchmarks.kernels.instructions import Figures, Nest, per_chunk
from benchmarks.kernels.kernel import Kernel
from benchmarks.kernels.marks import counted_shares, shares_of_blocks
from benchmarks.kernels.sass import Function

pytestmark = pytest.mark.timeout(1800)  # the first time, these instances are compiled


def with_programs(*programs: str) -> pytest.MarkDecorator:
    """Skips a test where a program is missing, with the reason."""
    try:
        for program in programs:
            toolchain.cuda_program(program)
    except toolchain.ToolMissingError as error:
        return pytest.mark.skip(reason=str(error))
    return pytest.mark.slow


@pytest.fixture(scope="module")
def kernels() -> list[Kernel]:
    """Those that registers.problems asks something of."""
    collected = []
    for pattern in registers.FAST_PATHS:
        found, errors = registers.collect(pattern, list(registers.CHECKED_ARCHITECTURES))
        assert not errors
        collected += found
    return collected


@with_programs("nvcc")
def test_no_spills_and_enough_blocks(kernels):
    assert registers.problems(kernels) == []


@with_programs("nvcc", "nvdisasm")
def test_instructions():
    figures = []
    for pattern in instructions.PATTERNS:
        found, errors = instructions.collect(pattern, list(registers.CHECKED_ARCHITECTURES))
        assert errors == []
        figures += found
    assert instructions.problems(figures) == []


@with_programs("nvcc", "nvdisasm")
def test_same_code_knows_a_move_from_a_change(tmp_path, capsys):
    chosen = ["--architectures", "90", "--instances", "step_float64"]
    shutil.copytree(toolchain.ROOT / "csrc", tmp_path / "csrc")
    step = tmp_path / "csrc/cuda/decode/step.cuh"
    text = step.read_text()
    step.write_text("// A comment and a line more change no instruction.\n\n" + text)
    assert same_code.main([str(tmp_path), *chosen]) == 0
    assert "kernels in both: the same" in capsys.readouterr().out

    assert text.count("reciprocal(denominator + ") == 1
    step.write_text(text.replace("reciprocal(denominator + ", "reciprocal(denominator - "))
    assert same_code.main([str(tmp_path), *chosen]) == 1
    assert "step_float64.cu" in capsys.readouterr().out


# ---- the checks themselves, with no compiler ----

GOOD = Kernel(
    name=registers.OUTER_FORWARD,
    symbol="_Z",
    source="tensor_core_forward",
    architecture=90,
    registers=168,
    spill_stores=0,
    spill_loads=0,
    stack_frame=0,
    static_shared=38976,
    dynamic_shared=0,
    barriers=1,
    threads=128,
    asked_blocks=2,
    blocks=2,
)


ALL_GOOD = [
    replace(GOOD, name=name, architecture=architecture, blocks=blocks)
    for architecture in registers.CHECKED_ARCHITECTURES
    for name, blocks in registers.LEAST_BLOCKS.items()
]


def register_problems(kernel: Kernel) -> list[str]:
    others = [k for k in ALL_GOOD if (k.name, k.architecture) != (kernel.name, kernel.architecture)]
    return registers.problems([*others, kernel])


def test_register_problems():
    assert register_problems(GOOD) == []
    assert "spills 4 + 8 bytes" in register_problems(replace(GOOD, spill_stores=4, spill_loads=8))[0]
    assert "1 blocks per SM, not 2" in register_problems(replace(GOOD, blocks=1))[0]
    longer = replace(GOOD, name=GOOD.name.replace(", 64,", ", 128,"), blocks=1)
    assert "1 blocks per SM, not 2" in register_problems(longer)[0]
    assert register_problems(replace(longer, architecture=80)) == []
    grad_kv = "tensor_core::polynomial::grad_kv_kernel<bfloat16, taylor, 16, 64, false>"
    assert "1 blocks per SM, not 2" in register_problems(replace(GOOD, name=grad_kv, blocks=1))[0]
    float32 = replace(GOOD, name=registers.FLOAT32_FORWARD, blocks=1)
    assert "1 blocks per SM, not 2" in register_problems(float32)[0]
    other = replace(GOOD, name="tensor_core::grad_q_kernel<bfloat16, elu, 16, true>", blocks=0)
    assert "0 blocks per SM, not 1" in register_problems(other)[0]
    assert "not found" in registers.problems(ALL_GOOD[1:])[0]
    assert register_problems(replace(GOOD, name="general_forward<float64>", spill_stores=4)) == []


FIGURES = Figures(
    name=registers.OUTER_FORWARD,
    architecture=90,
    instructions=3000,
    hmma=107,
    ldsm=40,
    ldgsts=20,
    local_accesses=0,
    chunk_instructions=1354,
    chunk_opcodes={"HMMA": 200},
    chunk_accesses={"load 16": 8, "load 8": 2, "store 16": 4, "store 4": 2},
)


ALL_FIGURES = [
    replace(FIGURES, name=name, architecture=architecture, chunk_instructions=most, chunk_accesses={})
    for architecture in registers.CHECKED_ARCHITECTURES
    for name, most in instructions.MOST_INSTRUCTIONS.items()
]


def instruction_problems(figures: Figures) -> list[str]:
    others = [f for f in ALL_FIGURES if (f.name, f.architecture) != (figures.name, figures.architecture)]
    return instructions.problems([*others, figures])


def test_instruction_problems():
    assert instruction_problems(FIGURES) == []
    assert "2 accesses to local memory" in instruction_problems(replace(FIGURES, local_accesses=2))[0]
    longer = registers.OUTER_FORWARD.replace("16, 64", "16, 128")
    most = instructions.MOST_INSTRUCTIONS[longer]
    assert (
        f"{most + 1} instructions per chunk > {most}"
        in instruction_problems(replace(FIGURES, name=longer, chunk_instructions=most + 1))[0]
    )
    few_products = {"FFMA": 690}
    float32 = replace(
        FIGURES, name=registers.FLOAT32_FORWARD, chunk_instructions=1000, chunk_opcodes=few_products
    )
    problems = instruction_problems(float32)
    assert any("0.69 of its instructions are FFMA, not 0.7" in problem for problem in problems)
    split_stores = replace(FIGURES, chunk_accesses={"load 16": 8, "store 4": 24})
    assert "24 stores of 4 bytes per chunk, 2 expected" in instruction_problems(split_stores)[0]
    assert "not in LOOPS" in instruction_problems(replace(FIGURES, chunk_instructions=None))[0]
    assert "not found" in instructions.problems(ALL_FIGURES[1:])[0]


# A loop with an inner loop; the copy for diverged warps, after the end; sm_80's way to leave a loop.
LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDSM.16.M88.4 R4, [R2] ;
        /*0020*/                   BRA.DIV ~URZ, `(.L_x_3) ;
.L_x_1:
        /*0030*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0040*/              @!P1 STG.E.128 desc[UR4][R2.64], R8 ;
        /*0050*/               @P0 BRA `(.L_x_1) ;
        /*0060*/                   STL [R1+0x8], R100   (*"SpillRefill"*);
        /*0070*/               @P2 CALL.REL.NOINC `(.L_x_2) ;
        /*0080*/                   BRA `(.L_x_0) ;
.L_x_2:
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*00b0*/                   BRA `(.L_x_1) ;
"""


def test_loops_of_a_listing():
    function = Function(LISTING.splitlines())
    assert len(function.instructions) == 12
    (loop,) = function.loops
    (inner,) = loop.inner
    assert function.opcodes(inner) == {"HMMA.16816.F32.BF16": 1, "STG.E.128": 1, "BRA": 1}
    shares = shares_of_blocks(function, loop, 64)
    total = per_chunk(function, loop, (Nest(3),), shares)
    outer = {"LDSM.16.M88.4": 1, "BRA.DIV": 1, "STL": 1, "CALL.REL.NOINC": 1}
    assert total == {**outer, "HMMA.16816.F32.BF16": 3, "STG.E.128": 3, "BRA": 4}
    with pytest.raises(ValueError, match="1 inner loops and LOOPS knows of 2"):
        per_chunk(function, loop, (Nest(3), Nest(2)), shares)


# Aligned rows take one wide copy, others the two blocks before it, of which one is a loop.
NARROW_LISTING = """
.L_x_0:
        /*0000*/              @!P0 BRA `(.L_x_2) ;
        /*0010*/                   IADD3 R2, R2, 0x4, RZ ;
.L_x_1:
        /*0020*/                   LDGSTS.E.64 [R2], desc[UR4][R4.64] ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0050*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
.L_x_3:
        /*0060*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;
        /*0070*/               @P2 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
"""


def test_code_of_narrow_rows_is_not_counted():
    function = Function(NARROW_LISTING.splitlines())
    (loop,) = function.loops
    assert len(loop.inner) == 1
    shares = shares_of_blocks(function, loop, 64)
    counted = per_chunk(function, instructions.without_narrow_rows(function, loop), (), shares)
    assert counted == {"BRA": 2, "LDGSTS.E.BYPASS.128": 1, "HMMA.16816.F32.BF16": 1}


MARKED_SOURCE = """
if (whole) {
  copy();
} else {  // counted 0: rows are missing
  copy(
      rows);
}
if (warp == 0)  // counted 1/4
  add(
      sums);
{
  begin();
  if (token > own) continue;  // counted 5/8, 9/16 from here
  if (token == own) mask();  // counted 1/4, 1/8: its own tile
  end();
}
"""


@pytest.mark.parametrize(("chunk", "tile", "mask"), [(64, "5/8", "1/4"), (128, "9/16", "1/8")])
def test_marks_of_a_source(chunk, tile, mask):
    shares = {line: str(share) for line, share in counted_shares(MARKED_SOURCE, chunk).items()}
    without_rows, one_warp = {4: "0", 5: "0", 6: "0", 7: "0"}, {8: "1/4", 9: "1/4", 10: "1/4"}
    assert shares == {**without_rows, **one_warp, 13: tile, 14: mask, 15: tile, 16: tile}


# Instructions of line 5 are for missing rows, as the source above says; one of line 2 has moved there.
MARKED_LISTING = """
.L_x_0:
	//## File "/somewhere/csrc/cuda/marked.cuh", line 2
        /*0000*/               @!P0 BRA `(.L_x_2) ;
	//## File "/somewhere/csrc/cuda/device.cuh", line 70 inlined at "/somewhere/csrc/cuda/marked.cuh", line 5
	//## File "/somewhere/csrc/cuda/marked.cuh", line 5
        /*0010*/                   IADD3 R2, R2, 0x4, RZ ;
        /*0020*/                   LDGSTS.E.64 [R2], desc[UR4][R4.64] ;
        /*0030*/                   LDGSTS.E.64 [R2], desc[UR4][R4.64] ;
	//## File "/somewhere/csrc/cuda/marked.cuh", line 2
        /*0040*/                   BRA `(.L_x_1) ;
.L_x_2:
	//## File "/somewhere/csrc/cuda/marked.cuh", line 3
        /*0050*/                   LDGSTS.E.BYPASS.128 [R2], desc[UR4][R4.64] ;
.L_x_1:
	//## File "/somewhere/csrc/cuda/marked.cuh", line 5
        /*0060*/                   NOP ;
        /*0070*/               @P2 BRA `(.L_x_0) ;
        /*0080*/                   EXIT ;
"""


def test_marked_branches_are_not_counted(monkeypatch):
    monkeypatch.setattr(
        marks,
        "shares_of_file",
        lambda file, chunk: counted_shares(MARKED_SOURCE if file == "cuda/marked.cuh" else "", chunk),
    )
    function = Function(MARKED_LISTING.splitlines())
    (loop,) = function.loops
    counted = per_chunk(function, loop, (), shares_of_blocks(function, loop, 64))
    assert counted == {"BRA": 2, "LDGSTS.E.BYPASS.128": 1, "NOP": 1}


def test_widths_of_accesses():
    assert instructions.global_access("LDGSTS.E.BYPASS.128.ZFILL") == ("load", 16)
    assert instructions.global_access("LDG.E.U16.CONSTANT") == ("load", 2)
    assert instructions.global_access("STG.E.64") == ("store", 8)
    assert instructions.global_access("ST.E") == ("store", 4)
    assert instructions.global_access("STS.128") is None


# ---- kernels' times, with no GPU ----


def test_times_are_those_of_kernels_per_call():
    def event(key, microseconds, count, device_type=DeviceType.CUDA):
        return SimpleNamespace(
            key=key, self_device_time_total=microseconds, count=count, device_type=device_type
        )

    name = (
        "void rebased::cuda::tensor_core::forward_kernel<rebased::cuda::tensor_core::Slabs"
        "<rebased::cuda::bfloat16_t, 16>, (rebased::FeatureMap)0, false>(rebased::cuda::Arguments)"
    )
    events = [
        event("void at::native::(anonymous namespace)::copy_kernel<float>(int)", 3.0, 6),
        event(name, 600.0, 3),
        event("cudaLaunchKernel", 900.0, 9, DeviceType.CPU),
    ]
    first, second = profile.kernel_times(events, 3)
    assert first.pop("seconds") == pytest.approx(200e-6)
    assert second.pop("seconds") == pytest.approx(1e-6)
    assert first == {"kernel": "tensor_core::forward_kernel<bfloat16, 16, outer, false>", "launches": 1}
    assert second == {"kernel": events[0].key, "launches": 2}


def test_times_need_a_gpu(capsys):
    if profile.usable():
        pytest.skip("there is one")
    assert profile.main([]) == 1
    assert "torch sees no GPU" in capsys.readouterr().err


def test_every_call_is_timed_and_written(monkeypatch, tmp_path, capsys, one_thread):
    """On the CPU, in place of whose events stands what a GPU's would say, but for one of the calls."""
    of_events, projections, shapes = profile.kernel_times, profile.projections, []

    def inputs(shape, device):
        shapes.append(shape)
        return projections(shape, device)

    def kernel_times(events, profiled):
        assert len(events) > 0
        assert of_events(events, profiled) == []  # none was on a GPU
        is_elu = shapes[-1].feature_map == "elu"
        return [] if is_elu else [{"kernel": "some_kernel", "launches": 1.0, "seconds": 2e-3}]

    for size in profile.SIZES:
        monkeypatch.setitem(profile.SIZES, size, (1, 2, 40, 8))
    monkeypatch.setattr(profile, "DEVICE", "cpu")
    monkeypatch.setattr(profile, "usable", lambda: True)
    monkeypatch.setattr(profile, "ProfilerActivity", SimpleNamespace(CUDA=ProfilerActivity.CPU))
    monkeypatch.setattr(profile, "projections", inputs)
    monkeypatch.setattr(profile, "kernel_times", kernel_times)
    path = tmp_path / "kernels.json"
    assert profile.main(["--json", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "some_kernel" in printed
    assert "the profiler saw nothing" in printed
    contents = json.loads(path.read_text())
    assert contents["machine"]["torch"] == torch.__version__
    failed = [call["shape"]["feature_map"] for call in contents["calls"] if "failed" in call]
    assert failed == ["elu"]
    timed = [call for call in contents["calls"] if "failed" not in call]
    assert len(timed) == 13
    assert all(0 < call["forward"] < call["forward_backward"] for call in timed)
    assert [(step["sequences"], step["seconds"] > 0) for step in contents["steps"]] == [
        (256, True),
        (1, True),
    ] * 2
    assert profile.main(["--shapes", "R2"]) == 0
