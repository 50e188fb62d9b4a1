"""The kernels of a compilation: readable names, what ptxas -v said, and how many blocks an SM holds."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.kernels.toolchain import (
    FLAGS,
    ROOT,
    Compilation,
    CompileError,
    cuda_program,
    host_program,
    run,
    toolkit_include,
)

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Kernel:
    name: str  # tensor_core::forward_kernel<bfloat16, outer, 16, false>
    symbol: str
    source: str  # the instance's file name without suffix
    architecture: int
    registers: int  # per thread
    spill_stores: int  # bytes per thread, as are the next two
    spill_loads: int
    stack_frame: int
    static_shared: int  # bytes per block
    dynamic_shared: int | None  # the same; None: depends on the problem
    barriers: int
    threads: int  # most per block, from the launch bounds
    asked_blocks: int  # blocks per SM that the launch bounds ask for
    blocks: int = 0  # per SM; where dynamic_shared is None, as if there were none

    @property
    def is_fast_path(self) -> bool:
        return self.name.startswith(("tensor_core::", "float32_path::"))

    @property
    def spills(self) -> bool:
        return self.spill_stores > 0 or self.spill_loads > 0


def read_kernels(compilation: Compilation) -> list[Kernel]:
    """Every kernel of the compilation, without `blocks` and without sizes of dynamic shared memory."""
    bounds = _launch_bounds(compilation.ptx.read_text())
    # ptxas also reports functions that it did not inline; only entries are kernels
    pattern = re.compile(
        r"Compiling entry function '(?P<symbol>\w+)'.*\n"
        r"(?:ptxas info\s*: Function properties for \w+\n"
        r"\s*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads\n)"
        r"ptxas info\s*: Used (?P<registers>\d+) registers(?P<rest>.*)"
    )
    kernels = []
    for entry in pattern.finditer(compilation.log):
        symbol, rest = entry["symbol"], entry["rest"]
        threads, asked_blocks, has_dynamic = bounds[symbol]

        def number(words: str, rest: str = rest) -> int:
            match = re.search(words, rest)
            return int(match.group(1)) if match else 0

        kernels.append(
            Kernel(
                readable_name(symbol),
                symbol,
                compilation.source.stem,
                compilation.architecture,
                int(entry["registers"]),
                int(entry["stores"]),
                int(entry["loads"]),
                int(entry["stack"]),
                number(r"(\d+) bytes smem"),
                None if has_dynamic else 0,
                number(r"used (\d+) barriers"),
                threads,
                asked_blocks,
            )
        )
    if len(kernels) != len(bounds):
        raise ValueError(
            f"{compilation.source.name}: {len(bounds)} kernels in the PTX, {len(kernels)} in ptxas' log"
        )
    return kernels


def _launch_bounds(ptx: str) -> dict[str, tuple[int, int, bool]]:
    """By symbol: threads per block, blocks per SM asked for, whether it uses dynamic shared memory."""
    bounds = {}
    for symbol, head, body in re.findall(r"\.entry (\w+)\((.*?)\n\{(.*?)\n\}", ptx, re.DOTALL):
        threads = re.search(r"\.maxntid (\d+)(?:, (\d+), (\d+))?", head)
        if threads is None:
            raise ValueError(f"{symbol} has no launch bounds")
        count = 1
        for size in threads.groups(default="1"):
            count *= int(size)
        blocks = re.search(r"\.minnctapersm (\d+)", head)
        bounds[symbol] = (count, int(blocks.group(1)) if blocks else 1, "dynamic_shared" in body)
    return bounds


# ---- names ----


@functools.cache
def _feature_maps() -> list[str]:
    header = (ROOT / "csrc/op/problem.h").read_text()
    return re.search(r"enum class FeatureMap \{([^}]*)\}", header).group(1).replace(" ", "").split(",")


@functools.cache
def readable_name(symbol: str) -> str:
    """A mangled symbol -> tensor_core::forward_kernel<bfloat16, outer, 16, false>."""
    return readable(run(["c++filt", symbol]).strip())


def readable(name: str) -> str:
    """The same of a demangled name."""
    name = re.sub(r"\(rebased::FeatureMap\)(\d+)", lambda match: _feature_maps()[int(match.group(1))], name)
    name = re.sub(r"^void |rebased::|cuda::", "", name)
    name = re.sub(r"tensor_core::Slabs<(\w+), (\d+)> ?", r"\1, \2", name)
    name = re.sub(r"tensor_core::polynomial::Shape<(\w+, \d+, \d+)> ?", r"\1", name)
    name = re.sub(r"tensor_core::elementwise::Shape<(\w+, \d+)> ?", r"\1", name)
    name = re.sub(r"tensor_core::polynomial::Slot<(\w+, \d+)> ?", r"\1", name)
    name = name.replace("bfloat16_t", "bfloat16").replace("half_t", "float16").replace("double", "float64")
    name = re.sub(r"\bfloat\b", "float32", name)
    depth = 0
    for i, character in enumerate(name):  # up to the parameters
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:i]
    return name


# ---- what a small program of our own computes ----


def with_dynamic_shared(kernels: list[Kernel]) -> list[Kernel]:
    """The kernels with `dynamic_shared` filled in where the launcher's arithmetic is known."""
    if not any(k.is_fast_path and k.dynamic_shared is None for k in kernels):
        return kernels
    program = host_program(HERE / "dynamic_shared_memory.cu", [cuda_program("nvcc"), *FLAGS, "-arch=sm_80"])
    lines = [line.split(" ", 1) for line in run([str(program)]).splitlines()]
    known = {name: int(size) for size, name in lines}
    for kernel in kernels:
        if kernel.is_fast_path and kernel.dynamic_shared is None and kernel.name not in known:
            raise CompileError(f"{kernel.name} is not in dynamic_shared_memory.cu")
    return [replace(k, dynamic_shared=known.get(k.name)) if k.dynamic_shared is None else k for k in kernels]


def with_blocks(kernels: list[Kernel]) -> list[Kernel]:
    """The kernels with `blocks` filled in."""
    program = host_program(HERE / "occupancy.cpp", ["g++", "-std=c++17", "-isystem", str(toolkit_include())])
    lines = [
        f"{k.architecture} {k.threads} {k.registers} {k.static_shared} {k.dynamic_shared or 0} {k.barriers}"
        for k in kernels
    ]
    output = run([str(program)], stdin="\n".join(lines)).splitlines()
    return [replace(k, blocks=int(line.split()[0])) for k, line in zip(kernels, output, strict=True)]
