"""One version of the op in a process of its own: `python -m benchmarks.speed.version FOLDER DEVICE THREADS`.

rebased_cuda comes from FOLDER, the benchmark from here. Every line of the input is answered by one: "hello"
by what was imported, a Call by {"seconds": of one}, {"calls": n} by {"seconds": of n}, and all by
{"failed": why} where that could not be. Between lines the process sleeps.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def imported(folder: Path) -> dict[str, Any]:
    """Imports the folder's package, and says so where Python has found another one."""
    sys.path.insert(0, str(folder))
    import rebased_cuda

    found = Path(rebased_cuda.__file__).resolve().parent
    if found != (folder / "rebased_cuda").resolve():
        raise ImportError(f"rebased_cuda comes from {found}, not from {folder}")
    return {"version": rebased_cuda.__version__, "build": rebased_cuda.build_info()}


def settle() -> None:
    """Returns when no thread of this process runs any longer: OpenMP's wait for more work by spinning."""
    for _ in range(100):
        before = time.process_time()
        time.sleep(1e-3)
        if time.process_time() - before < 2e-4:
            return


class Timer:
    """Times the call that it was given last."""

    def __init__(self, device: str, threads: int) -> None:
        import torch

        from . import op

        torch.set_num_threads(threads)
        if device == "cpu":
            op.keep_freed_memory()
        self.device = device
        self._flush = op.Flush(device)
        self._run: Callable[[], Any] | None = None
        self._host = False

    def prepare(self, told: dict[str, Any]) -> float:
        """Seconds of one call, warmed up."""
        from . import op

        call = op.Call(op.Shape(**told["shape"]), told["direction"], told["host"])
        self._run = None  # its tensors go first
        self._run = op.prepare(call, self.device)
        self._host = call.host or self.device == "cpu"
        self._run()
        return min(self.seconds(1) for _ in range(2))

    def seconds(self, calls: int) -> float:
        """Of so many calls together; where they are several, one more goes first and does not count.

        On a CPU and of the host by the clock; on a GPU by events, each call with cold caches and behind a
        wait of about a millisecond, in which its launches queue up.
        """
        import torch

        run = self._run
        assert run is not None
        if calls > 1:
            run()
        if self._host:
            start = time.perf_counter()
            for _ in range(calls):
                run()
            seconds = time.perf_counter() - start
            if self.device == "cuda":
                torch.cuda.synchronize()
            return seconds
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for begin, end in events:
            self._flush()
            torch.cuda._sleep(2_000_000)
            begin.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in events) / 1e3


def failed(error: Exception) -> dict[str, Any]:
    return {"failed": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def main() -> None:
    folder, device, threads = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    timer: Timer | None = None
    try:
        introduction = imported(folder)
        timer = Timer(device, threads)
    except Exception as error:  # of whatever kind: it is the answer
        introduction = failed(error)
    for line in sys.stdin:
        told = json.loads(line)
        if timer is None or told == "hello":
            answer = introduction
        else:
            try:
                answer = {"seconds": timer.seconds(told["calls"]) if "calls" in told else timer.prepare(told)}
            except Exception as error:  # another version may know less
                answer = failed(error)
        settle()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
