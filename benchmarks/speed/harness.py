"""Times methods against each other: checked first, warmed up, interleaved, medians with their spread.

A method is a name, a Shape and a function that makes something that runs (peers.py). All methods that are
compared run in turn, once a round, so that a machine that is slow for a while is slow for all of them; ratios
are medians of the ratios within a round.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rebased_cuda.demo import timing
from rebased_cuda.state import num_features

from .ceilings import Ceilings
from .op import DIRECTIONS, OURS, Flush, Shape

ROUNDS = (3, 15)  # how many times every method is measured, at least and at most
# A call that takes less than QUICK seconds is timed once more, warm, before the number of calls is chosen.
QUICK = 5e-3
# Runs of at most UNCOUNTED_SECONDS are repeated UNCOUNTED times before any counts. PeakMemory has handed the
# heap's pages back to the system, and getting them again would cost a short run more than its work.
UNCOUNTED, UNCOUNTED_SECONDS = 2, 0.3


class UnavailableError(Exception):
    """A peer that does not run here; the message is its row."""


@dataclass
class Prepared:
    """A method made ready for one shape: `run` is what is timed, `error` the check of what it computes."""

    run: Callable[[], Any]
    error: Callable[[], float]  # relative L2 error against float64
    bound: float
    compiles: bool = False  # the first call takes much longer
    elsewhere: bool = False  # in another process, whose memory is not seen
    calls: int = 1  # at least so many make a run, whose time is divided by their number


Preparer = Callable[[], Prepared]  # raises UnavailableError


@dataclass(frozen=True)
class Method:
    """One line of a comparison: who, at which shape, and how it is made ready."""

    name: str
    shape: Shape
    prepare: Preparer

    def __str__(self) -> str:
        return f"{self.shape}: {self.name}"


@dataclass
class Row:
    """One line of a table. `status` is "ok", or why there are no times."""

    question: str
    shape: dict[str, Any]
    direction: str
    method: str
    status: str = "ok"
    seconds: tuple[float, ...] = ()
    median: float | None = None
    spread: float | None = None  # half the distance between the quartiles, over the median
    ratio: float | None = None  # time over that of the first method, ours unless the question says otherwise
    over_floor: float | None = None  # the op's, where all threads run, and a decode step's over its copy
    error: float | None = None
    peak_bytes: int | None = None

    def set_floor(self, ceilings: Ceilings) -> None:
        assert self.median is not None
        self.over_floor = self.median / floor_seconds(Shape(**self.shape), self.direction, ceilings)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class PeakMemory:
    """Bytes that a block needs at its peak beyond those that it found: `with PeakMemory(device) as peak`.

    On a GPU what torch's allocator gave out; on a CPU the resident set, by Linux' own high-water mark (None
    elsewhere), after the heap's free pages were handed back.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.bytes: int | None = None

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
        elif Path("/proc/self/clear_refs").exists():
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
            self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        if self.device == "cuda":
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        elif Path("/proc/self/clear_refs").exists():
            self.bytes = max(_status("VmHWM") - self._before, 0)


def _status(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {name} in /proc/self/status")


def measure(
    question: str,
    direction: str,
    methods: Sequence[Method],
    device: str,
    budget: float,
    ceilings: Ceilings | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """Checks, warms up and times the methods in turn, for about `budget` seconds; one Row each.

    Ratios are to the first method's time. A peer of which one call takes longer than the budget and half of
    it again is not timed, its row says how long it took. With ceilings, the op's rows get their floor.
    """
    threads = torch.get_num_threads()
    try:
        return _measure_methods(question, direction, methods, device, budget, ceilings, tell)
    finally:
        torch.set_num_threads(threads)


def _measure_methods(
    question: str,
    direction: str,
    methods: Sequence[Method],
    device: str,
    budget: float,
    ceilings: Ceilings | None,
    tell: Callable[[str], None],
) -> list[Row]:
    all_threads = torch.get_num_threads()
    rows: dict[str, Row] = {}
    runs: dict[str, tuple[Callable[[], Any], int]] = {}  # what a round runs, and the calls in it
    needed: dict[str, float] = {}  # seconds of that
    for method in methods:
        tell(f"{question}: {method}, {direction}")
        torch.set_num_threads(method.shape.threads or all_threads)
        described = asdict(method.shape) | {"threads": torch.get_num_threads()}
        row = rows[str(method)] = Row(question, described, direction, method.name)
        ready = _ready(method, row, device, 1.5 * budget)
        if ready is not None:
            runs[str(method)] = _repeated(ready, device)
            needed[str(method)] = runs[str(method)][1] * ready.seconds

    flush = Flush(device)
    threads = {str(method): method.shape.threads or all_threads for method in methods}

    def before(_: int, name: str) -> None:
        torch.set_num_threads(threads[name])
        flush()

    short = {name: runs[name][0] for name in runs if needed[name] <= UNCOUNTED_SECONDS}
    timing.interleave(short, UNCOUNTED, device, before)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    base, done = str(methods[0]), 0
    for up_to, names in _rounds(needed, budget, base):
        tell(f"{question}: {methods[0].shape}, {direction}: {up_to - done} rounds of {len(names)}")
        part = {name: runs[name][0] for name in names}
        for name, times in timing.interleave(part, up_to - done, device, before).items():
            seconds[name] += times
        done = up_to
    for method in methods:
        name, row = str(method), rows[str(method)]
        if name not in runs:
            continue
        _fill(row, [x / runs[name][1] for x in seconds[name]])
        if ceilings is not None and method.name == OURS and threads[name] == all_threads:
            row.set_floor(ceilings)
        if base in runs:
            row.ratio = timing.ratio(list(row.seconds), list(rows[base].seconds))
    return list(rows.values())


@dataclass
class _Ready:
    run: Callable[[], Any]
    seconds: float
    calls: int


def _ready(method: Method, row: Row, device: str, longest: float) -> _Ready | None:
    """A method checked and warmed up; None where it is not to be timed, and the row says why."""
    try:
        prepared = method.prepare()
        row.error = prepared.error()
        if not row.error <= prepared.bound:
            row.status = f"wrong: relative error {row.error:.2g}, allowed {prepared.bound:.2g}"
            return None
        if prepared.compiles:
            prepared.run()
        with PeakMemory(device) as peak:
            warm_up = timing.once(prepared.run, device)
    except UnavailableError as error:
        row.status = str(error)
        return None
    except Exception as error:  # a peer's failure, of whatever kind, is its own row
        if method.name == OURS and not isinstance(error, RuntimeError):
            raise
        row.status = f"failed: {' '.join(str(error).split())[:200]}"
        return None
    row.peak_bytes = None if prepared.elsewhere else peak.bytes
    if warm_up > longest and method.name != OURS:
        row.status = f"not timed: one call takes {warm_up:.1f} s"
        return None
    quick = warm_up < QUICK
    seconds = timing.once(prepared.run, device) if quick else warm_up
    return _Ready(prepared.run, seconds, prepared.calls)


def _rounds(needed: Mapping[str, float], budget: float, base: str) -> list[tuple[int, list[str]]]:
    """Up to which round each set of methods runs: slow ones, of `needed` seconds, sit out the later rounds.

    Every method may use its share of the budget. The one that ratios are to is in every round.
    """
    fewest, most = ROUNDS
    share = budget / max(len(needed), 1)
    count = {name: min(most, max(fewest, int(share / max(x, 1e-9)))) for name, x in needed.items()}
    if base in count:
        count[base] = max(count.values())
    return [(up_to, [n for n in count if count[n] >= up_to]) for up_to in sorted(set(count.values()))]


def _repeated(ready: _Ready, device: str) -> tuple[Callable[[], Any], int]:
    """(a run of at least about a millisecond, the calls in it): on a CPU the clock itself costs something."""
    count = 1 if device == "cuda" else max(ready.calls, int(1e-3 / max(ready.seconds, 1e-7)))
    if count == 1:
        return ready.run, 1

    def many() -> None:
        for _ in range(count):
            ready.run()

    return many, count


def _fill(row: Row, times: list[float]) -> None:
    row.seconds = tuple(times)
    row.median = statistics.median(times)
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    row.spread = (high - low) / 2 / row.median


def work(shape: Shape, direction: str, chunk: int) -> tuple[int, int]:
    """FLOPs and bytes of one call at least: "forward", "backward" or both.

    FLOPs a token and head: C (d + dv) + 4 F dv forward, C (3 d + 2 dv) + 10 F dv backward; where less,
    without a state and with N for C. Bytes: inputs and outputs once, one float a row, backward in one pass.
    """
    d, dv = shape.feature_dim, shape.head_dim
    features = num_features(shape.feature_map, d)
    element = torch.tensor([], dtype=shape.torch_dtype).element_size()
    flops = traffic = 0
    if direction != "backward":
        flops += min(chunk * (d + dv) + 4 * features * dv, shape.seqlen * (d + dv))
        traffic += element * (2 * d + 2 * dv) + 4
    if direction != DIRECTIONS[0]:
        flops += min(chunk * (3 * d + 2 * dv) + 10 * features * dv, shape.seqlen * (3 * d + 2 * dv))
        traffic += element * (4 * d + 4 * dv) + 4
    tokens = shape.batch * shape.heads * shape.seqlen
    return tokens * flops, tokens * traffic


def floor_seconds(shape: Shape, direction: str, ceilings: Ceilings) -> float:
    """The larger of the products' at sgemm's rate and the traffic's at the copy's. C = 16 costs least."""
    flops, traffic = work(shape, direction, chunk=16)
    return max(flops / ceilings.flops[shape.dtype], traffic / ceilings.copy_bytes)


def relative_error(value: Tensor, expected: Tensor) -> float:
    return timing.relative_error(value, expected)
