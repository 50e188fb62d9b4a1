// The products of bf16_products.h on AMX tiles. It includes what is in simd/ alone and knows neither states
// nor chunks.
//
// A tile is a register of 16 rows of 64 bytes, and there are eight. Four of them hold the float32 sums of two
// by two tiles, the others hold operands, which are pairs along the summed index as everywhere:
//   a  rows of 16 pairs       b  16 rows, one for each pair, of 16 columns
// The rows of a are tokens or features and its pairs lie side by side, so what has tokens as lanes is
// transposed first.
#pragma once

#include "cpu/simd/bf16_products.h"

namespace rebased::cpu::REBASED_ISA {

constexpr int kTile = 16;  // rows, and columns or pairs, of one register
static_assert(kProductRows == 2 * kTile);
static_assert(kProductRows == kLanes<float>);  // a block of tokens

// The registers can be used while an object of this type lives.
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
template <int NV>
REBASED_INLINE void multiply_tiles(float* c, bool add, const uint32_t* a, int a_stride, const uint32_t* b,
                                   int pairs) {
  if (add)
    multiply_tiles<NV, true>(c, a, a_stride, b, pairs);
  else
    multiply_tiles<NV, false>(c, a, a_stride, b, pairs);
}

// target[lane][kTile pairs], whose rows lie `stride` pairs apart, takes kTile pairs of kTile lanes: pairs(i)
// gives pair i of all these lanes.
template <class Pairs>
REBASED_INLINE void store_transposed(uint32_t* target, int stride, const Pairs& pairs) {
  FloatVector rows[kTile];
#pragma GCC unroll 16
  for (int i = 0; i < kTile; i++) rows[i] = (FloatVector)pairs(i);
  transpose<float>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < kTile; i++) store_pairs(target + i * stride, (Uint32Vector)rows[i]);
}

// VectorProducts of bf16_products.h on tiles. Values fill whole panels, numbers of pairs are multiples of
// kTile, and tokens that a chunk lacks are pairs of zeros, since a product takes whole blocks.
struct TileProducts {
  template <int NV>
  REBASED_INLINE static void add_tokens(float* sums, int rows, const uint32_t* a, const uint32_t* b) {
    constexpr int columns = NV * kTile, half = kLanes<float> / 2;
    for (int first = 0; first < rows; first += kLanes<float>)
      multiply_tiles<NV, true>(sums, a + first / 2 * kProductRows, half, b + first / 2 * columns, half);
  }

  // The operand lies as [kLanes][stride], of which the first `pairs` are written.
  template <class Body>
  REBASED_INLINE static void pack_block(int pairs, int stride, uint32_t* target, const Body& body) {
    for (int i = 0; i < pairs; i += kTile)
#pragma GCC unroll 2
      for (int n = 0; n < kLanes<float>; n += kTile)
        store_transposed(target + n * stride + i, stride, [&](int k) { return body(i + k, n); });
  }
  template <int NV>
  REBASED_INLINE static void multiply_block(float* sums, bool add, int pairs, int stride, const uint32_t* a,
                                            const uint32_t* b, PrefetchQueue* queue) {
    queue->advance();
    multiply_tiles<NV>(sums, add, a, stride, b, pairs);
  }
};

}  // namespace rebased::cpu::REBASED_ISA
