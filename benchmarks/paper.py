"""Every table and picture of the paper that can be made here, one after the other.

    python -m benchmarks.paper --small [--jobs N] [--threads N] [--device cpu] [--output FOLDER]

The same command goes on where it was stopped: each experiment skips the runs that it has finished. Without
`--small` the sizes are the paper's, which is weeks of a GPU; the commands are the same one by one
(benchmarks/README.md).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.language_model import __main__ as language_model
from benchmarks.mqar import __main__ as mqar
from benchmarks.mqar.command import RUNS

# The command, in the paper's order, and the options that it knows of those given here.
EXPERIMENTS: dict[str, tuple[Callable[[Sequence[str]], int], str, tuple[str, ...]]] = {
    **{f"figure{n}": (mqar.main, f"figure{n}", ()) for n in (2, 6)},
    **{
        name: (mqar.main, name, ("device", "jobs", "threads"))
        for name in ("table1", "table3", "figure4", "figure7", "figure1")
    },
    "table2": (language_model.main, "compare", ("device", "threads")),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.paper",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--small", action="store_true", help="hours on 2 CPU cores; without it, weeks of a GPU"
    )
    parser.add_argument("--only", nargs="+", choices=list(EXPERIMENTS), help="default: all")
    parser.add_argument("--output", type=Path, default=RUNS, help="a folder for each is made there")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--jobs", help="processes; default: one per core on a CPU, 1 on a GPU")
    parser.add_argument(
        "--threads", help="of each process; default: OMP_NUM_THREADS, else the cores shared out"
    )
    arguments = parser.parse_args(argv)
    for name in arguments.only or EXPERIMENTS:
        run, command, known = EXPERIMENTS[name]
        print(f"\n=== {name}", flush=True)
        options = ["--output", str(arguments.output / (name + "-small" * arguments.small))]
        if command not in ("figure2", "figure6"):
            options += ["--small"] * arguments.small
        for option in known:
            value = getattr(arguments, option)
            options += [] if value is None else [f"--{option}", value]
        status = run([command, *options])
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
