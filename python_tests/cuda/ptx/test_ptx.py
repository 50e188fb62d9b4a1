"""Runs the PTX that nvcc emits, in ptx_interpreter.py: device.cuh's inline assembly, which the emulated build
does not see, and the whole tensor-core forward."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import ptx_interpreter
import ptx_numbers
import pytest
import torch
from ptx_memory import GlobalMemory
from ptx_parser import Kernel, PtxError, parse_kernels

from benchmarks.kernels import instructions, toolchain
from rebased_cuda import reference

HERE = Path(__file__).parent
ARCHITECTURES = (80, 90)

try:
    toolchain.cuda_program("nvcc")
except toolchain.ToolMissingError as error:
    pytestmark = pytest.mark.skip(reason=str(error))
else:
    pytestmark = pytest.mark.slow


@cache
def compiled(source: str, architecture: int) -> dict[str, Kernel]:
    return parse_kernels(toolchain.compile_source(HERE / source, architecture).ptx.read_text())


def find(kernels: dict[str, Kernel], name: str) -> Kernel:
    """The kernel with this name in its mangled symbol."""
    (symbol,) = (symbol for symbol in kernels if re.search(rf"\d{name}(?=[EIP])", symbol))
    return kernels[symbol]


def run_wrapper(name: str, architecture: int, inputs: list[np.ndarray], count: int, dtype: str) -> np.ndarray:
    """Runs a kernel of ptx_wrappers.cu, whose parameters are pointers: inputs, then `count` results."""
    memory = GlobalMemory()
    addresses = [memory.upload(array) for array in inputs]
    out = memory.allocate(count, dtype)
    parameters = np.array([*addresses, out], np.uint64).tobytes()
    kernel = find(compiled("ptx_wrappers.cu", architecture), name)
    ptx_interpreter.launch(kernel, memory, (1, 1, 1), 32, parameters)
    return memory.download(out, count, dtype)


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits, rounded by torch."""
    return (
        torch.from_numpy(np.asarray(values, np.float32)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    )


def half(values: np.ndarray) -> np.ndarray:
    return np.asarray(values).astype(np.float16).view(np.uint16)


def pair(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_numbers(architecture):
    random = np.random.default_rng(0)
    a, b = (random.standard_normal(32).astype(np.float32) for _ in range(2))
    a[:3] = 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-11  # ties of bfloat16, of tf32
    halves = random.integers(0, 0x7C00, 32).astype(np.uint16)
    out = run_wrapper("numbers", architecture, [a, b, halves], 13 * 32, "u4").reshape(13, 32)
    float_of = {bfloat16: ptx_numbers.bfloat16_to_float, half: ptx_numbers.half_to_float}
    np.testing.assert_array_equal(out[0], bfloat16(a))
    np.testing.assert_array_equal(out[1], half(a))
    np.testing.assert_array_equal(out[2].view(np.float32), halves.view(np.float16).astype(np.float32))
    for row, kind in ((0, bfloat16), (1, half)):
        x, y = float_of[kind](kind(a)), float_of[kind](kind(b))
        np.testing.assert_array_equal(out[3 + row], pair(kind(a), kind(b)))
        np.testing.assert_array_equal(out[5 + row], pair(kind(x * y), kind(y * y)))
        np.testing.assert_array_equal(out[7 + row], pair(kind(x + y), kind(y + y)))
    mantissa = np.frexp(a)[0]  # in [0.5, 1): 10 bits after the leading one are multiples of 2^-11
    tf32 = np.ldexp(np.sign(a) * np.floor(np.abs(mantissa) * 2**11 + 0.5) / 2**11, np.frexp(a)[1])
    np.testing.assert_array_equal(out[9].view(np.float32), tf32.astype(np.float32))
    np.testing.assert_allclose(out[10].view(np.float32), 1 / a, rtol=2e-7)
    np.testing.assert_allclose(out[12].view(np.float32), np.abs(a), rtol=2e-7)
    assert set(out[11]) == {sum(1 << lane for lane in range(32) if a[lane] > b[lane])}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_exchanges(architecture):
    x = np.random.default_rng(1).integers(0, 2**32, 32, np.uint64).astype(np.uint32)
    out = run_wrapper("exchanges", architecture, [x], 5 * 32, "u4").reshape(5, 32)
    lane = np.arange(32)
    np.testing.assert_array_equal(out[0], x[::-1])
    np.testing.assert_array_equal(out[1], x[lane ^ 5])
    np.testing.assert_array_equal(out[2], np.concatenate([x[:3], x[:-3]]))
    np.testing.assert_array_equal(out[3], np.concatenate([x[3:], x[-3:]]))
    np.testing.assert_array_equal(out[4], lane)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_matrices(architecture):
    """Element (row, column) of matrix m is 64 m + 8 row + column."""
    rows = np.arange(256, dtype=np.uint16)
    out = run_wrapper("matrices", architecture, [rows], 15 * 32, "u4").reshape(15, 32)
    group, t = np.arange(32) // 4, np.arange(32) % 4
    plain = [pair(64 * m + 8 * group + 2 * t, 64 * m + 8 * group + 2 * t + 1) for m in range(4)]
    transposed = [pair(64 * m + 8 * (2 * t) + group, 64 * m + 8 * (2 * t + 1) + group) for m in range(4)]
    expected = [plain[0], *plain[:2], *plain, transposed[0], *transposed[:2], *transposed, plain[0]]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_stored_matrices(architecture):
    tile = np.arange(256, dtype=np.uint16).reshape(16, 16)
    group, t = np.arange(32) // 4, np.arange(32) % 4
    corners = [(group + 8 * (i % 2), 2 * t + 8 * (i // 2)) for i in range(4)]
    registers = np.stack([pair(tile[row, column], tile[row, column + 1]) for row, column in corners])
    out = run_wrapper("stored_matrices", architecture, [registers], 2 * 16 * 72, "u2").reshape(2, 16, 72)
    expected = np.full((2, 16, 72), 0xFFFF, np.uint16)
    expected[0, :, :16] = tile
    expected[1, :8, :16] = tile[:8]
    expected[1, 8:, 16:32] = tile[8:]
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["bfloat16", "half", "bfloat16_k8", "half_k8", "tf32"])
def test_products(kind, architecture):
    """Small integers, so that every sum is exact."""
    random = np.random.default_rng(2)
    depth = 16 if kind in ("bfloat16", "half") else 8
    a, b, d = (
        random.integers(-8, 9, shape).astype(np.float32) for shape in ((16, depth), (depth, 8), (16, 8))
    )
    g, t = np.arange(32) // 4, np.arange(32) % 4
    if kind == "tf32":
        registers = [a[g, t], a[g + 8, t], a[g, t + 4], a[g + 8, t + 4], b[t, g], b[t + 4, g]]
        fragments = [register.view(np.uint32) for register in registers]
    else:
        bits = {"bfloat16": bfloat16, "half": half}[kind.removesuffix("_k8")]
        # the wrapper reads four registers of a and two of b, of which the product of depth 8 uses the first
        second = 2 * t + depth - 8
        places = [(g, 2 * t), (g + 8, 2 * t), (g, second), (g + 8, second)]
        fragments = [pair(bits(a[row, column]), bits(a[row, column + 1])) for row, column in places]
        fragments += [pair(bits(b[row, g]), bits(b[row + 1, g])) for row in (2 * t, second)]
    corners = [(g, 2 * t), (g, 2 * t + 1), (g + 8, 2 * t), (g + 8, 2 * t + 1)]
    fragments += [d[corner].view(np.uint32) for corner in corners]
    out = run_wrapper(f"product_{kind}", architecture, [np.stack(fragments)], 4 * 32, "f4").reshape(4, 32)
    np.testing.assert_array_equal(out, [(a @ b + d)[corner] for corner in corners])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_copies(architecture):
    source = np.random.default_rng(3).integers(0, 2**32, (32, 4), np.uint64).astype(np.uint32)
    out = run_wrapper("copies", architecture, [source], 4 * 128, "u4").reshape(4, 32, 4)
    lane = np.arange(32)[:, None]
    np.testing.assert_array_equal(out[0], np.where(lane % 2, source, 0))
    np.testing.assert_array_equal(out[1], np.where((lane % 2 == 1) | (np.arange(4) % 2 == 0), source, 0))
    np.testing.assert_array_equal(out[2], np.where(lane % 3, source, 0))
    np.testing.assert_array_equal(out[3], source)


# ---- which inline assembly is covered ----


def assembly_in_source() -> set[str]:
    """The opcodes of every asm statement of device.cuh."""
    text = (toolchain.ROOT / "csrc/cuda/device/device.cuh").read_text()
    statements = re.findall(r"\basm(?: volatile)?\(\s*\"([^\"]*)\"", text)
    return {re.split(r"[\s;]", statement)[0] for statement in statements}


def inline_opcodes(kernels: dict[str, Kernel]) -> set[str]:
    return {step.opcode for kernel in kernels.values() for step in kernel.code if step.inline}


def test_every_asm_statement_is_tested():
    """ptx_wrappers.cu has each of device.cuh's, and the tests above run all of that file."""
    covered = set().union(*(inline_opcodes(compiled("ptx_wrappers.cu", a)) for a in ARCHITECTURES))
    assert covered == assembly_in_source()
    tested = {
        "numbers",
        "exchanges",
        "matrices",
        "stored_matrices",
        "copies",
        "product_bfloat16",
        "product_half",
        "product_bfloat16_k8",
        "product_half_k8",
        "product_tf32",
    }
    kernels = compiled("ptx_wrappers.cu", 80)
    assert {kernel.name for kernel in kernels.values()} == {find(kernels, name).name for name in tested}
    for kernel in kernels.values():
        assert not any(step.predicate and step.inline for step in kernel.code), (
            "inline assembly may not have run"
        )


# ---- the tensor-core forward ----

# in the order of op/problem.h
MAPS = ("outer", "square", "taylor", "elu")
ELEMENTWISE = ("square", "elu")  # their kernels for whole rows have chunks of 64 tokens
DTYPES = ("fp32", "fp64", "fp16", "bf16")
HEAD_NORM = 2
SCALE, EPS, LAYER_NORM_EPS = 0.25, 1e-6, 1e-5
HEAD_DIM = 64


def inputs(seqlen: int, head_dim: int = HEAD_DIM) -> dict[str, torch.Tensor]:
    """For one head; q, k and v are bfloat16 numbers."""
    torch.manual_seed(4)
    widths = {"q": 16, "k": 16, "v": head_dim}
    tensors = {name: torch.randn(1, 1, seqlen, width).bfloat16().float() for name, width in widths.items()}
    for name in ("gamma_q", "beta_q", "gamma_k", "beta_k"):
        tensors[name] = torch.randn(16) * 0.3 + name.startswith("gamma")
    return tensors


@dataclass
class Result:
    y: torch.Tensor  # (seqlen, head_dim)
    r: torch.Tensor  # (seqlen)
    kv: torch.Tensor  # (features, head_dim)
    k: torch.Tensor  # (features)
    executed: Counter[str]  # warp instructions by opcode


def forward(
    feature_map: str,
    architecture: int,
    seqlen: int,
    dtype: str = "bf16",
    edit: Callable[[str], str] = str,
    y_rows: int | None = None,
    chunk: int = 0,
    head_dim: int = HEAD_DIM,
) -> Result:
    """What the kernel makes of inputs(seqlen, head_dim), with layer_norm="head" and a final state.

    `edit` may change the PTX; y_rows is for how many rows y has room. `chunk`: of the kernel with that chunk
    length, or 0 for the kernel that the elementwise maps have for rows in narrow pieces.
    """
    memory = GlobalMemory()
    arrays = {name: x.numpy() for name, x in inputs(seqlen, head_dim).items()}
    bits = {"bf16": bfloat16, "fp16": half}[dtype]
    addresses = [memory.upload(bits(x) if name in "qkv" else x) for name, x in arrays.items()]
    features = reference.num_features(feature_map, 16)
    sizes = [(y_rows or seqlen) * head_dim, seqlen, features * head_dim, features]
    results = [
        memory.allocate(size, dtype) for size, dtype in zip(sizes, ("u2", "f4", "f4", "f4"), strict=True)
    ]

    program = toolchain.host_program(
        HERE / "ptx_arguments.cu", [toolchain.cuda_program("nvcc"), *toolchain.FLAGS]
    )
    options = [chunk, DTYPES.index(dtype), MAPS.index(feature_map), HEAD_NORM, 1, 1, seqlen, head_dim]
    options += [SCALE, EPS, LAYER_NORM_EPS]
    numbers = " ".join(map(str, [*options, *addresses, *results]))
    x, y, threads, dynamic_shared, parameters = toolchain.run([str(program)], numbers).split()

    source = toolchain.ROOT / f"csrc/cuda/instances/tensor_core_forward_{dtype}_{feature_map}.cu"
    ptx = edit(toolchain.compile_source(source, architecture).ptx.read_text())
    kernel = one_head_kernel(ptx, feature_map, chunk)
    grid = (int(x), int(y), 1)
    counts = ptx_interpreter.launch(
        kernel, memory, grid, int(threads), bytes.fromhex(parameters), int(dynamic_shared)
    )
    executed: Counter[str] = Counter()
    for index, warps in counts.items():
        executed[kernel.code[index].opcode] += warps
    r, kv, k = (
        torch.from_numpy(memory.download(address, size, "f4"))
        for address, size in zip(results[1:], sizes[1:], strict=True)
    )
    to_float = {"bf16": ptx_numbers.bfloat16_to_float, "fp16": ptx_numbers.half_to_float}[dtype]
    y = torch.from_numpy(to_float(memory.download(results[0], sizes[0], "u2")).reshape(-1, head_dim))
    return Result(y, r, kv.reshape(features, head_dim), k, executed)


def one_head_kernel(ptx: str, feature_map: str, chunk: int) -> Kernel:
    """forward_kernel<T, S, false>, the instance for one query head per kv head."""
    shape = "5Slabs" if not chunk else "5Shape" if feature_map in ELEMENTWISE else rf"5Shape.*Li{chunk}E"
    pattern = rf"14forward_kernelI.*{shape}.*Lb0E"
    (kernel,) = (k for name, k in parse_kernels(ptx).items() if re.search(pattern, name))
    return kernel


def exact(feature_map: str, seqlen: int, head_dim: int = HEAD_DIM) -> tuple[torch.Tensor, ...]:
    """y, 1 / r, kv and k in float64."""
    tensors = {name: x.double() for name, x in inputs(seqlen, head_dim).items()}
    options = {"feature_map": feature_map, "layer_norm": "head", "scale": SCALE}
    y, (kv, k) = reference.chunked(*tensors.values(), **options, eps=EPS, return_state=True)
    del tensors["v"]
    scores = reference.attention_matrix(*tensors.values(), **options, normalize=False)
    return y[0, 0], scores[0, 0].sum(-1) + EPS, kv[0, 0], k[0, 0]


def plain(feature_map: str, seqlen: int, head_dim: int) -> torch.Tensor:
    """y in plain PyTorch with q', k', v and the scores rounded to 16 bits, as the kernel rounds them."""
    kind = torch.bfloat16
    q, k, v, *affine = inputs(seqlen, head_dim).values()
    q = reference.normalise(q, *affine[:2], "head").to(kind)
    k = reference.normalise(k, *affine[2:], "head").to(kind)
    scores = reference.sim(q, k, feature_map, SCALE).tril()
    return ((scores @ v.to(kind)).float() / (scores.float().sum(-1, keepdim=True) + EPS))[0, 0]


def relative_error(x: torch.Tensor, exact: torch.Tensor) -> float:
    return float((x.double() - exact).norm() / exact.norm())


def error_bound(feature_map: str, seqlen: int, head_dim: int = HEAD_DIM) -> float:
    rounded, y = plain(feature_map, seqlen, head_dim), exact(feature_map, seqlen, head_dim)[0]
    return 1.25 * relative_error(rounded, y)


WHOLE_ROWS = [("square", 0), ("elu", 0), ("outer", 64), ("outer", 128), ("taylor", 64)]
WHOLE_ROWS += [(name, 64) for name in ELEMENTWISE]
NARROW_ROWS = [("outer", 128, 21), ("outer", 64, 12)]  # in pieces of 2 and of 8 bytes
KERNELS = [*((*kernel, HEAD_DIM) for kernel in WHOLE_ROWS), *NARROW_ROWS]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("feature_map", "chunk", "head_dim"), KERNELS)
def test_forward(feature_map, chunk, head_dim, architecture):
    """Against the float64 reference; two chunks, the second with rows missing."""
    seqlen, unit = max(chunk, 64) + 13, 2**-8
    result = forward(feature_map, architecture, seqlen, chunk=chunk, head_dim=head_dim)
    y, inverse_r, kv, k = exact(feature_map, seqlen, head_dim)
    assert relative_error(result.y, y) <= error_bound(feature_map, seqlen, head_dim)
    assert relative_error(1 / result.r, inverse_r) < unit
    assert relative_error(result.kv, kv) < unit
    assert relative_error(result.k, k) < unit


@pytest.mark.parametrize(("feature_map", "chunk"), WHOLE_ROWS)
def test_products_per_chunk(feature_map, chunk):
    """benchmarks.kernels.instructions counts in machine code as many as run; an mma is one HMMA."""
    tokens, warps = 2 * (chunk or 64), 4
    executed = forward(feature_map, 90, tokens, chunk=chunk).executed
    ran = sum(count for opcode, count in executed.items() if opcode.startswith("mma.sync"))
    try:
        figures, errors = instructions.collect(f"tensor_core_forward_bf16_{feature_map}", [90])
    except toolchain.ToolMissingError as error:
        pytest.skip(str(error))
    folder = "" if not chunk else "elementwise::" if feature_map in ELEMENTWISE else "polynomial::"
    shape = f", {chunk}" if folder == "polynomial::" else ""
    name = f"tensor_core::{folder}forward_kernel<bfloat16, {feature_map}, 16{shape}, false>"
    (counted,) = (f for f in figures if f.name == name)
    assert not errors
    assert counted.chunk_opcodes["HMMA"] == round(ran / warps / (tokens / 64))


FAULTS = {
    "no wait for a copy": (r"cp\.async\.wait_group 0", "cp.async.wait_group 9"),
    "a load not transposed": (r"x4\.trans\.shared", "x4.shared"),
    "halves exchanged": (r"(cvt\.rn\.bf16x2\.f32\s+%\w+), (%\w+), (%\w+)", r"\1, \3, \2"),
    "rows of b exchanged": (r"(mma.*, \{%r\d+, [^}]*\}), \{(%r\d+), (%r\d+)\}", r"\1, {\3, \2}"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_found(fault):
    pattern, replacement = FAULTS[fault]
    edited = []

    def edit(ptx: str) -> str:
        text, count = re.subn(pattern, replacement, ptx)
        edited.append(count)
        return text

    try:
        error = relative_error(forward("square", 90, 50, edit=edit).y, exact("square", 50)[0])
    except PtxError:
        error = float("nan")
    assert edited[0] > 0
    assert not error <= error_bound("square", 50)  # nor is NaN


def test_a_write_past_the_end_is_found():
    with pytest.raises(PtxError, match="global access out of bounds"):
        forward("square", 90, 50, y_rows=49)
