"""Figures of a result file, by matplotlib: time against N with the crossovers, and floor over time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

from .harness import OURS
from .report import shape_of


def draw(path: Path) -> list[Path]:
    """Writes the figures beside the file; those that it has rows for."""
    contents = json.loads(path.read_text())
    rows = [row for row in contents["rows"] if row["status"] == "ok"]
    made = []
    for feature_map in ("outer", "square"):
        of_map = [row for row in rows if row["shape"]["feature_map"] == feature_map]
        for direction in ("forward", "forward + backward"):
            picked = [row for row in of_map if _on_curve(row) and row["direction"] == direction]
            if picked:
                name = f"{path.stem}-{feature_map}-{direction.replace(' + ', '-')}.svg"
                made.append(_length(picked, path.with_name(name), f"{feature_map}, {direction}"))
    floors = [row for row in rows if row["over_floor"] is not None and row["direction"] != "step"]
    if floors:
        made.append(_floors(floors, path.with_name(f"{path.stem}-floor.svg")))
    return made


def _on_curve(row: dict[str, Any]) -> bool:
    """The question's own rows, and of the reference shapes those with a few sequences."""
    return row["question"] == "length" or (row["question"] == "reference" and row["shape"]["batch"] <= 8)


def _length(rows: list[dict[str, Any]], path: Path, title: str) -> Path:
    """Time per token and head against N: the shapes of one curve differ in heads."""
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    curves: dict[str, dict[int, float]] = {}
    for row in rows:
        shape = row["shape"]
        work = shape["batch"] * shape["heads"] * shape["seqlen"]
        curves.setdefault(row["method"], {})[shape["seqlen"]] = row["median"] / work * 1e9
    for method, curve in curves.items():
        lengths = sorted(curve)
        style = {"linewidth": 2.5, "color": "black"} if method == OURS else {"linewidth": 1.2}
        axes.plot(lengths, [curve[n] for n in lengths], marker="o", label=method, **style)
    for method, curve in curves.items():
        for n in _crossovers(curves.get(OURS, {}), curve) if method != OURS else []:
            axes.axvline(n, color="grey", linestyle=":", linewidth=1)
            axes.annotate(f"{method}: N = {n:.0f}", (n, axes.get_ylim()[0]), rotation=90, fontsize=7)
    axes.set(xscale="log", yscale="log", xlabel="N", ylabel="ns per token and head", title=title)
    axes.legend(fontsize=8)
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _crossovers(ours: dict[int, float], other: dict[int, float]) -> list[float]:
    """Where the curves cross, straight in log-log between measured lengths."""
    common = sorted(set(ours) & set(other))
    gaps = [math.log(other[n] / ours[n]) for n in common]
    pairs = zip(common, common[1:], gaps, gaps[1:], strict=False)
    return [a * (b / a) ** (x / (x - y)) for a, b, x, y in pairs if x * y < 0]


def _floors(rows: list[dict[str, Any]], path: Path) -> Path:
    names = [f"{shape_of(row)}, {row['direction']}" for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.22 * len(rows)), layout="constrained")
    axes.barh(range(len(rows)), [1 / row["over_floor"] for row in rows], color="steelblue")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(rows)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("floor / time")
    figure.savefig(path)
    pyplot.close(figure)
    return path
