"""Runs kernels as nvcc compiled them to PTX, in numpy: to test, with no GPU, the inline assembly that the
emulated build replaces, and what the compiler made of the rest.

The threads of a block run in step: the next instruction is always the one at the lowest address that some
thread has reached, for all threads there. So threads that took different branches meet again where their ways
join. Found and reported as PtxError: accesses out of bounds or misaligned, barriers and warp instructions
that only some threads reach, copies that nobody waited for. Shared memory and registers start as NaN, and an
asynchronous copy arrives only at its wait, so that what is read too early shows in the results.

Not modelled: rounding inside a tensor core, approximate reciprocals and roots (they are exact here), races.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import ptx_warp
from ptx_arithmetic import ARITHMETIC, Arithmetic
from ptx_memory import GLOBAL_BASE, SHARED_WINDOW, TYPES, GlobalMemory, check_range, gather, scatter
from ptx_parser import Instruction, Kernel, PtxError


@dataclass
class Copies:
    """The asynchronous copies of one instruction that have not arrived."""

    threads: np.ndarray
    targets: np.ndarray  # offsets in shared memory
    sources: np.ndarray  # offsets in global memory
    group: np.ndarray  # of each thread
    size: int
    source_bytes: np.ndarray
    arrived: np.ndarray


def launch(
    kernel: Kernel,
    memory: GlobalMemory,
    grid: tuple[int, int, int],
    threads: int,
    parameters: bytes,
    dynamic_shared_bytes: int = 0,
) -> Counter[int]:
    """Runs the kernel, block after block; gives how many warps executed each of kernel.code."""
    if len(parameters) != kernel.parameter_bytes:
        raise PtxError(f"{kernel.parameter_bytes} bytes of parameters expected, {len(parameters)} given")
    if threads % 32:
        raise PtxError("a block must be whole warps")
    executed: Counter[int] = Counter()
    for z in range(grid[2]):
        for y in range(grid[1]):
            for x in range(grid[0]):
                block = Block(kernel, memory, threads, parameters, dynamic_shared_bytes, executed)
                block.special.update(zip(("%ctaid.x", "%ctaid.y", "%ctaid.z"), (x, y, z), strict=True))
                block.special.update(zip(("%nctaid.x", "%nctaid.y", "%nctaid.z"), grid, strict=True))
                block.run()
    return executed


class Block(Arithmetic):
    def __init__(
        self,
        kernel: Kernel,
        memory: GlobalMemory,
        threads: int,
        parameters: bytes,
        dynamic_shared_bytes: int,
        executed: Counter[int],
    ) -> None:
        super().__init__(kernel, threads)
        self.memory, self.executed = memory, executed
        self.parameters = np.frombuffer(parameters, np.uint8)
        shared_bytes = max([kernel.static_shared_bytes, *kernel.shared.values()]) + dynamic_shared_bytes
        self.shared = np.full(shared_bytes, 0xFF, np.uint8)
        self.counter = np.zeros(threads, int)
        self.finished = np.zeros(threads, bool)
        self.at_barrier = np.zeros(threads, bool)
        self.at_warp_barrier = np.zeros(threads, bool)
        self.copies: list[Copies] = []
        self.copy_group = np.zeros(threads, int)

    # ---- the order of instructions ----

    def run(self) -> None:
        with np.errstate(all="ignore"):
            while not self.finished.all():
                ready = ~self.finished & ~self.at_barrier & ~self.at_warp_barrier
                if ready.any():
                    self._step(ready)
                elif self.at_warp_barrier.any():
                    raise PtxError(f"{self.kernel.name}: a warp barrier that only some lanes reach")
                else:
                    self._release_barrier()
        if self.copies:
            raise PtxError(f"{self.kernel.name}: asynchronous copies that nobody waited for")

    def _step(self, ready: np.ndarray) -> None:
        here = int(self.counter[ready].min())
        self.active = ready & (self.counter == here)
        self.counter[self.active] += 1
        if here >= len(self.kernel.code):
            self.finished |= self.active
            return
        instruction = self.kernel.code[here]
        if instruction.predicate:
            self.active = self.active & (self.registers[instruction.predicate] ^ instruction.negated)
        if not self.active.any():
            return
        self.executed[here] += int(self.active.reshape(-1, 32).any(1).sum())
        name = instruction.words[0]
        handler = getattr(self, f"_{name}", None)
        if handler is None and name not in ARITHMETIC:
            raise PtxError(f"unknown instruction: {instruction.text}")
        try:
            (handler or self.arithmetic)(instruction)
        except (PtxError, KeyError, ValueError, IndexError) as error:
            raise PtxError(f"{self.kernel.name}: {instruction.text}: {error!r}") from error

    def _release_barrier(self) -> None:
        if self.finished.any() or len(set(self.counter[self.at_barrier])) > 1:
            raise PtxError(f"{self.kernel.name}: a barrier that only some threads reach")
        self.at_barrier[:] = False

    # ---- addresses ----

    def address(self, operand: str) -> np.ndarray:
        """Of the active threads, from "[%rd1+8]"."""
        base, _, offset = operand.strip("[]").partition("+")
        narrow = base in self.registers and self.registers[base].dtype.itemsize == 4
        value = self.read(base, "u32" if narrow else "u64").astype(np.int64)[self.active]
        return value + int(offset or "0", 0)

    def place(self, space: str, operand: str, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(memory, checked offsets of the active threads); `space` "" is a generic address."""
        offsets = self.address(operand)
        if space == "":
            in_shared = offsets >= SHARED_WINDOW
            if in_shared.any() != in_shared.all():
                raise PtxError("generic addresses of both shared and global memory in one instruction")
            space, offsets = ("shared", offsets - SHARED_WINDOW) if in_shared.all() else ("global", offsets)
        if (offsets % size).any():
            raise PtxError(f"misaligned {space} access of {size} bytes")
        if space == "global":
            offsets = offsets - GLOBAL_BASE
            self.memory.check(offsets, size)
            return self.memory.bytes, offsets
        memory = self.parameters if space == "param" else self.shared
        check_range(offsets, size, len(memory), space)
        return memory, offsets

    # ---- control ----

    def _bra(self, instruction: Instruction) -> None:
        self.counter[self.active] = self.kernel.labels[instruction.operands[0]]

    def _ret(self, instruction: Instruction) -> None:
        self.finished |= self.active

    def _trap(self, instruction: Instruction) -> None:
        raise PtxError("a failed assertion")

    def _bar(self, instruction: Instruction) -> None:
        if instruction.words[1] == "warp":  # lanes may wait at different ones, where code has been duplicated
            if (self.read(instruction.operands[0], "b32")[self.active] != 0xFFFFFFFF).any():
                raise PtxError("a warp barrier for some lanes alone")
            self.at_warp_barrier |= self.active
            complete = self.at_warp_barrier.reshape(-1, 32).all(1)
            self.at_warp_barrier &= ~np.repeat(complete, 32)
        else:
            self.at_barrier |= self.active

    # ---- memory ----

    def _space(self, instruction: Instruction) -> str:
        return next((word for word in instruction.words if word in ("param", "global", "shared")), "")

    def _ld(self, instruction: Instruction) -> None:
        targets, kind = instruction.operands[0].strip("{}").split(","), instruction.words[-1]
        size = TYPES[kind].itemsize
        memory, offsets = self.place(self._space(instruction), instruction.operands[1], size * len(targets))
        for i, target in enumerate(targets):
            value = np.zeros(self.threads, TYPES[kind])
            value[self.active] = gather(memory, offsets + size * i, TYPES[kind])
            self.write(target, value, kind)

    def _st(self, instruction: Instruction) -> None:
        sources, kind = instruction.operands[1].strip("{}").split(","), instruction.words[-1]
        size = TYPES[kind].itemsize
        memory, offsets = self.place(self._space(instruction), instruction.operands[0], size * len(sources))
        for i, source in enumerate(sources):
            scatter(memory, offsets + size * i, self.read(source, kind)[self.active])

    def _cp(self, instruction: Instruction) -> None:
        operation = instruction.words[2]
        if operation == "commit_group":
            self.copy_group[self.active] += 1
        elif operation == "wait_group":
            self._wait(int(instruction.operands[0]))
        else:
            target, source, size, *source_bytes = instruction.operands
            count = self.read(source_bytes[0] if source_bytes else size, "u32")[self.active].astype(int)
            check_range(count, 0, int(size), "size of the source of an asynchronous copy:")
            _, targets = self.place("shared", target, int(size))
            sources = self.address(source) - GLOBAL_BASE
            if (sources % int(size)).any():
                raise PtxError("misaligned source of an asynchronous copy")
            self.memory.check(sources[count > 0], count[count > 0])
            threads = np.nonzero(self.active)[0]
            arrived = np.zeros(len(threads), bool)
            group = self.copy_group[threads].copy()
            self.copies.append(Copies(threads, targets, sources, group, int(size), count, arrived))

    def _wait(self, groups_left: int) -> None:
        for copies in self.copies:
            closed = copies.group + groups_left < self.copy_group[copies.threads]
            now = self.active[copies.threads] & closed & ~copies.arrived
            for byte in range(copies.size):
                read = now & (byte < copies.source_bytes)
                self.shared[copies.targets[now] + byte] = 0
                self.shared[copies.targets[read] + byte] = self.memory.bytes[copies.sources[read] + byte]
            copies.arrived |= now
        self.copies = [copies for copies in self.copies if not copies.arrived.all()]

    def _cvta(self, instruction: Instruction) -> None:
        value = self.read(instruction.operands[1], "u64")
        if "shared" in instruction.words:
            value = (
                value + np.uint64(SHARED_WINDOW)
                if "to" not in instruction.words
                else value - np.uint64(SHARED_WINDOW)
            )
        self.write(instruction.operands[0], value, "u64")

    # ---- warps ----

    def _warps(self, mask: str) -> np.ndarray:
        """The warps that execute a warp instruction, all of whose lanes have to be there."""
        active = self.active.reshape(-1, 32)
        warps = np.nonzero(active.any(1))[0]
        if not active[warps].all() or (self.read(mask, "b32").reshape(-1, 32)[warps] != 0xFFFFFFFF).any():
            raise PtxError("a warp instruction that only some lanes reach")
        return warps

    def _fragment(self, operand: str, kind: str = "b32") -> list[np.ndarray]:
        return [self.read(name, kind).reshape(-1, 32) for name in operand.strip("{}").split(",")]

    def _write_fragment(self, operand: str, values: list[np.ndarray], kind: str = "b32") -> None:
        for name, value in zip(operand.strip("{}").split(","), values, strict=True):
            self.write(name, value.reshape(-1), kind)

    def _shfl(self, instruction: Instruction) -> None:
        target, source, operand, clamp, mask = instruction.operands
        self._warps(mask)
        value, by, limit = (self.read(name, "b32").reshape(-1, 32) for name in (source, operand, clamp))
        lanes = ptx_warp.shuffle_source(instruction.words[2], by.astype(int), limit)
        self.write(target.split("|")[0], np.take_along_axis(value, lanes, 1).reshape(-1), "b32")

    def _vote(self, instruction: Instruction) -> None:
        target, predicate, mask = instruction.operands
        if "ballot" not in instruction.words:
            raise PtxError("only the ballot is known here")
        self._warps(mask)
        bits = self.registers[predicate].reshape(-1, 32).astype(np.uint32) << np.arange(32, dtype=np.uint32)
        self.write(target, np.repeat(bits.sum(1, dtype=np.uint32), 32), "b32")

    def _ldmatrix(self, instruction: Instruction) -> None:
        warps = self._warps("0xffffffff")
        count = {"x1": 1, "x2": 2, "x4": 4}[
            next(word for word in instruction.words if word in ("x1", "x2", "x4"))
        ]
        active, used = self.active, np.arange(self.threads) % 32 < 8 * count
        self.active = active & used
        memory, offsets = self.place("shared", instruction.operands[1], 16)
        self.active = active
        rows = memory[offsets[:, None] + np.arange(16)].view(np.uint16).reshape(len(warps), count, 8, 8)
        result = [np.zeros((self.threads // 32, 32), np.uint32) for _ in range(count)]
        for warp, matrices in zip(warps, rows, strict=True):
            for i, register in enumerate(ptx_warp.load_matrices(matrices, "trans" in instruction.words)):
                result[i][warp] = register
        self._write_fragment(instruction.operands[0], result)

    def _stmatrix(self, instruction: Instruction) -> None:
        warps = self._warps("0xffffffff")
        if "x4" not in instruction.words or "trans" in instruction.words:
            raise PtxError("only stmatrix of four matrices as they are is known here")
        memory, offsets = self.place("shared", instruction.operands[0], 16)
        registers = self._fragment(instruction.operands[1])
        for warp, rows in zip(warps, offsets.reshape(-1, 32), strict=True):
            matrices = ptx_warp.store_matrices([register[warp] for register in registers])
            memory[rows[:, None] + np.arange(16)] = matrices.reshape(32, 8).view(np.uint8)

    def _movmatrix(self, instruction: Instruction) -> None:
        self._warps("0xffffffff")
        (matrix,) = self._fragment(instruction.operands[1])
        self._write_fragment(
            instruction.operands[0], [np.stack([ptx_warp.transpose_matrix(row) for row in matrix])]
        )

    def _mma(self, instruction: Instruction) -> None:
        shape, kinds = instruction.words[3], instruction.words[-4:]
        shapes = {"bf16": ("m16n8k16", "m16n8k8"), "f16": ("m16n8k16", "m16n8k8"), "tf32": ("m16n8k8",)}
        if shape not in shapes.get(kinds[1], ()):
            raise PtxError("a shape or type of mma that is not known here")
        self._warps("0xffffffff")
        target, *sources = instruction.operands
        a, b = (self._fragment(operand) for operand in sources[:2])
        c = self._fragment(sources[2], "f32")
        each = []
        for warp in range(self.threads // 32):
            registers = ([register[warp] for register in matrix] for matrix in (a, b, c))
            each.append(ptx_warp.multiply_matrices(*registers, kinds[1]))
        self._write_fragment(target, [np.stack(registers) for registers in zip(*each, strict=True)], "f32")
