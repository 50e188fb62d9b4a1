"""Many runs, shared between processes, done once each whatever happens to a process.

A folder holds `results.jsonl`, a line for each finished run, and while a run lasts its checkpoint and lock.
Every process takes the first run that is neither finished nor locked; a lock goes with its process, and the
checkpoint stays for whoever takes the run next. So the same command given twice shares the work, and given
again after a kill goes on.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.report import duration
from benchmarks.training import append_json_line, claim, read_json_lines

from .cell import CHECKPOINT_SECONDS, Cell, Progress, result, train
from .models import RecallModel

try:
    from tqdm import tqdm
except ImportError:  # the extra `bench`
    tqdm = None

RESULTS = "results.jsonl"
Judge = Callable[[Cell, RecallModel, torch.device], dict[str, Any]]


def no_judge(cell: Cell, model: RecallModel, device: torch.device) -> dict[str, Any]:
    return {}


def finished(folder: Path, cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """The lines of those of the cells that are done, by name."""
    wanted = {cell.name for cell in cells}
    return {line["cell"]: line for line in read_json_lines(folder / RESULTS) if line["cell"] in wanted}


def run(
    folder: Path,
    cells: Sequence[Cell],
    device: torch.device,
    every: float = CHECKPOINT_SECONDS,
    judge: Judge = no_judge,
    workers: Sequence[str] = (),
    jobs: int = 1,
    deadline: float = math.inf,
) -> list[dict[str, Any]]:
    """Runs what is not finished and returns the lines, in the cells' order.

    Args:
        every: seconds between checkpoints.
        judge: what to find out about a trained model, added to its line.
        workers: the command of a further process that calls `work` on the same cells; jobs - 1 are started.
        deadline: of time.monotonic(); what has not finished then has no line, and goes on from its checkpoint
            the next time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    helpers = [subprocess.Popen(workers) for _ in range(jobs - 1)] if len(cells) > 1 else []
    bar = _Bar(folder, cells)
    try:
        while len(finished(folder, cells)) < len(cells) and time.monotonic() < deadline:
            if not work(folder, cells, device, every, judge, bar, deadline=deadline):
                time.sleep(0.5)  # the rest is in other hands
                bar.show(None)
    finally:
        bar.close()
        for helper in helpers:
            helper.terminate()
            helper.wait()
    lines = finished(folder, cells)
    return [lines[cell.name] for cell in cells if cell.name in lines]


def work(
    folder: Path,
    cells: Sequence[Cell],
    device: torch.device,
    every: float = CHECKPOINT_SECONDS,
    judge: Judge = no_judge,
    bar: _Bar | None = None,
    parent: int | None = None,
    deadline: float = math.inf,
) -> int:
    """Takes runs until none is free or time is up; how many were done. With `parent`, ends when it has."""

    def tell(progress: Progress) -> None:
        if parent is not None and os.getppid() != parent:
            sys.exit("the process that started this one is gone")
        if bar is not None:
            bar.show(progress)
        if time.monotonic() >= deadline:
            raise TimeoutError

    done = 0
    before = finished(folder, cells)
    for cell in cells:
        if cell.name in before:
            continue
        lock, checkpoint = folder / f"{cell.name}.lock", folder / f"{cell.name}.pt"
        with claim(lock) as mine:
            if not mine or cell.name in finished(folder, [cell]):
                continue
            if bar is not None:
                bar.begin(cell)
            try:
                model, progress = train(cell, device, checkpoint, every, tell)
            except TimeoutError:
                return done
            line = result(cell, model, progress, device)
            append_json_line(folder / RESULTS, line | judge(cell, model, device))
            checkpoint.unlink(missing_ok=True)
            lock.unlink()
        done += 1
    return done


class _Bar:
    """Finished runs of all, and this process' run: its step, accuracy, and the time that it has left at most.

    A bar on a terminal; elsewhere a line when a run has finished, and every LINE_SECONDS.
    """

    LINE_SECONDS = 30.0

    def __init__(self, folder: Path, cells: Sequence[Cell]) -> None:
        self.folder, self.cells = folder, cells
        self.cell: Cell | None = None
        self.started, self.first_step = 0.0, 0  # of what this process has seen of its run
        self.shown, self.printed, self.size, self.count = 0.0, -math.inf, -1, -1
        self.bar = None if tqdm is None else tqdm(total=len(cells), unit="run", disable=None)

    def begin(self, cell: Cell) -> None:
        """This process takes up a run."""
        self.cell, self.started, self.first_step = cell, time.monotonic(), -1

    def show(self, progress: Progress | None) -> None:
        now = time.monotonic()
        if progress is not None and self.first_step < 0:
            self.started, self.first_step = now, progress.step
        if now - self.shown < 0.5:
            return
        self.shown = now
        path = self.folder / RESULTS
        size = path.stat().st_size if path.exists() else 0
        count = self.count if size == self.size else len(finished(self.folder, self.cells))
        self.size = size
        told = "" if progress is None or self.cell is None else self._told(self.cell, progress, now)
        if self.bar is not None and not self.bar.disable:
            self.bar.n = count
            self.bar.set_postfix_str(told, refresh=False)
            self.bar.refresh()
        elif count != self.count or now - self.printed >= self.LINE_SECONDS:
            self.printed = now
            runs = f"{count} of {len(self.cells)} runs"
            print(f"{runs}; {told}" if told else runs, file=sys.stderr, flush=True)
        self.count = count

    def _told(self, cell: Cell, progress: Progress, now: float) -> str:
        told = f"{cell.name}: step {progress.step} of {cell.steps}, accuracy {progress.accuracy:.3f}"
        done = progress.step - self.first_step
        if done:
            left = (now - self.started) / done * (cell.steps - progress.step)
            told += f", at most {duration(left)} left"
        return told

    def close(self) -> None:
        if self.bar is not None:
            self.bar.n = len(finished(self.folder, self.cells))
            self.bar.close()
