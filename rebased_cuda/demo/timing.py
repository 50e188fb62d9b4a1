"""Interleaved timing, and what it was done on. Shared by `python -m rebased_cuda` and the benchmarks."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]
QUEUED_CYCLES = 2_000_000


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def once(run: Run, device: str = "cpu") -> float:
    """Seconds of one call: by the monotonic clock on a CPU, by events on a GPU.

    There a wait of about a millisecond goes first: the launches queue up behind it, and a kernel of
    microseconds is not timed with the host's own. A forward + backward took the host of an H100 up to half
    of that.
    """
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    torch.cuda._sleep(QUEUED_CYCLES)  # type: ignore[no-untyped-call]
    begin.record()
    run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def interleave(
    methods: Mapping[str, Run],
    rounds: int,
    device: str = "cpu",
    before: Callable[[int, str], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call of each method, one round of all of them after the other.

    A machine that is slow for a while is then slow for all, and ratios are taken within a round. `before`
    hears of each call (its round and method) outside the timed part. The caller has warmed the methods up.
    """
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    for number in range(rounds):
        for name, run in methods.items():
            if before is not None:
                before(number, name)
            synchronize(device)
            seconds[name].append(once(run, device))
    return seconds


def ratio(seconds: list[float], base: list[float]) -> float:
    """Median of the ratios within a round."""
    return statistics.median(a / b for a, b in zip(seconds, base, strict=False))


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    """L2 norm of the difference over that of the expected tensor."""
    value, expected = value.detach().double(), expected.detach().double()
    return float((value - expected).norm() / expected.norm().clamp_min(1e-300))


def cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_memory() -> int:
    """Bytes that can be allocated without swapping; 0 where the system does not say."""
    information = Path("/proc/meminfo")
    if information.is_file():
        for line in information.read_text().splitlines():
            if line.startswith("MemAvailable"):
                return int(line.split()[1]) * 1024
    return 0


def machine() -> dict[str, Any]:
    """What code runs on here: JSON-ready."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }
