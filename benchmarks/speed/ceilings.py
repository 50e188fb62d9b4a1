"""What this machine can do at best: the rates of a matrix product and of a copy, in the very same run."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from rebased_cuda.demo import timing

SIZE = {"cpu": 2048, "cuda": 8192}  # of the square matrices
COPIED = {"cpu": 256 << 20, "cuda": 2 << 30}  # bytes, far beyond every cache
REPEATS = 15


@dataclass(frozen=True)
class Ceilings:
    """flops: FLOP/s of a large square matmul by dtype; copy_bytes: bytes read plus bytes written a second by
    a large copy. The best of all tries. float16 counts as bfloat16: torch's own float16 product on a CPU is
    no ceiling."""

    flops: dict[str, float]
    copy_bytes: float

    def or_better(self, other: Ceilings) -> Ceilings:
        flops = {dtype: max(rate, other.flops[dtype]) for dtype, rate in self.flops.items()}
        return Ceilings(flops, max(self.copy_bytes, other.copy_bytes))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def measure(device: str) -> Ceilings:
    flops = {}
    for dtype in ("float32", "float64", "bfloat16"):
        for size in (SIZE[device] // 4, SIZE[device]):
            a, b = (torch.randn(size, size, device=device).to(getattr(torch, dtype)) for _ in range(2))
            out = torch.empty_like(a)
            seconds = _seconds(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)
            flops[dtype] = 2 * size**3 / seconds
            if 4**3 * seconds > 1:  # bfloat16 where the processor has no instructions for it
                break
    flops["float16"] = flops["bfloat16"]
    source = torch.ones(COPIED[device] // 4, device=device)
    target = torch.empty_like(source)
    copy = 2 * COPIED[device] / _seconds(lambda: target.copy_(source), device)
    return Ceilings(flops, copy)


def _seconds(run: Any, device: str) -> float:
    run()
    timing.synchronize(device)
    return min(timing.once(run, device) for _ in range(REPEATS))  # a ceiling: the most the machine does
