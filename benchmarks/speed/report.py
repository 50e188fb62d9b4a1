"""Tables on the terminal, JSON in benchmarks/results, and two JSON files side by side."""

from __future__ import annotations

import functools
import json
import math
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import rebased_cuda
from rebased_cuda.demo import timing

from . import others, peers, targets
from .ceilings import Ceilings
from .harness import OURS, Row, Shape
from .questions import nothing_slower

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:  # the extra `bench`
    Console = Table = None  # type: ignore[assignment,misc]

FLOOR = "floor"
PEERS = {
    "softmax attention": tuple(x for x in (*peers.CPU_METHODS, *peers.GPU_METHODS) if peers.SDPA in x),
    "plain PyTorch": peers.PLAIN,
    "other packages": others.NAMES,
}
RESULTS = Path(__file__).parent.parent / "results"
FILE_WIDTH = 170


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    rows = [list(row) for row in rows]
    print(f"\n{title}")
    if Console is None:
        widths = [max(len(row[i]) for row in [list(columns), *rows]) for i in range(len(columns))]
        for row in [list(columns), *rows]:
            print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)))
        return
    table = Table()
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index > 1 else "left", no_wrap=index < 2)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console = Console(width=FILE_WIDTH)
    console.print(table)


def shape_of(row: dict[str, Any]) -> Shape:
    return Shape(**row["shape"])


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    for size, name in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.1f} {name}"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    scale, unit = (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    return f"{seconds * scale:.3g} {unit}"


def show(contents: dict[str, Any], with_targets: bool = False) -> None:
    """All tables of a result; `with_targets`: also that of targets.py."""
    rows = contents["rows"]
    for question in dict.fromkeys(row["question"] for row in rows):
        _print_question(question, [row for row in rows if row["question"] == question])
    print_ratios(rows)
    if with_targets and contents["device"] == "cpu":
        print_targets(rows)
    used = ", ".join(f"{name} {seconds:.0f}" for name, seconds in contents["seconds_by_question"].items())
    print(f"seconds by question: {used}")


def _print_question(question: str, rows: Sequence[dict[str, Any]]) -> None:
    lines: list[list[str]] = []
    previous = ""
    absent = _absent(rows)
    for row in (row for row in rows if row["method"] not in absent):
        shape = f"{shape_of(row)}, {row['direction']}"
        lines.append(["" if shape == previous else shape, row["method"], *_cells(row)])
        previous = shape
    columns = ["shape", "method", "median", "spread", "time/first", "ours/floor", "error", "peak MiB"]
    print_table(question, columns, lines)
    for method, reason in absent.items():
        print(f"{method}: {reason}")


def _cells(row: dict[str, Any]) -> list[str]:
    if row["status"] != "ok":
        return [row["status"], "", "", "", "", ""]

    def number(name: str, form: str, factor: float = 1.0) -> str:
        return "" if row[name] is None else format(row[name] * factor, form)

    return [
        duration(row["median"]),
        f"{row['spread']:.0%}",
        number("ratio", ".2f") + "x" * (row["ratio"] is not None),
        number("over_floor", ".2f"),
        number("error", ".1e"),
        number("peak_bytes", ".1f", 2**-20),
    ]


def print_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """The op's time over the floor and the best peers' times over the op's, then where plain PyTorch wins."""
    lines = [
        [
            str(shape),
            direction,
            duration(found["ours"]),
            *("" if (x := found.get(name)) is None else f"{x:.2f}x" for name in (FLOOR, *PEERS)),
        ]
        for (shape, direction), found in _best_peers(rows).items()
        if len(found) > 1  # there is something to compare with
    ]
    if not lines:
        return
    columns = ["shape", "direction", "ours", "ours/floor", *(f"{name}/ours" for name in PEERS)]
    print_table("Against the floor, and the best of each kind of peer against the op", columns, lines)
    found = nothing_slower.ratios(rows)
    slower = [x for x in found if x.ratio < 1]
    print(
        f"plain PyTorch is faster at {len(slower)} of {len(found)} shapes and directions" + ":" * bool(slower)
    )
    for x in slower:
        print(f"  {x.shape}, {x.direction}: {x.method} takes {x.ratio:.2f} of our time")


def _best_peers(rows: Sequence[dict[str, Any]]) -> dict[tuple[Shape, str], dict[str, float]]:
    """By shape and direction; of one that two questions asked, the figures that are worse for the op."""
    timed = [row for row in rows if row["status"] == "ok"]
    result: dict[tuple[Shape, str], dict[str, float]] = {}
    asked = set()
    for row in timed:
        key = (shape_of(row), row["direction"])
        if row["method"] != OURS or row["ratio"] != 1:  # times are relative to a call of another kind
            continue
        asked.add((row["question"], *key))
        found = result.setdefault(key, {"ours": 0.0})
        found["ours"] = max(found["ours"], row["median"])
        if row["over_floor"] is not None:
            found[FLOOR] = max(found.get(FLOOR, 0.0), row["over_floor"])
    for row in timed:
        key = (shape_of(row), row["direction"])
        for kind, methods in PEERS.items():
            if row["method"] in methods and (row["question"], *key) in asked:
                result[key][kind] = min(result[key].get(kind, math.inf), row["ratio"])
    return result


def print_targets(rows: Sequence[dict[str, Any]]) -> None:
    found = targets.targets(rows)
    if not found:
        return
    lines = [
        [
            target.name,
            f"{target.value:.2f} {target.unit}",
            f"{'<=' if target.at_most else '>='} {target.wanted:g}",
            "held" if target.held else "MISSED",
        ]
        for target in found
    ]
    held = sum(target.held for target in found)
    print_table(f"{held} of {len(found)} figures held", ["figure", "measured", "wanted", ""], lines)


def _absent(rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Methods that did not run for one and the same reason at any shape: a line each is enough."""
    reasons: dict[str, set[str]] = {}
    for row in rows:
        reasons.setdefault(row["method"], set()).add(row["status"])
    return {
        method: next(iter(found))
        for method, found in reasons.items()
        if len(found) == 1 and "ok" not in found
    }


@functools.lru_cache
def commit(folder: Path = Path(__file__).parent) -> str:
    """The source's commit, with + where it was changed since; empty outside git."""

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    return head + "+" * bool(head and git("status", "--porcelain", "--untracked-files=no"))


def summary(
    rows: list[Row], ceilings: Ceilings, device: str, quick: bool, seconds: float, used: dict[str, float]
) -> dict[str, Any]:
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "version": rebased_cuda.__version__,
        "build": rebased_cuda.build_info(),
        "machine": timing.machine(),
        "peers": others.versions(),
        "device": device,
        "quick": quick,
        "seconds": round(seconds, 1),
        "seconds_by_question": {name: round(x, 1) for name, x in used.items()},
        "ceilings": ceilings.to_json(),
        "rows": [row.to_json() for row in rows],
    }


def default_path(device: str) -> Path:
    stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
    return RESULTS / f"speed-{device}-{stamp}.json"


def save(path: Path, contents: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents, indent=1) + "\n")


def _key(row: dict[str, Any]) -> tuple[str, ...]:
    return (row["question"], str(shape_of(row)), row["direction"], row["method"])


def moved(before: dict[str, Any], after: dict[str, Any]) -> list[dict[str, Any]]:
    """Every row that both have, with the factor its time changed by and whether that is beyond the spread.

    Beyond the spread: the medians are further apart than the half distances between the quartiles together,
    and by more than 2 %.
    """
    old = {_key(row): row for row in before["rows"] if row["status"] == "ok"}
    result = []
    for row in after["rows"]:
        was = old.get(_key(row))
        if was is None or row["status"] != "ok":
            continue
        factor = row["median"] / was["median"]
        noise = max(was["spread"] + row["spread"] * factor, 0.02)
        changed = abs(factor - 1) > noise
        result.append({"row": row, "was": was, "factor": factor, "noise": noise, "moved": changed})
    return result


def compare(first: Path, second: Path) -> None:
    before, after = (json.loads(path.read_text()) for path in (first, second))
    for name, contents in ((first, before), (second, after)):
        machine = contents["machine"]
        where = ", ".join(machine["gpus"]) if contents["device"] == "cuda" else machine["cpu"]
        rate = contents["ceilings"]["flops"]["float32"] / 1e9
        copy = contents["ceilings"]["copy_bytes"] / 1e9
        print(
            f"{name}: {contents['when']}, commit {contents['commit'] or 'unknown'}, {where}, "
            f"{machine['threads']} threads, sgemm {rate:.0f} GFLOP/s, copy {copy:.1f} GB/s"
        )
    changes = moved(before, after)
    lines = [
        [
            f"{shape_of(change['row'])}, {change['row']['direction']}",
            change["row"]["method"],
            duration(change["was"]["median"]),
            duration(change["row"]["median"]),
            f"{change['factor']:.2f}x",
            f"{change['noise']:.0%}",
            _ours_moved(change),
        ]
        for change in sorted(changes, key=lambda change: change["factor"])
        if change["moved"]
    ]
    columns = ["shape", "method", "before", "after", "after/before", "spread", ""]
    print_table(f"{len(lines)} of {len(changes)} times moved beyond their spread", columns, lines)


def _ours_moved(change: dict[str, Any]) -> str:
    if change["row"]["method"] != OURS:
        return ""
    return "slower" if change["factor"] > 1 else "faster"
