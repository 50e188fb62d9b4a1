"""Whether every kernel has the machine code that it has in another checkout, as after a move it must.

A kernel is the same if its instructions, registers and static shared memory are. Of one that differs, the
opcodes whose counts have changed are shown. A source whose preprocessed text is the same is compiled once.
"""

from __future__ import annotations

import argparse
import hashlib
import struct
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from benchmarks.kernels.kernel import read_kernels
from benchmarks.kernels.sass import Function, disassemble
from benchmarks.kernels.toolchain import (
    ROOT,
    Compilation,
    ToolMissingError,
    compile_all,
    instances,
)

Place = tuple[str, str, int]  # source, kernel, architecture


@dataclass(frozen=True)
class Code:
    """What a compilation made of one kernel."""

    digest: str  # of its instructions
    registers: int
    shared: int  # bytes, static


def digests(cubin: bytes) -> dict[str, str]:
    """By symbol, a hash of every kernel's instructions: those of the ELF section .text.SYMBOL."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + i * size) for i in range(count)]
    found = {}
    for name, _, _, _, offset, length, *_ in sections:
        begin = sections[names][4] + name
        kind, _, symbol = cubin[begin : cubin.index(b"\0", begin)].decode().rpartition(".")
        if kind == ".text":
            found[symbol] = hashlib.sha256(cubin[offset : offset + length]).hexdigest()
    return found


def kernels_of(compilations: list[Compilation]) -> dict[Place, tuple[Code, Compilation, str]]:
    found = {}
    for one in compilations:
        code = digests(one.cubin.read_bytes())
        for kernel in read_kernels(one):
            place = (one.source.name, kernel.name, one.architecture)
            of_kernel = Code(code[kernel.symbol], kernel.registers, kernel.static_shared)
            found[place] = (of_kernel, one, kernel.symbol)
    return found


def changed_opcodes(one: Function, other: Function) -> str:
    before, after = (Counter(i.opcode for i in f.instructions) for f in (one, other))
    changes = [f"{code} {before[code]} -> {after[code]}" for code in sorted(before | after)]
    return ", ".join(text for text in changes if len(set(text.split()[1::2])) > 1) or "only their order"


def differences(before: list[Compilation], after: list[Compilation]) -> tuple[int, list[str]]:
    """How many kernels both have, and a line for each that is missing, new, or not the same."""
    old, new = kernels_of(before), kernels_of(after)
    lines = []
    for place in sorted(old.keys() | new.keys()):
        label = f"{place[0]} {place[1]} sm_{place[2]}"
        if place not in old or place not in new:
            lines.append(f"{label}: only in the {'other' if place in old else 'this'} checkout")
            continue
        (code, one, symbol), (now, other, symbol_now) = old[place], new[place]
        if code != now:
            opcodes = changed_opcodes(disassemble(one.cubin)[symbol], disassemble(other.cubin)[symbol_now])
            lines.append(
                f"{label}: registers {code.registers} -> {now.registers}, shared memory {code.shared} -> "
                f"{now.shared}; instructions: {opcodes}"
            )
    return len(old.keys() & new.keys()), lines


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.same_code", description=__doc__)
    parser.add_argument("folder", type=Path, help="another checkout, like one of the commit before")
    parser.add_argument("--architectures", type=int, nargs="+", default=[80, 90])
    parser.add_argument("--instances", default="*", help="only files whose name matches, like step_*")
    options = parser.parse_args(arguments)

    errors: list[str] = []
    compilations = []
    for root in (options.folder.resolve(), ROOT):
        sources = instances(options.instances, root)
        if not sources:
            errors.append(f"no kernels in {root / 'csrc/cuda/instances'}")
        compilations.append(
            compile_all(sources, options.architectures, lambda error: errors.append(str(error)), root)
        )
    both, lines = differences(*compilations)
    for line in [*lines, *errors]:
        print(line)
    changed = "the same" if not lines else f"{len(lines)} differences"
    print(f"{both} kernels in both: {changed}")
    return 1 if lines or errors else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ToolMissingError as error:
        sys.exit(f"error: {error}")
