"""The mixers' perplexities over several seeds, beside the paper's, and what they say in one sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.training import read_json_lines

# Table 2: perplexity on the Pile over all, AR and non-AR tokens; models of 127 M (attention) and 157 M
PAPER = {
    "attention": (16.62, 3.57, 58.57),
    "based": (16.69, 3.72, 57.21),
    "rebased": (16.45, 3.67, 56.31),
}
COLUMNS = ("all", "recall", "other")


def results(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The finished runs of a JSON lines file, by mixer and seed."""
    return {(record["mixer"], record["seed"]): record for record in read_json_lines(path)}


def table(records: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Rows (mixer, parameters, seeds, then ours and the paper's for all, AR and other tokens)."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        groups.setdefault(record["mixer"], []).append(record)
    rows = []
    for mixer in (name for name in PAPER if name in groups):
        group = groups[mixer]
        row = [mixer, f"{group[0]['parameters']:,}", str(len(group))]
        for column, paper in zip(COLUMNS, PAPER[mixer], strict=True):
            row += [spread([record[column] for record in group]), f"{paper:.2f}"]
        rows.append(row)
    return rows


HEADER = (
    "mixer", "parameters", "seeds", "all", "paper", "AR", "paper", "other", "paper",
)  # fmt: skip


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def statement(records: Iterable[Mapping[str, Any]]) -> str:
    """One plain sentence: is ReBased's perplexity on AR tokens below Based's, and is that more than noise."""
    values: dict[str, dict[int, float]] = {"rebased": {}, "based": {}}
    for record in records:
        if record["mixer"] in values:
            values[record["mixer"]][record["seed"]] = record["recall"]
    seeds = sorted(values["rebased"].keys() & values["based"].keys())
    if not seeds:
        return "No seed has both a ReBased and a Based run: nothing to compare."
    ours, theirs = ([values[mixer][seed] for seed in seeds] for mixer in ("rebased", "based"))
    below = sum(a < b for a, b in zip(ours, theirs, strict=True))
    mean, other = statistics.mean(ours), statistics.mean(theirs)
    verdict = "is below" if mean < other else "is NOT below"
    text = (
        f"ReBased's perplexity on AR tokens {verdict} Based's: {mean:.3f} against {other:.3f} "
        f"({below} of {len(seeds)} seeds lower)"
    )
    if len(seeds) > 1:
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        error = statistics.stdev(differences) / math.sqrt(len(seeds))
        text += f"; mean difference {statistics.mean(differences):+.3f}, standard error {error:.3f}"
    return text + "."
