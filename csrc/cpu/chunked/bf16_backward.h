// The backward's products with a state in bfloat16 (bf16_products.h): features, values, ghat and two copies
// of the state are rounded, sums and the state itself stay float32. Products within a chunk stay as in
// backward.h.
#pragma once

#include "cpu/chunked/backward.h"
#include "cpu/simd/bf16_products.h"

namespace rebased::cpu::REBASED_ISA {

struct Bf16BackwardScratch : BackwardScratch<float> {
  uint32_t* state_rows;     // [panel][feature][pair of columns]
  uint32_t* state_pairs;    // [panel][pair of features][columns]
  uint32_t* column_pairs;   // [pair of columns][kLanes]: v or ghat of a block
  uint32_t* value_pairs;    // [panel][pair of tokens][columns]: v or ghat
  uint32_t* feature_pairs;  // [pair of features of the slab][kLanes]
  uint32_t* token_pairs;    // [block][kRows][pair of tokens]

  Bf16BackwardScratch(const Sizes<float>& s, int64_t group, Arena& arena)
      : BackwardScratch<float>(s, group, arena) {
    state_rows = arena.take<uint32_t>(s.state_kv / 2), state_pairs = arena.take<uint32_t>(s.state_kv / 2);
    column_pairs = arena.take<uint32_t>(s.value_columns / 2 * kLanes<float>);
    value_pairs = arena.take<uint32_t>(s.chunk / 2 * s.value_columns);
    feature_pairs = arena.take<uint32_t>(s.slab / 2 * kLanes<float>);
    token_pairs = arena.take<uint32_t>(s.blocks * kRows * kLanes<float> / 2);
  }
};

struct Bf16BackwardCall : BackwardCall<float> {
  using Base = BackwardCall<float>;
  using Scratch = Bf16BackwardScratch;
  using Base::Base;
  static constexpr int lanes = kLanes<float>, width = kWidth<float>;

  Scratch scratch(Arena& arena) const {
    return Scratch(sizes, problem.kv_heads ? problem.heads / problem.kv_heads : 0, arena);
  }

  // Both rounded copies of a tile of the state, features [f, f + kRows).
  template <int NV>
  REBASED_INLINE void round_tile(const Scratch& scratch, int f, int column, const float* rows) const {
    constexpr int columns = NV * width;
    const int64_t offset = (int64_t(column) * sizes.feature_pad + int64_t(f) * columns) / 2;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) {
      const float* row = rows + r * columns;
      const Uint32Vector halves =
          pair_lanes(load(row), NV == 2 ? load(row + (NV - 1) * width) : FloatVector{});
      __builtin_memcpy(scratch.state_rows + offset + r * columns / 2, &halves, columns * 2);
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r += 2)
#pragma GCC unroll 2
      for (int n = 0; n < columns; n += width)
        store_pairs(scratch.state_pairs + offset + r / 2 * columns + n,
                    pair(load(rows + r * columns + n), load(rows + (r + 1) * columns + n)));
  }
  void round_state(const Scratch& scratch) const {
    for (int f = 0; f < sizes.feature_pad; f += kRows)
      for_panels<float>(sizes.value_columns, [&](auto vectors, int column) {
        constexpr int NV = decltype(vectors)::value;
        round_tile<NV>(scratch, f, column,
                       scratch.state + int64_t(column) * sizes.feature_pad + f * NV * width);
      });
  }

  // phi of features [f, f + Rows) of all blocks of tokens: all_sums takes their weighted sums in, target is
  // [block][Rows][pair of tokens].
  template <bool Weighted, int Rows>
  REBASED_INLINE void pack_features(const float* tokens, const float* token_weights, int f, int blocks,
                                    float* all_sums, uint32_t* target) const {
    constexpr int half = lanes / 2;
    FloatVector sums[Rows];
    for (int r = 0; r < Rows; r++) {
      const FeaturePair<float> feature = pairs[f + r];
      sums[r] = FloatVector{};
      for (int b = 0; b < blocks; b++) {
        FloatVector phi[2];
#pragma GCC unroll 2
        for (int n = 0; n < 2; n++) {
          const float* X = tokens + b * token_block() + n * width;
          phi[n] = load(X + feature.first * lanes) * load(X + feature.second * lanes);
          if (Weighted) phi[n] *= feature.weight;
          sums[r] += token_weights ? phi[n] * load(token_weights + b * lanes + n * width) : phi[n];
        }
        store_pairs(target + (b * Rows + r) * half, pair_lanes(phi[0], phi[1]));
      }
    }
    add_row_sums<float, Rows>(sums, all_sums + f);
  }

  template <bool Weighted>
  void add_to_state(const Scratch& scratch, const float* tokens, const float* token_weights,
                    const float* values, int rows, float* state) const {
    const Sizes<float>& s = sizes;
    const int blocks = (rows + lanes - 1) / lanes;
    constexpr int half = lanes / 2;
    for_panels<float>(s.value_columns, [&](auto vectors, int column) {
      constexpr int columns = decltype(vectors)::value * width;
      const float* panel = values + int64_t(column) * s.chunk;
      uint32_t* target = scratch.value_pairs + int64_t(column) * s.chunk / 2;
      for (int i = 0; i < rows; i += 2)
        for (int n = 0; n < columns; n += width) {
          const FloatVector odd = i + 1 < rows ? load(panel + (i + 1) * columns + n) : FloatVector{};
          store_pairs(target + i / 2 * columns + n, pair(load(panel + i * columns + n), odd));
        }
    });
    for (int f = 0; f < s.feature_pad; f += kRows) {
      scratch.queue->advance();
      pack_features<Weighted, kRows>(tokens, token_weights, f, blocks, state + s.state_kv,
                                     scratch.token_pairs);
      for_panels<float>(s.value_columns, [&](auto vectors, int column) {
        constexpr int NV = decltype(vectors)::value, columns = NV * width;
        float* part = state + int64_t(column) * s.feature_pad + f * columns;
        const uint32_t* panel = scratch.value_pairs + int64_t(column) * s.chunk / 2;
        Tile<float, NV> tile;
        tile.load_rows(part, columns);
        for (int b = 0; b < blocks; b++)
          multiply_pairs<half, 1>(tile, (smaller(rows - b * lanes, lanes) + 1) / 2,
                                  scratch.token_pairs + b * kRows * half, panel + b * half * columns);
        tile.store_rows(part, columns);
        round_tile<NV>(scratch, f, column, part);
      });
    }
  }

  // v or ghat of block b as pairs of columns
  void round_columns(const Scratch& scratch, int b) const {
    const float* transposed = scratch.transposed + int64_t(b) * sizes.value_columns * lanes;
    for (int c = 0; c < sizes.value_columns; c += 2)
      for (int n = 0; n < lanes; n += width)
        store_pairs(scratch.column_pairs + c / 2 * lanes + n,
                    pair(load(transposed + c * lanes + n), load(transposed + (c + 1) * lanes + n)));
  }

  template <bool Weighted>
  void gradient_from_state(const Scratch& scratch, int b, const float* token_weights, const float* X,
                           float* dX) const {
    const Sizes<float>& s = sizes;
    round_columns(scratch, b);
    FloatVector weights[kVectors];
    for (int n = 0; n < kVectors; n++)
      weights[n] = token_weights ? load(token_weights + n * width) : broadcast<float>(1);
    for (int f = 0; f < s.feature_pad; f += kRows) {
      scratch.queue->advance();
      Tile<float, kVectors> tile;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; n++) tile.sum[r][n] = scratch.state[s.state_kv + f + r] * weights[n];
      for_panels<float>(s.value_columns, [&](auto vectors, int column) {
        constexpr int half = decltype(vectors)::value * width / 2;
        multiply_pairs<half, 1>(tile, half,
                                scratch.state_rows + int64_t(column) * s.feature_pad / 2 + f * half,
                                scratch.column_pairs + column / 2 * lanes);
      });
      add_feature_gradient<float, Weighted>(pairs + f, tile, X, dX);
    }
  }

  void values_from_state(const Scratch& scratch, int b) const {
    const Sizes<float>& s = sizes;
    const float* X = scratch.keys + b * token_block();
    float* sums = scratch.grad_values + int64_t(b) * lanes * s.value_columns;
    for (int begin = 0; begin < s.feature_pad; begin += s.slab) {
      const int end = smaller(begin + s.slab, s.feature_pad);
      for (int f = begin; f < end; f += 2)
#pragma GCC unroll 2
        for (int n = 0; n < lanes; n += width) {
          const auto phi = [&](int feature) {
            return load(X + pairs[feature].first * lanes + n) * load(X + pairs[feature].second * lanes + n);
          };
          store_pairs(scratch.feature_pairs + (f - begin) / 2 * lanes + n, pair(phi(f), phi(f + 1)));
        }
      for_panels<float>(s.value_columns, [&](auto vectors, int column) {
        constexpr int NV = decltype(vectors)::value, columns = NV * width;
        for (int j = 0; j < lanes; j += kRows) {
          scratch.queue->advance();
          float* target = sums + column * lanes + j * columns;
          Tile<float, NV> tile;
          if (begin)
            tile.load_rows(target, columns);
          else
            tile.zero();
          multiply_pairs<1, lanes>(
              tile, (end - begin) / 2, scratch.feature_pairs + j,
              scratch.state_pairs + (int64_t(column) * s.feature_pad + int64_t(begin) * columns) / 2);
          tile.store_rows(target, columns);
        }
      });
    }
  }
};

}  // namespace rebased::cpu::REBASED_ISA
