"""Instructions of the fast paths' kernels, from their machine code: how many a warp issues per chunk.

Counting. A kernel's chunk loop is its outermost loop with the most HMMA, or of the float32 kernels FFMA;
LOOPS says how often per chunk each loop inside it runs. Instructions per chunk (64 tokens; 32 in the float32
backward) are the sum over these loops of (instructions of the loop's own blocks) times (runs per chunk).
Every instruction of a block counts, also a predicated one and, but for the marks below, one that a branch
skips: three kinds of LayerNorm are compiled in and one of them runs. So the number is an upper bound of what
a warp issues. Where warps differ in how often a loop runs, it is their mean. What is outside the chunk loop
is not counted. Kernels whose last argument is true serve several query heads per kv head; their number is
that of one head. Inner loops of the tensor-core kernels without HMMA are those of rows in pieces of less than
16 bytes: these loops, and the blocks that lead to them alone, are skipped by a call with aligned rows and are
not counted. Of the loops with HMMA in the kernels of elementwise/ one walks the tiles of 16 tokens up to a
warp's own; the other, with a few, walks four tiles in one of four warps.

Numbers of the kernels of polynomial/, whose chunks have 64 or 128 tokens, and of elementwise/ are per 64
tokens and of one path, which marks.py reads from their source.

python_tests/cuda/ptx/test_ptx.py compares HMMA per chunk with those that really run.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path

from benchmarks.kernels.kernel import read_kernels
from benchmarks.kernels.marks import all_blocks, shares_of_blocks
from benchmarks.kernels.registers import (
    CHECKED_ARCHITECTURES,
    FLOAT32_FORWARD,
    SQUARE_FORWARD,
)
from benchmarks.kernels.report import format_table, write_json
from benchmarks.kernels.sass import Function, Loop, disassemble
from benchmarks.kernels.toolchain import (
    ToolMissingError,
    compile_all,
    compiler_release,
    instances,
)

SQUARE_STATES = "tensor_core::elementwise::segment_state_kernel<bfloat16, square, 16>"
PATTERNS = ("tensor_core_*", "float32_*")
# Per 64 tokens and warp at sm_90, of one query head per kv head; of `outer` with chunks of 128 tokens.
MOST_INSTRUCTIONS = {
    "tensor_core::polynomial::forward_kernel<bfloat16, outer, 16, 128, false>": 950,
    "tensor_core::polynomial::segment_state_kernel<bfloat16, outer, 16, 128>": 355,
    "tensor_core::polynomial::grad_q_kernel<bfloat16, outer, 16, 128, false>": 1410,
    "tensor_core::polynomial::reverse_segment_kernel<bfloat16, outer, 16, 128>": 440,
    "tensor_core::polynomial::grad_kv_kernel<bfloat16, outer, 16, 128, false>": 1830,
    SQUARE_FORWARD: 610,
    SQUARE_STATES: 245,
}
FLOAT32_FORWARD_SHARE = 0.7  # of FFMA among the instructions per chunk, at least


@dataclass(frozen=True)
class Nest:
    """A loop inside the chunk loop: runs of its body per chunk, and the loops inside it."""

    runs: float
    inner: tuple[Nest, ...] = ()


ROW_TILES = Nest(
    2, (Nest(2),)
)  # pairs of row tiles; in it the column tiles outside the pair: 2 and 0 of them
HALVES = Nest(2)  # of the chunk, in add_chunk
OWN_TOKENS = Nest(2.5)  # the column tiles that a warp's row tile looks at: 1, 2, 3 and 4 for the four warps

# d = 32: two warps share what one does above, and each looks at every other column tile.
WIDE_ROW_TILES = Nest(2, (Nest(1),))  # of the reverse sweep without a loop inside
WIDE_TURN = Nest(4)  # four offsets of a warp's half
WIDE_OWN_TOKENS = Nest(1.25)
QUARTERS = Nest(4)

# By kernel, in the order of the code.
LOOPS = {
    "forward_kernel": (ROW_TILES, HALVES),
    "segment_state_kernel": (HALVES,),
    "reverse_segment_kernel": (HALVES,),
    "grad_kv_kernel": (OWN_TOKENS, ROW_TILES, HALVES),
    "grad_q_kernel": (OWN_TOKENS, HALVES),
    "wide_forward_kernel": (WIDE_ROW_TILES, QUARTERS),
    "wide_segment_state_kernel": (QUARTERS,),
    "wide_reverse_segment_kernel": (QUARTERS,),
    "wide_grad_kv_kernel": (Nest(2), WIDE_TURN, WIDE_TURN, WIDE_OWN_TOKENS, QUARTERS),
    "wide_grad_q_kernel": (WIDE_TURN, WIDE_TURN, WIDE_OWN_TOKENS, QUARTERS),
}

# The float32 kernels. Thread i of 16 has feature i; for circulant maps warps 0 and 1, whose i are below 8,
# have one offset more: two loops, each run by half of the warps. Tokens are taken 4 at a time.
FORWARD_STEPS, BACKWARD_STEPS = 16, 8
QUADS = Nest(16)  # of the 64 columns


def _update(steps: int, feature_map: str, weighted: bool) -> tuple[Nest, ...]:
    polynomial = feature_map in ("outer", "taylor")
    tokens = (Nest(steps / 2), Nest(steps / 2)) if polynomial else (Nest(steps),)
    entries = 1.25 if polynomial else 1  # of the denominator's sums per thread; those past 128 are warp 0's
    constant = 8 if feature_map == "taylor" else 0  # 32 tokens, for one thread of warp 0
    sums = (Nest(steps * entries), *([Nest(constant)] if weighted else []))
    return (*tokens, Nest(entries, sums))


def _float32_loops(feature_map: str) -> dict[str, tuple[Nest, ...]]:
    forward, backward = (_update(steps, feature_map, False) for steps in (FORWARD_STEPS, BACKWARD_STEPS))
    reverse = _update(BACKWARD_STEPS, feature_map, True)
    pairs = (Nest(8),) if feature_map in ("outer", "taylor") else ()  # of features
    # the sums' 8 features; 32 keys, 4 at a time, for all warps; the next 32 for the two with later queries
    member = Nest(1, (Nest(8), *pairs, Nest(8), Nest(4)))
    own_tokens = Nest(5)  # others of a warp's 8 rows, 4 at a time: 2, 4, 6 and 8 for the four warps
    scored_values = Nest(6)  # others of a warp's 16 rows: 4 or 8
    return {
        "forward_kernel": (member, *forward),
        "ForwardShape": forward,
        "BackwardShape": backward,
        "reverse_segment_states": (Nest(1, reverse),),
        "grad_q_kernel": (Nest(1, (QUADS, QUADS, own_tokens)), *backward),
        "grad_kv_kernel": (Nest(1, (QUADS, QUADS, *pairs, own_tokens, scored_values, *reverse)),),
    }


# Global accesses per chunk and thread narrower than 16 bytes, by direction and bytes; of all branches.
# 8 bytes: the statistics of "token" LayerNorm; partial gradients that another kernel finishes.
# 4 bytes: r and delta of a row.
NARROW_ACCESSES = {
    "forward_kernel": {("load", 8): 2, ("store", 4): 8},
    "segment_state_kernel": {("load", 8): 1},
    "reverse_segment_kernel": {("load", 8): 1, ("load", 4): 1},
    "grad_kv_kernel": {("load", 8): 2, ("load", 4): 1, ("store", 8): 4, ("store", 4): 4},
    "grad_q_kernel": {("load", 8): 2, ("load", 4): 2, ("store", 8): 4},
    "wide_forward_kernel": {("load", 8): 2, ("store", 4): 4},
    "wide_segment_state_kernel": {("load", 8): 1},
    "wide_reverse_segment_kernel": {("load", 8): 1, ("load", 4): 1},
    "wide_grad_kv_kernel": {("load", 8): 2, ("load", 4): 1, ("store", 8): 8, ("store", 4): 2},
    "wide_grad_q_kernel": {("load", 8): 2, ("load", 4): 2, ("store", 8): 8},
}

# Of the kernels of polynomial/, per 64 tokens. Whole chunks and others are separate branches, and both count.
# 8 bytes: as above. 4 bytes: r and delta of a row; deltas that grad q makes; y in a sequence's first chunk;
# with d = 8 a lane's two features of a row of grad q or grad k.
POLYNOMIAL_NARROW_ACCESSES = {
    "forward_kernel": {("load", 8): 2, ("store", 4): 2},
    "segment_state_kernel": {("load", 8): 2},
    "reverse_segment_kernel": {("load", 8): 1, ("load", 4): 2},
    "grad_kv_kernel": {("load", 8): 4, ("load", 4): 4, ("store", 8): 2, ("store", 4): 2},
    "grad_q_kernel": {("load", 8): 2, ("load", 4): 3, ("store", 8): 2, ("store", 4): 5},
}

# Of the kernels of elementwise/: as of those of polynomial/.
ELEMENTWISE_NARROW_ACCESSES = {
    "forward_kernel": {("load", 8): 2, ("store", 4): 2},
    "segment_state_kernel": {("load", 8): 2},
}

# 4 bytes: the mean and deviation of "token" LayerNorm; r of a row, and delta; a lane's feature of a row of
# grad q or grad k, 16 of them side by side, or of its unfinished gradient.
FLOAT32_NARROW_ACCESSES = {
    "forward_kernel": {("load", 4): 2, ("store", 4): 8},
    "segment_states": {("load", 4): 2},
    "reverse_segment_states": {("load", 4): 7},
    "grad_kv_kernel": {("load", 4): 7, ("store", 4): 8},
    "grad_q_kernel": {("load", 4): 7, ("store", 4): 8},
}


def base_name(name: str) -> str:
    """grad_q_kernel of tensor_core::grad_q_kernel<bfloat16, outer, 16, false>."""
    return re.sub(r"<.*", "", name).split("::")[-1]


def narrow_accesses(name: str) -> dict[tuple[str, int], int]:
    """By direction and bytes.

    In long segments, a branch of its own, the float32 kernels also load and store carries of 4 bytes: of the
    state's sums, of `taylor`'s constant row, and of the sums for gamma and beta.
    """
    base = base_name(name)
    if "polynomial::" in name:
        return POLYNOMIAL_NARROW_ACCESSES[base]
    if "elementwise::" in name:
        return ELEMENTWISE_NARROW_ACCESSES[base]
    if not name.startswith("float32_path::"):
        return NARROW_ACCESSES[base]
    carries = 1 + ("<taylor" in name) + (base in ("grad_kv_kernel", "grad_q_kernel"))
    accesses = FLOAT32_NARROW_ACCESSES[base]
    return accesses | {(way, 4): accesses.get((way, 4), 0) + carries for way in ("load", "store")}


@dataclass(frozen=True)
class Figures:
    name: str
    architecture: int
    instructions: int  # of the whole kernel, as are the next four
    hmma: int
    ldsm: int
    ldgsts: int
    local_accesses: int
    chunk_instructions: (
        int | None
    )  # per chunk and warp, as is all that follows; None: LOOPS does not have the kernel
    chunk_opcodes: dict[str, int]
    chunk_accesses: dict[str, int]  # to global memory: {"load 16": 8, ...}


def product_of(name: str) -> str:
    """The instruction that does a kernel's work."""
    return "FFMA" if name.startswith("float32_path::") else "HMMA"


def chunk_loop(function: Function, product: str) -> Loop | None:
    def products(loop: Loop) -> int:
        return sum(
            count for opcode, count in function.opcodes(loop).items() if opcode.startswith(product)
        ) + sum(map(products, loop.inner))

    best = max(function.loops, key=products, default=None)
    return best if best and products(best) else None


# The kernels of polynomial/. Loops without HMMA serve rows that are not all there and are left out; a loop
# around others is that over query heads. Of the rest the one of grad k with few HMMA multiplies slabs of T,
# behind the first of them; all others walk tiles of 16 tokens. The compiler may have unrolled any of them.
SUMS_PRODUCTS, SLAB_PRODUCTS = 4, 16  # at most


def polynomial_nest(name: str, loop: Loop, function: Function) -> Nest:
    """Runs per chunk of an inner loop of a kernel of polynomial/, and of the loops inside it."""
    dim, chunk = polynomial_shape(name)
    if not products_of_loop(function, loop):
        return Nest(0, tuple(Nest(0) for _ in loop.inner))
    own = sum(n for opcode, n in function.opcodes(loop).items() if opcode.startswith("HMMA"))
    if any(products_of_loop(function, x) for x in loop.inner):
        runs = 1.0
    elif base_name(name) == "grad_kv_kernel" and SUMS_PRODUCTS < own <= SLAB_PRODUCTS:
        runs = dim / 2 - 1
    else:
        runs = chunk / 16
    return Nest(runs, tuple(polynomial_nest(name, x, function) for x in loop.inner))


def elementwise_nest(loop: Loop, function: Function) -> Nest:
    """The same of a kernel of elementwise/."""
    products = products_of_loop(function, loop)
    runs = 0 if not products else 1 if products <= SUMS_PRODUCTS else OWN_TOKENS.runs
    return Nest(runs, tuple(elementwise_nest(x, function) for x in loop.inner))


def polynomial_shape(name: str) -> tuple[int, int]:
    """d and tokens of a chunk."""
    match = re.search(r"<bfloat16, \w+, (\d+), (\d+)", name)
    assert match is not None
    return int(match[1]), int(match[2])


def products_of_loop(function: Function, loop: Loop) -> int:
    own = sum(n for opcode, n in function.opcodes(loop).items() if opcode.startswith("HMMA"))
    return own + sum(products_of_loop(function, x) for x in loop.inner)


def loops_of(name: str) -> tuple[Nest, ...] | None:
    base = base_name(name)
    if name.startswith("float32_path::"):
        shape = re.search(r"\w+Shape", name)  # segment_states has chunks of either sweep
        return _float32_loops(re.search(r"<(\w+)", name)[1]).get(shape[0] if shape else base)
    return LOOPS.get(base)


def inner_loops(loop: Loop) -> list[Loop]:
    return [x for inner in loop.inner for x in (inner, *inner_loops(inner))]


def serves_all_rows(opcode: str) -> bool:
    """Whether aligned rows can't do without it: a product, a barrier, a wide access."""
    return opcode.startswith(("HMMA", "BAR", "LDGDEPBAR")) or global_access(opcode) in WIDE_ACCESSES


def without_narrow_rows(function: Function, loop: Loop) -> Loop:
    """The loop without what only rows in narrow pieces run.

    It is found from the inner loops without HMMA up: through the blocks that dominate them, as long as
    nothing that all rows need comes behind.
    """
    inside = all_blocks(loop)
    behind = {x: {y for y in inside if x in function.dominators[y]} for x in inside}

    def is_needed(blocks: set[int]) -> bool:
        return any(serves_all_rows(i.opcode) for block in blocks for i in function.blocks[block])

    skipped: set[int] = set()
    for inner in inner_loops(loop):
        if not is_needed(all_blocks(inner)):
            above = function.dominators[inner.header] & inside
            skipped |= set().union(*(behind[x] for x in above if not is_needed(behind[x])))

    def pruned(loop: Loop) -> Loop:
        inner = [pruned(x) for x in loop.inner if x.header not in skipped]
        return Loop(loop.header, loop.blocks - skipped, inner)

    return pruned(loop)


def per_chunk(
    function: Function, loop: Loop, nests: tuple[Nest, ...], shares: dict[int, Fraction], runs: float = 1
) -> Counter[str]:
    """Opcodes per chunk of `loop`, which itself runs `runs` times per chunk."""
    if len(loop.inner) != len(nests):
        raise ValueError(f"a loop has {len(loop.inner)} inner loops and LOOPS knows of {len(nests)}")
    total: Counter[str] = Counter()
    for block in loop.blocks:
        share = runs * float(shares[block])
        for instruction in function.blocks[block] if share else ():
            total[instruction.opcode] += share
    for inner, nest in zip(loop.inner, nests, strict=True):
        total += per_chunk(function, inner, nest.inner, shares, nest.runs)
    return total


WIDE_ACCESSES = (("load", 16), ("store", 16))


def global_access(opcode: str) -> tuple[str, int] | None:
    """("load" or "store", bytes per thread) of an access to global memory, LDGSTS among the loads."""
    words = opcode.split(".")
    if words[0] not in ("LDG", "LD", "LDGSTS", "STG", "ST"):
        return None
    widths = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    width = next((widths[word] for word in words if word in widths), 4)
    return ("store" if words[0].startswith("ST") else "load"), width


def by_base(opcodes: Counter[str]) -> Counter[str]:
    total: Counter[str] = Counter()
    for opcode, count in opcodes.items():
        total[opcode.split(".")[0]] += count
    return total


def measure(name: str, architecture: int, function: Function) -> Figures:
    whole = Counter(instruction.opcode for instruction in function.instructions)
    bases = by_base(whole)
    chunk: Counter[str] = Counter()
    loop = chunk_loop(function, product_of(name))
    try:
        if loop and "polynomial::" in name:
            nests = tuple(polynomial_nest(name, x, function) for x in loop.inner)
            tokens = polynomial_shape(name)[1]
            counts = per_chunk(function, loop, nests, shares_of_blocks(function, loop, tokens))
            chunk = Counter({x: n * 64 / tokens for x, n in counts.items()})
        elif loop and "elementwise::" in name:
            nests = tuple(elementwise_nest(x, function) for x in loop.inner)
            chunk = per_chunk(function, loop, nests, shares_of_blocks(function, loop, 64))
        elif loop and (nests := loops_of(name)):
            if product_of(name) == "HMMA":
                loop = without_narrow_rows(function, loop)
            chunk = per_chunk(function, loop, nests, shares_of_blocks(function, loop, 64))
    except ValueError as error:
        raise ValueError(f"{name} at sm_{architecture}: {error}") from None
    accesses: Counter[str] = Counter()
    for opcode, count in chunk.items():
        access = global_access(opcode)
        if access:
            accesses["{} {}".format(*access)] += count
    return Figures(
        name,
        architecture,
        sum(whole.values()),
        bases["HMMA"],
        bases["LDSM"],
        bases["LDGSTS"],
        bases["LDL"] + bases["STL"],
        round(sum(chunk.values())) if chunk else None,
        {base: round(count) for base, count in by_base(chunk).most_common()},
        {access: round(count) for access, count in sorted(accesses.items())},
    )


def collect(pattern: str, architectures: list[int]) -> tuple[list[Figures], list[str]]:
    """Figures of the kernels with HMMA and of those of the float32 path, and what went wrong."""
    errors: list[str] = []
    figures = {}
    for compilation in compile_all(
        instances(pattern), architectures, lambda error: errors.append(str(error))
    ):
        functions = disassemble(compilation.cubin)
        for kernel in read_kernels(compilation):
            function = functions[kernel.symbol]
            is_float32 = kernel.name.startswith("float32_path::") and kernel.dynamic_shared is None
            if not is_float32 and not any(i.base == "HMMA" for i in function.instructions):
                continue
            try:
                found = measure(kernel.name, kernel.architecture, function)
            except ValueError as error:
                errors.append(str(error))
            else:
                figures[kernel.name, kernel.architecture] = found
    return [figures[key] for key in sorted(figures)], errors


SHOWN = ("HMMA", "LDSM", "FFMA", "LDS")  # per chunk


def table(figures: list[Figures]) -> str:
    heading = (
        "kernel",
        "sm",
        "all",
        "HMMA",
        "LDSM",
        "LDGSTS",
        "local",
        "per chunk",
        "HMMA",
        "LDSM",
        "FFMA",
        "LDS",
        "global accesses",
    )
    rows = [heading]
    for f in figures:
        known = f.chunk_instructions is not None
        chunk = (str(f.chunk_instructions), *(str(f.chunk_opcodes.get(base, 0)) for base in SHOWN))
        accesses = ", ".join(f"{access}: {count}" for access, count in f.chunk_accesses.items())
        whole = (f.instructions, f.hmma, f.ldsm, f.ldgsts, f.local_accesses)
        shown = chunk if known else ("?",) * len(chunk)
        rows.append((f.name, str(f.architecture), *map(str, whole), *shown, accesses))
    return format_table(rows)


def problems(figures: list[Figures]) -> list[str]:
    """What --check fails for."""
    found = []
    for f in figures:
        if f.architecture not in CHECKED_ARCHITECTURES:
            continue
        where = f"{f.name} at sm_{f.architecture}"
        if f.local_accesses:
            found.append(f"{where}: {f.local_accesses} accesses to local memory")
        if f.chunk_instructions is None:
            found.append(f"{where}: its loops are not in LOOPS")
            continue
        for access, count in f.chunk_accesses.items():
            direction, width = access.split()
            allowed = narrow_accesses(f.name).get((direction, int(width)), 0)
            if int(width) != 16 and count > allowed:
                found.append(f"{where}: {count} {direction}s of {width} bytes per chunk, {allowed} expected")
        if f.name == FLOAT32_FORWARD:
            share = f.chunk_opcodes["FFMA"] / f.chunk_instructions
            if share < FLOAT32_FORWARD_SHARE:
                found.append(
                    f"{where}: {share:.2f} of its instructions are FFMA, not {FLOAT32_FORWARD_SHARE}"
                )
        most = MOST_INSTRUCTIONS.get(f.name)
        if most and f.architecture == 90 and f.chunk_instructions > most:
            found.append(f"{where}: {f.chunk_instructions} instructions per chunk > {most}")
    for architecture in CHECKED_ARCHITECTURES:
        for name in MOST_INSTRUCTIONS:
            if not any(f.name == name and f.architecture == architecture for f in figures):
                found.append(f"{name} at sm_{architecture}: not found")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.instructions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--architectures", type=int, nargs="+", default=list(CHECKED_ARCHITECTURES))
    parser.add_argument(
        "--instances", nargs="+", default=PATTERNS, metavar="PATTERN", help="only files whose name matches"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures, like benchmarks/results/x.json"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="fail for local memory, narrow global accesses per chunk, or too many instructions per chunk",
    )
    options = parser.parse_args(arguments)

    figures, errors = [], []
    for pattern in options.instances:
        found, wrong = collect(pattern, options.architectures)
        figures += found
        errors += wrong
    print(f"{compiler_release()}. Per chunk and warp, upper bounds: see --help; accesses: bytes, number")
    print(table(figures))
    if options.json and not errors:  # never incomplete ones
        command, facts = "python -m benchmarks.kernels.instructions", {"counting": __doc__.splitlines()}
        write_json(options.json, command, arguments, facts, [asdict(f) for f in figures])
    if options.check:
        errors += problems(figures)
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ToolMissingError as error:
        sys.exit(f"error: {error}")
