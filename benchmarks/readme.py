"""The tables of benchmarks/README.md, from the results in benchmarks/results.

python -m benchmarks.readme                   writes them into the page, between its markers
python -m benchmarks.readme keep FOLDER NAME  first keeps a folder's results as results/mqar/NAME.jsonl
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.attention_maps import overlap
from benchmarks.mqar import report, steps
from benchmarks.training import read_json_lines

HERE = Path(__file__).parent
PAGE, RESULTS = HERE / "README.md", HERE / "results" / "mqar"
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
TABLES: dict[str, Callable[[Sequence[Any]], str]] = {
    "table1-small": report.table1,
    "figure1-small": report.figure1,
    "figure4-small": report.figure4,
    "table3-small": lambda lines: overlap.table(x for x in lines if x["seqlen"] == overlap.SEQLEN[True]),
    "steps-small": steps.table,
}


def fill(page: str) -> str:
    """The page with every table as the results have it.

    Raises:
        FileNotFoundError: the page shows a table whose results are not there.
    """

    def table(match: re.Match[str]) -> str:
        path = RESULTS / f"{match[2]}.jsonl"
        lines = read_json_lines(path)
        if not lines:
            raise FileNotFoundError(f"{path}: no results")
        return f"{match[1]}{TABLES[match[2]](lines)}\n{match[3]}"

    return BLOCK.sub(table, page)


def keep(folder: Path, name: str) -> None:
    """The folder's lines, without what only the pictures of Figure 10 need."""
    dropped = {"history"} if name.startswith("table3") else {"history", "norms"}
    RESULTS.mkdir(parents=True, exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("w") as file:
        for line in read_json_lines(folder / "results.jsonl"):
            kept = {key: value for key, value in line.items() if key not in dropped}
            file.write(json.dumps(kept) + "\n")


def main(argv: Sequence[str]) -> int:
    if len(argv) == 3 and argv[0] == "keep" and argv[2] in TABLES:
        keep(Path(argv[1]), argv[2])
    elif argv:
        print(f"{__doc__}\nNAME: one of {', '.join(TABLES)}", file=sys.stderr)
        return 2
    PAGE.write_text(fill(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
