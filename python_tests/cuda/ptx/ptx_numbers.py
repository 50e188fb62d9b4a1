"""16-bit floats and tf32 as bits, rounded as the PTX manual says; numpy has no bfloat16."""

from __future__ import annotations

import numpy as np


def bfloat16_to_float(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def float_to_bfloat16(value: np.ndarray) -> np.ndarray:
    """To nearest even. A sum or product of two bfloat16 keeps its rounding if it was a float32 in between."""
    bits = np.atleast_1d(np.asarray(value, np.float32)).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, 0x7FFF, rounded).astype(np.uint16)


def half_to_float(bits: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(bits, np.uint16).view(np.float16).astype(np.float32)


def float_to_half(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.atleast_1d(np.asarray(value)).astype(np.float16).view(np.uint16)


def float_to_tf32(value: np.ndarray) -> np.ndarray:
    """To 10 bits of mantissa, ties away from zero."""
    return (np.atleast_1d(np.asarray(value, np.float32)).view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)


DECODE = {"bf16": bfloat16_to_float, "f16": half_to_float}
ENCODE = {"bf16": float_to_bfloat16, "f16": float_to_half}


def unpack(pair: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The low and the high half of registers that hold two numbers."""
    decode = DECODE[kind]
    return decode((pair & 0xFFFF).astype(np.uint16)), decode((pair >> 16).astype(np.uint16))


def pack(low: np.ndarray, high: np.ndarray, kind: str) -> np.ndarray:
    encode = ENCODE[kind]
    return encode(low).astype(np.uint32) | encode(high).astype(np.uint32) << 16
