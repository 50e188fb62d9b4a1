"""`python -m benchmarks.speed`: see the package's docstring. About 10 minutes on 2 cores, --quick about 2."""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # before torch is loaded: a thread stays on its core
    os.environ.setdefault("OMP_PROC_BIND", "close")
    os.environ.setdefault("OMP_PLACES", "cores")

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import benchmarks.speed
from rebased_cuda import build_info
from rebased_cuda.demo import timing

from . import against, ceilings, questions, report
from .harness import DIRECTIONS, OURS, Row
from .op import keep_freed_memory


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.speed", description=benchmarks.speed.__doc__, formatter_class=formatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer shapes, nothing compiled: 2 minutes")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--only", nargs="+", choices=list(questions.QUESTIONS), default=list(questions.QUESTIONS)
    )
    parser.add_argument("--output", type=Path, help="JSON; default in benchmarks/results, by date")
    parser.add_argument("--targets", action="store_true", help="also what the project has set itself (CPU)")
    commands = parser.add_subparsers(dest="command")
    comparison = commands.add_parser("compare", help="what moved from one JSON file to another")
    comparison.add_argument("before", type=Path)
    comparison.add_argument("after", type=Path)
    show = commands.add_parser("show", help="the tables of a JSON file")
    show.add_argument("file", type=Path)
    plot = commands.add_parser("plot", help="figures of a JSON file, beside it")
    plot.add_argument("file", type=Path)
    versions = commands.add_parser(
        "against",
        help="another built checkout of the project beside this one",
        description=against.__doc__,
        formatter_class=formatter,
        argument_default=argparse.SUPPRESS,  # what was given before the command's name holds
    )
    versions.add_argument("folder", type=Path)
    versions.add_argument("--only", nargs="+", choices=against.NAMES)
    versions.add_argument("--device", choices=("cpu", "cuda"))
    versions.add_argument("--output", type=Path, help="JSON, with every ratio; none where not given")
    versions.add_argument("--pairs", type=_pairs, default=against.PAIRS, help="a row's; default %(default)s")
    versions.add_argument("--threads", type=int, default=0, help="default: torch's")
    return parser.parse_args(argv)


def _pairs(text: str) -> int:
    if int(text) < against.FEWEST_PAIRS:
        raise argparse.ArgumentTypeError(f"at least {against.FEWEST_PAIRS}, or there is no interval")
    return int(text)


def _tell(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{text[:100]}", end="", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.command == "compare":
        report.compare(arguments.before, arguments.after)
        return 0
    if arguments.command == "show":
        report.show(json.loads(arguments.file.read_text()), arguments.targets)
        return 0
    if arguments.command == "plot":
        from . import plots

        for path in plots.draw(arguments.file):
            print(path)
        return 0
    if arguments.device == "cuda" and not (build_info()["cuda"] and torch.cuda.is_available()):
        print("--device cuda: torch sees no GPU, or this build has no CUDA kernels", file=sys.stderr)
        return 1
    if arguments.command == "against":
        return against.run(arguments, _tell)
    return _measure_all(arguments)


def _measure_all(arguments: argparse.Namespace) -> int:
    start = time.monotonic()
    device = arguments.device
    machine = timing.machine()
    kept = device == "cpu" and keep_freed_memory()
    _tell("the machine's ceilings")
    limits = ceilings.measure(device)
    where = (
        ", ".join(machine["gpus"]) if device == "cuda" else f"{machine['cpu']}, {machine['threads']} threads"
    )
    print(f"{where}; torch {machine['torch']}, commit {report.commit() or 'unknown'}")
    print(
        f"CPU instruction set {build_info()['cpu_instruction_set']}, "
        f"OMP_PROC_BIND={os.environ.get('OMP_PROC_BIND')}, "
        f"freed memory {'is kept' if kept else 'may go back to the system'}"
    )
    _print_ceilings(limits)
    _print_plan(arguments.only, arguments.quick)

    def tell(text: str) -> None:
        _tell(f"{time.monotonic() - start:5.0f} s  {text}")

    run = questions.Run(device, arguments.quick, limits, tell)
    path = arguments.output or report.default_path(device)
    rows: list[Row] = []
    for row in questions.ask(
        arguments.only, run
    ):  # saved as they come: an interrupted run leaves what it had
        rows.append(row)
        seconds = time.monotonic() - start
        report.save(path, report.summary(rows, limits, device, arguments.quick, seconds, run.used))
    # once more, since others' work on the machine may have held the first try back for all of its time
    _tell("the machine's ceilings")
    limits = limits.or_better(ceilings.measure(device))
    for row in rows:
        if row.over_floor is not None and row.direction in DIRECTIONS:  # a step's floor is a copy's time
            row.set_floor(limits)
    contents = report.summary(rows, limits, device, arguments.quick, time.monotonic() - start, run.used)
    report.save(path, contents)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    report.show(contents, arguments.targets)
    _print_ceilings(limits)
    print(f"\n{contents['seconds']:.0f} s; {path}")
    ours = [row.status for row in rows if row.method == OURS]
    return 1 if any(status.startswith(("wrong", "failed")) for status in ours) else 0


def _print_ceilings(limits: ceilings.Ceilings) -> None:
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in limits.flops.items())
    print(f"matmul GFLOP/s: {rates}; copy {limits.copy_bytes / 1e9:.1f} GB/s (read + written)")


def _print_plan(names: Sequence[str], quick: bool) -> None:
    """How long each question may take at most, but for the comparison that it is in the middle of."""
    asked = {name: questions.QUESTIONS[name] for name in names}
    total = sum(question.seconds[quick] for question in asked.values())
    print(f"{len(asked)} questions in at most about {total:.0f} s, less where peers were compiled before:")
    for name, question in asked.items():
        print(f"  {question.seconds[quick]:4.0f} s  {name}: {question.about}")


if __name__ == "__main__":
    sys.exit(main())
