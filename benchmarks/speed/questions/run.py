"""What a question has to work with: the machine, how long it may take, and how shapes are asked."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field

from .. import peers
from ..ceilings import Ceilings
from ..harness import DIRECTIONS, OURS, Method, Row, Shape, measure
from ..op import Call

Tell = Callable[[str], None]


def both_directions(shapes: Sequence[Shape]) -> list[Call]:
    return [Call(shape, direction) for shape in shapes for direction in DIRECTIONS]


@dataclass
class Run:
    """One invocation: where, how much, the machine's ceilings, and the time that the question at hand has."""

    device: str
    quick: bool
    ceilings: Ceilings | None
    tell: Tell
    deadline: float = math.inf
    used: dict[str, float] = field(default_factory=dict)  # seconds by question
    _begin: float = 0.0

    def begin(self, seconds: float) -> None:
        self._begin = time.monotonic()
        self.deadline = self._begin + seconds

    def end(self, name: str) -> None:
        self.used[name] = time.monotonic() - self._begin

    @property
    def late(self) -> bool:
        return time.monotonic() > self.deadline

    @property
    def dtype(self) -> str:
        return "bfloat16" if self.device == "cuda" else "float32"

    @property
    def everybody(self) -> tuple[str, ...]:
        """All that may run; a compiler takes its time, so a quick run goes without."""
        names = peers.GPU_METHODS if self.device == "cuda" else peers.CPU_METHODS
        return tuple(name for name in names if not (self.quick and name in peers.COMPILED))

    @property
    def few(self) -> tuple[str, ...]:
        """The op, softmax attention and eager PyTorch: for questions of many shapes."""
        eager = (OURS, peers.LOOP, peers.CUMSUM, peers.QUADRATIC)
        return tuple(x for x in self.everybody if x in eager or x.startswith(peers.SDPA))

    @property
    def budget(self) -> float:
        """Seconds of timing for one comparison; making ready, checking and compiling come on top."""
        return 1.0 if self.quick else 2.0

    def compare(
        self, question: str, direction: str, methods: Sequence[Method], floor: bool = True
    ) -> list[Row]:
        """Times the methods against each other, if there is time left.

        On a GPU a peer's Triton kernels are compiled and tuned when it first runs, for up to a minute: that
        is on top of the question's time, or one peer would cost all others their rows.
        """
        if self.late:
            status = "left out: the question's time was over"
            return [Row(question, asdict(x.shape), direction, x.name, status) for x in methods]
        peers.forget_compiled()
        ceilings = self.ceilings if floor else None
        begin = time.monotonic()
        rows = measure(question, direction, methods, self.device, self.budget, ceilings, self.tell)
        if self.device == "cuda":
            self.deadline += max(0.0, time.monotonic() - begin - 3 * self.budget)
        return rows

    def method(self, name: str, shape: Shape, direction: str) -> Method:
        prepare = functools.partial(peers.prepare, name, shape, direction, self.device, not self.quick)
        return Method(name, shape, prepare)

    def ask(
        self, question: str, shapes: Sequence[Shape], names: Sequence[str] | None = None
    ) -> Iterator[Row]:
        """Forward, and forward + backward, of each shape: `names` in turn, everybody if not given."""
        for shape in shapes:
            for direction in DIRECTIONS:
                methods = [self.method(name, shape, direction) for name in names or self.everybody]
                yield from self.compare(question, direction, methods)
