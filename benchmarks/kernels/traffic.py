"""Global and shared-memory accesses of the fast paths' kernels, counted while they run on the emulator.

bfloat16, or float32 where a name says so, d = 16 (outer8: 8, outer32: 32), dv = 64, one head of 4096
tokens, "head" LayerNorm with gamma and beta; in one pass, and split in 4 segments. The figures are per head
and token, and exact. Bytes are what threads ask for. Sectors are 32 bytes each, counted for every access of a
warp: what L2 serves where L1 does not help, so two accesses to the halves of a sector count it twice. The
limits hold for both; for float32, whose threads copy rows 16 bytes at a time, only for bytes. Needs g++,
cmake and ninja on x86-64; no GPU and no nvcc.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.kernels.report import format_table

ROOT = Path(__file__).resolve().parents[2]
TOKENS = 4096
DRIVERS = ("traffic", "traffic_float32")
COMMAND = "python -m benchmarks.kernels.traffic"


@dataclass(frozen=True)
class Floor:
    """What a call has to move per head and token."""

    row: int = 32  # bytes of q, k, grad q, grad k
    values: int = 128  # of v, y, grad y, grad v; r and delta have 4
    keys_read_y: bool = True  # else grad q leaves delta, and reads y in a sequence's first chunk alone

    @property
    def forward(self) -> int:
        return 2 * self.row + 2 * self.values + 4

    @property
    def backward(self) -> int:
        # q, k, v, y, grad y, r to grad k, grad v, delta; then q, k, v, grad y, r, delta to grad q. Or grad q
        # first, with delta as a result, and then grad k and grad v from delta in the place of y
        values = (3 if self.keys_read_y else 2) * self.values
        grad_kv = (2 * self.row + values + 4) + (self.row + self.values + 4)
        grad_q = (2 * self.row + 2 * self.values + 4 + 4) + self.row
        return grad_kv + grad_q

    @property
    def reverse_sums(self) -> int:
        """All segments but one read q, grad y, r and y or delta once more."""
        y = self.values if self.keys_read_y else 4
        return (self.row + self.values + y + 4) * 3 // 4


FLOORS = {
    "outer": Floor(keys_read_y=False),
    "square": Floor(),
    "outer8": Floor(row=16, keys_read_y=False),
    "outer32": Floor(row=64),
}
FLOAT32_FLOOR = Floor(row=64, values=256)

# The most that the traffic may be, as a multiple of the floor.
LIMITS = {
    "forward outer 1": 1.01,
    "forward square 1": 1.10,
    "forward outer 4": 1.68,
    "forward square 4": 1.45,
    "backward outer 1": 1.025,
    "backward square 1": 1.15,
    "backward outer 4": 1.15,
    "backward square 4": 1.15,
    "forward outer8 1": 1.01,
    "forward outer8 4": 1.55,
    "backward outer8 1": 1.025,
    "backward outer8 4": 1.15,
    "forward outer32 1": 1.10,
    "forward outer32 4": 2.65,  # the states are 143 KB a segment
    "backward outer32 1": 1.15,
    "backward outer32 4": 1.15,
    "forward outer 1 float32": 1.05,
    "forward square 1 float32": 1.05,
    "forward outer 4 float32": 1.60,
    "forward square 4 float32": 1.45,
    "backward outer 1 float32": 1.15,  # delta is a launch of its own, which reads y and grad y
    "backward square 1 float32": 1.15,
    "backward outer 4 float32": 1.15,
    "backward square 4 float32": 1.15,
}


# The most passes through shared memory, as a multiple of those without bank conflicts: what was counted of
# the kernels of polynomial/ and elementwise/, rounded up. All other kernels have no conflicts.
CONFLICTS = {"outer": 1.035, "outer8": 1.02, "square": 1.025}


@dataclass(frozen=True)
class Buffer:
    """Of one named buffer, per head and token."""

    name: str
    read: float
    written: float
    sectors_read: float  # in bytes
    sectors_written: float


@dataclass(frozen=True)
class Wavefronts:
    """Of one kernel: passes through shared memory, and as many as there had to be without bank conflicts."""

    kernel: str
    counted: int
    ideal: int


@dataclass(frozen=True)
class KernelTraffic:
    """Of one kernel, in the order of their first launches, per head and token."""

    kernel: str
    bytes: float
    sector_bytes: float


@dataclass(frozen=True)
class Figures:
    name: str  # sweep, map, segments
    buffers: list[Buffer]
    shared: list[Wavefronts]
    kernels: list[KernelTraffic] = field(default_factory=list)

    @property
    def bytes(self) -> float:
        return sum(buffer.read + buffer.written for buffer in self.buffers)

    @property
    def sector_bytes(self) -> float:
        return sum(buffer.sectors_read + buffer.sectors_written for buffer in self.buffers)

    @property
    def floor(self) -> float:
        """Of a backward in segments: with the states, as they were moved."""
        sweep, feature_map, segments, *dtype = self.name.split()
        floor = FLOAT32_FLOOR if dtype else FLOORS[feature_map]
        if sweep == "forward":
            return floor.forward
        states = sum(buffer.read + buffer.written for buffer in self.buffers if "states" in buffer.name)
        return floor.backward + (0 if segments == "1" else floor.reverse_sums + states)

    @property
    def ratio(self) -> float:
        return self.bytes / self.floor

    @property
    def sector_ratio(self) -> float:
        return self.sector_bytes / self.floor


def measure(folder: Path = ROOT / "build/traffic") -> list[Figures]:
    """Builds the traced drivers in `folder` and runs them."""
    for command in (
        ["cmake", "-S", ROOT / "csrc/tests", "-B", folder, "-G", "Ninja", "-DSANITIZER=trace"],
        ["cmake", "--build", folder, "-j", "2", "--target", *DRIVERS],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)
    runs = {}
    for driver in DRIVERS:
        done = subprocess.run([folder / driver], check=True, capture_output=True, text=True)
        runs |= json.loads(done.stdout)
    return [read_figures(name, traced) for name, traced in runs.items()]


def read_figures(name: str, traced: dict[str, Any]) -> Figures:
    buffers = [
        Buffer(
            buffer["name"],
            read=buffer["read_bytes"] / TOKENS,
            written=buffer["written_bytes"] / TOKENS,
            sectors_read=32 * buffer["read_sectors"] / TOKENS,
            sectors_written=32 * buffer["written_sectors"] / TOKENS,
        )
        for buffer in traced["buffers"]
        if buffer["read_bytes"] or buffer["written_bytes"]
    ]
    shared, kernels = [], []
    for kernel in traced["kernels"]:
        lines = [line for line in kernel["lines"] if line["memory"] == "shared"]
        counted = sum(line["wavefronts"] for line in lines)
        ideal = sum(line["ideal_wavefronts"] for line in lines)
        base_name = kernel["name"].split("<")[0].split("::")[-1]
        if lines:
            shared.append(Wavefronts(base_name, counted, ideal))
        lines = [line for line in kernel["lines"] if line["memory"] == "global"]
        moved = sum(line["bytes"] for line in lines)
        sectors = sum(line["sectors"] for line in lines)
        kernels.append(KernelTraffic(base_name, moved / TOKENS, 32 * sectors / TOKENS))
    return Figures(name, buffers, shared, kernels)


def tables(all_figures: Iterable[Figures]) -> str:
    """Per run its buffers, then all runs against their floors, then shared memory."""
    buffers = [("bytes per head and token", "read", "written", "sectors read", "sectors written")]
    totals = [("sweep, map, segments", "bytes", "floor", "ratio", "limit", "sectors", "ratio")]
    shared = [("shared memory", "wavefronts", "ideal")]
    for run in all_figures:
        for b in run.buffers:
            amounts = (b.read, b.written, b.sectors_read, b.sectors_written)
            buffers.append((f"{run.name}: {b.name}", *(f"{amount:.1f}" for amount in amounts)))
        ratios = (f"{run.ratio:.3f}", f"{LIMITS[run.name]:.2f}")
        sectors = (f"{run.sector_bytes:.1f}", f"{run.sector_ratio:.3f}")
        totals.append((run.name, f"{run.bytes:.1f}", f"{run.floor:.1f}", *ratios, *sectors))
        shared += [(f"{run.name}: {s.kernel}", str(s.counted), str(s.ideal)) for s in run.shared]
    return "\n\n".join(format_table(rows) for rows in (buffers, totals, shared))


def problems(all_figures: Iterable[Figures]) -> list[str]:
    """What --check fails for."""
    found = []
    for run in all_figures:
        limit = LIMITS[run.name]
        if run.ratio > limit:
            found.append(f"{run.name}: {run.ratio:.3f} times the floor, not {limit:.2f}")
        if not run.name.endswith("float32") and run.sector_ratio > limit:
            found.append(f"{run.name}: in sectors {run.sector_ratio:.3f} times the floor, not {limit:.2f}")
        _, feature_map, _, *dtype = run.name.split()
        most = 1.0 if dtype else CONFLICTS.get(feature_map, 1.0)
        for s in run.shared:
            if s.counted > s.ideal * most:
                found.append(
                    f"{run.name}: {s.kernel} has bank conflicts, {s.counted} wavefronts for {s.ideal}"
                )
    return found


def to_json(run: Figures) -> dict[str, Any]:
    totals = {"bytes": run.bytes, "floor": run.floor, "ratio": round(run.ratio, 4), "limit": LIMITS[run.name]}
    return {"name": run.name, **totals, "sector_bytes": run.sector_bytes, **asdict(run)}


def write_json(path: Path, all_figures: Iterable[Figures]) -> None:
    runs = [to_json(run) for run in all_figures]
    head = {"command": f"{COMMAND} --json {path}", "unit": "bytes per head and token", "tokens": TOKENS}
    path.write_text(json.dumps({**head, "runs": runs}, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the figures, like benchmarks/results/x.json"
    )
    parser.add_argument(
        "--check", action="store_true", help="fail where a limit is passed, or banks conflict"
    )
    options = parser.parse_args(arguments)
    figures = measure()
    print(tables(figures))
    if options.json:
        write_json(options.json, figures)
    found = problems(figures)
    for problem in found:
        print(f"{'error' if options.check else 'note'}: {problem}", file=sys.stderr)
    return 1 if options.check and found else 0


if __name__ == "__main__":
    sys.exit(main())
