"""`python -m benchmarks.mqar`: see the package's docstring."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import benchmarks.mqar
from benchmarks.training import choose_device

from . import presets, report
from .cell import Cell
from .command import RUNS, add_options, execute
from .models import FIRST_LAYERS, MIXERS

DRAWN = ("figure2", "figure6")
VARIED = ("mixer", "width", "learning_rate", "seed")


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
        add_options(command)
    for name in DRAWN:
        drawn = commands.add_parser(name, help=f"see above: {name}")
        drawn.add_argument("--output", type=Path, help=f"folder; default {RUNS}/{name}")
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
            help=f"{field.metadata['help']}; default {default}",
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
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["table3"]:
        from benchmarks.attention_maps import __main__ as attention_maps

        return attention_maps.main(argv[1:])
    arguments = _arguments(argv)
    if arguments.command in DRAWN:
        from . import drawings

        print(drawings.draw(arguments.command, arguments.output or RUNS / arguments.command))
        return 0
    small = getattr(arguments, "small", False)
    folder = arguments.output or RUNS / (arguments.command + "-small" * small)
    if arguments.command == "steps":
        from . import steps

        steps.report(folder, choose_device(arguments.device), small)
        return 0
    lines = execute("benchmarks.mqar", argv, arguments, folder, _cells(arguments))
    if lines is not None:
        report.show(arguments.command, lines, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
