"""The paper's Figures 2 and 6, which need no training: the kernels, and how the models are built."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# x = q.k -> sim(q, k). gamma and beta move and scale ReBased's parabola; two of its shapes are shown.
KERNELS = {
    "exp(x), attention": np.exp,
    "1 + x + x²/2, Based": lambda x: 1 + x + x**2 / 2,
    "x², ReBased at its start": np.square,
    "(1.5 x + 0.5)², ReBased": lambda x: (1.5 * x + 0.5) ** 2,
}
# From the input upwards; the second half of a block has no MLP in the recall task, only its LayerNorm.
COLUMNS = {
    "Attention": ("attention", "attention"),
    "Attention, hybrid": ("gated convolution, 3 tokens", "attention"),
    "Based": ("gated convolution, 3 tokens", "linear attention\n1 + q.k + (q.k)²/2"),
    "ReBased": ("gated convolution, 3 tokens", "linear attention, (q'.k')²\nq' = gamma norm(q) + beta"),
}


def similarity() -> Figure:
    """Figure 2: similarity of q and k against their scalar product."""
    figure, axes = pyplot.subplots(figsize=(6, 4.2), layout="constrained")
    x = np.linspace(-3, 3, 301)
    for name, kernel in KERNELS.items():
        axes.plot(x, kernel(x), label=name)
    axes.axhline(0.5, color="grey", linestyle=":", linewidth=1)
    axes.annotate("Based is never below 0.5", (0.9, 0.58), fontsize=8, color="grey")
    axes.set_xlabel("q.k")
    axes.set_ylabel("sim(q, k)")
    axes.set_ylim(-0.2, 8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


def architectures() -> Figure:
    """Figure 6: the models of the recall task, a column each, input below."""
    figure, grid = pyplot.subplots(1, len(COLUMNS), figsize=(13, 6), layout="constrained")
    for axes, (name, mixers) in zip(grid, COLUMNS.items(), strict=True):
        rows = ["token + position embedding"]
        for mixer in mixers:
            rows += ["LayerNorm", mixer, "+ residual", "LayerNorm", "+ residual"]
        _column(axes, [*rows, "LayerNorm", "embedding, transposed"])
        axes.set_title(name)
    return figure


def _column(axes: Axes, rows: list[str]) -> None:
    for height, row in enumerate(rows):
        colour = "tab:orange" if "attention" in row else "tab:green" if "convolution" in row else "white"
        box = {"boxstyle": "round", "facecolor": colour, "alpha": 0.4}
        axes.text(0.5, height, row, ha="center", va="center", fontsize=8, bbox=box)
        if height:
            axes.annotate(
                "",
                (0.5, height - 0.35),
                (0.5, height - 0.65),
                arrowprops={"arrowstyle": "->", "color": "grey"},
            )
    axes.set_xlim(0, 1)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.axis("off")


DRAWINGS = {"figure2": similarity, "figure6": architectures}


def draw(name: str, folder: Path) -> Path:
    """The figure as folder/name.png."""
    folder.mkdir(parents=True, exist_ok=True)
    figure = DRAWINGS[name]()
    path = folder / f"{name}.png"
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
