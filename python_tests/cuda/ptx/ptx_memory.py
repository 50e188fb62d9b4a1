"""The memory of the PTX interpreter: global allocations with guards, and accesses that are checked."""

from __future__ import annotations

import numpy as np
from ptx_parser import PtxError

GLOBAL_BASE = 1 << 32
SHARED_WINDOW = 1 << 40  # where generic addresses of shared memory begin
GUARD = 256  # bytes before and after each allocation

# PTX types as numpy has them; b16 .. b64 and f16 are bits. A register of type f32 holds float32.
TYPES = {
    "pred": np.dtype(bool),
    **{f"{kind}{bits}": np.dtype(f"u{bits // 8}") for kind in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype("u2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
}


class GlobalMemory:
    """What is between the allocations may not be touched; a fresh allocation is all ones, which is NaN."""

    def __init__(self) -> None:
        self.bytes = np.full(GUARD, 0xFF, np.uint8)
        self.allocated = np.zeros(GUARD, bool)

    def upload(self, array: np.ndarray) -> int:
        """Copies the array in and gives its address, which is a multiple of 256."""
        address = GLOBAL_BASE + len(self.bytes)
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        padding = np.full(GUARD + -len(content) % GUARD, 0xFF, np.uint8)
        self.bytes = np.concatenate([self.bytes, content, padding])
        self.allocated = np.concatenate(
            [self.allocated, np.ones(len(content), bool), np.zeros(len(padding), bool)]
        )
        return address

    def allocate(self, count: int, dtype: str) -> int:
        return self.upload(np.full(count * np.dtype(dtype).itemsize, 0xFF, np.uint8))

    def download(self, address: int, count: int, dtype: str) -> np.ndarray:
        begin = address - GLOBAL_BASE
        return self.bytes[begin : begin + count * np.dtype(dtype).itemsize].view(dtype).copy()

    def check(self, offsets: np.ndarray, size: int | np.ndarray) -> None:
        inside = (offsets >= 0) & (offsets + size <= len(self.bytes))
        if inside.all():
            inside = self.allocated[offsets] & self.allocated[offsets + size - 1]
        if not inside.all():
            raise PtxError(f"global access out of bounds, by lane {int(np.argmin(inside))} of those active")


def check_range(offsets: np.ndarray, size: int, limit: int, what: str) -> None:
    if (offsets < 0).any() or (offsets + size > limit).any():
        raise PtxError(f"{what} access out of bounds: {int(offsets.max())} + {size} of {limit} bytes")


def gather(memory: np.ndarray, offsets: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """memory[offset:offset + itemsize] as dtype, one for each (aligned) offset."""
    return memory[offsets[:, None] + np.arange(dtype.itemsize)].reshape(-1).view(dtype)


def scatter(memory: np.ndarray, offsets: np.ndarray, values: np.ndarray) -> None:
    size = values.dtype.itemsize
    memory[offsets[:, None] + np.arange(size)] = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size)
