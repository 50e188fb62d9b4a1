"""`python -m benchmarks.mqar`: see the package's docstring."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

import benchmarks.mqar
from benchmarks.training import choose_device

from . import grid, presets, report
from .cell import CHECKPOINT_SECONDS, Cell
from .models import FIRST_LAYERS, MIXERS

RUNS = Path("benchmarks/runs")
VARIED = ("mixer", "width", "learning_rate", "seed")
PARENT = "REBASED_BENCHMARK_PARENT"  # the process that a further worker belongs to


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mqar",
        description=benchmarks.mqar.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("run", "grid"):
        _settings(commands.add_parser(name, help=f"see above: {name}"), several=name == "grid")
    for name in (*presets.PRESETS, "table3", "steps"):
        commands.add_parser(name, help=f"see above: {name}").add_argument(
            "--small", action="store_true", help="minutes on 2 CPU cores; without it, days on a GPU"
        )
    for command in commands.choices.values():
        command.add_argument("--output", type=Path, help=f"folder; default {RUNS}/ and the command's name")
        command.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
        command.add_argument("--jobs", type=int, help="processes; default: one per core on a CPU, 1 on a GPU")
        command.add_argument(
            "--checkpoint-every", type=float, default=CHECKPOINT_SECONDS, help="seconds; default %(default)s"
        )
    return parser.parse_args(argv)


def _settings(parser: argparse.ArgumentParser, several: bool) -> None:
    """An option for each of a run's settings."""
    kinds = {
        "int": int,
        "float": float,
        "str": str,
        "bool": lambda x: {"true": True, "false": False}[x.lower()],
        "int | None": lambda x: None if x == "none" else int(x),
    }
    choices = {"mixer": MIXERS, "first": FIRST_LAYERS, "schedule": ("cosine", "constant")}
    for name, field in Cell.__dataclass_fields__.items():
        many = several and name in VARIED
        default = str(field.default).lower() if isinstance(field.default, bool) else field.default
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kinds[str(field.type)],
            default=[field.default] if many else field.default,
            choices=choices.get(name),
            nargs="+" if many else None,
            help=f"default {default}",
        )


def _cells(arguments: argparse.Namespace) -> list[Cell]:
    if arguments.command in presets.PRESETS:
        return presets.PRESETS[arguments.command](arguments.small)
    given = {name: getattr(arguments, name) for name in Cell.__dataclass_fields__}
    if arguments.command == "run":
        return [Cell(**given)]
    varied = {name: given.pop(name) for name in VARIED}
    return presets.product(given, **varied)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _arguments(argv)
    small = getattr(arguments, "small", False)
    folder = arguments.output or RUNS / (arguments.command + "-small" * small)
    device = choose_device(arguments.device)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    jobs = arguments.jobs or (1 if device.type == "cuda" else cores)
    if arguments.command == "table3":
        from benchmarks.attention_maps import __main__ as attention_maps

        return attention_maps.main([*["--small"] * small, "--output", str(folder), "--device", device.type])
    if arguments.command == "steps":
        from . import steps

        steps.report(folder, device, small)
        return 0
    cells = _cells(arguments)
    jobs = min(jobs, len(cells))
    torch.set_num_threads(max(cores // jobs, 1))
    if PARENT in os.environ:
        grid.work(folder, cells, device, arguments.checkpoint_every, parent=int(os.environ[PARENT]))
        return 0
    os.environ[PARENT] = str(os.getpid())  # for the workers
    try:
        command = [sys.executable, "-m", "benchmarks.mqar", *(sys.argv[1:] if argv is None else argv)]
        lines = grid.run(folder, cells, device, command, jobs, arguments.checkpoint_every)
    finally:
        del os.environ[PARENT]
    report.show(arguments.command, lines, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
