"""Pictures of finished runs, by matplotlib, laid out as the paper's Figures 1, 3, 4 and 7."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes

from .models import SQUARE
from .report import TWICE, Key, Line, by_first, expectation, scores, shortest, title


def draw(command: str, lines: Sequence[Line], folder: Path) -> list[Path]:
    """The pictures of a preset; a grid of one's own is drawn as Figure 1."""
    if not lines:
        return []
    if command == "figure4":
        return [_expected(lines, folder / "figure4.png")]
    if command == "table1":
        return [_accuracy(shortest(lines), folder / "figure3.png")]
    if command == "figure7":
        lines = by_first(lines)
    return [_accuracy(lines, folder / f"{command}.png")] if len(lines) > 1 else []


def _accuracy(lines: Sequence[Line], path: Path) -> Path:
    """Accuracy against width, median and range of seeds, a panel for each length.

    For one width, a point for each seed, and the median.
    """
    found = scores(lines, statistics.median)
    mixers = list(dict.fromkeys(key[0] for key in found))
    widths = sorted({key[2] for key in found})

    def panel(axes: Axes, n: int) -> None:
        for index, mixer in enumerate(mixers):
            points = [(w, found[mixer, n, w]) for w in widths if (mixer, n, w) in found]
            dashed = mixer.endswith((SQUARE, TWICE))
            style = {"color": f"C{index % 10}", "linestyle": "--" if dashed else "-"}
            if len(widths) > 1:
                seeds = np.array([np.quantile(score.accuracies, [0, 0.5, 1]) for _, score in points])
                axes.errorbar(
                    [w for w, _ in points],
                    seeds[:, 1],
                    yerr=np.diff(seeds).T,
                    marker="o",
                    capsize=3,
                    label=title(mixer),
                    **style,
                )
                continue
            for _, score in points:
                axes.plot([index] * len(score.accuracies), score.accuracies, "o", alpha=0.5, **style)
                axes.plot(
                    [index - 0.3, index + 0.3], [statistics.median(score.accuracies)] * 2, color="black"
                )
        if len(widths) > 1:
            axes.set_xscale("log", base=2)
            axes.set_xticks(widths, [str(w) for w in widths])
            axes.set_xlabel("width")
        else:
            axes.set_xticks(
                range(len(mixers)), [title(m) for m in mixers], rotation=60, ha="right", fontsize=7
            )

    return _panels(sorted({key[1] for key in found}), "N = {}", panel, "accuracy", path, len(widths) > 1)


def _expected(lines: Sequence[Line], path: Path) -> Path:
    """Expected best accuracy against tries, a panel for each width."""
    curves = expectation(lines)

    def panel(axes: Axes, width: int) -> None:
        of_width: dict[Key, list[float]] = {key: curve for key, curve in curves.items() if key[2] == width}
        for (mixer, n, _), curve in of_width.items():
            axes.plot(range(1, len(curve) + 1), curve, marker="o", label=f"{title(mixer)}, N = {n}")
            axes.set_xticks(range(1, len(curve) + 1))
        axes.set_xlabel("learning rates tried")

    return _panels(
        sorted({key[2] for key in curves}), "width {}", panel, "expected best accuracy", path, True
    )


def _panels(
    values: Sequence[int],
    heading: str,
    panel: Callable[[Axes, int], None],
    label: str,
    path: Path,
    legend: bool,
) -> Path:
    figure, grid = pyplot.subplots(
        1, len(values), figsize=(1.5 + 4 * len(values), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axes, value in zip(grid[0], values, strict=True):
        panel(axes, value)
        axes.set_title(heading.format(value))
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
    grid[0][0].set_ylabel(label)
    if legend:
        grid[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
