// The backward's products with a state in bfloat16 (bf16_backward.h) on AMX: the same numbers are rounded, a
// product takes a whole block of tokens or kProductRows features at a time. Values fill whole panels.
#pragma once

#include "cpu/chunked/backward_sweeps.h"
#include "cpu/chunked/bf16_backward.h"
#include "cpu/simd/amx_products.h"

namespace rebased::cpu::REBASED_ISA {

struct AmxBackwardScratch : Bf16BackwardScratch {
  uint32_t* feature_rows;    // [kLanes][pair of features of the slab], tokens are rows
  uint32_t* token_rows;      // [block][kProductRows][pair of tokens], features are rows
  float* feature_gradients;  // [kProductRows][kLanes]

  AmxBackwardScratch(const Sizes<float>& s, int64_t group, Arena& arena)
      : Bf16BackwardScratch(s, group, arena) {
    feature_rows = arena.take<uint32_t>(s.slab / 2 * kLanes<float>);
    token_rows = arena.take<uint32_t>(s.blocks * kProductRows * kLanes<float> / 2);
    feature_gradients = arena.take<float>(kProductRows * kLanes<float>);
  }
};

struct AmxBackwardCall : Bf16BackwardCall {
  using Scratch = AmxBackwardScratch;
  using Bf16BackwardCall::Bf16BackwardCall;
  static constexpr int half = lanes / 2;  // pairs of a block's tokens, and of a panel's columns

  Scratch scratch(Arena& arena) const {
    return Scratch(sizes, problem.kv_heads ? problem.heads / problem.kv_heads : 0, arena);
  }

  template <bool Weighted>
  void add_to_state(const Scratch& scratch, const float* tokens, const float* token_weights,
                    const float* values, int rows, float* state) const {
    const Sizes<float>& s = sizes;
    const int blocks = (rows + lanes - 1) / lanes;
    for_panels<float>(s.value_columns, [&](auto vectors, int column) {
      constexpr int columns = decltype(vectors)::value * width;
      const float* panel = values + int64_t(column) * s.chunk;
      uint32_t* target = scratch.value_pairs + int64_t(column) * s.chunk / 2;
      for (int i = 0; i < blocks * lanes; i += 2)  // tokens that the chunk lacks are zeros
        for (int n = 0; n < columns; n += width) {
          const FloatVector even = i < rows ? load(panel + i * columns + n) : FloatVector{};
          const FloatVector odd = i + 1 < rows ? load(panel + (i + 1) * columns + n) : FloatVector{};
          store_pairs(target + i / 2 * columns + n, pair(even, odd));
        }
    });
    for (int f = 0; f < s.feature_pad; f += kProductRows) {
      scratch.queue->advance();
      pack_features<Weighted, kProductRows>(tokens, token_weights, f, blocks, state + s.state_kv,
                                            scratch.token_rows);
      for_panels<float>(s.value_columns, [&](auto vectors, int column) {
        constexpr int NV = decltype(vectors)::value, columns = NV * width;
        float* part = state + int64_t(column) * s.feature_pad + f * columns;
        const uint32_t* panel = scratch.value_pairs + int64_t(column) * s.chunk / 2;
        for (int b = 0; b < blocks; b++)
          multiply_tiles<NV, true>(part, scratch.token_rows + b * kProductRows * half, half,
                                   panel + b * half * columns, half);
        for (int r = 0; r < kProductRows; r += kRows)
          round_tile<NV>(scratch, f + r, column, part + r * columns);
      });
    }
  }

  template <bool Weighted>
  void gradient_from_state(const Scratch& scratch, int b, const float* token_weights, const float* X,
                           float* dX) const {
    const Sizes<float>& s = sizes;
    round_columns(scratch, b);
    FloatVector weights[kVectors];
    for (int n = 0; n < kVectors; n++)
      weights[n] = token_weights ? load(token_weights + n * width) : broadcast<float>(1);
    for (int f = 0; f < s.feature_pad; f += kProductRows) {
      scratch.queue->advance();
      for (int column = 0; column < s.value_columns; column += lanes) {
        const uint32_t* rows = scratch.state_rows + int64_t(column) * s.feature_pad / 2 + f * half;
        const uint32_t* columns = scratch.column_pairs + column / 2 * lanes;
        if (column)
          multiply_tiles<kVectors, true>(scratch.feature_gradients, rows, half, columns, half);
        else
          multiply_tiles<kVectors, false>(scratch.feature_gradients, rows, half, columns, half);
      }
      for (int i = 0; i < kProductRows && f + i < s.features; i += kRows) {  // without the padding
        Tile<float, kVectors> tile;
        tile.load_rows(scratch.feature_gradients + i * lanes, lanes);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
          for (int n = 0; n < kVectors; n++)
            tile.sum[r][n] += scratch.state[s.state_kv + f + i + r] * weights[n];
        add_feature_gradient<float, Weighted>(pairs + f + i, tile, X, dX);
      }
    }
  }

  void values_from_state(const Scratch& scratch, int b) const {
    const Sizes<float>& s = sizes;
    const float* X = scratch.keys + b * token_block();
    float* sums = scratch.grad_values + int64_t(b) * lanes * s.value_columns;
    for (int begin = 0; begin < s.feature_pad; begin += s.slab) {
      const int end = smaller(begin + s.slab, s.feature_pad), stride = s.slab / 2;
      for (int f = begin; f < end; f += kProductRows)
#pragma GCC unroll 2
        for (int n = 0; n < lanes; n += width) {
          const auto phi = [&](int feature) {
            return load(X + pairs[feature].first * lanes + n) * load(X + pairs[feature].second * lanes + n);
          };
          store_transposed(scratch.feature_rows + n * stride + (f - begin) / 2, stride,
                           [&](int i) { return pair(phi(f + 2 * i), phi(f + 2 * i + 1)); });
        }
      for_panels<float>(s.value_columns, [&](auto vectors, int column) {
        constexpr int NV = decltype(vectors)::value, columns = NV * width;
        scratch.queue->advance();
        float* target = sums + column * lanes;
        const uint32_t* T =
            scratch.state_pairs + (int64_t(column) * s.feature_pad + int64_t(begin) * columns) / 2;
        if (begin)
          multiply_tiles<NV, true>(target, scratch.feature_rows, stride, T, (end - begin) / 2);
        else
          multiply_tiles<NV, false>(target, scratch.feature_rows, stride, T, (end - begin) / 2);
      });
    }
  }
};

struct AmxBackwardSweeps : BackwardSweeps<float, AmxBackwardCall> {
  using Sweeps = BackwardSweeps<float, AmxBackwardCall>;
  using Sweeps::Sweeps;
  template <class Start>
  void run(const Item& item, const Scratch& scratch, const Start& start_state) const {
    const AmxRegisters registers;
    Sweeps::run(item, scratch, start_state);
  }
  void local_key_state(const Item& item, const Scratch& scratch, float* state) const {
    const AmxRegisters registers;
    Sweeps::local_key_state(item, scratch, state);
  }
  void local_query_state(const Item& item, const Scratch& scratch, float* state) const {
    const AmxRegisters registers;
    Sweeps::local_query_state(item, scratch, state);
  }
};

}  // namespace rebased::cpu::REBASED_ISA
