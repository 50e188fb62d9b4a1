"""How long a CUDA kernel takes by arithmetic alone: a prediction, from counted work and a card's rates.

A kernel has four resources, each with the time that its work needs there:
  memory  the bytes its threads ask for, at most of the rate of a large copy
  L2      its sectors, at the L2 cache's rate
  issue   its warp instructions, at the rate of the schedulers. With few warps resident a scheduler often has
          none that is ready: its rate is then the number of its warps times a warp's own rate
  tensor  its mma instructions, at the rate of mma.sync
Blocks go in waves of as many as the card holds; in issue and tensor a wave takes as long as its fullest
multiprocessor. The prediction is the slowest resource, everything else hidden behind it, plus the launch;
`at_most` is their sum, nothing hidden. Every rate is an Input, with where it comes from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

MMA_FLOPS = 2 * 16 * 8 * 16  # of one mma.sync.m16n8k16
RESOURCES = ("memory", "L2", "issue", "tensor")


@dataclass(frozen=True)
class Input:
    name: str
    value: float
    unit: str
    source: str


@dataclass(frozen=True)
class Gpu:
    name: str
    inputs: tuple[Input, ...]

    def __getitem__(self, name: str) -> float:
        return next(x.value for x in self.inputs if x.name == name)


def _hopper(name: str, copy: float) -> Gpu:
    datasheet, assumed = "vendor's datasheet", "assumed, never measured here"
    fitted = "fitted to the sweeps' kernels of R1 and R2 measured on an H100"
    return Gpu(
        name,
        (
            Input("multiprocessors", 132, "", f"{datasheet}, SXM"),
            Input("clock", 1.83e9, "Hz", f"{datasheet}: 989 TFLOP/s are 4096 bf16 FLOP a clock and SM"),
            Input("schedulers", 4, "per SM", f"{datasheet}: each issues one warp instruction a clock"),
            Input("copy", copy, "B/s", "a large device-to-device copy through torch, read + written"),
            Input("L2", 5.5e12, "B/s", "published microbenchmarks of an H100, read"),
            Input("matmul", 800e12, "FLOP/s", "a bf16 product of 8192 through torch; of the floor only"),
            Input("mma.sync", 620e12, "FLOP/s", "published, of mma.sync where wgmma reaches the matmul"),
            Input("copy_share", 0.82, "of the copy", fitted),
            Input("issue_of_a_warp", 0.28, "instructions a clock", fitted),
            Input("issue_at_most", 0.58, "instructions a clock and scheduler", fitted),
            Input("launch", 2e-6, "s", f"{assumed}: from one kernel of a stream to the next"),
        ),
    )


GPUS = (_hopper("H100", 3.0e12), _hopper("H200", 4.3e12))


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of it."""

    name: str
    blocks_per_multiprocessor: int
    warps: int  # per block
    chunk_instructions: int = 0  # per warp and chunk; 0: not counted, a kernel that only moves data
    chunk_mma: int = 0


@dataclass(frozen=True)
class Work:
    """One launch, or several alike: blocks, how many chunks each walks, what all of them move."""

    kernel: Kernel
    blocks: int
    chunks: float
    bytes: float
    sector_bytes: float
    launches: int = 1


@dataclass(frozen=True)
class Time:
    kernel: str
    waves: float
    seconds_of: dict[str, float]  # by resource
    launch: float

    @property
    def bound(self) -> str:
        return max(self.seconds_of, key=self.seconds_of.__getitem__)

    @property
    def busy(self) -> float:
        return max(self.seconds_of.values())

    @property
    def predicted(self) -> float:
        return self.busy + self.launch

    @property
    def at_most(self) -> float:
        return sum(self.seconds_of.values()) + self.launch


def issue_rate(gpu: Gpu, resident_warps: float) -> float:
    """Warp instructions a second of one multiprocessor with so many warps."""
    per_scheduler = resident_warps / gpu["schedulers"] * gpu["issue_of_a_warp"]
    return gpu["clock"] * gpu["schedulers"] * min(per_scheduler, gpu["issue_at_most"])


def predict(gpu: Gpu, work: Work) -> Time:
    kernel = work.kernel
    room = int(gpu["multiprocessors"]) * kernel.blocks_per_multiprocessor
    issue = tensor = 0.0
    left = work.blocks
    while left > 0:
        resident = math.ceil(min(left, room) / gpu["multiprocessors"])  # on the fullest multiprocessor
        warps = resident * kernel.warps
        issue += warps * work.chunks * kernel.chunk_instructions / issue_rate(gpu, warps)
        tensor += (
            warps * work.chunks * kernel.chunk_mma * MMA_FLOPS * gpu["multiprocessors"] / gpu["mma.sync"]
        )
        left -= room
    times = (work.bytes / gpu["copy"] / gpu["copy_share"], work.sector_bytes / gpu["L2"], issue, tensor)
    return Time(
        kernel.name,
        work.blocks / room,
        dict(zip(RESOURCES, times, strict=True)),
        work.launches * gpu["launch"],
    )
