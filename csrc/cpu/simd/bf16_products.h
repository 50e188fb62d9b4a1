// Products of bfloat16 operands with float32 sums (vdpbf16ps), for instruction sets that have them. An
// operand is made of pairs along the summed index, two numbers in 32 bits, the lower half first:
//   a(r, k), a(r, k + 1) as one scalar, b[k][:], b[k + 1][:] as one vector; a tile takes in two k at a time.
#pragma once

#include "cpu/simd/microkernel.h"

namespace rebased::cpu::REBASED_ISA {

REBASED_INLINE Uint32Vector load_pairs(const uint32_t* source) {
  Uint32Vector v;
  __builtin_memcpy(&v, source, sizeof v);
  return v;
}
REBASED_INLINE void store_pairs(uint32_t* target, Uint32Vector v) { __builtin_memcpy(target, &v, sizeof v); }

// Rounded to nearest even: lane l of both vectors side by side.
REBASED_INLINE Uint32Vector pair(FloatVector even, FloatVector odd) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (Uint32Vector)_mm512_permutexvar_epi16(interleave, (__m512i)halves);
}
// Rounded: first, then second, so that neighbouring lanes are pairs.
REBASED_INLINE Uint32Vector pair_lanes(FloatVector first, FloatVector second) {
  return (Uint32Vector)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
REBASED_INLINE FloatVector even_of(Uint32Vector pairs) { return (FloatVector)(pairs << 16); }
REBASED_INLINE FloatVector odd_of(Uint32Vector pairs) { return (FloatVector)(pairs & 0xffff0000u); }

// tile[r][:] += sum of a(r, k) b[k][:]; a(r, pair) = a[r * RowStride + pair * DepthStride],
// b of a pair at b + pair * the tile's columns.
template <int RowStride, int DepthStride, int NV>
REBASED_INLINE void multiply_pairs(Tile<float, NV>& tile, int depth, const uint32_t* a, const uint32_t* b) {
  FloatVector sum[kRows][NV];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
    for (int n = 0; n < NV; n++) sum[r][n] = tile.sum[r][n];
  for (int k = 0; k < depth; k++) {
    __m512bh column[NV];
#pragma GCC unroll 2
    for (int n = 0; n < NV; n++) column[n] = (__m512bh)load_pairs(b + (k * NV + n) * kWidth<float>);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const __m512bh scalar = (__m512bh)_mm512_set1_epi32(int(a[r * RowStride + k * DepthStride]));
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++)
        sum[r][n] = (FloatVector)_mm512_dpbf16_ps((__m512)sum[r][n], scalar, column[n]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
    for (int n = 0; n < NV; n++) tile.sum[r][n] = sum[r][n];
}

}  // namespace rebased::cpu::REBASED_ISA
