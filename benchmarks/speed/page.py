"""The tables of docs/performance.md that change with the kernels, from benchmarks/results.

python -m benchmarks.speed.page      writes them into the page, between its markers
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.readme import BLOCK

ROOT = Path(__file__).parents[2]
PAGE, RESULTS = ROOT / "docs" / "performance.md", ROOT / "benchmarks" / "results"
MEANT = {"forward": "forward", "backward": "backward alone", "step": "decode step"}


def _read(name: str) -> Any:
    return json.loads((RESULTS / name).read_text())


def predicted() -> str:
    """The floor, the prediction and its upper bound of every shape, of bfloat16 on an H100."""
    lines = [
        "| batch, heads, N | dv | map | | floor | predicted | at most |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: |",
    ]
    for row in _read("predictions.json")["predictions"]:
        sizes = row["sizes"]
        if row["gpu"] != "H100" or sizes["dtype"] != "bfloat16":
            continue
        times = [
            row[name] * 1e6 for name in ("floor_seconds", "predicted_seconds", "predicted_at_most_seconds")
        ]
        cells = [
            f"{sizes['batch']}, {sizes['heads']}, {sizes['seqlen']}",
            str(sizes["head_dim"]),
            f"`{sizes['feature_map']}`",
            MEANT[row["direction"]],
            *(f"{time:,.0f}" for time in times),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def counted() -> str:
    """Registers, spills, blocks and instructions of the kernels of `outer` with d = 16."""
    lines = [
        "| kernel | architecture | registers | bytes spilled | blocks per SM | instructions per 64 tokens |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    instructions = {
        (kernel["name"], kernel["architecture"]): kernel["chunk_instructions"]
        for kernel in _read("kernel_instructions_sm80_sm90.json")["kernels"]
    }
    for kernel in _read("kernel_registers_sm80_sm90.json")["kernels"]:
        of = re.fullmatch(
            r"tensor_core::polynomial::(\w+)_kernel<bfloat16, outer, 16, (\d+), false>", kernel["name"]
        )
        if not of or (of[2] == "128") != (kernel["architecture"] == 90):
            continue  # the chunk that the architecture's cards take
        cells = [
            f"{of[1]}, chunks of {of[2]}",
            f"sm_{kernel['architecture']}",
            kernel["registers"],
            kernel["spill_stores"],
            kernel["blocks"],
            f"{instructions[kernel['name'], kernel['architecture']]:,}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def traffic() -> str:
    """Global bytes of a token and head beside the floor, of one and of four segments."""
    lines = ["| sweep | segments | bytes | floor |", "| --- | ---: | ---: | ---: |"]
    for run in _read("traffic.json")["runs"]:
        name = re.fullmatch(r"(forward|backward) (outer|square) (\d)", run["name"])
        if name:
            lines.append(
                f"| {name[1]}, `{name[2]}` | {name[3]} | {run['bytes']:,.0f} | {run['floor']:,.0f} |"
            )
    return "\n".join(lines)


TABLES: dict[str, Callable[[], str]] = {"predicted": predicted, "counted": counted, "traffic": traffic}


def fill(page: str) -> str:
    """The page with every table as the results have it."""
    return BLOCK.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", page)


def main(argv: Sequence[str]) -> int:
    if argv:
        print(__doc__, file=sys.stderr)
        return 2
    PAGE.write_text(fill(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
