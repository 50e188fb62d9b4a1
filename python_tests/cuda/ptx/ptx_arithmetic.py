"""Registers of the PTX interpreter's threads, and the instructions that only compute."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable

import numpy as np
from ptx_memory import TYPES
from ptx_numbers import DECODE, ENCODE, float_to_tf32, pack, unpack
from ptx_parser import Instruction, Kernel, PtxError

WIDER = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
COMPARISONS = {
    **{name: getattr(operator, name) for name in ("lt", "le", "gt", "ge", "eq", "ne")},
    "neu": operator.ne,  # the unordered ones are true for NaN
    "equ": lambda a, b: ~((a < b) | (a > b)),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "lo": operator.lt,
    "ls": operator.le,
    "hi": operator.gt,
    "hs": operator.ge,
}


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    quotient = np.abs(a) // np.abs(safe)  # integers round towards zero
    return np.where((a < 0) != (b < 0), -quotient, quotient) if a.dtype.kind == "i" else quotient


ARITHMETIC = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "mad": lambda a, b, c: a * b + c,
    "div": _divide,
    "rem": lambda a, b: a - b * _divide(a, b),
    "min": np.fmin,
    "max": np.fmax,
    "neg": operator.neg,
    "abs": np.abs,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "not": operator.invert,
    "mov": lambda a: a,
    "rcp": lambda a: 1 / a,
    "sqrt": np.sqrt,
    "rsqrt": lambda a: 1 / np.sqrt(a),
    "ex2": np.exp2,
    "lg2": np.log2,
}


class Registers:
    """Of all threads of a block: name -> array (threads). Those that were never written are all ones."""

    def __init__(self, kernel: Kernel, threads: int) -> None:
        self.kernel, self.threads = kernel, threads
        self.registers = {
            name: np.full(threads * TYPES[kind].itemsize, kind != "pred" and 0xFF, np.uint8).view(TYPES[kind])
            for name, kind in kernel.registers.items()
        }
        thread = np.arange(threads)
        self.special = {"%tid.x": thread, "%tid.y": 0, "%tid.z": 0, "%laneid": thread % 32, "WARP_SZ": 32}
        self.special.update({"%ntid.x": threads, "%ntid.y": 1, "%ntid.z": 1})
        self.symbols = {**kernel.parameters, **kernel.shared}
        self.active = np.ones(threads, bool)  # of the instruction being executed

    def read(self, operand: str, kind: str) -> np.ndarray:
        """The operand of all threads; of a wider register the low part."""
        dtype = TYPES[kind]
        if operand in self.registers:
            value = self.registers[operand]
            if value.dtype == bool or value.dtype.itemsize == dtype.itemsize:
                return value.view(dtype)
            return value.view(f"u{value.dtype.itemsize}").astype(f"u{dtype.itemsize}").view(dtype)
        if operand in self.special:
            return np.broadcast_to(self.special[operand], self.threads).astype(dtype)
        bits = re.fullmatch(r"0[fFdD]([0-9a-fA-F]+)", operand)
        number = (
            self.symbols[operand]
            if operand in self.symbols
            else int(bits[1], 16)
            if bits
            else int(operand, 0)
        )
        width = 8 * dtype.itemsize
        return np.full(self.threads, number & ((1 << width) - 1), f"u{dtype.itemsize}").view(dtype)

    def write(self, operand: str, value: np.ndarray, kind: str) -> None:
        """To the active threads; into a wider register extended, with the sign if `kind` has one."""
        if operand == "_":
            return
        target = self.registers[operand]
        value = np.broadcast_to(np.asarray(value).astype(TYPES[kind], copy=False), self.threads)
        if kind != "pred" and target.dtype.itemsize > value.dtype.itemsize:
            value = value.astype(f"{'i' if kind[0] == 's' else 'u'}{target.dtype.itemsize}")
        np.copyto(target, np.ascontiguousarray(value).view(target.dtype), where=self.active)


class Arithmetic(Registers):
    """An instruction foo.bar is run by the method _foo, or by arithmetic."""

    def arithmetic(self, instruction: Instruction) -> None:
        name, *words = instruction.words
        target, *sources = instruction.operands
        kind = words[-1]
        if kind in ("bf16x2", "f16x2"):
            self._pairs(instruction, ARITHMETIC[name])
        elif name == "mov" and "{" in target + sources[0]:
            self._move_parts(target, sources[0], kind)
        elif "wide" in words or "hi" in words:
            wide = WIDER[kind]
            a, b = (self.read(source, kind).astype(TYPES[wide]) for source in sources[:2])
            product = a * b
            if "hi" in words:
                self.write(target, product >> TYPES[wide].type(8 * TYPES[kind].itemsize), kind)
            else:
                self.write(target, product + self.read(sources[2], wide) if name == "mad" else product, wide)
        else:
            self.write(target, ARITHMETIC[name](*(self.read(source, kind) for source in sources)), kind)

    def _fma(self, instruction: Instruction) -> None:
        kind = instruction.words[-1]
        if kind in ("bf16x2", "f16x2"):
            self._pairs(instruction, lambda a, b, c: a * b + c)
            return
        a, b, c = (self.read(source, kind).astype(np.float64) for source in instruction.operands[1:])
        self.write(instruction.operands[0], a * b + c, kind)

    def _pairs(self, instruction: Instruction, function: Callable) -> None:
        kind = instruction.words[-1].removesuffix("x2")
        numbers = [unpack(self.read(source, "b32"), kind) for source in instruction.operands[1:]]
        low, high = (function(*(pair[half].astype(np.float64) for pair in numbers)) for half in (0, 1))
        self.write(instruction.operands[0], pack(low, high, kind), "b32")

    def _move_parts(self, target: str, source: str, kind: str) -> None:
        """mov of a register to or from its {low, high} parts."""
        targets, sources = (text.strip("{}").split(",") for text in (target, source))
        part = f"b{int(kind[1:]) // max(len(targets), len(sources))}"
        bits = TYPES[kind].type(int(part[1:]))
        if len(targets) > 1:
            value = self.read(sources[0], kind)
            for i, name in enumerate(targets):
                self.write(name, value >> (TYPES[kind].type(i) * bits), part)
        else:
            parts = [self.read(name, part).astype(TYPES[kind]) for name in sources]
            self.write(
                target, sum(value << (TYPES[kind].type(i) * bits) for i, value in enumerate(parts)), kind
            )

    def _shl(self, instruction: Instruction) -> None:
        kind = instruction.words[-1]
        value, count = self.read(instruction.operands[1], kind), self.read(instruction.operands[2], "u32")
        width = 8 * TYPES[kind].itemsize
        if instruction.words[0] == "shl":
            result = np.where(count < width, value << np.minimum(count, width - 1).astype(value.dtype), 0)
        elif kind[0] == "s":
            result = value >> np.minimum(count, width - 1).astype(value.dtype)
        else:
            result = np.where(count < width, value >> np.minimum(count, width - 1).astype(value.dtype), 0)
        self.write(instruction.operands[0], result, kind)

    _shr = _shl

    def _bfi(self, instruction: Instruction) -> None:
        target, source, into, position, length = instruction.operands
        begin, count = (int(self.read(operand, "u32")[0]) for operand in (position, length))
        mask = np.uint32(((1 << count) - 1) << begin & 0xFFFFFFFF)
        field = self.read(source, "b32") << np.uint32(begin)
        self.write(target, (field & mask) | (self.read(into, "b32") & ~mask), "b32")

    def _prmt(self, instruction: Instruction) -> None:
        """Each byte of the result is one of the eight of two registers, or its sign bit eight times."""
        target, low, high, selector = instruction.operands
        both = self.read(low, "b32").astype(np.uint64) | self.read(high, "b32").astype(
            np.uint64
        ) << np.uint64(32)
        selection = self.read(selector, "b32").astype(np.uint64)
        result = np.zeros(self.threads, np.uint64)
        for i in range(4):
            nibble = selection >> np.uint64(4 * i)
            byte = both >> (np.uint64(8) * (nibble & np.uint64(7))) & np.uint64(0xFF)
            sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
            result |= np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * i)
        self.write(target, result, "b32")

    def _setp(self, instruction: Instruction) -> None:
        kind = instruction.words[-1]
        if len(instruction.operands) != 3:
            raise PtxError("setp with a combination is not known here")
        a, b = (self.read(operand, kind) for operand in instruction.operands[1:])
        self.write(instruction.operands[0], COMPARISONS[instruction.words[1]](a, b), "pred")

    def _selp(self, instruction: Instruction) -> None:
        target, a, b, predicate = instruction.operands
        kind = instruction.words[-1]
        self.write(target, np.where(self.registers[predicate], self.read(a, kind), self.read(b, kind)), kind)

    def _cvt(self, instruction: Instruction) -> None:
        target, *sources = instruction.operands
        *_, to, source_kind = instruction.words
        if to in ("bf16x2", "f16x2"):
            high, low = (self.read(source, "f32") for source in sources)
            self.write(target, pack(low, high, to.removesuffix("x2")), "b32")
        elif to == "tf32":
            self.write(target, float_to_tf32(self.read(sources[0], "f32")), "b32")
        elif to in ENCODE:
            self.write(target, ENCODE[to](self.read(sources[0], source_kind)), "b16")
        elif source_kind in DECODE:
            self.write(target, DECODE[source_kind](self.read(sources[0], "b16")), to)
        else:
            value = self.read(sources[0], source_kind)
            if to[0] in "us" and source_kind[0] == "f" and "rzi" not in instruction.words:
                raise PtxError("only truncating conversions to integers are known here")
            self.write(target, value.astype(TYPES[to]), to)
