"""Machine code as nvdisasm prints it: instructions, and the loops they are in."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.kernels.toolchain import cuda_program, run


@dataclass(frozen=True)
class Instruction:
    opcode: str  # LDG.E.128
    operands: str
    predicated: bool
    # Where it is from, if the code was compiled with -lineinfo: (file, line), then where that is inlined, and
    # so on up to the kernel. Of a file's path what stands behind "csrc/".
    lines: tuple[tuple[str, int], ...] = ()

    @property
    def base(self) -> str:
        return self.opcode.split(".")[0]


@dataclass
class Loop:
    """A natural loop: `blocks` are those of the loop without its inner loops."""

    header: int
    blocks: set[int]
    inner: list[Loop] = field(default_factory=list)


class Function:
    """A kernel's basic blocks and loops.

    Threads of a warp are taken to stay together: a BRA.DIV, which leaves for a copy of the next instructions
    where the warp has diverged, is not followed, and that copy is then no part of any loop.
    """

    def __init__(self, lines: list[str]) -> None:
        self.blocks: list[list[Instruction]] = [[]]
        labels: dict[str, int] = {}
        source: list[tuple[str, int]] = []
        described = False  # whether the lines before described where the next instructions are from
        for line in lines:
            place = re.match(r'\s*//## File "(?:.*/csrc/(?:\./)?)?([^"]+)", line (\d+)', line)
            if place:
                source = [*(source if described else []), (place[1], int(place[2]))]
                described = True
                continue
            label = re.match(r"(\.L_\w+):", line)
            instruction = re.match(
                r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*(?:\(\*.*\*\))?\s*;?$", line
            )
            if label:
                if self.blocks[-1]:
                    self.blocks.append([])
                labels[label.group(1)] = len(self.blocks) - 1
            elif instruction:
                predicate, opcode, operands = instruction.groups()
                self.blocks[-1].append(Instruction(opcode, operands, predicate is not None, tuple(source)))
                described = False
                if opcode.split(".")[0] in ("BRA", "CALL", "BRX", "JMP", "EXIT", "RET"):
                    self.blocks.append([])
        self.next = [self._next(i, labels) for i in range(len(self.blocks))]
        self.dominators: dict[int, set[int]] = {}  # of each block that can be reached
        self.loops = self._find_loops()

    @property
    def instructions(self) -> list[Instruction]:
        return [instruction for block in self.blocks for instruction in block]

    def _next(self, index: int, labels: dict[str, int]) -> list[int]:
        """The blocks that may follow."""
        following = [index + 1] if index + 1 < len(self.blocks) else []
        if not self.blocks[index]:
            return following
        last = self.blocks[index][-1]
        if last.base in ("EXIT", "RET"):
            return following if last.predicated else []
        if last.base in ("BRX", "JMP"):
            raise ValueError(f"{last.opcode}: loops are not known where jumps are computed")
        target = re.search(r"`\((\.L_\w+)\)", last.operands)
        # a call of a label inside the function does not return: the compiler's way to leave a loop on sm_80
        if last.base not in ("BRA", "CALL") or ".DIV" in last.opcode or (last.base == "CALL" and not target):
            return following
        conditional = last.predicated or re.match(r"!?U?P\d", last.operands)  # BRA P3, `(...)
        return [labels[target.group(1)], *following] if conditional else [labels[target.group(1)]]

    def _find_loops(self) -> list[Loop]:
        """Outermost loops, in the order of the code, each with its inner ones."""
        order = self._reverse_postorder()
        dominators: dict[int, set[int]] = {block: set(order) for block in order}
        dominators[order[0]] = {order[0]}
        before: dict[int, list[int]] = {block: [] for block in order}
        for block in order:
            for following in self.next[block]:
                before[following].append(block)
        changed = True
        while changed:
            changed = False
            for block in order[1:]:
                found = {block} | set.intersection(*(dominators[previous] for previous in before[block]))
                changed |= found != dominators[block]
                dominators[block] = found
        self.dominators = dominators
        bodies: dict[int, set[int]] = {}
        for block in order:
            for header in self.next[block]:
                if header in dominators[block]:  # a back edge
                    body, pending = bodies.setdefault(header, {header}), [block]
                    while pending:
                        member = pending.pop()
                        if member not in body:
                            body.add(member)
                            pending += before[member]
        outermost: list[Loop] = []
        loops = {header: Loop(header, set(body)) for header, body in bodies.items()}
        for header in sorted(bodies):
            around = [h for h in bodies if h != header and header in bodies[h]]
            if around:
                parent = loops[min(around, key=lambda h: len(bodies[h]))]
                parent.inner.append(loops[header])
                parent.blocks -= bodies[header]
            else:
                outermost.append(loops[header])
        return outermost

    def _reverse_postorder(self) -> list[int]:
        seen, order, stack = {0}, [], [(0, iter(self.next[0]))]
        while stack:
            block, following = stack[-1]
            step = next((n for n in following if n not in seen), None)
            if step is None:
                order.append(block)
                stack.pop()
            else:
                seen.add(step)
                stack.append((step, iter(self.next[step])))
        return order[::-1]

    def opcodes(self, loop: Loop) -> Counter[str]:
        """Instructions of the loop's own blocks, inner loops left out."""
        return Counter(instruction.opcode for block in loop.blocks for instruction in self.blocks[block])


def disassemble(cubin: Path) -> dict[str, Function]:
    """The kernels of a cubin by symbol."""
    functions: dict[str, list[str]] = {}
    current: list[str] = []
    for line in run([cuda_program("nvdisasm"), "-c", "-gi", str(cubin)]).splitlines():
        section = re.match(r"\s*\.section\s+\.text\.(\w+)", line)
        if section:
            current = functions.setdefault(section.group(1), [])
        else:
            current.append(line)
    return {symbol: Function(lines) for symbol, lines in functions.items()}
