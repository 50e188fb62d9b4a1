// Forward of one item of `outer` and `taylor` for bfloat16 inputs with bfloat16 products: features, scores
// and a copy of the state are rounded to bfloat16, sums and the state itself stay float32. Denominators sum
// the same rounded numbers. What is small stays as it is in forward.h: LayerNorm, q'.k', the quadratic form.
#pragma once

#include "cpu/chunked/forward.h"
#include "cpu/simd/bf16_products.h"

namespace rebased::cpu::REBASED_ISA {

struct Bf16ForwardScratch : ForwardScratch<float> {
  uint32_t* state_pairs;  // [panel][pair of features][columns]
  uint32_t* query_pairs;  // [pair of features of the slab][kLanes]
  uint32_t* key_pairs;    // [block][kRows][pair of tokens]
  uint32_t* value_pairs;  // [panel][pair of tokens][columns]
  uint32_t* score_pairs;  // [pair of keys][kLanes]

  Bf16ForwardScratch(const Sizes<float>& s, Arena& arena) : ForwardScratch<float>(s, arena) {
    state_pairs = arena.take<uint32_t>(s.state_kv / 2);
    query_pairs = arena.take<uint32_t>(s.slab / 2 * kLanes<float>);
    key_pairs = arena.take<uint32_t>(s.blocks * kRows * kLanes<float> / 2);
    value_pairs = arena.take<uint32_t>(s.chunk / 2 * s.value_columns);
    score_pairs = arena.take<uint32_t>(s.chunk / 2 * kLanes<float>);
  }
};

struct Bf16ForwardCall : ForwardCall<float> {
  using Base = ForwardCall<float>;
  using Scratch = Bf16ForwardScratch;
  using Base::Base;
  static constexpr int lanes = kLanes<float>, width = kWidth<float>;

  Scratch scratch(Arena& arena) const { return Scratch(sizes, arena); }
  int64_t block() const { return int64_t(sizes.feature_rows) * lanes; }

  void pack_value_pairs(const Item& item, int64_t row, int rows, const Ahead& ahead, uint32_t* target) const {
    const ConstRows& v = problem.v;
    const char* head =
        head_rows<float>(v, item.batch, item.kv_head, Dtype::bfloat16) + 2 * sizes.first_column;
    const Bfloat16* source = reinterpret_cast<const Bfloat16*>(head) + row * v.row_stride;
    for_panels<float>(sizes.value_columns, [&](auto vectors, int column) {
      constexpr int columns = decltype(vectors)::value * width;
      uint32_t* panel = target + int64_t(column) * sizes.chunk / 2;
      for (int i = 0; i < rows; i += 2)
        for (int n = 0; n < columns; n += width) {
          const Bfloat16* first = source + i * v.row_stride + column + n;
          const int count = sizes.head_dim - column - n;
          const FloatVector even = read<float>(first, count);
          const FloatVector odd = i + 1 < rows ? read<float>(first + v.row_stride, count) : FloatVector{};
          store_pairs(panel + i / 2 * columns + n, ((Uint32Vector)even >> 16) | (Uint32Vector)odd);
        }
    });
    queue_rows(ahead, head, row, rows, v.row_stride, sizes.head_dim);
  }

  template <int NV, bool Masked>
  REBASED_INLINE void score_pair_tile(const float* keys, const float* queries, int first, uint32_t* scores,
                                      FloatVector* sums) const {
    const float a0 = sizes.a0, a1 = sizes.a1, a2 = sizes.a2;
    Tile<float, NV> tile;
    tile.zero();
    tile.template multiply_transposed<lanes, lanes>(sizes.feature_dim, keys, queries);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r += 2)
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) {
        FloatVector sim[2];
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; odd++) {
          const FloatVector dot = tile.sum[r + odd][n];
          sim[odd] = a0 + dot * (a1 + a2 * dot);
          if (Masked)
            sim[odd] = lane_numbers<float>() >= first + r + odd - n * width ? sim[odd] : FloatVector{};
        }
        const Uint32Vector rounded = pair(sim[0], sim[1]);
        sums[n] += even_of(rounded) + odd_of(rounded);
        store_pairs(scores + r / 2 * lanes + n * width, rounded);
      }
  }
  // scores of block b's queries and the chunk's own keys
  void score_pairs(const Scratch& scratch, int b, int rows, FloatVector* sums) const {
    const float* queries = scratch.queries + b * block();
    for (int j = 0; j < smaller(rows, (b + 1) * lanes); j += kRows) {
      scratch.queue->advance();
      const float* keys = scratch.keys + j / lanes * block() + j % lanes;
      uint32_t* scores = scratch.score_pairs + j / 2 * lanes;
      const int first = j - b * lanes;
      if (first + kRows <= 0)
        score_pair_tile<kVectors, false>(keys, queries, first, scores, sums);
      else if (first < width)
        score_pair_tile<kVectors, true>(keys, queries, first, scores, sums);
      else
        score_pair_tile<1, true>(keys, queries + width, first - width, scores + width, sums + 1);
    }
  }

  void meet_pairs(const Scratch& scratch, int b, int rows, const float* state) const {
    const Sizes<float>& s = sizes;
    FloatVector denominators[kVectors] = {};
    score_pairs(scratch, b, rows, denominators);
    float* saved = scratch.denominators + b * lanes;
    float* sums = scratch.sums + int64_t(b) * lanes * s.value_columns;
    const int features = state ? s.feature_pad : 0;
    int begin = 0;
    do {
      const int end = smaller(begin + s.slab, features);
      const bool last_slab = end == features;
      const float* X = scratch.queries + b * block();
      for (int f = begin; f < end; f += 2) {
        const FeaturePair<float> even = pairs[f], odd = pairs[f + 1];
        const float even_z = state[s.state_kv + f], odd_z = state[s.state_kv + f + 1];
#pragma GCC unroll 2
        for (int n = 0; n < kVectors; n++) {
          const auto x = [&](int e) { return load(X + e * lanes + n * width); };
          const Uint32Vector phi =
              pair(x(even.first) * x(even.second) * even.weight, x(odd.first) * x(odd.second) * odd.weight);
          denominators[n] += even_of(phi) * even_z + odd_of(phi) * odd_z;
          store_pairs(scratch.query_pairs + (f - begin) / 2 * lanes + n * width, phi);
        }
      }
      if (last_slab)
        for (int n = 0; n < kVectors; n++)
          store(saved + n * width,
                problem.normalize ? 1 / (denominators[n] + float(problem.eps)) : broadcast<float>(1));
      for_panels<float>(s.value_columns, [&](auto vectors, int column) {
        constexpr int NV = decltype(vectors)::value, columns = NV * width;
        for (int i = 0; i < lanes; i += kRows) {
          scratch.queue->advance();
          float* target = sums + column * lanes + i * columns;
          Tile<float, NV> tile;
          if (begin)
            tile.load_rows(target, columns);
          else
            tile.zero();
          multiply_pairs<1, lanes>(
              tile, (end - begin) / 2, scratch.query_pairs + i,
              scratch.state_pairs + (int64_t(column) * s.feature_pad + int64_t(begin) * columns) / 2);
          if (last_slab) {
            const int seen = smaller(rows, b * lanes + i + kRows);
            multiply_pairs<1, lanes>(tile, (seen + 1) / 2, scratch.score_pairs + i,
                                     scratch.value_pairs + int64_t(column) * s.chunk / 2);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
              for (int n = 0; n < NV; n++) tile.sum[r][n] *= saved[i + r];
          }
          tile.store_rows(target, columns);
        }
      });
      begin = end;
    } while (begin < features);
  }

  void round_rows(const Scratch& scratch, int f, int column, int columns, const float* rows) const {
    uint32_t* target = scratch.state_pairs + (int64_t(column) * sizes.feature_pad + int64_t(f) * columns) / 2;
    for (int r = 0; r < kRows; r += 2)
      for (int n = 0; n < columns; n += width)
        store_pairs(target + r / 2 * columns + n,
                    pair(load(rows + r * columns + n), load(rows + (r + 1) * columns + n)));
  }

  void round_state(const Scratch& scratch) const {
    for (int f = 0; f < sizes.feature_pad; f += kRows)
      for_panels<float>(sizes.value_columns, [&](auto vectors, int column) {
        constexpr int columns = decltype(vectors)::value * width;
        round_rows(scratch, f, column, columns,
                   scratch.state + int64_t(column) * sizes.feature_pad + f * columns);
      });
  }

  // phi(k) for features [f, f + Rows) of all blocks: z takes their sums in, target is [block][Rows][pair of
  // tokens].
  template <int Rows>
  REBASED_INLINE void pack_key_features(const Scratch& scratch, int f, int blocks, uint32_t* target) const {
    constexpr int half = lanes / 2;
    FloatVector sums[Rows];
    for (int r = 0; r < Rows; r++) {
      const FeaturePair<float> feature = pairs[f + r];
      sums[r] = FloatVector{};
      for (int b = 0; b < blocks; b++) {
        const float* first = scratch.keys + b * block() + feature.first * lanes;
        const float* second = scratch.keys + b * block() + feature.second * lanes;
        const Uint32Vector phi =
            pair_lanes(load(first) * load(second), load(first + width) * load(second + width));
        sums[r] += even_of(phi) + odd_of(phi);
        store_pairs(target + (b * Rows + r) * half, phi);
      }
    }
    add_row_sums<float, Rows>(sums, scratch.state + sizes.state_kv + f);
  }

  // S += phi(k) v^T, z += phi(k), and S's rounded copy.
  void update_pairs(const Scratch& scratch, int rows) const {
    const Sizes<float>& s = sizes;
    const int blocks = (rows + lanes - 1) / lanes;
    constexpr int half = lanes / 2;
    for (int f = 0; f < s.feature_pad; f += kRows) {
      scratch.queue->advance();
      pack_key_features<kRows>(scratch, f, blocks, scratch.key_pairs);
      for_panels<float>(s.value_columns, [&](auto vectors, int column) {
        constexpr int NV = decltype(vectors)::value, columns = NV * width;
        float* part = scratch.state + int64_t(column) * s.feature_pad + f * columns;
        const uint32_t* panel = scratch.value_pairs + int64_t(column) * s.chunk / 2;
        Tile<float, NV> tile;
        tile.load_rows(part, columns);
        for (int b = 0; b < blocks; b++)
          multiply_pairs<half, 1>(tile, (smaller(rows - b * lanes, lanes) + 1) / 2,
                                  scratch.key_pairs + b * kRows * half, panel + b * half * columns);
        tile.store_rows(part, columns);
        round_rows(scratch, f, column, columns, part);
      });
    }
  }
};

// The walk over an item's chunks; Products: Bf16ForwardCall, or amx_forward.h's.
template <class Products>
struct Bf16ForwardSweep : Products {
  using Scratch = typename Products::Scratch;
  using Products::Products, Products::sizes, Products::problem, Products::statistics;

  void run(const Item& item, const Scratch& scratch, bool state_is_zero) const {
    if (item.quadratic) return ForwardCall<float>::run(item, scratch, state_is_zero);
    const ForwardProblem& p = problem;
    const Sizes<float>& s = sizes;
    const int64_t group = p.heads / p.kv_heads;
    const Tokens<float> keys = head_tokens<float>(p, s, false, statistics, item.batch, item.kv_head);
    const bool keep_state = item.last && p.final_state.kv;
    const Ahead next{scratch.queue, s.chunk};
    if (!state_is_zero) this->round_state(scratch);
    for (int64_t row = item.begin; row < item.end; row += s.chunk) {
      scratch.queue->clear();
      const int rows = int(smaller<int64_t>(s.chunk, item.end - row));
      this->pack_tokens(keys, row, rows, next, scratch.keys);
      this->pack_value_pairs(item, row, rows, next, scratch.value_pairs);
      for (int64_t g = 0; g < group; g++) {
        const int64_t head = item.kv_head * group + g;
        this->pack_tokens(head_tokens<float>(p, s, true, statistics, item.batch, head), row, rows, next,
                          scratch.queries);
        this->queue_rows(next, head_rows<float>(p.y, item.batch, head, p.dtype), row, rows, p.y.row_stride,
                         s.head_dim);
        for (int b = 0; b * kLanes<float> < rows; b++) {
          this->meet_pairs(scratch, b, rows, state_is_zero ? nullptr : scratch.state);
          this->write_block(scratch, b, item, head, row + b * kLanes<float>,
                            smaller(rows - b * kLanes<float>, kLanes<float>));
        }
      }
      if (row + rows == item.end && !keep_state) continue;
      this->update_pairs(scratch, rows);
      state_is_zero = false;
    }
    if (keep_state) export_state(s, scratch.state, p.final_state, item.sequence * p.kv_heads + item.kv_head);
  }
};

}  // namespace rebased::cpu::REBASED_ISA
