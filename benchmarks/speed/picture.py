"""README's picture of speed: time per token and head against N, on a CPU and on a GPU, of committed results.

python -m benchmarks.speed.picture      writes docs/pictures/speed.svg

What it draws stands as JSON in the picture's <desc>, so that a test sees when the results have moved on.
"""

from __future__ import annotations

import html
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker
from matplotlib.axes import Axes

from .harness import OURS

ROOT = Path(__file__).parents[2]
PICTURE = ROOT / "docs" / "pictures" / "speed.svg"
CPU = ROOT / "benchmarks" / "results" / "speed-cpu.json"
GPU = ROOT / "benchmarks" / "results" / "NVIDIA_H100_80GB_HBM3" / "speed.json"
GPU_CHECKS = GPU.with_name("checks.txt")  # flash-linear-attention ran there alone
DIRECTION = "forward + backward"
FLA_SHAPE = (8, 12, 4096)  # of checks.txt

SOFTMAX, CHUNKED, COMPILED = "softmax attention", "PyTorch chunked", "the same, compiled"
FLA = "flash-linear-attention"
# a curve, and the methods of the results of which it is the fastest
CURVES = {
    OURS: (OURS,),
    SOFTMAX: ("SDPA", "SDPA cuDNN", "SDPA flash"),
    CHUNKED: ("PyTorch loop", "PyTorch cumsum"),
    COMPILED: ("PyTorch loop, compiled", "PyTorch cumsum, compiled"),
}
# stand-ins that `_with_colours` replaces by what suits a light and a dark page
COLOURS = {
    "ink": ("#010101", "#1f2328", "#e6edf3"),
    "grid": ("#020202", "#d8dee4", "#3d444d"),
    "card": ("#030303", "#ffffff", "#1b1f27"),
    OURS: ("#040404", "#0969da", "#58a6ff"),
    SOFTMAX: ("#050505", "#cf222e", "#ff7b72"),
    CHUNKED: ("#060606", "#57606a", "#9198a1"),
    COMPILED: ("#070707", "#57606a", "#9198a1"),
    FLA: ("#080808", "#8250df", "#d2a8ff"),
}

Curve = dict[int, float]  # N -> nanoseconds per token and head


def curves(contents: dict[str, Any]) -> dict[str, Curve]:
    """Of `outer`, forward with backward: the curves of `CURVES` that the results have."""
    found: dict[str, Curve] = {}
    batch = 1 if contents["device"] == "cpu" else FLA_SHAPE[0]
    for row in contents["rows"]:
        shape = row["shape"]
        if (
            row["status"] == "ok"
            and row["question"] in ("reference", "length")
            and row["direction"] == DIRECTION
            and (shape["feature_map"], shape["batch"]) == ("outer", batch)
        ):
            time = row["median"] / (shape["batch"] * shape["heads"] * shape["seqlen"]) * 1e9
            for name, methods in CURVES.items():
                if row["method"] in methods:
                    curve = found.setdefault(name, {})
                    curve[shape["seqlen"]] = min(time, curve.get(shape["seqlen"], time))
    return {name: dict(sorted(found[name].items())) for name in CURVES if name in found}


def fla_curve(checks: str) -> Curve:
    """flash-linear-attention's one point, of the line that `checks.txt` has of it."""
    line = re.search(
        rf"^fla parallel_rebased outer {re.escape(DIRECTION)} .* ms ([\d.]+)$", checks, re.MULTILINE
    )
    assert line, "checks.txt: no time of parallel_rebased"
    batch, heads, seqlen = FLA_SHAPE
    return {seqlen: float(line[1]) * 1e6 / (batch * heads * seqlen)}


def panels() -> dict[str, dict[str, Curve]]:
    """What the picture shows: a title, and its curves."""
    cpu, gpu = json.loads(CPU.read_text()), json.loads(GPU.read_text())
    names = [" ".join(cpu["machine"]["cpu"].replace("(R)", "").split()), gpu["machine"]["gpus"][0]]
    titles = [
        f"{cpu['machine']['cores']} cores of an {names[0]}, float32, at {cpu['commit'][:7]}",
        f"{names[1]}, bfloat16, at {gpu['commit'][:7]}",
    ]
    return {titles[0]: curves(cpu), titles[1]: {**curves(gpu), FLA: fla_curve(GPU_CHECKS.read_text())}}


def _panel(axes: Axes, title: str, of: dict[str, Curve]) -> None:
    for name, curve in of.items():
        axes.plot(
            list(curve),
            list(curve.values()),
            label=name,
            color=COLOURS[name][0],
            linewidth=3 if name == OURS else 1.6,
            linestyle="--" if name == COMPILED else "-",
            marker="D" if name == FLA else "o",
            markersize=6 if name in (OURS, FLA) else 4,
        )
    lengths = sorted({n for curve in of.values() for n in curve})
    axes.set(xscale="log", yscale="log", xlabel="sequence length N")
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ticker.FuncFormatter(lambda y, _: f"{y:,g}"))
    axes.yaxis.set_minor_locator(ticker.NullLocator())
    if len(lengths) == 2:
        axes.margins(x=0.25)
    axes.set_title(title, fontsize=10)
    axes.grid(color=COLOURS["grid"][0], linewidth=0.8)
    axes.tick_params(which="both", colors=COLOURS["ink"][0], labelsize=9)
    for spine in axes.spines.values():
        spine.set_color(COLOURS["grid"][0])
    axes.legend(
        loc="upper left" if FLA not in of else "center left",
        fontsize=9,
        framealpha=0,
        labelcolor=COLOURS["ink"][0],
    )


def _with_colours(svg: str, description: str) -> str:
    """The SVG with colours that follow the reader's preference, and the description."""
    for index, (stand_in, _, _) in enumerate(COLOURS.values()):
        svg = svg.replace(stand_in, f"var(--c{index})")

    def variables(which: int) -> str:
        return "".join(f"--c{index}:{colours[which]};" for index, colours in enumerate(COLOURS.values()))

    style = f"<style>svg{{{variables(1)}}}@media (prefers-color-scheme:dark){{svg{{{variables(2)}}}}}</style>"
    start = re.search(r"<svg[^>]*>", svg)
    assert start
    head = f"\n<desc>{html.escape(description, quote=False)}</desc>\n{style}"
    lines = (svg[start.start() : start.end()] + head + svg[start.end() :]).splitlines()
    return "\n".join(line.rstrip() for line in lines) + "\n"


def draw(path: Path = PICTURE) -> Path:
    """Writes the picture."""
    ink = COLOURS["ink"][0]
    settings = {
        "svg.fonttype": "none",  # text stays text
        "svg.hashsalt": "rebased_cuda",
        "font.family": "sans-serif",
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.titlecolor": ink,
        "figure.facecolor": COLOURS["card"][0],
        "savefig.facecolor": COLOURS["card"][0],
        "axes.facecolor": COLOURS["card"][0],
    }
    shown = panels()
    with matplotlib.rc_context(settings):
        figure, (left, right) = pyplot.subplots(
            1, 2, figsize=(10, 4), layout="constrained", width_ratios=(3, 2)
        )
        for axes, (title, of) in zip((left, right), shown.items(), strict=True):
            _panel(axes, title, of)
        left.set_ylabel("ns per token and head, " + DIRECTION, fontsize=9)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_with_colours(buffer.getvalue(), json.dumps(shown)))
    return path


def drawn(path: Path = PICTURE) -> Any:
    """What a picture says that it shows: `panels` of the results that it was drawn from, through JSON."""
    description = re.search(r"<desc>(.*?)</desc>", path.read_text(), re.DOTALL)
    assert description, f"{path}: no description"
    return json.loads(html.unescape(description[1]))


def main(argv: Sequence[str]) -> int:
    if argv:
        print(__doc__, file=sys.stderr)
        return 2
    print(draw().relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
