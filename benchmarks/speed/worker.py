"""A process of its own for one instruction set, which the op chooses once: it runs when it is told to.

A line {"shape": ..., "direction": ...} prepares, answered by {"error": ..., "bound": ..., "instruction_set":
...}; the line "run" runs once, answered by "done". About 50 microseconds of each run are the two lines.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from .harness import OURS, Method, Prepared, Shape, UnavailableError
from .op import keep_freed_memory

ROOT = Path(__file__).resolve().parents[2]

Started = TypeVar("Started", bound="Process")


class Process:
    """A module of this folder that answers lines, while a `with` statement lasts."""

    def __init__(
        self, about: str, module: str, arguments: Sequence[str], environment: dict[str, str]
    ) -> None:
        self.about = about
        self._command = [sys.executable, "-m", f"benchmarks.speed.{module}", *arguments]
        self._environment = environment

    def __enter__(self: Started) -> Started:
        self._process = subprocess.Popen(
            self._command,
            cwd=ROOT,
            env=os.environ | self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()  # closes its input, which ends it

    def answer(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the {self.about} process ended: {self._process.wait()}")
        return answer


class Worker(Process):
    """`with Worker("avx2") as worker: worker.method(shape, direction)`; one method at a time."""

    def __init__(self, instruction_set: str) -> None:
        super().__init__(instruction_set, "worker", (), {"REBASED_CPU_ISA": instruction_set})
        self.instruction_set = instruction_set

    def _prepare(self, shape: Shape, direction: str) -> Prepared:
        told = json.loads(self.answer(json.dumps({"shape": asdict(shape), "direction": direction})))
        if told["instruction_set"] != self.instruction_set:
            raise UnavailableError(f"this processor or build gives {told['instruction_set']} instead")
        return Prepared(
            lambda: self.answer("run"), lambda: float(told["error"]), float(told["bound"]), elsewhere=True
        )

    def method(self, shape: Shape, direction: str) -> Method:
        name = f"{OURS}, {self.instruction_set}"
        return Method(name, shape, functools.partial(self._prepare, shape, direction))


def main() -> None:
    import torch

    from rebased_cuda import build_info

    from . import peers

    keep_freed_memory()
    prepared: Prepared | None = None
    for line in sys.stdin:
        if line == "run\n":
            assert prepared is not None
            prepared.run()
            print("done", flush=True)
            continue
        told = json.loads(line)
        shape = Shape(**told["shape"])
        torch.set_num_threads(shape.threads or torch.get_num_threads())
        prepared = peers.prepare(OURS, shape, told["direction"], "cpu")
        answer = {"error": prepared.error(), "bound": prepared.bound}
        answer["instruction_set"] = build_info()["cpu_instruction_set"]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
