// What a backward of `outer` and `taylor` needs beside its products with a state: a worker's scratch, the
// products within a chunk, which are made in T whatever the others are made of, and the way of the gradients
// out. The products with a state are made in float.h, bf16.h and amx.h, the walks over the chunks in
// backward_sweeps.h, which has the formulas. It includes call.h alone.
//
// Letters are those of csrc/README.md, and w_ij = c_ij d sim / d u.
#pragma once

#include "cpu/call.h"

namespace rebased::cpu::REBASED_ISA {

template <class T>
struct BackwardScratch {
  T *keys, *queries;                  // tokens of a chunk
  T *normalized, *inverse_deviation;  // of the tokens whose gradient is made
  T *values, *gradients;              // values of a chunk: v, ghat
  T* delta;                           // [chunk]: -delta
  T* transposed;                      // [block][value_columns][kLanes]: ghat or v of the tokens in lanes
  T *scores, *weights;                // [token of the other side][kLanes]: sim and w
  T* slab;                            // [feature of the slab][kLanes]
  T* row_slab;                        // [block][kRows][kLanes]
  T* grad_tokens;                     // tokens: grad q' or grad k'
  T* grad_values;                     // [block]: values of kLanes rows
  T* grad_affine;                     // [query head of the group][2][feature_dim][kWidth]
  T* state;
  LongSums<T>* long_sums;  // of the state
  PrefetchQueue* queue;

  BackwardScratch(const Sizes<T>& s, int64_t group, Arena& arena) {
    const int64_t tokens = int64_t(s.blocks) * s.feature_rows * kLanes<T>;
    const int64_t columns = int64_t(s.chunk) * s.value_columns;
    keys = arena.take<T>(tokens), queries = arena.take<T>(tokens);
    normalized = arena.take<T>(tokens), inverse_deviation = arena.take<T>(s.chunk);
    values = arena.take<T>(columns), gradients = arena.take<T>(columns);
    delta = arena.take<T>(s.chunk);
    transposed = arena.take<T>(columns);
    scores = arena.take<T>(int64_t(s.chunk) * kLanes<T>),
    weights = arena.take<T>(int64_t(s.chunk) * kLanes<T>);
    slab = arena.take<T>(int64_t(s.slab) * kLanes<T>);
    row_slab = arena.take<T>(int64_t(s.blocks) * kRows * kLanes<T>);
    grad_tokens = arena.take<T>(tokens);
    grad_values = arena.take<T>(columns);
    grad_affine = arena.take<T>(group * 2 * s.feature_dim * kWidth<T>);
    state = arena.take<T>(s.state_size);
    long_sums = LongSums<T>::make(s, arena);
    queue = arena.take<PrefetchQueue>(1);
  }
};

template <class T>
struct BackwardCall : Call<T>, GradientTargets<T> {
  using Call<T>::sizes, Call<T>::token_block;
  const BackwardProblem& problem;

  BackwardCall(const BackwardProblem& p, int threads, Arena& arena, bool needs_state, int64_t parts)
      : Call<T>(p, threads, arena, needs_state, parts), GradientTargets<T>(p, arena), problem(p) {
    this->share_keys = arena.base && p.part == BackwardPart::all && this->schedule.items() <= threads;
  }

  // Packs ghat and -delta of a chunk of queries.
  void pack_gradients(const BackwardScratch<T>& scratch, int64_t batch, int64_t head, int64_t row, int rows,
                      const Ahead& ahead) const {
    const BackwardProblem& p = problem;
    const T* r = static_cast<const T*>(p.r) + (batch * p.heads + head) * p.seqlen + row;
    this->pack_values(p.grad_y, batch, head, row, rows, ahead, scratch.gradients);
    const char* y_head = head_rows<T>(p.y, batch, head, p.dtype);
    if (p.normalize) this->queue_rows(ahead, y_head, row, rows, p.y.row_stride, sizes.head_dim);
    for (int i = 0; i < sizes.chunk; i++) scratch.delta[i] = 0;
    with_element<T>(p.dtype, [&](auto element) {
      using E = typename decltype(element)::type;
      sum_tokens<T>(rows, scratch.delta, [&](int i) {
        const E* y = reinterpret_cast<const E*>(y_head) + (row + i) * p.y.row_stride;
        Vector<T> sum{};
        for_panels<T>(sizes.value_columns, [&](auto vectors, int column) {
          constexpr int columns = decltype(vectors)::value * kWidth<T>;
          T* gradient = scratch.gradients + int64_t(column) * sizes.chunk + i * columns;
          for (int n = 0; n < columns; n += kWidth<T>) {
            const Vector<T> scaled = load(gradient + n) * r[i];
            store(gradient + n, scaled);
            if (p.normalize) sum -= scaled * read<T>(y + column + n, sizes.head_dim - column - n);
          }
        });
        return sum;
      });
    });
  }

  // target: [block][value_columns][kLanes] takes the values of a chunk.
  void transpose_values(const T* values, int rows, T* target) const {
    for (int b = 0; b * kLanes<T> < rows; b++)
      for_panels<T>(sizes.value_columns, [&](auto vectors, int column) {
        constexpr int columns = decltype(vectors)::value * kWidth<T>;
        read_transposed<T>(values + int64_t(column) * sizes.chunk + b * kLanes<T> * columns, columns,
                           smaller(rows - b * kLanes<T>, kLanes<T>), columns,
                           target + (int64_t(b) * sizes.value_columns + column) * kLanes<T>);
      });
  }

  // tile[r][:] += row r of values (from `row`) . columns of a transposed block
  template <int NV>
  REBASED_INLINE void dot_values(Tile<T, NV>& tile, const T* values, int row, const T* transposed) const {
    for_panels<T>(sizes.value_columns, [&](auto vectors, int column) {
      constexpr int columns = decltype(vectors)::value * kWidth<T>;
      tile.template multiply_rows<columns, kLanes<T>>(
          columns, values + int64_t(column) * sizes.chunk + row * columns, transposed + column * kLanes<T>);
    });
  }

  // gradient += tokens [begin, end) of a chunk, each times its row of weights
  void add_weighted_tokens(const T* tokens, const T* weights, int begin, int end, T* gradient) const {
    for (int e = 0; e < sizes.feature_dim; e += kRows) {
      Tile<T, kVectors> tile;
      tile.load_rows(gradient + e * kLanes<T>, kLanes<T>);
      for (int i = begin; i < end; i += kLanes<T>)
        tile.template multiply_rows<kLanes<T>>(smaller(end - i, kLanes<T>),
                                               tokens + i / kLanes<T> * token_block() + e * kLanes<T>,
                                               weights + i * kLanes<T>);
      tile.store_rows(gradient + e * kLanes<T>, kLanes<T>);
    }
  }

  // Block b of queries (lanes) meets a chunk of keys: adds to grad q'.
  void meet_keys(const BackwardScratch<T>& scratch, int b, int key_rows, bool diagonal) const {
    for_seen_keys<T>(b, key_rows, diagonal, [&](auto vectors, auto masked, int j) REBASED_INLINE_LAMBDA {
      constexpr int NV = decltype(vectors)::value;
      scratch.queue->advance();
      if (NV < kVectors) clear_vector(scratch.weights + j * kLanes<T>);
      weigh_keys<NV, decltype(masked)::value>(scratch, b, j, (kVectors - NV) * kWidth<T>);
    });
    const int end = diagonal ? smaller(key_rows, (b + 1) * kLanes<T>) : key_rows;
    add_weighted_tokens(scratch.keys, scratch.weights, 0, end, scratch.grad_tokens + b * token_block());
  }
  // Clears one of a tile's two vectors, which the diagonal leaves out.
  static void clear_vector(T* rows) {
    for (int r = 0; r < kRows; r++) store(rows + r * kLanes<T>, Vector<T>{});
  }

  // w of the tile of keys from j on and of NV vectors of block b's queries from `lane` on.
  template <int NV, bool Masked>
  REBASED_INLINE void weigh_keys(const BackwardScratch<T>& scratch, int b, int j, int lane) const {
    const Sizes<T>& s = sizes;
    const T a1 = s.a1, twice_a2 = 2 * s.a2;
    T* weights = scratch.weights + j * kLanes<T> + lane;
    Tile<T, NV> u;
    u.zero();
    u.template multiply_transposed<kLanes<T>, kLanes<T>>(
        s.feature_dim, scratch.keys + j / kLanes<T> * token_block() + j % kLanes<T>,
        scratch.queries + b * token_block() + lane);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) {
        const int first = j - b * kLanes<T> + r - lane - n * kWidth<T>;
        Vector<T> slope = a1 + twice_a2 * u.sum[r][n];
        if (Masked) slope = lane_numbers<T>() >= typename Simd<T>::Int(first) ? slope : Vector<T>{};
        store(weights + r * kLanes<T> + n * kWidth<T>, slope);
      }
    Tile<T, NV> c;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) c.sum[r][n] = load(scratch.delta + b * kLanes<T> + lane + n * kWidth<T>);
    dot_values(c, scratch.values, j, scratch.transposed + int64_t(b) * s.value_columns * kLanes<T> + lane);
    multiply_weights(c, weights);
  }

  // Multiplies the weights by c: d sim / d u stands there already, and 0 for unseen tokens.
  template <int NV>
  REBASED_INLINE void multiply_weights(const Tile<T, NV>& c, T* weights) const {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) {
        T* target = weights + r * kLanes<T> + n * kWidth<T>;
        store(target, c.sum[r][n] * load(target));
      }
  }

  // Block b of keys (lanes) meets a chunk of queries: adds to grad k' and grad v.
  void meet_queries(const BackwardScratch<T>& scratch, int b, int query_rows, bool diagonal) const {
    const Sizes<T>& s = sizes;
    const int begin = diagonal ? b * kLanes<T> : 0;
    for (int i = begin; i < query_rows; i += kRows) {
      scratch.queue->advance();
      const int first = i - b * kLanes<T>;  // query of the tile's first row, counted from lane 0's own
      if (!diagonal || first >= kLanes<T>) {
        weigh_queries<kVectors, false>(scratch, b, i);
      } else if (first + kRows > kWidth<T>) {
        weigh_queries<kVectors, true>(scratch, b, i);
      } else {  // of two vectors of keys these queries see the first
        const int unseen = i * kLanes<T> + kWidth<T>;
        clear_vector(scratch.weights + unseen), clear_vector(scratch.scores + unseen);
        weigh_queries<1, true>(scratch, b, i);
      }
    }
    add_weighted_tokens(scratch.queries, scratch.weights, begin, query_rows,
                        scratch.grad_tokens + b * token_block());
    for_panels<T>(s.value_columns, [&](auto vectors, int column) {
      constexpr int NV = decltype(vectors)::value, columns = NV * kWidth<T>;
      const T* gradients = scratch.gradients + int64_t(column) * s.chunk;
      for (int j = 0; j < kLanes<T>; j += kRows) {
        scratch.queue->advance();
        const int first = diagonal ? begin + j : 0;
        T* target =
            scratch.grad_values + int64_t(b) * kLanes<T> * s.value_columns + column * kLanes<T> + j * columns;
        Tile<T, NV> tile;
        tile.load_rows(target, columns);
        tile.template multiply_transposed<kLanes<T>>(
            query_rows - first, scratch.scores + first * kLanes<T> + j, gradients + first * columns);
        tile.store_rows(target, columns);
      }
    });
  }

  // sim and w of the tile of queries from i on and of the first NV vectors of block b's keys.
  template <int NV, bool Masked>
  REBASED_INLINE void weigh_queries(const BackwardScratch<T>& scratch, int b, int i) const {
    const Sizes<T>& s = sizes;
    const T a0 = s.a0, a1 = s.a1, a2 = s.a2;
    T *scores = scratch.scores + i * kLanes<T>, *weights = scratch.weights + i * kLanes<T>;
    Tile<T, NV> u;
    u.zero();
    u.template multiply_transposed<kLanes<T>, kLanes<T>>(
        s.feature_dim, scratch.queries + i / kLanes<T> * token_block() + i % kLanes<T>,
        scratch.keys + b * token_block());
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) {
        const auto seen = lane_numbers<T>() <= typename Simd<T>::Int(i - b * kLanes<T> + r - n * kWidth<T>);
        const Vector<T> dot = u.sum[r][n];
        Vector<T> sim = a0 + dot * (a1 + a2 * dot), slope = a1 + 2 * a2 * dot;
        if (Masked) sim = seen ? sim : Vector<T>{}, slope = seen ? slope : Vector<T>{};
        store(scores + r * kLanes<T> + n * kWidth<T>, sim);
        store(weights + r * kLanes<T> + n * kWidth<T>, slope);
      }
    Tile<T, NV> c;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) c.sum[r][n] = broadcast<T>(scratch.delta[i + r]);
    dot_values(c, scratch.gradients, i, scratch.transposed + int64_t(b) * s.value_columns * kLanes<T>);
    multiply_weights(c, weights);
  }

  // Makes the gradient of q or k of that of q' or k' of a chunk, and writes it out.
  void finish_tokens(const BackwardScratch<T>& scratch, const Tokens<T>& t, int64_t row, int rows,
                     const MutableRows& target, int64_t batch, int64_t head, T* grad_affine) const {
    const auto finish = [&](auto element) {
      using E = typename decltype(element)::type;
      const int64_t offset =
          batch * target.batch_stride + head * target.head_stride + row * target.row_stride;
      for (int b = 0; b * kLanes<T> < rows; b++) {
        T* gradient = scratch.grad_tokens + b * token_block();
        layer_norm_backward(t, smaller(rows - b * kLanes<T>, kLanes<T>), gradient,
                            scratch.normalized + b * token_block(), scratch.inverse_deviation + b * kLanes<T>,
                            static_cast<E*>(target.data) + offset + b * kLanes<T> * target.row_stride,
                            target.row_stride, grad_affine);
      }
    };
    if (this->accumulator_target)
      finish(ElementType<T>{});
    else
      with_element<T>(problem.dtype, finish);
  }

  // The lane sums for gamma and beta join rows of [2][feature_dim], and begin anew.
  void move_affine(T* lanes, int64_t heads, T* target) const {
    for (int64_t i = 0; i < heads * 2 * sizes.feature_dim; i++)
      target[i] += horizontal_sum<T>(load(lanes + i * kWidth<T>));
    this->clear(lanes, heads * 2 * sizes.feature_dim * kWidth<T>);
  }
};

}  // namespace rebased::cpu::REBASED_ISA
