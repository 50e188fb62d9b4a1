// The products of `outer` and `taylor` in the accumulation type T, float or double: all products of a
// forward, and the products of a backward with a state. It includes forward.h and backward.h and knows no
// order of chunks.
#pragma once

#include "cpu/chunked/backward.h"
#include "cpu/chunked/forward.h"

namespace rebased::cpu::REBASED_ISA {

struct NoRegisters {};  // in the place of AmxRegisters, which amx.h has set up for an item

template <class T>
struct ForwardProducts : ForwardCall<T> {
  using Scratch = ForwardScratch<T>;
  using Registers = NoRegisters;
  using ForwardCall<T>::ForwardCall;
  using Call<T>::sizes, Call<T>::pairs, Call<T>::token_block;

  void round_state(const Scratch&) const {}  // bf16.h keeps a rounded copy of the state

  // v of a chunk, as the products take it.
  void pack_chunk_values(const Scratch& scratch, const Item& item, int64_t row, int rows,
                         const Ahead& ahead) const {
    this->pack_values(this->problem.v, item.batch, item.kv_head, row, rows, ahead, scratch.values);
  }

  // Scores of block b's queries (lanes) and every key of the meeting that they may see; adds the row sums to
  // `sums`.
  void score(const Scratch& scratch, int b, const Meeting<T>& meeting, Vector<T> (&sums)[kVectors]) const {
    const T* queries = scratch.queries + b * token_block();
    for_seen_keys<T>(b, meeting.key_rows, meeting.diagonal, [&](auto vectors, auto masked, int j) {
      constexpr int NV = decltype(vectors)::value, lane = (kVectors - NV) * kWidth<T>;
      scratch.queue->advance();
      score_tile<NV, decltype(masked)::value>(scratch.keys + j / kLanes<T> * token_block() + j % kLanes<T>,
                                              queries + lane, j - b * kLanes<T> - lane,
                                              scratch.scores + j * kLanes<T> + lane, sums + lane / kWidth<T>);
    });
  }

  // first: the tile's first key, counted from the query in the tile's first lane.
  template <int NV, bool Masked>
  REBASED_INLINE void score_tile(const T* keys, const T* queries, int first, T* scores,
                                 Vector<T>* sums) const {
    const T a0 = sizes.a0, a1 = sizes.a1, a2 = sizes.a2;
    Tile<T, NV> tile;
    tile.zero();
    tile.template multiply_transposed<kLanes<T>, kLanes<T>>(sizes.feature_dim, keys, queries);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) {
        const Vector<T> dot = tile.sum[r][n];
        Vector<T> sim = a0 + dot * (a1 + a2 * dot);
        if (Masked)
          sim = lane_numbers<T>() >= typename Simd<T>::Int(first + r - n * kWidth<T>) ? sim : Vector<T>{};
        sums[n] += sim;
        store(scores + r * kLanes<T> + n * kWidth<T>, sim);
      }
  }

  // One block of queries against one chunk of keys; y and r are written when this chunk is the last.
  void meet(const Scratch& scratch, int b, const Meeting<T>& meeting) const {
    const Sizes<T>& s = sizes;
    Vector<T> denominators[kVectors];
    T* saved = scratch.denominators + b * kLanes<T>;
    for (int n = 0; n < kVectors; n++)
      denominators[n] = meeting.first ? Vector<T>{} : load(saved + n * kWidth<T>);
    score(scratch, b, meeting, denominators);
    bool started = !meeting.first;
    T* sums = scratch.sums + int64_t(b) * kLanes<T> * s.value_columns;
    const int64_t y_stride = this->problem.y.row_stride;
    const int features = meeting.state ? s.feature_pad : 0;
    int begin = 0;
    do {
      const int end = smaller(begin + s.slab, features);
      const bool last_slab = end == features;
      const T* phi = scratch.query_slab;
      const T* z = meeting.state ? meeting.state + s.state_kv : nullptr;
      Vector<T> odd[kVectors] = {};  // two sums: one alone would wait for itself
      for (int f = begin; f < end; f += kRows)
        feature_tile<T, true>(
            pairs + f, scratch.queries + b * token_block(), scratch.query_slab + (f - begin) * kLanes<T>,
            [&](int r, int n, Vector<T> x) { (r % 2 ? odd : denominators)[n] += x * z[f + r]; });
      for (int n = 0; n < kVectors; n++) denominators[n] += odd[n];
      if (last_slab) {
        for (int n = 0; n < kVectors; n++) {
          if (meeting.last) denominators[n] = this->inverse(denominators[n]);
          store(saved + n * kWidth<T>, denominators[n]);
        }
      }
      for_panels<T>(s.value_columns, [&](auto vectors, int column) {
        constexpr int NV = decltype(vectors)::value, columns = NV * kWidth<T>;
        const T* values = scratch.values + int64_t(column) * s.chunk;
        const T* state =
            features ? meeting.state + int64_t(column) * s.feature_pad + int64_t(begin) * columns : nullptr;
        for (int i = 0; i < kLanes<T>; i += kRows) {
          scratch.queue->advance();
          T* target = sums + column * kLanes<T> + i * columns;
          Tile<T, NV> tile;
          tile.start(started, target, columns);
          tile.template multiply_transposed<kLanes<T>>(end - begin, phi + i, state);
          if (last_slab) {
            const int seen =
                meeting.diagonal ? smaller(meeting.key_rows, b * kLanes<T> + i + kRows) : meeting.key_rows;
            tile.template multiply_transposed<kLanes<T>>(seen, scratch.scores + i, values);
            if (meeting.last) tile.scale_rows(saved + i);
          }
          if (last_slab && meeting.last && meeting.y)
            tile.store_rows(meeting.y + i * y_stride + column, y_stride);
          else
            tile.store_rows(target, columns);
        }
      });
      started = true;
      begin = end;
    } while (begin < features);
  }

  // S += phi(k) v^T and z += phi(k) for the chunk's keys.
  void add_to_state(const Scratch& scratch, int rows) const {
    update_state<T, false>(sizes, pairs, scratch.keys, nullptr, scratch.values, rows, scratch.state,
                           scratch.long_sums, scratch.key_slab, scratch.queue);
  }
};

template <class T>
struct BackwardProducts : BackwardCall<T> {
  using Scratch = BackwardScratch<T>;
  using Registers = NoRegisters;
  using BackwardCall<T>::BackwardCall;
  using Call<T>::sizes, Call<T>::pairs, Call<T>::token_block;

  void round_state(const Scratch&) const {}

  // S or T and its denominator take in a chunk: Weighted puts the query's weights on the features.
  template <bool Weighted>
  void add_to_state(const Scratch& scratch, const T* tokens, const T* token_weights, const T* values,
                    int rows, T* state) const {
    update_state<T, Weighted>(sizes, pairs, tokens, token_weights, values, rows, state, scratch.long_sums,
                              scratch.row_slab, scratch.queue);
  }
  // Adds to dX what comes through the state for block b, whose v or ghat stands in scratch.transposed.
  template <bool Weighted>
  void gradient_from_state(const Scratch& scratch, int b, const T* token_weights, const T* X, T* dX) const {
    state_gradient<T, Weighted>(sizes, pairs, scratch.state,
                                scratch.transposed + int64_t(b) * sizes.value_columns * kLanes<T>,
                                token_weights, X, dX, scratch.queue);
  }
  // grad v of block b begins with phi(k') T.
  void values_from_state(const Scratch& scratch, int b) const {
    const Sizes<T>& s = sizes;
    T* sums = scratch.grad_values + int64_t(b) * kLanes<T> * s.value_columns;
    for (int begin = 0; begin < s.feature_pad; begin += s.slab) {
      const int end = smaller(begin + s.slab, s.feature_pad);
      for (int f = begin; f < end; f += kRows)
        feature_tile<T, false>(pairs + f, scratch.keys + b * token_block(),
                               scratch.slab + (f - begin) * kLanes<T>, [](int, int, Vector<T>) {});
      for_panels<T>(s.value_columns, [&](auto vectors, int column) {
        constexpr int NV = decltype(vectors)::value, columns = NV * kWidth<T>;
        const T* state = scratch.state + int64_t(column) * s.feature_pad + int64_t(begin) * columns;
        for (int j = 0; j < kLanes<T>; j += kRows) {
          scratch.queue->advance();
          T* target = sums + column * kLanes<T> + j * columns;
          Tile<T, NV> tile;
          tile.start(begin > 0, target, columns);
          tile.template multiply_transposed<kLanes<T>>(end - begin, scratch.slab + j, state);
          tile.store_rows(target, columns);
        }
      });
    }
  }
};

}  // namespace rebased::cpu::REBASED_ISA
