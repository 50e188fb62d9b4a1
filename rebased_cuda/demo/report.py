"""What `python -m rebased_cuda` says: lines, progress, tables and checks; through rich where it is."""

from __future__ import annotations

import math
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

try:
    from rich.console import Console
    from rich.status import Status
    from rich.table import Table
except ImportError:
    Console = Status = Table = None  # type: ignore[assignment,misc]

PROGRESS_SECONDS = 10.0  # between two lines of progress where they cannot overwrite each other
FILE_WIDTH = 120  # columns, where the output is no terminal


class Report:
    """Collects checks and results, and shows them on `stream` as they come."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stdout
        self.checks: list[dict[str, Any]] = []
        self.results: dict[str, Any] = {}
        self._console: Console | None = None
        if Console is not None:
            width = None if self.stream.isatty() else FILE_WIDTH
            self._console = Console(file=self.stream, highlight=False, width=width)
        self._status: Status | None = None
        self._last_progress = 0.0

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check["passed"] for check in self.checks)

    def say(self, text: str = "") -> None:
        if self._console is not None:
            self._console.print(text, markup=False, soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def progress(self, text: str) -> None:
        """What is going on now, of no later interest."""
        if self._status is not None:
            self._status.update(text)
        elif time.monotonic() - self._last_progress > PROGRESS_SECONDS:
            self._last_progress = time.monotonic()
            self.say(f"    ... {text}")

    def check(self, name: str, value: float, bound: float, what: str = "relative L2 error") -> bool:
        """A number that must not exceed its bound (NaN does)."""
        return self.verdict(name, value <= bound, f"{what} {value:.3g}, allowed {bound:.3g}", value, bound)

    def verdict(
        self, name: str, passed: bool, detail: str, value: float | None = None, bound: float | None = None
    ) -> bool:
        passed = bool(passed)
        value = value if value is not None and math.isfinite(value) else None  # JSON has no NaN
        self.checks.append({"name": name, "passed": passed, "detail": detail, "value": value, "bound": bound})
        self.say(f"  {'ok    ' if passed else 'FAILED'} {name}: {detail}")
        return passed

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """One part of the run, named. An exception in it is a failed check, and the other parts go on."""
        self.say(f"\n{name}")
        start = time.monotonic()
        self._last_progress = start
        try:
            if self._console is not None and self._console.is_terminal:
                with self._console.status(name) as self._status:
                    yield
            else:
                yield
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{frame.filename.rpartition('/')[2]}:{frame.lineno}"
            self.verdict(name, False, f"{type(error).__name__} at {where}: {error}")
        finally:
            self._status = None
        self.results.setdefault("stage_seconds", {})[name] = round(time.monotonic() - start, 2)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """The first column left, the others right."""
        self.say(f"  {title}")
        if self._console is not None:
            table = Table()
            for index, column in enumerate(columns):
                table.add_column(column, justify="right" if index else "left")
            for row in rows:
                table.add_row(*row)
            self._console.print(table)
            return
        lines = [list(columns), *map(list, rows)]
        widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
        for line in lines:
            cells = (text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))
            self.say("  ".join(["  " + line[0].ljust(widths[0]), *cells]))
