"""Pictures of attention and of gamma and beta, by matplotlib, as the paper's Figures 5, 8, 9 and 10."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.mqar.report import TITLES, Line

from .overlap import MIXERS


def draw(lines: Sequence[Line], seqlen: int, folder: Path) -> list[Path]:
    """The pictures; seqlen is Table 3's."""
    best: dict[str, Line] = {}
    for line in lines:
        if line["seqlen"] == seqlen and line["shown"]:
            other = best.get(line["mixer"])
            if other is None or line["accuracy"] > other["accuracy"]:
                best[line["mixer"]] = line
    made = []
    if set(best) == set(MIXERS):
        examples = len(best[MIXERS[0]]["shown"])
        made.append(_save(_maps(best, [0]), folder / "figure5.png"))
        made.append(_save(_maps(best, range(examples)), folder / "figure8.png"))
        made.append(_save(_last_query(best), folder / "figure9.png"))
    norms = [line for line in lines if line["mixer"] == "rebased" and line["norms"]]
    if norms:
        made.append(_save(_norms(norms), folder / "figure10.png"))
    return made


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _maps(best: dict[str, Line], examples: Sequence[int]) -> Figure:
    """Attention of the queries (rows) to the pairs (columns), a row of panels for each example."""
    columns = (*MIXERS, "truth")
    figure, grid = pyplot.subplots(
        len(examples), 4, figsize=(13, 0.5 + 2.6 * len(examples)), squeeze=False, layout="constrained"
    )
    for row, example in zip(grid, examples, strict=True):
        for axes, name in zip(row, columns, strict=True):
            shown = best[name if name in best else MIXERS[0]]["shown"][example]
            matrix = np.array(shown["attention"])
            if name == "truth":
                matrix = np.zeros_like(matrix)
                matrix[np.arange(len(matrix)), shown["truth"]] = 1
            axes.imshow(matrix, vmin=0, vmax=1, cmap="viridis", aspect="auto")
            _whole_ticks(axes)
            axes.set_title(TITLES.get(name, "ground truth"), fontsize=9)
            axes.set_xlabel("position among the pairs", fontsize=8)
        row[0].set_ylabel("query", fontsize=8)
    return figure


def _whole_ticks(axes: Axes) -> None:
    """No ticks between two positions or queries."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def _last_query(best: dict[str, Line]) -> Figure:
    """What the last query of the first example attends to."""
    figure, grid = pyplot.subplots(1, len(MIXERS), figsize=(12, 3), sharey=True, layout="constrained")
    for axes, mixer in zip(grid, MIXERS, strict=True):
        shown = best[mixer]["shown"][0]
        scores = shown["attention"][-1]
        colours = ["tab:orange" if i == shown["truth"][-1] else "tab:blue" for i in range(len(scores))]
        axes.bar(range(len(scores)), scores, color=colours)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title(TITLES[mixer], fontsize=9)
        axes.set_xlabel("position (orange: the value asked for)", fontsize=8)
    grid[0].set_ylabel("attention of the last query")
    return figure


def _norms(lines: Sequence[Line]) -> Figure:
    """Mean over seeds of gamma's and beta's mean and deviation, against steps, a curve for each length."""
    figure, grid = pyplot.subplots(2, 2, figsize=(10, 6), sharex=True, layout="constrained")
    for row, which in zip(grid, (("gamma_q", "gamma_k"), ("beta_q", "beta_k")), strict=True):
        for axes, name in zip(row, which, strict=True):
            for index, n in enumerate(sorted({line["seqlen"] for line in lines})):
                of_length = [line["norms"] for line in lines if line["seqlen"] == n]
                steps = [step for step, _ in min(of_length, key=len)]
                values = np.array([[held[name] for _, held in norms[: len(steps)]] for norms in of_length])
                mean, deviation = values.mean(0).T
                axes.plot(steps, mean, color=f"C{index}", marker=".", label=f"N = {n}, mean")
                axes.plot(steps, deviation, color=f"C{index}", linestyle=":", label=f"N = {n}, deviation")
            axes.set_title(name)
    for axes in grid[1]:
        axes.set_xlabel("step")
    grid[0][0].legend(fontsize=7)
    return figure
