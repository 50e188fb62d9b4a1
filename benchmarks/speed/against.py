"""`python -m benchmarks.speed against FOLDER`: is this version of the op anywhere slower than another?

FOLDER is the other's checkout, built (`python setup.py build_ext --inplace` there). A version has a process
(version.py), which takes its rebased_cuda from its folder and all else from here. The two take turns, one
repetition each, the first of a pair being now this, now that, and whoever waits sleeps. A row's ratios are
this version's seconds over the other's, pair by pair.

The interval is the distribution-free one of the ratios' median at 95 % or more, that of the sign test: with
40 pairs from the 14th smallest to the 14th largest. A row is slower where all of it is above 1.03, faster
where all of it is below 1 / 1.03, not slower where it ends at 1.03 or below; else it is unclear.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from rebased_cuda.demo import timing

from . import questions, report
from .op import Call
from .worker import ROOT, Process

NAMES = [name for name, question in questions.QUESTIONS.items() if question.calls]
PAIRS, FEWEST_PAIRS = 40, 6  # with fewer there is no interval
TOLERANCE = 1.03
CONFIDENCE = 0.95
REPETITION = 8e-3  # seconds that one lasts at least
# For GNU's and LLVM's OpenMP: a thread that waits within a call spins, as users' do; one that waits for the
# next call gives up after about a millisecond, and version.settle returns when it has.
SPIN = {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"}


class RefusedError(Exception):
    """There is nothing to compare; the message is one sentence."""


class FailedError(Exception):
    """What a version answered instead of seconds."""


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """Two order statistics of the ratios, between which the true median lies with at least CONFIDENCE.

    How many of n ratios are below that median is binomial (n, 1/2).
    """
    n = len(ratios)
    below, k = 1, 0  # 2**n times the probability of at most k below it
    while 2 * below <= (1 - CONFIDENCE) * 2**n:
        k += 1
        below += math.comb(n, k)
    if k == 0:
        return 0.0, math.inf
    in_order = sorted(ratios)
    return in_order[k - 1], in_order[n - k]


def verdict(ratios: Sequence[float]) -> str:
    low, high = interval(ratios)
    if low > TOLERANCE:
        return "slower"
    if high < 1 / TOLERANCE:
        return "faster"
    return "not slower" if high <= TOLERANCE else "unclear"


@dataclass
class Comparison:
    """One row: seconds of a call, pair by pair. `status` is "ok", or why there are none."""

    questions: list[str]
    call: Call
    status: str = "ok"
    calls: int = 1  # in a repetition
    this: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.this, self.other, strict=True)]

    @property
    def verdict(self) -> str:
        return verdict(self.ratios) if self.status == "ok" else self.status

    def to_json(self) -> dict[str, Any]:
        result = {"questions": self.questions, **asdict(self.call), "status": self.status}
        if self.status == "ok":
            result |= {"calls": self.calls, "this": self.this, "other": self.other, "ratios": self.ratios}
            result |= {"ratio": statistics.median(self.ratios), "interval": interval(self.ratios)}
            result["verdict"] = self.verdict
        return result


class Version(Process):
    """`with Version("this", folder, device, threads) as version`: a checkout that is told what to time."""

    def __init__(self, about: str, folder: Path, device: str, threads: int) -> None:
        super().__init__(about, "version", (str(folder), device, str(threads)), SPIN)
        self.folder = folder

    def ask(self, told: dict[str, Any] | str) -> dict[str, Any]:
        answer = json.loads(self.answer(json.dumps(told)))
        assert isinstance(answer, dict)
        if "failed" in answer:
            raise FailedError(f"failed in {self.about}: {answer['failed']}")
        return answer

    def introduce(self) -> dict[str, Any]:
        try:
            answer = self.ask("hello")
        except FailedError as error:
            raise RefusedError(f"{self.folder} cannot be timed: {error}") from error
        return {"folder": str(self.folder), "commit": report.commit(self.folder), **answer}


def rows(names: Sequence[str], run: questions.Run) -> list[Comparison]:
    """The calls of the questions; what several of them ask is one row."""
    asked: dict[Call, list[str]] = {}
    for name in names:
        calls = questions.QUESTIONS[name].calls
        for call in calls(run) if calls else ():
            asked.setdefault(call, []).append(name)
    return [Comparison(names, call) for call, names in asked.items()]


def measure(row: Comparison, this: Version, other: Version, pairs: int) -> None:
    """Both make the same number of calls in a repetition."""
    seconds: dict[Version, list[float]] = {this: row.this, other: row.other}
    try:
        one = min(version.ask(asdict(row.call))["seconds"] for version in seconds)
        row.calls = max(1, math.ceil(REPETITION / one))
        for number in range(pairs):
            for version in (this, other) if number % 2 == 0 else (other, this):
                seconds[version].append(version.ask({"calls": row.calls})["seconds"] / row.calls)
    except FailedError as error:
        row.status = str(error)


def _refuse_without_build(folder: Path) -> None:
    if not list((folder / "rebased_cuda").glob("*.so")):
        raise RefusedError(
            f"{folder} has no built rebased_cuda: run `python setup.py build_ext --inplace` there"
        )


def run(arguments: argparse.Namespace, tell: Callable[[str], None]) -> int:
    """0: nowhere slower. 1: somewhere, or this version failed. 2: there was nothing to compare."""
    start = time.monotonic()
    folder = arguments.folder.resolve()
    threads = arguments.threads or torch.get_num_threads()
    compared = rows(arguments.only, questions.Run(arguments.device, arguments.quick, None, tell))
    contents: dict[str, Any] = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": timing.machine(),
        "device": arguments.device,
        "threads": threads,
        "pairs": arguments.pairs,
        "tolerance": TOLERANCE,
        "confidence": CONFIDENCE,
    }
    try:
        if not compared:
            raise RefusedError(f"no question of {', '.join(arguments.only)} has rows of the op alone")
        for where in (ROOT, folder):
            _refuse_without_build(where)
        with (
            Version("this", ROOT, arguments.device, threads) as this,
            Version("other", folder, arguments.device, threads) as other,
        ):
            for version in (this, other):
                contents[version.about] = version.introduce()
                print(f"{version.about}: {version.folder}, commit {contents[version.about]['commit'] or '?'}")
            for number, row in enumerate(compared, 1):
                tell(f"{time.monotonic() - start:5.0f} s  {number} of {len(compared)}: {row.call}")
                measure(row, this, other, arguments.pairs)
                if arguments.output:  # as they come: an interrupted run leaves what it had
                    contents["seconds"] = round(time.monotonic() - start, 1)
                    contents["rows"] = [x.to_json() for x in compared[:number]]
                    report.save(arguments.output, contents)
    except RefusedError as error:
        print(error, file=sys.stderr)
        return 2
    _show(compared, arguments.pairs)
    found = [row.verdict for row in compared]
    failed = sum(x.startswith("failed") for x in found)
    print(
        f"{len(found)} rows in {time.monotonic() - start:.0f} s: {found.count('slower')} slower, "
        f"{found.count('faster')} faster, {found.count('unclear')} unclear, {failed} failed."
    )
    return 1 if any(x == "slower" or x.startswith("failed in this") for x in found) else 0


def _show(compared: Sequence[Comparison], pairs: int) -> None:
    lines = []
    for row in compared:
        cells = [", ".join(row.questions), str(row.call)]
        if row.status == "ok":
            low, high = interval(row.ratios)
            cells += [report.duration(statistics.median(x)) for x in (row.this, row.other)]
            cells += [f"{statistics.median(row.ratios):.3f}", f"{low:.3f} to {high:.3f}", str(row.calls)]
        else:
            cells += [""] * 5
        lines.append([*cells, row.verdict])
    columns = ["question", "call", "this", "other", "this/other", "interval", "calls", "verdict"]
    report.print_table(f"This version against the other, {pairs} pairs a row", columns, lines)
