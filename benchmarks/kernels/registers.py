"""Registers, spills, shared memory and blocks per SM of every kernel, by ptxas -v and cuda_occupancy.h.

Threads per block are the launch bounds' (the general path may launch fewer). Dynamic shared memory is the
launcher's for the tensor-core and float32 paths; the general path's depends on the problem: its blocks per SM
are at most those shown.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.kernels.kernel import Kernel, read_kernels, with_blocks, with_dynamic_shared
from benchmarks.kernels.report import format_table, write_json
from benchmarks.kernels.toolchain import (
    CompileError,
    ToolMissingError,
    compile_all,
    compiler_release,
    instances,
)

CHECKED_ARCHITECTURES = (80, 90)
FAST_PATHS = ("float32_*", "tensor_core_*")  # the instances whose kernels are checked
OUTER_FORWARD = "tensor_core::polynomial::forward_kernel<bfloat16, outer, 16, 64, false>"
SQUARE_FORWARD = "tensor_core::elementwise::forward_kernel<bfloat16, square, 16, false>"
FLOAT32_FORWARD = "float32_path::forward_kernel<outer>"
# Blocks per SM that must fit. Shared memory is what grad_kv has least of, at sm_80.
LEAST_BLOCKS = {OUTER_FORWARD: 2, SQUARE_FORWARD: 3, FLOAT32_FORWARD: 2}
LEAST_BLOCKS |= {
    f"tensor_core::polynomial::{kernel}<bfloat16, {feature_map}, 16, 64, {grouped}>": 2
    for kernel in ("forward_kernel", "grad_q_kernel", "grad_kv_kernel")
    for feature_map in ("outer", "taylor")
    for grouped in ("false", "true")
}
# Chunks of 128 tokens are for devices with 227 KB a block.
LEAST_BLOCKS_OF_LONGER_CHUNKS = 2


def collect(pattern: str, architectures: list[int]) -> tuple[list[Kernel], list[str]]:
    """The kernels, each once per architecture (some are in several files), and what went wrong."""
    errors: list[str] = []
    compilations = compile_all(instances(pattern), architectures, lambda error: errors.append(str(error)))
    once = {(k.architecture, k.name): k for c in compilations for k in read_kernels(c)}
    kernels = sorted(once.values(), key=lambda k: (not k.is_fast_path, k.name, k.architecture))
    try:
        kernels = with_dynamic_shared(kernels)
    except CompileError as error:
        errors.append(f"dynamic shared memory of a fast path is unknown:\n{error}")
    return with_blocks(kernels), errors


def table(kernels: list[Kernel]) -> str:
    heading = ("kernel", "sm", "registers", "spill", "stack", "static", "dynamic", "threads", "blocks/SM")
    rows = [heading]
    for k in kernels:
        unknown = k.dynamic_shared is None
        rows.append(
            (
                k.name,
                str(k.architecture),
                str(k.registers),
                f"{k.spill_stores}/{k.spill_loads}" if k.spills else "0",
                str(k.stack_frame),
                str(k.static_shared),
                "?" if unknown else str(k.dynamic_shared),
                str(k.threads),
                f"<= {k.blocks}" if unknown else str(k.blocks),
            )
        )
    return format_table(rows)


def spill_text(kernel: Kernel) -> str:
    sizes = f"{kernel.spill_stores} + {kernel.spill_loads} bytes"
    return f"{kernel.name} at sm_{kernel.architecture}: spills {sizes}"


def problems(kernels: list[Kernel]) -> list[str]:
    """What --check fails for."""
    found = []
    for k in kernels:
        if not k.is_fast_path or k.architecture not in CHECKED_ARCHITECTURES:
            continue
        if k.spills:
            found.append(spill_text(k))
        least = LEAST_BLOCKS.get(k.name, 1)
        if "polynomial::" in k.name and ", 128" in k.name and k.architecture >= 90:
            least = LEAST_BLOCKS_OF_LONGER_CHUNKS
        if k.blocks < least:
            found.append(f"{k.name} at sm_{k.architecture}: {k.blocks} blocks per SM, not {least}")
    known = {(k.name, k.architecture) for k in kernels}
    for architecture in CHECKED_ARCHITECTURES:
        for name in LEAST_BLOCKS:
            if (name, architecture) not in known:
                found.append(f"{name} at sm_{architecture}: not found")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.registers", description=__doc__)
    parser.add_argument("--architectures", type=int, nargs="+", default=list(CHECKED_ARCHITECTURES))
    parser.add_argument(
        "--instances", default="*", help="only files whose name matches, like tensor_core_forward*"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures, like benchmarks/results/x.json"
    )
    parser.add_argument(
        "--check", action="store_true", help="fail if a fast path's kernel spills, or too few blocks fit"
    )
    options = parser.parse_args(arguments)

    kernels, errors = collect(options.instances, options.architectures)
    print(f"{compiler_release()}. Bytes; spill = stores/loads per thread; ?, <=: depends on the problem")
    print(table(kernels))
    for k in kernels:
        if k.spills and not k.is_fast_path:
            print(f"note, not on the fast path: {spill_text(k)}")
        if k.blocks < k.asked_blocks:
            asked = f"its launch bounds ask for {k.asked_blocks}"
            print(f"note: {k.name} at sm_{k.architecture}: {k.blocks} blocks per SM, {asked}")
    if options.json and not errors:  # never incomplete ones
        command = "python -m benchmarks.kernels.registers"
        rows = [{key: value for key, value in asdict(k).items() if key != "symbol"} for k in kernels]
        write_json(options.json, command, arguments, {}, rows)
    if options.check:
        errors += problems(kernels)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ToolMissingError as error:
        sys.exit(f"error: {error}")
