// The products of bf16.h on AMX. The same numbers are rounded, but a product takes a whole block of tokens or
// kProductRows features at a time, and values fill whole panels. What is here differs from bf16.h because a
// product leaves its sums in memory, where a tile of bf16.h keeps them in registers. It includes bf16.h and
// amx_products.h.
#pragma once

#include "cpu/chunked/bf16.h"
#include "cpu/simd/amx_products.h"

namespace rebased::cpu::REBASED_ISA {

struct AmxForwardScratch : Bf16ForwardScratch {
  uint32_t* score_rows;  // [kLanes][pair of keys]

  AmxForwardScratch(const Sizes<float>& s, Arena& arena) : Bf16ForwardScratch(s, arena) {
    score_rows = arena.take<uint32_t>(s.chunk / 2 * kLanes<float>);
  }
};

struct AmxForwardProducts : Bf16ForwardOn<TileProducts> {
  using Scratch = AmxForwardScratch;
  using Registers = AmxRegisters;
  using Bf16ForwardOn<TileProducts>::Bf16ForwardOn;

  // Features [begin, end) of block b's queries as rows; adds their products with z to the denominators.
  void query_features(const Scratch& scratch, int b, int begin, int end, const float* z,
                      FloatVector* denominators) const {
    const float* X = scratch.queries + b * token_block();
    for (int f = begin; f < end; f += kProductRows)
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; n++) {
        FloatVector sum{};
        store_transposed(scratch.query_pairs + n * width * (sizes.slab / 2) + (f - begin) / 2, sizes.slab / 2,
                         [&](int i) {
                           const FeaturePair<float> even = pairs[f + 2 * i], odd = pairs[f + 2 * i + 1];
                           const auto x = [&](int e) { return load(X + e * lanes + n * width); };
                           const Uint32Vector phi = pair(x(even.first) * x(even.second) * even.weight,
                                                         x(odd.first) * x(odd.second) * odd.weight);
                           sum += even_of(phi) * z[f + 2 * i] + odd_of(phi) * z[f + 2 * i + 1];
                           return phi;
                         });
        denominators[n] += sum;
      }
  }

  // A block of queries against the chunk's own keys and the state.
  void meet(const Scratch& scratch, int b, const Meeting<float>& meeting) const {
    if (meeting.quadratic) return ForwardProducts<float>::meet(scratch, b, meeting);
    const Sizes<float>& s = sizes;
    const float* state = meeting.state;
    FloatVector denominators[kVectors] = {};
    const int key_pairs = (b + 1) * lanes / 2;
    for (int i = 0; i < key_pairs * lanes; i += width)  // what the diagonal leaves out is not written
      store_pairs(scratch.score_pairs + i, Uint32Vector{});
    score_pairs(scratch, b, meeting.key_rows, denominators);
    TileProducts::pack_block(key_pairs, s.chunk / 2, scratch.score_rows, [&](int i, int lane) {
      return load_pairs(scratch.score_pairs + i * lanes + lane);
    });
    float* sums = scratch.sums + int64_t(b) * lanes * s.value_columns;
    for (int begin = 0; state && begin < s.feature_pad; begin += s.slab) {
      const int end = smaller(begin + s.slab, s.feature_pad);
      query_features(scratch, b, begin, end, state + s.state_kv, denominators);
      for_panels<float>(s.value_columns, [&](auto vectors, int column) {
        constexpr int NV = decltype(vectors)::value, columns = NV * width;
        TileProducts::multiply_block<NV>(
            sums + column * lanes, begin > 0, (end - begin) / 2, s.slab / 2, scratch.query_pairs,
            scratch.state_pairs + (int64_t(column) * s.feature_pad + int64_t(begin) * columns) / 2,
            scratch.queue);
      });
    }
    float* saved = scratch.denominators + b * lanes;
    for (int n = 0; n < kVectors; n++) store(saved + n * width, inverse(denominators[n]));
    for_panels<float>(s.value_columns, [&](auto vectors, int column) {
      constexpr int NV = decltype(vectors)::value, columns = NV * width;
      float* target = sums + column * lanes;
      multiply_tiles<NV>(target, state, scratch.score_rows, s.chunk / 2,
                         scratch.value_pairs + int64_t(column) * s.chunk / 2, key_pairs);
      for (int i = 0; i < lanes; i++)
#pragma GCC unroll 2
        for (int n = 0; n < columns; n += width)
          store(target + i * columns + n, load(target + i * columns + n) * saved[i]);
    });
  }
};

struct AmxBackwardScratch : Bf16BackwardScratch {
  float* feature_gradients;  // [kProductRows][kLanes]

  AmxBackwardScratch(const Sizes<float>& s, int64_t group, Arena& arena)
      : Bf16BackwardScratch(s, group, arena) {
    feature_gradients = arena.take<float>(kProductRows * kLanes<float>);
  }
};

struct AmxBackwardProducts : Bf16BackwardOn<TileProducts> {
  using Scratch = AmxBackwardScratch;
  using Registers = AmxRegisters;
  using Bf16BackwardOn<TileProducts>::Bf16BackwardOn;

  template <bool Weighted>
  void gradient_from_state(const Scratch& scratch, int b, const float* token_weights, const float* X,
                           float* dX) const {
    constexpr int half = lanes / 2;
    const Sizes<float>& s = sizes;
    round_columns(scratch, b);
    FloatVector weights[kVectors];
    load_weights(token_weights, weights);
    for (int f = 0; f < s.feature_pad; f += kProductRows) {
      scratch.queue->advance();
      for (int column = 0; column < s.value_columns; column += lanes)
        multiply_tiles<kVectors>(scratch.feature_gradients, column > 0,
                                 scratch.state_rows + int64_t(column) * s.feature_pad / 2 + f * half, half,
                                 scratch.column_pairs + column / 2 * lanes, half);
      for (int i = 0; i < kProductRows && f + i < s.features; i += kRows) {  // without the padding
        Tile<float, kVectors> tile;
        tile.load_rows(scratch.feature_gradients + i * lanes, lanes);
        tile.add_outer(scratch.state + s.state_kv + f + i, weights);
        add_feature_gradient<float, Weighted>(pairs + f + i, tile, X, dX);
      }
    }
  }
};

}  // namespace rebased::cpu::REBASED_ISA
