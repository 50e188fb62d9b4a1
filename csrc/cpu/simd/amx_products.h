// The products of bf16_products.h on AMX tiles, eight registers of 16 rows of 64 bytes: two by two of them
// hold sums in float32, the others operands, pairs along the summed index as everywhere:
//   a  rows of 16 pairs       b  16 rows, one for each pair, of 16 columns
// So a's rows are tokens or features and its pairs lie side by side: what has tokens as lanes is transposed.
#pragma once

#include "cpu/simd/bf16_products.h"

namespace rebased::cpu::REBASED_ISA {

constexpr int kTile = 16;                      // rows, and columns or pairs, of one register
constexpr int kProductRows = 2 * kTile;        // rows of one product
static_assert(kProductRows == kLanes<float>);  // a block of tokens
static_assert(kFeatureMultiple % kProductRows == 0);

// The registers can be used while one lives.
struct AmxRegisters {
  AmxRegisters() {
    alignas(64) uint8_t configuration[64] = {1};  // palette 1
    for (int i = 0; i < 8; i++) configuration[16 + 2 * i] = 64, configuration[48 + i] = kTile;
    // GCC takes the instruction to read eight bytes and may leave the others unwritten
    asm volatile("" ::"r"(configuration) : "memory");
    _tile_loadconfig(configuration);
  }
  ~AmxRegisters() { _tile_release(); }
  AmxRegisters(const AmxRegisters&) = delete;
  AmxRegisters& operator=(const AmxRegisters&) = delete;
};

// c [kProductRows][NV * kTile] += (Add) or = a b over `pairs` pairs, a multiple of kTile. Rows of a lie
// a_stride pairs apart, those of b and c side by side.
template <int NV, bool Add>
REBASED_INLINE void multiply_tiles(float* c, const uint32_t* a, int a_stride, const uint32_t* b, int pairs) {
  constexpr int columns = NV * kTile, stride = columns * 4, lower = kTile * columns;
  asm volatile("" ::: "memory");  // the compiler does not know that a tile is loaded from memory
  if (Add) {
    _tile_loadd(0, c, stride);
    _tile_loadd(1, c + lower, stride);
    if (NV > 1) {
      _tile_loadd(2, c + kTile, stride);
      _tile_loadd(3, c + lower + kTile, stride);
    }
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int k = 0; k < pairs; k += kTile) {
    _tile_loadd(4, a + k, a_stride * 4);
    _tile_loadd(5, a + kTile * a_stride + k, a_stride * 4);
    _tile_loadd(6, b + k * columns, stride);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if (NV > 1) {
      _tile_loadd(7, b + k * columns + kTile, stride);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, stride);
  _tile_stored(1, c + lower, stride);
  if (NV > 1) {
    _tile_stored(2, c + kTile, stride);
    _tile_stored(3, c + lower + kTile, stride);
  }
  asm volatile("" ::: "memory");
}

// target[lane][kTile pairs], rows `stride` pairs apart, of the kTile pairs of kTile lanes that pairs(i)
// gives.
template <class Pairs>
REBASED_INLINE void store_transposed(uint32_t* target, int stride, const Pairs& pairs) {
  FloatVector rows[kTile];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; i++) rows[i] = (FloatVector)pairs(i);
  transpose<float>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kTile; i++) store_pairs(target + i * stride, (Uint32Vector)rows[i]);
}

}  // namespace rebased::cpu::REBASED_ISA
