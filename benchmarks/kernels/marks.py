"""Which part of a kernel's machine code one path runs, by marks in its source.

The path: whole chunks, "token" LayerNorm, a later chunk than the first. Comments in the source say what of
a chunk's runs this path takes. `counted 0`, behind a statement or behind the brace that opens one, means
never; `counted 1/4` means that one of four warps takes it, or each of them once in four times; a second
number is for chunks of 128 tokens; and `from here` means what follows inside the same braces. A block of
machine code counts as its instructions do, which are from the lines of such a statement or inlined there.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from fractions import Fraction

from benchmarks.kernels.sass import Function, Instruction, Loop
from benchmarks.kernels.toolchain import ROOT


def all_blocks(loop: Loop) -> set[int]:
    return loop.blocks.union(*map(all_blocks, loop.inner))


def counted_shares(text: str, chunk: int) -> dict[int, Fraction]:
    """The lines of a source whose statements a mark gives a share, and the smallest share of each."""
    lines = text.splitlines()
    code = [re.sub(r"//.*", "", line).rstrip() for line in lines]
    shares: dict[int, Fraction] = {}
    for first, line in enumerate(lines):
        mark = re.search(r"// counted (\d(?:/\d+)?)(?:, (\d+/\d+))?( from here)?\b", line)
        if not mark:
            continue
        last = first
        if mark[3] or code[first].endswith("{"):
            depth = 1
            while depth > 0:
                last += 1
                depth += code[last].count("{") - code[last].count("}")
        else:
            while not code[last].endswith(";"):
                last += 1
        share = Fraction(mark[2] if mark[2] and chunk == 128 else mark[1])
        for number in range(first + 1, last + 2):
            shares[number] = min(share, shares.get(number, Fraction(1)))
    return shares


@functools.cache
def shares_of_file(file: str, chunk: int) -> dict[int, Fraction]:
    path = ROOT / "csrc" / file
    return counted_shares(path.read_text(), chunk) if path.is_file() else {}  # a toolkit's header


def share_of_block(block: list[Instruction], chunk: int) -> Fraction:
    """What part of a chunk's runs of a block count, by the marks of its instructions.

    The compiler moves some between blocks: the largest share of those that a third of them have.
    """
    one = Fraction(1)
    found = Counter(
        min((shares_of_file(file, chunk).get(line, one) for file, line in i.lines), default=one)
        for i in block
    )
    return max((share for share, count in found.items() if 3 * count > len(block)), default=one)


def shares_of_blocks(function: Function, loop: Loop, chunk: int) -> dict[int, Fraction]:
    """Of each block of the loop. Where ways join again, a block counts as all that leads to it does."""
    inside = all_blocks(loop)
    ends = [block for block in inside if loop.header in function.next[block]]
    always = set.intersection(*(function.dominators[end] for end in ends)) & inside
    shares = {block: share_of_block(function.blocks[block], chunk) for block in inside}
    shares |= {block: Fraction(1) for block in always if not shares[block]}
    reached, pending = {loop.header}, [loop.header]
    while pending:
        for following in function.next[pending.pop()]:
            if following in inside and following not in reached and shares[following]:
                reached.add(following)
                pending.append(following)
    return {block: share if block in reached else Fraction(0) for block, share in shares.items()}
