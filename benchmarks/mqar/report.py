"""Tables in Markdown, beside the paper's numbers, and the pictures' data, from finished runs."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .models import ABLATION, SQUARE

Line = Mapping[str, Any]

TITLES = {
    "rebased": "ReBased, (gamma norm(x) + beta)²",
    "based": "Based",
    "linear": "Linear Transformer",
    "softmax": "Attention",
    "hyena": "Hyena",
    "rwkv": "RWKV",
    "mamba": "Mamba",
    "x2": "x²",
    "norm": "norm(x)²",
    "gamma": "(gamma x)²",
    "gamma-beta": "(gamma x + beta)²",
}
TWICE = "-twice"  # ending of a name in Figure 7: the mixer stands in both blocks
# Table 1: accuracy and its deviation over 5 seeds, for lengths 256 and 2048 and widths 16, 24, 32, 48.
PAPER_LENGTHS, PAPER_WIDTHS = (256, 2048), (16, 24, 32, 48)
PAPER_TABLE1: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = {
    "based": (
        ((0.06, 0.02), (0.45, 0.15), (0.82, 0.06), (0.99, 0.00)),
        ((0.02, 0.02), (0.40, 0.18), (0.66, 0.08), (0.99, 0.01)),
    ),
    "x2": (
        ((0.05, 0.05), (0.47, 0.08), (0.64, 0.42), (0.99, 0.00)),
        ((0.03, 0.03), (0.33, 0.21), (0.46, 0.42), (0.93, 0.09)),
    ),
    "norm": (
        ((0.09, 0.04), (0.39, 0.24), (0.84, 0.09), (0.97, 0.02)),
        ((0.05, 0.05), (0.56, 0.10), (0.72, 0.17), (0.99, 0.00)),
    ),
    "gamma": (
        ((0.02, 0.02), (0.35, 0.22), (0.71, 0.09), (0.98, 0.03)),
        ((0.02, 0.03), (0.26, 0.45), (0.65, 0.37), (0.99, 0.01)),
    ),
    "gamma-beta": (
        ((0.06, 0.01), (0.51, 0.08), (0.89, 0.03), (0.99, 0.00)),
        ((0.06, 0.03), (0.50, 0.08), (0.85, 0.04), (0.99, 0.01)),
    ),
    "rebased": (
        ((0.09, 0.05), (0.59, 0.06), (0.86, 0.08), (0.99, 0.00)),
        ((0.04, 0.03), (0.58, 0.01), (0.83, 0.04), (0.99, 0.00)),
    ),
}
# its means over widths as printed there
PAPER_MEANS = {
    "based": (0.58, 0.51),
    "x2": (0.54, 0.44),
    "norm": (0.57, 0.58),
    "gamma": (0.51, 0.48),
    "gamma-beta": (0.61, 0.60),
    "rebased": (0.63, 0.61),
}


@dataclass(frozen=True)
class Score:
    """Accuracies of a model's seeds at its best learning rate."""

    accuracies: tuple[float, ...]
    learning_rate: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def deviation(self) -> float:
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else math.nan

    def median_and_range(self) -> str:
        """The median, with the lowest and the highest seed."""
        median = statistics.median(self.accuracies)
        if len(self.accuracies) == 1:
            return f"{median:.2f} (one seed)"
        return f"{median:.2f} ({min(self.accuracies):.2f} to {max(self.accuracies):.2f})"


Key = tuple[str, int, int]  # mixer, length, width


def by_rate(lines: Iterable[Line]) -> dict[Key, dict[float, list[float]]]:
    """Accuracies of the seeds, of each model at each learning rate."""
    found: dict[Key, dict[float, list[float]]] = {}
    for line in lines:
        key = (line["mixer"], line["seqlen"], line["width"])
        found.setdefault(key, {}).setdefault(line["learning_rate"], []).append(line["accuracy"])
    return found


def scores(
    lines: Iterable[Line], centre: Callable[[Sequence[float]], float] = statistics.fmean
) -> dict[Key, Score]:
    """Each model's score at the learning rate whose seeds have the best mean, or other `centre`."""

    def best(rates: dict[float, list[float]]) -> Score:
        rate = max(rates, key=lambda rate: centre(rates[rate]))
        return Score(tuple(rates[rate]), rate)

    return {key: best(rates) for key, rates in by_rate(lines).items()}


def expected_best(accuracies: Sequence[float], tries: int) -> float:
    """Expected maximum of `tries` draws, with replacement, from the accuracies found (Dodge et al. 2019).

    The share of draws whose maximum is at most the i-th smallest of n values is (i / n)^tries.
    """
    ordered, n = sorted(accuracies), len(accuracies)
    return sum(x * (((i + 1) / n) ** tries - (i / n) ** tries) for i, x in enumerate(ordered))


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (columns, rule, *rows))


def rank_test(a: Sequence[float], b: Sequence[float]) -> float:
    """Two-sided p of the exact rank-sum test of Mann and Whitney, for the seeds of two rows.

    The share of all ways to divide the values into two such groups whose ranks are at least as far apart.
    """

    def distance(first: Sequence[float], second: Sequence[float]) -> float:
        above = sum((x > y) + (x == y) / 2 for x in first for y in second)
        return abs(above - len(a) * len(b) / 2)

    values, found = [*a, *b], []
    for chosen in map(set, itertools.combinations(range(len(values)), len(a))):
        first = [x for i, x in enumerate(values) if i in chosen]
        found.append(distance(first, [x for i, x in enumerate(values) if i not in chosen]))
    return sum(x >= distance(a, b) for x in found) / len(found)


def steps_to_learn(lines: Iterable[Line]) -> dict[Key, str]:
    """Median over seeds of the steps to the accuracy that ends a run, at the quickest learning rate.

    `> steps` where half of the seeds or more never have it.
    """
    found: dict[Key, dict[float, list[float]]] = {}
    most: dict[Key, int] = {}
    for line in lines:
        key = (line["mixer"], line["seqlen"], line["width"])
        learned = line["accuracy"] >= line["stop_at"]
        steps = line["steps_done"] if learned else math.inf
        found.setdefault(key, {}).setdefault(line["learning_rate"], []).append(steps)
        most[key] = line["steps"]
    medians = {key: min(map(statistics.median, rates.values())) for key, rates in found.items()}
    return {key: f"{x:.0f}" if math.isfinite(x) else f"> {most[key]}" for key, x in medians.items()}


def shortest(lines: Sequence[Line]) -> list[Line]:
    """The lines of the shortest schedule, whose accuracies Table 1 has; steps to learn are of the longest."""
    return [line for line in lines if line["steps"] == min(x["steps"] for x in lines)]


def table1(lines: Sequence[Line]) -> str:
    """The paper's rows and ours, for both kinds of square (Based has its own map); p: see `rank_test`."""
    ours = scores(shortest(lines))
    steps = steps_to_learn(x for x in lines if x["steps"] == max(line["steps"] for line in lines))
    sizes = sorted({key[1:] for key in ours})
    columns = ["q and k", *(f"paper, N = {n}, mean" for n in PAPER_LENGTHS)]
    for n, width in sizes:
        if width in PAPER_WIDTHS:
            columns += [f"paper, N = {paper_n}, width {width}" for paper_n in PAPER_LENGTHS]
        for map_name in ("outer", "square"):
            columns += [f"`{map_name}`, N = {n}, width {width}", f"`{map_name}`, steps to learn"]
            columns.append("p against ReBased")
    rows = []
    for mixer in ("based", *ABLATION):
        paper = PAPER_TABLE1[mixer]
        cells = [TITLES[mixer], *(f"{mean:.2f}" for mean in PAPER_MEANS[mixer])]
        for n, width in sizes:
            if width in PAPER_WIDTHS:
                printed = [of_length[PAPER_WIDTHS.index(width)] for of_length in paper]
                cells += [f"{mean:.2f} ± {deviation:.2f}" for mean, deviation in printed]
            rebased = ours.get(("rebased", n, width))
            for key in ((mixer, n, width), (mixer + SQUARE, n, width)):
                cells += [ours[key].median_and_range() if key in ours else "", steps.get(key, "")]
                known = key in ours and rebased is not None
                cells.append(f"{rank_test(rebased.accuracies, ours[key].accuracies):.3f}" if known else "")
        rows.append(cells)
    return markdown(columns, rows)


def figure1(lines: Sequence[Line]) -> str:
    """Medians over seeds, which one seed that doesn't learn leaves where they are, and the range."""
    ours = scores(lines, statistics.median)
    sizes = sorted({key[1:] for key in ours})
    rows = []
    for mixer in dict.fromkeys(key[0] for key in ours):
        found = (ours.get((mixer, n, width)) for n, width in sizes)
        rows.append([title(mixer), *(score.median_and_range() if score else "" for score in found)])
    return markdown(["mixer", *(f"N = {n}, width {width}" for n, width in sizes)], rows)


def figure7(lines: Iterable[Line]) -> str:
    """As `figure1`, a row for a mixer behind a convolution and one for it in both blocks."""
    return figure1(by_first(lines))


def by_first(lines: Iterable[Line]) -> list[Line]:
    """The lines with mixers that say what stands in the first block."""
    return [{**line, "mixer": line["mixer"] + TWICE * (line["first"] == "same")} for line in lines]


def title(mixer: str) -> str:
    """What tables and pictures call a mixer."""
    if mixer.endswith(TWICE):
        return f"{title(mixer.removesuffix(TWICE))}, in both blocks"
    name = TITLES[mixer.removesuffix(SQUARE)]
    return f"{name}, elementwise" if mixer.endswith(SQUARE) else name


def figure4(lines: Sequence[Line]) -> str:
    """Expected best accuracy of 1, 2, ... learning rates, each the median of its seeds."""
    curves = expectation(lines)
    tries = max((len(curve) for curve in curves.values()), default=0)
    columns = ["mixer", "N", "width", *(f"{k} {'try' if k == 1 else 'tries'}" for k in range(1, tries + 1))]
    return markdown(
        columns,
        (
            [TITLES[mixer], str(n), str(width), *(f"{x:.2f}" for x in curve)]
            for (mixer, n, width), curve in curves.items()
        ),
    )


def expectation(lines: Iterable[Line]) -> dict[Key, list[float]]:
    curves = {}
    for key, rates in by_rate(lines).items():
        medians = [statistics.median(accuracies) for accuracies in rates.values()]
        curves[key] = [expected_best(medians, k) for k in range(1, len(medians) + 1)]
    return curves


def runs(lines: Sequence[Line]) -> str:
    """Each run on its own line."""
    names = ("mixer", "seqlen", "width", "learning_rate", "seed", "accuracy", "steps_done", "seconds")
    return markdown(names, ([str(line[name]) for name in names] for line in lines))


TABLES = {"table1": table1, "figure1": figure1, "figure4": figure4, "figure7": figure7}


def show(command: str, lines: Sequence[Line], folder: Path) -> None:
    """Prints the table, leaves it in the folder, and draws the pictures where matplotlib is installed."""
    table = TABLES.get(command, runs)(lines)
    print(table)
    path = folder / f"{command}.md"
    path.write_text(table + "\n")
    made = [path]
    try:
        from . import plots
    except ImportError:
        print("no pictures: matplotlib is not installed (pip install -e '.[bench]')")
    else:
        made += plots.draw(command, lines, folder)
    seconds = sum(line["seconds"] for line in lines)
    print(f"\n{len(lines)} runs, {seconds / 60:.1f} minutes of training; {', '.join(map(str, made))}")
