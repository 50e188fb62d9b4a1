"""Reads PTX as nvcc emits it, as far as ptx_interpreter.py needs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class PtxError(Exception):
    """What the text, or a thread of it, may not do; or an instruction that is not known here."""


@dataclass(frozen=True)
class Instruction:
    opcode: str  # mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32
    operands: tuple[str, ...]  # "%r1", "{%r1,%r2}", "[%rd1+8]", "16", "0f3F800000", a symbol
    predicate: str  # a register, or "" for none
    negated: bool
    inline: bool  # from an asm statement of the source
    text: str

    @property
    def words(self) -> list[str]:
        return self.opcode.split(".")


@dataclass
class Kernel:
    name: str
    parameters: dict[str, int] = field(default_factory=dict)  # symbol -> offset in the parameter block
    parameter_bytes: int = 0
    registers: dict[str, str] = field(default_factory=dict)  # name -> type without its dot
    shared: dict[str, int] = field(default_factory=dict)  # symbol -> offset in shared memory
    static_shared_bytes: int = 0
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # -> index into code


def parse_kernels(text: str) -> dict[str, Kernel]:
    """Every kernel of a PTX file by its symbol."""
    entries = re.finditer(r"\.entry (\w+)\((.*?)\)(.*?)\n\{\n(.*?)\n\}", text, re.DOTALL)
    dynamic = re.findall(r"\.extern \.shared [^;]*?(\w+)\[\];", text)
    return {entry[1]: _parse_kernel(entry[1], entry[2], entry[4], dynamic) for entry in entries}


def _align(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _parse_kernel(name: str, parameters: str, body: str, dynamic: list[str]) -> Kernel:
    kernel = Kernel(name)
    for parameter in parameters.split(","):
        if not parameter.strip():
            continue
        array = re.search(r"\.align (\d+) \.b8 ([\w$]+)\[(\d+)\]", parameter)
        if array:
            alignment, symbol, size = int(array[1]), array[2], int(array[3])
        else:
            kind, symbol = re.search(r"\.param \.(\w+) (?:\.ptr.*? )?(\w+)\s*$", parameter).groups()
            alignment = size = int(kind[1:]) // 8
        offset = _align(kernel.parameter_bytes, alignment)
        kernel.parameters[symbol] = offset
        kernel.parameter_bytes = offset + size

    offset = 0
    inline = False
    for line in _statements(body):
        if "inline asm" in line:
            inline = line.startswith("// begin")
        elif line.startswith(".reg"):
            _declare_registers(kernel, line)
        elif line.startswith(".shared"):
            alignment, symbol, size = re.search(r"\.align (\d+) \.b8 ([\w$]+)\[(\d+)\]", line).groups()
            offset = _align(offset, int(alignment))
            kernel.shared[symbol] = offset
            offset += int(size)
        elif line.startswith(".local"):
            raise PtxError(f"{name} keeps an array in local memory: {line}")
        elif line.startswith("."):
            continue  # .loc, .pragma
        else:
            label = re.fullmatch(r"(\$?\w+):", line)
            if label:
                kernel.labels[label[1]] = len(kernel.code)
            else:
                kernel.code.append(_parse_instruction(line, inline))
    kernel.static_shared_bytes = offset
    for symbol in dynamic:
        kernel.shared[symbol] = _align(offset, 128)
    return kernel


def _statements(body: str) -> list[str]:
    """Instructions, labels, declarations and the comments around inline assembly, one each."""
    statements = []
    for line in body.splitlines():
        code, slashes, comment = line.partition("//")
        if "inline asm" in comment:
            statements.append(slashes + comment)
        for part in re.split(r"(?<=:)\s|;", code):
            part = part.strip()
            if part and part not in "{}":
                statements.append(part)
    return statements


def _declare_registers(kernel: Kernel, line: str) -> None:
    kind, names = re.fullmatch(r"\.reg \.(\w+)\s+(.*)", line).groups()
    for name in names.split(","):
        several = re.fullmatch(r"(%\w+)<(\d+)>", name.strip())
        if several:
            kernel.registers.update({f"{several[1]}{i}": kind for i in range(int(several[2]))})
        else:
            kernel.registers[name.strip()] = kind


def _parse_instruction(line: str, inline: bool) -> Instruction:
    match = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", line)
    if not match:
        raise PtxError(f"not understood: {line}")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", match[4])
    return Instruction(
        opcode=match[3],
        operands=tuple(operand.replace(" ", "") for operand in operands),
        predicate=match[2] or "",
        negated=match[1] == "!",
        inline=inline,
        text=line,
    )
