"""`python -m benchmarks.attention_maps`: see the package. Also `python -m benchmarks.mqar table3`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import benchmarks.attention_maps
from benchmarks.mqar.command import RUNS, add_options, execute

from . import overlap

EXAMPLES = {True: 1_000, False: 10_000}  # of IoU, small or not


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.attention_maps",
        description=benchmarks.attention_maps.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--small", action="store_true", help="minutes on 2 CPU cores; else hours on a GPU")
    add_options(parser)
    arguments = parser.parse_args(argv)
    small = arguments.small
    folder = arguments.output or RUNS / ("table3" + "-small" * small)
    judge = partial(overlap.judge, examples=EXAMPLES[small])
    lines = execute("benchmarks.attention_maps", argv, arguments, folder, overlap.cells(small), judge)
    if lines is None:
        return 0
    seqlen = overlap.SEQLEN[small]
    table = overlap.table(line for line in lines if line["seqlen"] == seqlen)
    print(table)
    made = [folder / "table3.md"]
    made[0].write_text(table + "\n")
    try:
        from . import plots
    except ImportError:
        print("no pictures: matplotlib is not installed (pip install -e '.[bench]')")
    else:
        made += plots.draw(lines, seqlen, folder)
    seconds = sum(line["seconds"] for line in lines)
    print(f"\n{len(lines)} runs, {seconds / 60:.1f} minutes of training; {', '.join(map(str, made))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
