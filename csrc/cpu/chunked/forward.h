// Forward of one item: a segment of a sequence for one kv head and its query heads.
//
// With a state (chunked form), per chunk of keys and block of kLanes queries (lanes):
//   scores^T (keys x queries) = sim, masked;  y = (phi(q) S + scores v) / (phi(q) z + row sums + eps)
//   then S += phi(k)^T v, z += sum phi(k)
// Without (quadratic form), the same block against every chunk of keys before it. Scores, features and the
// running y never leave the worker's scratch, whose size does not depend on seqlen.
#pragma once

#include "cpu/call.h"

namespace rebased::cpu::REBASED_ISA {

template <class T>
struct ForwardScratch {
  T *keys, *queries;  // tokens of a chunk
  T* values;          // values of a chunk
  T* scores;          // [key of the chunk][kLanes]
  T* query_slab;      // [feature of the slab][kLanes]
  T* key_slab;        // [block][kRows][kLanes]
  T* sums;            // [block]: values of kLanes rows, before the division
  T* denominators;    // [chunk]
  T* state;
  LongSums<T>* long_sums;  // of the state
  PrefetchQueue* queue;

  ForwardScratch(const Sizes<T>& s, Arena& arena) {
    const int64_t tokens = int64_t(s.blocks) * s.feature_rows * kLanes<T>;
    keys = arena.take<T>(tokens), queries = arena.take<T>(tokens);
    values = arena.take<T>(int64_t(s.chunk) * s.value_columns);
    scores = arena.take<T>(int64_t(s.chunk) * kLanes<T>);
    query_slab = arena.take<T>(int64_t(s.slab) * kLanes<T>);
    key_slab = arena.take<T>(int64_t(s.blocks) * kRows * kLanes<T>);
    sums = arena.take<T>(int64_t(s.chunk) * s.value_columns);
    denominators = arena.take<T>(s.chunk);
    state = arena.take<T>(s.state_size);
    long_sums = LongSums<T>::make(s, arena);
    queue = arena.take<PrefetchQueue>(1);
  }
};

template <class T>
struct ForwardCall : Call<T> {
  using Scratch = ForwardScratch<T>;
  const ForwardProblem& problem;
  using Call<T>::sizes, Call<T>::pairs, Call<T>::statistics, Call<T>::pack_tokens, Call<T>::pack_values;

  ForwardCall(const ForwardProblem& p, int threads, Arena& arena, bool needs_state, int64_t parts)
      : Call<T>(p, threads, arena, needs_state, parts), problem(p) {}
  Scratch scratch(Arena& arena) const { return Scratch(sizes, arena); }

  // How a block of queries meets a chunk of keys.
  struct Meeting {
    int key_rows;
    bool diagonal;     // the same chunk: mask
    bool first, last;  // chunk of keys for these queries: start the sums, finish them
    const T* state;    // null: none
    T* y;              // where the rows of the block go in the end; null: to the sums, write_block takes them
  };

  // scores of block b's queries (lanes) and every key of the meeting that they may see; adds the row sums
  // to `sums`.
  void score(const ForwardScratch<T>& scratch, int b, const Meeting& meeting,
             Vector<T> (&sums)[kVectors]) const {
    const Sizes<T>& s = sizes;
    const int64_t block = int64_t(s.feature_rows) * kLanes<T>;
    const T *keys = scratch.keys, *queries = scratch.queries + b * block;
    const int end = meeting.diagonal ? smaller(meeting.key_rows, (b + 1) * kLanes<T>) : meeting.key_rows;
    for (int j = 0; j < end; j += kRows) {
      scratch.queue->advance();
      const T* tile_keys = keys + j / kLanes<T> * block + j % kLanes<T>;
      T* scores = scratch.scores + j * kLanes<T>;
      const int first = j - b * kLanes<T>;  // key of the tile's first row, counted from lane 0's own
      if (!meeting.diagonal || first + kRows <= 0)
        score_tile<kVectors, false>(tile_keys, queries, first, scores, sums);
      else if (first < kWidth<T>)
        score_tile<kVectors, true>(tile_keys, queries, first, scores, sums);
      else  // of two vectors of queries only the second sees these keys
        score_tile<1, true>(tile_keys, queries + kWidth<T>, first - kWidth<T>, scores + kWidth<T>, sums + 1);
    }
  }

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
  void meet(const ForwardScratch<T>& scratch, int b, const Meeting& meeting) const {
    const Sizes<T>& s = sizes;
    Vector<T> denominators[kVectors];
    T* saved = scratch.denominators + b * kLanes<T>;
    for (int n = 0; n < kVectors; n++)
      denominators[n] = meeting.first ? Vector<T>{} : load(saved + n * kWidth<T>);
    score(scratch, b, meeting, denominators);
    bool started = !meeting.first;
    T* sums = scratch.sums + int64_t(b) * kLanes<T> * s.value_columns;
    const int64_t block = int64_t(s.feature_rows) * kLanes<T>;
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
            pairs + f, scratch.queries + b * block, scratch.query_slab + (f - begin) * kLanes<T>,
            [&](int r, int n, Vector<T> x) { (r % 2 ? odd : denominators)[n] += x * z[f + r]; });
      for (int n = 0; n < kVectors; n++) denominators[n] += odd[n];
      if (last_slab) {
        for (int n = 0; n < kVectors; n++) {
          if (meeting.last)
            denominators[n] = problem.normalize ? 1 / (denominators[n] + T(problem.eps)) : broadcast<T>(1);
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
          if (started)
            tile.load_rows(target, columns);
          else
            tile.zero();
          tile.template multiply_transposed<kLanes<T>>(end - begin, phi + i, state);
          if (last_slab) {
            const int seen =
                meeting.diagonal ? smaller(meeting.key_rows, b * kLanes<T> + i + kRows) : meeting.key_rows;
            tile.template multiply_transposed<kLanes<T>>(seen, scratch.scores + i, values);
            if (meeting.last) {
#pragma GCC unroll 8
              for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
                for (int n = 0; n < NV; n++) tile.sum[r][n] *= saved[i + r];
            }
          }
          if (last_slab && meeting.last && meeting.y)
            tile.store_rows(meeting.y + i * problem.y.row_stride + column, problem.y.row_stride);
          else
            tile.store_rows(target, columns);
        }
      });
      started = true;
      begin = end;
    } while (begin < features);
  }

  char* y_rows(const Item& item, int64_t head) const {
    const ForwardProblem& p = problem;
    return const_cast<char*>(head_rows<T>(p.y, item.batch, head, p.dtype)) +
           sizes.first_column * bytes_of<T>(p.dtype);
  }
  // y of a block, where its rows take the tiles as they are; null where it takes write_block.
  T* whole_block(const Item& item, int64_t head, int64_t row, int rows) const {
    const ForwardProblem& p = problem;
    if (!is_accumulator<T>(p.dtype) || sizes.value_columns != sizes.head_dim || rows != kLanes<T>)
      return nullptr;
    return reinterpret_cast<T*>(y_rows(item, head)) + row * p.y.row_stride;
  }
  void write_block(const ForwardScratch<T>& scratch, int b, const Item& item, int64_t head, int64_t row,
                   int rows, bool y_is_there = false) const {
    const ForwardProblem& p = problem;
    const Sizes<T>& s = sizes;
    T* r = static_cast<T*>(p.r) + (item.batch * p.heads + head) * p.seqlen + row;
    for (int i = 0; i < rows && s.first_column == 0; i++) r[i] = scratch.denominators[b * kLanes<T> + i];
    if (y_is_there) return;
    with_element<T>(p.dtype, [&](auto element) {
      using E = typename decltype(element)::type;
      write_panels<T>(scratch.sums + int64_t(b) * kLanes<T> * s.value_columns, rows, s.head_dim, kLanes<T>,
                      reinterpret_cast<E*>(y_rows(item, head)) + row * p.y.row_stride, p.y.row_stride);
    });
  }

  // state null: quadratic form.
  void run(const Item& item, const ForwardScratch<T>& scratch, bool state_is_zero) const {
    const ForwardProblem& p = problem;
    const Sizes<T>& s = sizes;
    const int64_t group = p.heads / p.kv_heads;
    const Tokens<T> keys = head_tokens<T>(p, s, false, statistics, item.batch, item.kv_head);
    const bool keep_state = item.last && p.final_state.kv;
    if (!item.quadratic) scratch.long_sums->start(s, item.end - item.begin, scratch.state);
    const Ahead next{scratch.queue, s.chunk};
    for (int64_t row = item.begin; row < item.end; row += s.chunk) {
      scratch.queue->clear();
      const int rows = int(smaller<int64_t>(s.chunk, item.end - row));
      if (!item.quadratic) {
        pack_tokens(keys, row, rows, next, scratch.keys);
        pack_values(problem.v, item.batch, item.kv_head, row, rows, next, scratch.values);
      }
      for (int64_t g = 0; g < group; g++) {
        const int64_t head = item.kv_head * group + g;
        pack_tokens(head_tokens<T>(p, s, true, statistics, item.batch, head), row, rows, next,
                    scratch.queries);
        // written, but stores wait for their lines as well
        this->queue_rows(next, head_rows<T>(p.y, item.batch, head, p.dtype), row, rows, p.y.row_stride,
                         s.head_dim);
        const int64_t first_key = item.quadratic ? item.sequence_begin : row;
        for (int64_t key = first_key; key <= row; key += s.chunk) {
          if (item.quadratic) {
            const int key_rows = key == row ? rows : s.chunk;
            pack_tokens(keys, key, key_rows, Ahead{}, scratch.keys);
            pack_values(problem.v, item.batch, item.kv_head, key, key_rows, Ahead{}, scratch.values);
          }
          Meeting meeting{key == row ? rows : s.chunk,
                          key == row,
                          key == first_key,
                          key == row,
                          item.quadratic || state_is_zero ? nullptr : scratch.state,
                          nullptr};
          for (int b = 0; b * kLanes<T> < rows; b++) {
            const int block_rows = smaller(rows - b * kLanes<T>, kLanes<T>);
            const int64_t block_row = row + b * kLanes<T>;
            meeting.y = whole_block(item, head, block_row, block_rows);
            meet(scratch, b, meeting);
            if (meeting.last) write_block(scratch, b, item, head, block_row, block_rows, meeting.y);
          }
        }
      }
      if (item.quadratic || (row + rows == item.end && !keep_state)) continue;
      update_state<T, false>(s, pairs, scratch.keys, nullptr, scratch.values, rows, scratch.state,
                             scratch.long_sums, scratch.key_slab, scratch.queue);
      state_is_zero = false;
    }
    if (keep_state) export_state(s, scratch.state, p.final_state, item.sequence * p.kv_heads + item.kv_head);
  }

  // The state that an item's keys leave behind, from zero; in the buffers of `scratch`.
  void local_state(const Item& item, const ForwardScratch<T>& scratch, T* state) const {
    const Sizes<T>& s = sizes;
    const Tokens<T> keys = head_tokens<T>(problem, s, false, statistics, item.batch, item.kv_head);
    for (int64_t i = 0; i < s.state_size; i++) state[i] = 0;
    scratch.long_sums->start(s, item.end - item.begin, state);
    const Ahead next{scratch.queue, s.chunk};
    for (int64_t row = item.begin; row < item.end; row += s.chunk) {
      scratch.queue->clear();
      const int rows = int(smaller<int64_t>(s.chunk, item.end - row));
      pack_tokens(keys, row, rows, next, scratch.keys);
      pack_values(problem.v, item.batch, item.kv_head, row, rows, next, scratch.values);
      update_state<T, false>(s, pairs, scratch.keys, nullptr, scratch.values, rows, state, scratch.long_sums,
                             scratch.key_slab, scratch.queue);
    }
  }
};

}  // namespace rebased::cpu::REBASED_ISA
