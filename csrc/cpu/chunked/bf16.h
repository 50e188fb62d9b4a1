// The products of `outer` and `taylor` for bfloat16 inputs. Their operands are rounded to bfloat16: features,
// scores of a forward, v, ghat and copies of the state. Sums and the state itself stay float32, and so do
// LayerNorm, q'.k', the division, the quadratic form and a backward's products within a chunk, which float.h
// and backward.h make. It includes float.h and the products of simd/, and knows no order of chunks.
//
// Operands are pairs along the summed index, so the copy of the state lies by pairs of features, and in
// backward by pairs of columns too. Products is VectorProducts of bf16_products.h, or TileProducts of
// amx_products.h. One packing serves both: kProductRows features at a time, and whole blocks of tokens.
#pragma once

#include "cpu/chunked/float.h"
#include "cpu/simd/bf16_products.h"

namespace rebased::cpu::REBASED_ISA {

// A state takes in the products of a chunk's features with its values.
struct Bf16Update {
  const Sizes<float>& sizes;
  const FeaturePair<float>* pairs;
  const float* tokens;          // q' or k'
  int rows;                     // tokens of the chunk
  const uint32_t* value_pairs;  // [panel][pair of tokens][columns]; tokens that the last block lacks are zero
  float* state;
  uint32_t* features;  // scratch, [block][kProductRows][pair of tokens]
  PrefetchQueue* queue;

  // The numerator takes in phi(token) values^T, the denominator what sum(total, token, phi, rounded) adds of
  // two vectors of tokens from `token` on; round(f, vectors, column, rows) sees kRows finished rows of the
  // state.
  template <class Products, bool Weighted, class Sum, class Round>
  REBASED_INLINE void run(const Sum& sum, const Round& round) const {
    for (int f = 0; f < sizes.feature_pad; f += kProductRows) {
      queue->advance();
      pack<Weighted>(f, sum);
      for_panels<float>(sizes.value_columns, [&](auto vectors, int column) {
        constexpr int NV = decltype(vectors)::value, columns = NV * kWidth<float>;
        float* part = state + int64_t(column) * sizes.feature_pad + f * columns;
        Products::template add_tokens<NV>(part, rows, features,
                                          value_pairs + int64_t(column) * sizes.chunk / 2);
        for (int r = 0; r < kProductRows; r += kRows) round(f + r, vectors, column, part + r * columns);
      });
    }
  }

 private:
  template <bool Weighted, class Sum>
  REBASED_INLINE void pack(int f, const Sum& sum) const {
    constexpr int lanes = kLanes<float>, width = kWidth<float>;
    const int blocks = (rows + lanes - 1) / lanes;
    const int64_t token_block = int64_t(sizes.feature_rows) * lanes;
    FloatVector sums[kProductRows];
    for (int r = 0; r < kProductRows; r++) {
      const FeaturePair<float> feature = pairs[f + r];
      sums[r] = FloatVector{};
      for (int b = 0; b < blocks; b++) {
        const float* X = tokens + b * token_block;
        FloatVector phi[2];
#pragma GCC unroll 2
        for (int n = 0; n < 2; n++) {
          phi[n] = load(X + feature.first * lanes + n * width) * load(X + feature.second * lanes + n * width);
          if (Weighted) phi[n] *= feature.weight;
        }
        const Uint32Vector rounded = pair_lanes(phi[0], phi[1]);
        sum(sums[r], b * lanes, phi, rounded);
        store_pairs(features + (b * kProductRows + r) * lanes / 2, rounded);
      }
    }
    add_row_sums<float, kProductRows>(sums, state + sizes.state_kv + f);
  }
};

// The copy of kRows rows of the state by pairs of features, [panel][pair of features][columns].
template <int NV>
REBASED_INLINE void round_rows(const Sizes<float>& s, int f, int column, const float* rows,
                               uint32_t* state_pairs) {
  constexpr int width = kWidth<float>, columns = NV * width;
  uint32_t* target = state_pairs + (int64_t(column) * s.feature_pad + int64_t(f) * columns) / 2;
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r += 2)
#pragma GCC unroll 2
    for (int n = 0; n < columns; n += width)
      store_pairs(target + r / 2 * columns + n,
                  pair(load(rows + r * columns + n), load(rows + (r + 1) * columns + n)));
}
// Calls body(f, vectors, column, rows) for each tile of kRows rows of the state, from feature f on.
template <class Body>
REBASED_INLINE void for_state_rows(const Sizes<float>& s, const float* state, const Body& body) {
  for (int f = 0; f < s.feature_pad; f += kRows)
    for_panels<float>(s.value_columns, [&](auto vectors, int column) {
      constexpr int columns = decltype(vectors)::value * kWidth<float>;
      body(f, vectors, column, state + int64_t(column) * s.feature_pad + f * columns);
    });
}
// Rows of values as pairs: [panel][pair of tokens][columns]. body(token, column, columns, n) gives one vector
// of pairs of that token and the next, from n on within the panel that begins at `column` and has `columns`.
template <class Body>
REBASED_INLINE void pack_value_pairs(const Sizes<float>& s, int rows, uint32_t* target, const Body& body) {
  const int whole_blocks = int(round_up(rows, kLanes<float>));
  for_panels<float>(s.value_columns, [&](auto vectors, int column) {
    constexpr int columns = decltype(vectors)::value * kWidth<float>;
    uint32_t* panel = target + int64_t(column) * s.chunk / 2;
    for (int i = 0; i < whole_blocks; i += 2)
      for (int n = 0; n < columns; n += kWidth<float>)
        store_pairs(panel + i / 2 * columns + n, body(i, column, columns, n));
  });
}

struct Bf16ForwardScratch : ForwardScratch<float> {
  uint32_t* state_pairs;  // [panel][pair of features][columns]
  uint32_t* query_pairs;  // of a block and slab, as Products::pack_block leaves them
  uint32_t* key_pairs;    // [block][kProductRows][pair of tokens]
  uint32_t* value_pairs;  // [panel][pair of tokens][columns]
  uint32_t* score_pairs;  // [pair of keys][kLanes]

  Bf16ForwardScratch(const Sizes<float>& s, Arena& arena) : ForwardScratch<float>(s, arena) {
    state_pairs = arena.take<uint32_t>(s.state_kv / 2);
    query_pairs = arena.take<uint32_t>(s.slab / 2 * kLanes<float>);
    key_pairs = arena.take<uint32_t>(s.blocks * kProductRows * kLanes<float> / 2);
    value_pairs = arena.take<uint32_t>(s.chunk / 2 * s.value_columns);
    score_pairs = arena.take<uint32_t>(s.chunk / 2 * kLanes<float>);
  }
};

template <class Products>
struct Bf16ForwardOn : ForwardProducts<float> {
  using Scratch = Bf16ForwardScratch;
  using ForwardProducts<float>::ForwardProducts;
  static constexpr int lanes = kLanes<float>, width = kWidth<float>;

  void round_state(const Scratch& scratch) const {
    for_state_rows(sizes, scratch.state, [&](int f, auto vectors, int column, const float* rows) {
      round_rows<decltype(vectors)::value>(sizes, f, column, rows, scratch.state_pairs);
    });
  }

  void pack_chunk_values(const Scratch& scratch, const Item& item, int64_t row, int rows,
                         const Ahead& ahead) const {
    const ConstRows& v = problem.v;
    const char* head =
        head_rows<float>(v, item.batch, item.kv_head, Dtype::bfloat16) + 2 * sizes.first_column;
    const Bfloat16* source = reinterpret_cast<const Bfloat16*>(head) + row * v.row_stride;
    pack_value_pairs(sizes, rows, scratch.value_pairs, [&](int i, int column, int, int n) {
      const Bfloat16* first = source + i * v.row_stride + column + n;
      const int count = sizes.head_dim - column - n;
      const FloatVector even = i < rows ? read<float>(first, count) : FloatVector{};
      const FloatVector odd = i + 1 < rows ? read<float>(first + v.row_stride, count) : FloatVector{};
      return ((Uint32Vector)even >> 16) | (Uint32Vector)odd;
    });
    queue_rows(ahead, head, row, rows, v.row_stride, sizes.head_dim);
  }

  // As ForwardProducts has it; the sums are those of the rounded scores.
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
  // Scores of block b's queries and the chunk's own keys.
  void score_pairs(const Scratch& scratch, int b, int rows, FloatVector* sums) const {
    const float* queries = scratch.queries + b * token_block();
    for_seen_keys<float>(b, rows, true, [&](auto vectors, auto masked, int j) {
      constexpr int NV = decltype(vectors)::value, lane = (kVectors - NV) * width;
      scratch.queue->advance();
      score_pair_tile<NV, decltype(masked)::value>(
          scratch.keys + j / lanes * token_block() + j % lanes, queries + lane, j - b * lanes - lane,
          scratch.score_pairs + j / 2 * lanes + lane, sums + lane / width);
    });
  }

  // A block of queries against the chunk's own keys and the state.
  void meet(const Scratch& scratch, int b, const Meeting<float>& meeting) const {
    if (meeting.quadratic) return ForwardProducts<float>::meet(scratch, b, meeting);
    const Sizes<float>& s = sizes;
    FloatVector denominators[kVectors] = {};
    score_pairs(scratch, b, meeting.key_rows, denominators);
    float* saved = scratch.denominators + b * lanes;
    float* sums = scratch.sums + int64_t(b) * lanes * s.value_columns;
    const float* state = meeting.state;
    const int features = state ? s.feature_pad : 0;
    int begin = 0;
    do {
      const int end = smaller(begin + s.slab, features);
      const bool last_slab = end == features;
      const float* X = scratch.queries + b * token_block();
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
        for (int n = 0; n < kVectors; n++) store(saved + n * width, inverse(denominators[n]));
      for_panels<float>(s.value_columns, [&](auto vectors, int column) {
        constexpr int NV = decltype(vectors)::value, columns = NV * width;
        for (int i = 0; i < lanes; i += kRows) {
          scratch.queue->advance();
          float* target = sums + column * lanes + i * columns;
          Tile<float, NV> tile;
          tile.start(begin > 0, target, columns);
          multiply_pairs<1, lanes>(
              tile, (end - begin) / 2, scratch.query_pairs + i,
              scratch.state_pairs + (int64_t(column) * s.feature_pad + int64_t(begin) * columns) / 2);
          if (last_slab) {
            const int seen = smaller(meeting.key_rows, b * lanes + i + kRows);
            multiply_pairs<1, lanes>(tile, (seen + 1) / 2, scratch.score_pairs + i,
                                     scratch.value_pairs + int64_t(column) * s.chunk / 2);
            tile.scale_rows(saved + i);
          }
          tile.store_rows(target, columns);
        }
      });
      begin = end;
    } while (begin < features);
  }

  // S += phi(k) v^T, z += the rounded phi(k), and S's rounded copy.
  void add_to_state(const Scratch& scratch, int rows) const {
    const Bf16Update update{
        sizes,        pairs, scratch.keys, rows, scratch.value_pairs, scratch.state, scratch.key_pairs,
        scratch.queue};
    update.template run<Products, false>(
        [](FloatVector& total, int, const FloatVector*, Uint32Vector rounded) {
          total += even_of(rounded) + odd_of(rounded);
        },
        [&](int f, auto vectors, int column, const float* part) {
          round_rows<decltype(vectors)::value>(sizes, f, column, part, scratch.state_pairs);
        });
  }
};
using Bf16ForwardProducts = Bf16ForwardOn<VectorProducts>;

struct Bf16BackwardScratch : BackwardScratch<float> {
  uint32_t* state_rows;     // [panel][feature][pair of columns]
  uint32_t* state_pairs;    // [panel][pair of features][columns]
  uint32_t* column_pairs;   // [pair of columns][kLanes]: v or ghat of a block
  uint32_t* value_pairs;    // [panel][pair of tokens][columns]: v or ghat
  uint32_t* feature_pairs;  // of a block and slab, as Products::pack_block leaves them
  uint32_t* token_pairs;    // [block][kProductRows][pair of tokens]

  Bf16BackwardScratch(const Sizes<float>& s, int64_t group, Arena& arena)
      : BackwardScratch<float>(s, group, arena) {
    state_rows = arena.take<uint32_t>(s.state_kv / 2), state_pairs = arena.take<uint32_t>(s.state_kv / 2);
    column_pairs = arena.take<uint32_t>(s.value_columns / 2 * kLanes<float>);
    value_pairs = arena.take<uint32_t>(s.chunk / 2 * s.value_columns);
    feature_pairs = arena.take<uint32_t>(s.slab / 2 * kLanes<float>);
    token_pairs = arena.take<uint32_t>(s.blocks * kProductRows * kLanes<float> / 2);
  }
};

template <class Products>
struct Bf16BackwardOn : BackwardCall<float> {
  using Scratch = Bf16BackwardScratch;
  using Registers = NoRegisters;
  using BackwardCall<float>::BackwardCall;
  static constexpr int lanes = kLanes<float>, width = kWidth<float>;

  // Both rounded copies of kRows rows of the state.
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
    round_rows<NV>(sizes, f, column, rows, scratch.state_pairs);
  }
  void round_state(const Scratch& scratch) const {
    for_state_rows(sizes, scratch.state, [&](int f, auto vectors, int column, const float* rows) {
      round_tile<decltype(vectors)::value>(scratch, f, column, rows);
    });
  }

  template <bool Weighted>
  void add_to_state(const Scratch& scratch, const float* tokens, const float* token_weights,
                    const float* values, int rows, float* state) const {
    pack_value_pairs(sizes, rows, scratch.value_pairs, [&](int i, int column, int columns, int n) {
      const float* row = values + int64_t(column) * sizes.chunk + i * columns + n;
      return pair(i < rows ? load(row) : FloatVector{}, i + 1 < rows ? load(row + columns) : FloatVector{});
    });
    const Bf16Update update{
        sizes, pairs, tokens, rows, scratch.value_pairs, state, scratch.token_pairs, scratch.queue};
    update.template run<Products, Weighted>(
        [&](FloatVector& total, int token, const FloatVector* phi, Uint32Vector) {
#pragma GCC unroll 2
          for (int n = 0; n < 2; n++)
            total += token_weights ? phi[n] * load(token_weights + token + n * width) : phi[n];
        },
        [&](int f, auto vectors, int column, const float* part) {
          round_tile<decltype(vectors)::value>(scratch, f, column, part);
        });
  }

  // v or ghat of block b as pairs of columns.
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
    load_weights(token_weights, weights);
    for (int f = 0; f < s.feature_pad; f += kRows) {
      scratch.queue->advance();
      Tile<float, kVectors> tile;
      tile.set_outer(scratch.state + s.state_kv + f, weights);
      for_panels<float>(s.value_columns, [&](auto vectors, int column) {
        constexpr int half = decltype(vectors)::value * width / 2;
        multiply_pairs<half, 1>(tile, half,
                                scratch.state_rows + int64_t(column) * s.feature_pad / 2 + f * half,
                                scratch.column_pairs + column / 2 * lanes);
      });
      add_feature_gradient<float, Weighted>(pairs + f, tile, X, dX);
    }
  }

  // grad v of block b begins with phi(k') T.
  void values_from_state(const Scratch& scratch, int b) const {
    const Sizes<float>& s = sizes;
    const float* X = scratch.keys + b * token_block();
    float* sums = scratch.grad_values + int64_t(b) * lanes * s.value_columns;
    const int stride = s.slab / 2;
    for (int begin = 0; begin < s.feature_pad; begin += s.slab) {
      const int end = smaller(begin + s.slab, s.feature_pad), slab_pairs = (end - begin) / 2;
      Products::pack_block(slab_pairs, stride, scratch.feature_pairs, [&](int i, int lane) {
        const auto phi = [&](int feature) {
          return load(X + pairs[feature].first * lanes + lane) *
                 load(X + pairs[feature].second * lanes + lane);
        };
        return pair(phi(begin + 2 * i), phi(begin + 2 * i + 1));
      });
      for_panels<float>(s.value_columns, [&](auto vectors, int column) {
        constexpr int NV = decltype(vectors)::value, columns = NV * width;
        Products::template multiply_block<NV>(
            sums + column * lanes, begin > 0, slab_pairs, stride, scratch.feature_pairs,
            scratch.state_pairs + (int64_t(column) * s.feature_pad + int64_t(begin) * columns) / 2,
            scratch.queue);
      });
    }
  }
};
using Bf16BackwardProducts = Bf16BackwardOn<VectorProducts>;

}  // namespace rebased::cpu::REBASED_ISA
