"""How figures are shown and written."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.kernels.toolchain import compiler_release


def format_table(rows: list[tuple[str, ...]]) -> str:
    """Aligned text: the first row is the heading, the first column is set to the left."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append("  ".join(cells))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_json(
    path: Path, command: str, arguments: list[str] | None, facts: dict[str, Any], rows: list[dict[str, Any]]
) -> None:
    """One line per row, so that a change shows as the lines of the kernels that it is about."""
    words = sys.argv[1:] if arguments is None else arguments
    head = {"command": " ".join([command, *words]), "compiler": compiler_release(), **facts}
    lines = json.dumps(head, indent=1).removesuffix("\n}")
    kernels = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{lines},\n "kernels": [\n{kernels}\n ]\n}}\n')
