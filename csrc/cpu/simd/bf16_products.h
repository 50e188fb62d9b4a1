// Products of bfloat16 operands with float32 sums, for instruction sets that have vdpbf16ps. It includes what
// is in simd/ alone and knows neither states nor chunks.
//
// An operand is made of pairs along the summed index: two bfloat16 numbers in 32 bits, the first one in the
// lower half. A product sums over pairs of a and b:
//   a  a(r, k) and a(r, k + 1) are one scalar       b  b[k][:] and b[k + 1][:] are one vector
#pragma once

#include "cpu/simd/microkernel.h"
#include "cpu/simd/prefetch.h"

namespace rebased::cpu::REBASED_ISA {

REBASED_INLINE Uint32Vector load_pairs(const uint32_t* source) {
  Uint32Vector v;
  __builtin_memcpy(&v, source, sizeof v);
  return v;
}
REBASED_INLINE void store_pairs(uint32_t* target, Uint32Vector v) { __builtin_memcpy(target, &v, sizeof v); }

// Lane l of the result holds lane l of both vectors, rounded to nearest even.
REBASED_INLINE Uint32Vector pair(FloatVector even, FloatVector odd) {
  const __m512i interleave = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,
                                              23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512bh halves = _mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
  return (Uint32Vector)_mm512_permutexvar_epi16(interleave, (__m512i)halves);
}
// Neighbouring lanes become pairs: first those of `first`, then those of `second`.
REBASED_INLINE Uint32Vector pair_lanes(FloatVector first, FloatVector second) {
  return (Uint32Vector)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
}
REBASED_INLINE FloatVector even_of(Uint32Vector pairs) { return (FloatVector)(pairs << 16); }
REBASED_INLINE FloatVector odd_of(Uint32Vector pairs) { return (FloatVector)(pairs & 0xffff0000u); }

// tile[r][:] += sum of a(r, k) b[k][:] over `depth` pairs; a(r, pair) = a[r * RowStride + pair *
// DepthStride], and b of a pair begins at b + pair * (columns of the tile).
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

// The products of bf16.h by vdpbf16ps; TileProducts of amx_products.h has the same functions.
struct VectorProducts {
  // sums [kProductRows][NV vectors] += a b over a chunk's first `rows` tokens.
  // a: [block][kProductRows][pair of tokens], b: [pair of tokens][NV vectors].
  template <int NV>
  REBASED_INLINE static void add_tokens(float* sums, int rows, const uint32_t* a, const uint32_t* b) {
    constexpr int columns = NV * kWidth<float>, lanes = kLanes<float>, half = lanes / 2;
    Tile<float, NV> tile;
    tile.load_rows(sums, columns);
    for (int first = 0; first < rows; first += lanes)
      multiply_pairs<half, 1>(tile, (smaller(rows - first, lanes) + 1) / 2, a + first / 2 * kProductRows,
                              b + first / 2 * columns);
    tile.store_rows(sums, columns);
  }

  // Packs an operand a whose rows are the kLanes tokens of a block: body(pair, lane) gives one vector of
  // pairs, from that lane on. The operand lies as [pair][kLanes]; AMX has it as [kLanes][stride].
  template <class Body>
  REBASED_INLINE static void pack_block(int pairs, int /*stride*/, uint32_t* target, const Body& body) {
    for (int i = 0; i < pairs; i++)
#pragma GCC unroll 2
      for (int n = 0; n < kLanes<float>; n += kWidth<float>)
        store_pairs(target + i * kLanes<float> + n, body(i, n));
  }
  // sums [kLanes][NV vectors] = or, with `add`, += a b, where a is as pack_block leaves it.
  template <int NV>
  REBASED_INLINE static void multiply_block(float* sums, bool add, int pairs, int /*stride*/,
                                            const uint32_t* a, const uint32_t* b, PrefetchQueue* queue) {
    constexpr int columns = NV * kWidth<float>;
    for (int i = 0; i < kLanes<float>; i += kRows) {
      queue->advance();
      Tile<float, NV> tile;
      tile.start(add, sums + i * columns, columns);
      multiply_pairs<1, kLanes<float>>(tile, pairs, a + i, b);
      tile.store_rows(sums + i * columns, columns);
    }
  }
};

}  // namespace rebased::cpu::REBASED_ISA
