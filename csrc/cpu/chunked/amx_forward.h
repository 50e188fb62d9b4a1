// Forward with bfloat16 products (bf16_forward.h) on AMX: the same numbers are rounded, a product takes a
// whole block of tokens or kProductRows features at a time. Values fill whole panels.
#pragma once

#include "cpu/chunked/bf16_forward.h"
#include "cpu/simd/amx_products.h"

namespace rebased::cpu::REBASED_ISA {

struct AmxForwardScratch : Bf16ForwardScratch {
  uint32_t* query_rows;    // [kLanes][pair of features of the slab]
  uint32_t* score_rows;    // [kLanes][pair of keys]
  uint32_t* feature_rows;  // [block][kProductRows][pair of tokens]

  AmxForwardScratch(const Sizes<float>& s, Arena& arena) : Bf16ForwardScratch(s, arena) {
    query_rows = arena.take<uint32_t>(s.slab / 2 * kLanes<float>);
    score_rows = arena.take<uint32_t>(s.chunk / 2 * kLanes<float>);
    feature_rows = arena.take<uint32_t>(s.blocks * kProductRows * kLanes<float> / 2);
  }
};

struct AmxForwardCall : Bf16ForwardCall {
  using Scratch = AmxForwardScratch;
  using Bf16ForwardCall::Bf16ForwardCall;
  static constexpr int half = lanes / 2;  // pairs of a block's tokens

  Scratch scratch(Arena& arena) const { return Scratch(sizes, arena); }

  // Tokens that a chunk lacks are pairs of zeros: a product takes whole blocks.
  void pack_value_pairs(const Item& item, int64_t row, int rows, const Ahead& ahead, uint32_t* target) const {
    Bf16ForwardCall::pack_value_pairs(item, row, rows, ahead, target);
    for_panels<float>(sizes.value_columns, [&](auto vectors, int column) {
      constexpr int columns = decltype(vectors)::value * width;
      uint32_t* panel = target + int64_t(column) * sizes.chunk / 2;
      for (int i = (rows + 1) / 2; i < sizes.chunk / 2; i++)
        for (int n = 0; n < columns; n += width) store_pairs(panel + i * columns + n, Uint32Vector{});
    });
  }

  // Features [begin, end) of block b's queries as rows; adds their products with z to the denominators.
  void query_features(const Scratch& scratch, int b, int begin, int end, const float* z,
                      FloatVector* denominators) const {
    const float* X = scratch.queries + b * block();
    for (int f = begin; f < end; f += kProductRows)
#pragma GCC unroll 2
      for (int n = 0; n < kVectors; n++) {
        FloatVector sum{};
        store_transposed(scratch.query_rows + n * width * (sizes.slab / 2) + (f - begin) / 2, sizes.slab / 2,
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

  void meet_pairs(const Scratch& scratch, int b, int rows, const float* state) const {
    const Sizes<float>& s = sizes;
    FloatVector denominators[kVectors] = {};
    const int key_pairs = (b + 1) * half;
    for (int i = 0; i < key_pairs * lanes; i += width)  // what the diagonal leaves out is not written
      store_pairs(scratch.score_pairs + i, Uint32Vector{});
    score_pairs(scratch, b, rows, denominators);
    for (int k = 0; k < key_pairs; k += kTile)
#pragma GCC unroll 2
      for (int n = 0; n < lanes; n += width)
        store_transposed(scratch.score_rows + n * (s.chunk / 2) + k, s.chunk / 2,
                         [&](int i) { return load_pairs(scratch.score_pairs + (k + i) * lanes + n); });
    float* sums = scratch.sums + int64_t(b) * lanes * s.value_columns;
    for (int begin = 0; state && begin < s.feature_pad; begin += s.slab) {
      const int end = smaller(begin + s.slab, s.feature_pad);
      query_features(scratch, b, begin, end, state + s.state_kv, denominators);
      for_panels<float>(s.value_columns, [&](auto vectors, int column) {
        constexpr int NV = decltype(vectors)::value, columns = NV * width;
        const uint32_t* S =
            scratch.state_pairs + (int64_t(column) * s.feature_pad + int64_t(begin) * columns) / 2;
        float* target = sums + column * lanes;
        scratch.queue->advance();
        if (begin)
          multiply_tiles<NV, true>(target, scratch.query_rows, s.slab / 2, S, (end - begin) / 2);
        else
          multiply_tiles<NV, false>(target, scratch.query_rows, s.slab / 2, S, (end - begin) / 2);
      });
    }
    float* saved = scratch.denominators + b * lanes;
    for (int n = 0; n < kVectors; n++)
      store(saved + n * width,
            problem.normalize ? 1 / (denominators[n] + float(problem.eps)) : broadcast<float>(1));
    for_panels<float>(s.value_columns, [&](auto vectors, int column) {
      constexpr int NV = decltype(vectors)::value, columns = NV * width;
      const uint32_t* values = scratch.value_pairs + int64_t(column) * s.chunk / 2;
      float* target = sums + column * lanes;
      if (state)
        multiply_tiles<NV, true>(target, scratch.score_rows, s.chunk / 2, values, key_pairs);
      else
        multiply_tiles<NV, false>(target, scratch.score_rows, s.chunk / 2, values, key_pairs);
      for (int i = 0; i < lanes; i++)
#pragma GCC unroll 2
        for (int n = 0; n < columns; n += width)
          store(target + i * columns + n, load(target + i * columns + n) * saved[i]);
    });
  }

  void update_pairs(const Scratch& scratch, int rows) const {
    const Sizes<float>& s = sizes;
    const int blocks = (rows + lanes - 1) / lanes;
    for (int f = 0; f < s.feature_pad; f += kProductRows) {
      scratch.queue->advance();
      pack_key_features<kProductRows>(scratch, f, blocks, scratch.feature_rows);
      for_panels<float>(s.value_columns, [&](auto vectors, int column) {
        constexpr int NV = decltype(vectors)::value, columns = NV * width;
        float* part = scratch.state + int64_t(column) * s.feature_pad + f * columns;
        const uint32_t* panel = scratch.value_pairs + int64_t(column) * s.chunk / 2;
        for (int b = 0; b < blocks; b++)
          multiply_tiles<NV, true>(part, scratch.feature_rows + b * kProductRows * half, half,
                                   panel + b * half * columns, half);
        for (int r = 0; r < kProductRows; r += kRows)
          round_rows(scratch, f + r, column, columns, part + r * columns);
      });
    }
  }
};

struct AmxForwardSweep : Bf16ForwardSweep<AmxForwardCall> {
  using Bf16ForwardSweep<AmxForwardCall>::Bf16ForwardSweep;
  void run(const Item& item, const Scratch& scratch, bool state_is_zero) const {
    const AmxRegisters registers;
    Bf16ForwardSweep<AmxForwardCall>::run(item, scratch, state_is_zero);
  }
};

}  // namespace rebased::cpu::REBASED_ISA
