"""What the commands that work through a list of runs share: their options, and the processes they start."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.training import available_cores, choose_device, limit_threads

from . import grid
from .cell import CHECKPOINT_SECONDS, Cell

RUNS = Path("benchmarks/runs")
PARENT = "REBASED_BENCHMARK_PARENT"  # the process that a further worker belongs to


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, help=f"folder; default {RUNS}/ and the command's name")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    parser.add_argument("--jobs", type=int, help="processes; default: one per core on a CPU, 1 on a GPU")
    parser.add_argument(
        "--threads",
        type=int,
        help="of each process; default: OMP_NUM_THREADS if that is set, else the cores shared out",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=math.inf,
        help="seconds after which it stops, and shows the runs that have finished; default: none",
    )
    parser.add_argument(
        "--checkpoint-every",
        type=float,
        default=CHECKPOINT_SECONDS,
        help="seconds between checkpoints of a run, which goes on from the last one; default %(default)s",
    )


def execute(
    module: str,
    argv: Sequence[str],
    arguments: argparse.Namespace,
    folder: Path,
    cells: Sequence[Cell],
    judge: grid.Judge = grid.no_judge,
) -> list[dict[str, Any]] | None:
    """The lines of the cells, all of them unless a budget ran out; None in a process that only helped.

    Args:
        module, argv: the command line that got here, for further processes.
    """
    device = choose_device(arguments.device)
    jobs = min(arguments.jobs or (1 if device.type == "cuda" else available_cores()), len(cells))
    limit_threads(arguments.threads, jobs)
    every, deadline = arguments.checkpoint_every, time.monotonic() + arguments.budget
    if PARENT in os.environ:
        grid.work(folder, cells, device, every, judge, parent=int(os.environ[PARENT]), deadline=deadline)
        return None
    os.environ[PARENT] = str(os.getpid())
    try:
        workers = [sys.executable, "-m", module, *argv]
        return grid.run(folder, cells, device, every, judge, workers, jobs, deadline)
    finally:
        del os.environ[PARENT]
