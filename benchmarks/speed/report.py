"""Tables on the terminal, JSON in benchmarks/results, and two JSON files side by side."""

from __future__ import annotations

import functools
import json
import subprocess
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import rebased_cuda
from rebased_cuda import _measure

from .ceilings import Ceilings
from .harness import OURS, Row, Shape

try:
    from rich.console import Console
    from rich.table import Table
except ImportError:  # the extra `bench`
    Console = Table = None  # type: ignore[assignment,misc]

RESULTS = Path(__file__).parent.parent / "results"
FILE_WIDTH = 150


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
        table.add_column(column, justify="right" if index > 1 else "left")
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
    if seconds >= 1:
        return f"{seconds:.2f} s"
    scale, unit = (1e3, "ms") if seconds >= 1e-3 else (1e6, "us")
    return f"{seconds * scale:.3g} {unit}"


def tables(rows: list[Row]) -> None:
    for question in dict.fromkeys(row.question for row in rows):
        lines: list[list[str]] = []
        previous = ""
        asked = [row for row in rows if row.question == question]
        absent = _absent(asked)
        for row in (row for row in asked if row.method not in absent):
            shape = f"{Shape(**row.shape)}, {row.direction}"
            if row.status != "ok":
                cells = [row.status, "", "", "", "", ""]
            else:
                cells = [
                    duration(row.median),
                    f"{row.spread:.0%}",
                    "" if row.ratio is None else f"{row.ratio:.2f}x",
                    "" if row.over_floor is None else f"{row.over_floor:.2f}",
                    "" if row.error is None else f"{row.error:.1e}",
                    "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.1f}",
                ]
            lines.append(["" if shape == previous else shape, row.method, *cells])
            previous = shape
        columns = ["shape", "method", "median", "spread", "time/ours", "ours/floor", "error", "peak MiB"]
        print_table(question, columns, lines)
        for method, reason in absent.items():
            print(f"{method}: {reason}")


def _absent(rows: list[Row]) -> dict[str, str]:
    """Methods that did not run for one and the same reason at any shape: a line each is enough."""
    reasons: dict[str, set[str]] = {}
    for row in rows:
        reasons.setdefault(row.method, set()).add(row.status)
    return {
        method: next(iter(found))
        for method, found in reasons.items()
        if len(found) == 1 and "ok" not in found
    }


@functools.lru_cache
def commit() -> str:
    """The source's commit, with + where it was changed since; empty outside git."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        result = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=False)
        return result.stdout.strip() if result.returncode == 0 else ""

    head = git("rev-parse", "--short=12", "HEAD")
    return head + "+" * bool(head and git("status", "--porcelain", "--untracked-files=no"))


def summary(rows: list[Row], ceilings: Ceilings, device: str, quick: bool, seconds: float) -> dict[str, Any]:
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "version": rebased_cuda.__version__,
        "build": rebased_cuda.build_info(),
        "machine": _measure.machine(),
        "device": device,
        "quick": quick,
        "seconds": round(seconds, 1),
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
