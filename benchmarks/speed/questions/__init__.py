"""What is asked, one file per question: SECONDS it may take (all of it, --quick), and `rows(run)`.

Some have `calls(run)`: those of the op alone, for another version of it beside this one (against.py). The
first line of a file's docstring is the question. run.py has what they share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

from ..harness import Row
from ..op import Call
from . import (
    batch_heads,
    decoding,
    dtypes,
    feature_maps,
    hand_over,
    instruction_sets,
    layer,
    length,
    nothing_slower,
    overhead,
    reference,
    threads,
)
from .run import Run


@dataclass(frozen=True)
class Question:
    about: str
    seconds: tuple[float, float]  # of a full run, of a quick one
    rows: Callable[[Run], Iterator[Row]]
    calls: Callable[[Run], list[Call]] | None = None  # the op alone, for another version beside this one


def _question(module: ModuleType) -> Question:
    about = (module.__doc__ or "").split("\n")[0]
    return Question(about, module.SECONDS, module.rows, getattr(module, "calls", None))


QUESTIONS = {
    module.__name__.rpartition(".")[2]: _question(module)
    for module in (
        reference,
        length,
        batch_heads,
        dtypes,
        feature_maps,
        threads,
        instruction_sets,
        decoding,
        hand_over,
        layer,
        overhead,
        nothing_slower,
    )
}


def ask(names: Sequence[str], run: Run) -> Iterator[Row]:
    for name in names:
        question = QUESTIONS[name]
        run.begin(question.seconds[run.quick])
        yield from question.rows(run)
        run.end(name)


__all__ = ["QUESTIONS", "Question", "Run", "ask", "nothing_slower", "reference"]
