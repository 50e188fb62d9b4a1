"""Instructions of a whole warp: shuffles, votes, and those of the tensor cores.

Lane l of a warp has group g = l / 4 and pair t = l % 4; matrix fragments lie as in the PTX manual's figures
for mma.m16n8k8, mma.m16n8k16, ldmatrix, stmatrix and movmatrix. A register of one warp is an array (32).
"""

from __future__ import annotations

import numpy as np
from ptx_numbers import DECODE
from ptx_parser import PtxError

LANE = np.arange(32)
GROUP, PAIR = LANE // 4, LANE % 4


def shuffle_source(mode: str, operand: np.ndarray, clamp: np.ndarray) -> np.ndarray:
    """The lane that each lane reads, within the whole warp."""
    if (clamp != (0 if mode == "up" else 31)).any():
        raise PtxError("shuffles of parts of a warp are not known here")
    if mode == "bfly":
        return LANE ^ operand
    if mode == "idx":
        return operand & 31
    if mode == "up":
        return np.where(operand <= LANE, LANE - operand, LANE)
    return np.where(LANE + operand < 32, LANE + operand, LANE)  # down


def load_matrices(rows: np.ndarray, transposed: bool) -> list[np.ndarray]:
    """ldmatrix: rows (matrices, 8, 8) of 16-bit elements -> a register (32) for each matrix."""
    registers = []
    for matrix in rows.astype(np.uint32):
        source = matrix.T if transposed else matrix
        registers.append(source[GROUP, 2 * PAIR] | source[GROUP, 2 * PAIR + 1] << 16)
    return registers


def store_matrices(registers: list[np.ndarray]) -> np.ndarray:
    """stmatrix: a register (32) for each matrix -> rows (matrices, 8, 8) of 16-bit elements."""
    rows = np.zeros((len(registers), 8, 8), np.uint16)
    for matrix, register in zip(rows, registers, strict=True):
        matrix[GROUP, 2 * PAIR] = register & 0xFFFF
        matrix[GROUP, 2 * PAIR + 1] = register >> 16
    return rows


def transpose_matrix(register: np.ndarray) -> np.ndarray:
    """movmatrix.trans of one warp."""
    return load_matrices(store_matrices([register]), True)[0]


def multiply_matrices(
    a: list[np.ndarray], b: list[np.ndarray], c: list[np.ndarray], kind: str
) -> list[np.ndarray]:
    """mma of one warp: registers of a (4), b (2) and c (4 float32) -> d. `kind` is bf16, f16 or tf32.

    Of bf16 and f16 also those of half the depth, with two registers of a and one of b.

    Summed in float64 and rounded once; the order and the truncation of a real tensor core are not known.
    """
    half = 4 if kind == "tf32" else 8  # what one register of b covers of the depth
    depth = half * len(b)
    left, right, total = np.zeros((16, depth)), np.zeros((depth, 8)), np.zeros((16, 8))

    def entries(register: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """(index along the depth within a half, number): of a register's one or two numbers."""
        if kind == "tf32":
            return [(PAIR, (register & np.uint32(0xFFFFE000)).view(np.float32))]
        decode = DECODE[kind]
        return [(2 * PAIR + h, decode((register >> (16 * h) & 0xFFFF).astype(np.uint16))) for h in (0, 1)]

    for i, register in enumerate(a):
        for k, number in entries(register):
            left[GROUP + 8 * (i % 2), k + half * (i // 2)] = number
    for i, register in enumerate(b):
        for k, number in entries(register):
            right[k + half * i, GROUP] = number
    places = [(GROUP + 8 * (i // 2), 2 * PAIR + i % 2) for i in range(4)]
    for place, register in zip(places, c, strict=True):
        total[place] = register
    total = (total + left @ right).astype(np.float32)
    return [total[place] for place in places]
