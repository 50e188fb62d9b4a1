// The two sweeps of the backward over the chunks of one item: a segment of a sequence, for one kv head and
// its query heads. It knows no product with a state: Products is BackwardProducts of float.h, or what bf16.h
// and amx.h make of it.
//
// With ghat = r grad_y and delta = ghat . y of a query i, and for keys j <= i
// c_ij = ghat_i . v_j - delta_i and w_ij = c_ij d sim / d u:
//   queries, forwards, with the forward's state S, z:
//     grad q'_i = sum_j w_ij k'_j + (d phi / d q')^T (S ghat_i - delta_i z)
//   keys, backwards, with T = sum of later phi(q') ghat^T and M = -sum of later delta phi(q'):
//     grad k'_j = sum_i w_ij q'_i + (d phi / d k')^T (T v_j + M)
//     grad v_j = sum_i sim(i, j) ghat_i + phi(k'_j) T
// The first sweep has queries as lanes, the second keys. Without a state (quadratic form) every chunk meets
// every other. T carries the query's weights, so as a gradient of S it needs no further factor.
#pragma once

#include "cpu/chunked/float.h"

namespace rebased::cpu::REBASED_ISA {

template <class T, class Products = BackwardProducts<T>>
struct BackwardSweeps : Products {
  using Scratch = typename Products::Scratch;
  using Products::Products, Products::problem, Products::sizes, Products::token_block;

  Scratch scratch(Arena& arena) const { return Scratch(sizes, this->group(), arena); }

  void add_keys_to_state(const Scratch& scratch, int rows, T* state) const {
    this->template add_to_state<false>(scratch, scratch.keys, nullptr, scratch.values, rows, state);
  }
  void add_queries_to_state(const Scratch& scratch, int rows, T* state) const {
    this->template add_to_state<true>(scratch, scratch.queries, scratch.delta, scratch.gradients, rows,
                                      state);
  }

  // The row from which on the worker of the queries takes the keys too, where nothing else keeps a thread
  // busy: a token has three products with a state in the keys' sweep and two in the queries'. The worker of
  // the keys then brings T past these rows, by the same sums in the same order.
  int64_t shared_from(const Item& item) const {
    const int64_t chunks = (item.end - item.begin + sizes.chunk - 1) / sizes.chunk;
    if (!this->share_keys || item.quadratic) return item.end;
    return smaller(item.begin + (chunks * 13 + 15) / 16 * sizes.chunk, item.end);
  }

  // start_state(item, queries, state) brings the state before an item's queries, or after its keys, and
  // returns whether it is zero.
  template <class Start>
  void run(const Item& item, int64_t /*heads*/, const Scratch& scratch, const Start& start_state) const {
    [[maybe_unused]] const typename Products::Registers registers{};
    const int64_t shared = shared_from(item), affine = item.number * 2 * sizes.feature_dim;
    if (item.part == 1) {
      bool state_is_zero = start_state(item, true, scratch.state);
      start_long_sums(item, scratch, scratch.state);
      sweep_queries(item, scratch, state_is_zero);
      if (shared == item.end) return;
      state_is_zero = start_state(item, false, scratch.state);
      start_long_sums(item, scratch, scratch.state);
      return sweep_keys(item, scratch, state_is_zero, shared, item.end, this->shared_key_affine + affine);
    }
    bool state_is_zero = start_state(item, false, scratch.state);
    start_long_sums(item, scratch, scratch.state);
    for (int64_t row = last_chunk(item.begin, item.end); row >= shared; row -= sizes.chunk) {
      scratch.queue->clear();
      add_queries(item, scratch, row, int(smaller<int64_t>(sizes.chunk, item.end - row)), -sizes.chunk,
                  scratch.state);
      state_is_zero = false;
    }
    sweep_keys(item, scratch, state_is_zero, item.begin, shared, this->key_affine + affine);
  }
  void start_long_sums(const Item& item, const Scratch& scratch, const T* state) const {
    if (!item.quadratic) scratch.long_sums->start(sizes, item.end - item.begin, state);
  }
  // Whether the sums for gamma and beta are to begin anew after the chunk that begins at `row`.
  bool ends_fold(int64_t row) const {
    return sizes.has_long_rows && row / sizes.chunk % (kFoldRows / sizes.chunk) == 0;
  }
  int64_t last_chunk(int64_t begin, int64_t end) const {
    return begin + ((end - begin + sizes.chunk - 1) / sizes.chunk - 1) * sizes.chunk;
  }

  // grad q of an item, from its start state S.
  void sweep_queries(const Item& item, const Scratch& scratch, bool state_is_zero) const {
    const BackwardProblem& p = problem;
    const Sizes<T>& s = sizes;
    const int64_t group = this->group();
    const Tokens<T> keys = this->key_tokens(item);
    T* const grad_affine = this->query_affine + item.number * group * 2 * s.feature_dim;
    this->clear(scratch.grad_affine, group * 2 * s.feature_dim * kWidth<T>);
    this->clear(grad_affine, group * 2 * s.feature_dim);
    if (!item.quadratic && !state_is_zero) this->round_state(scratch);
    const Ahead next{scratch.queue, s.chunk};
    for (int64_t row = item.begin; row < item.end; row += s.chunk) {
      scratch.queue->clear();
      const int rows = int(smaller<int64_t>(s.chunk, item.end - row));
      const bool last_chunk = row + rows == item.end;
      if (!item.quadratic) {
        this->pack_tokens(keys, row, rows, next, scratch.keys);
        this->pack_values(p.v, item.batch, item.kv_head, row, rows, next, scratch.values);
      }
      for (int64_t g = 0; g < group; g++) {
        const int64_t head = item.kv_head * group + g;
        const Tokens<T> queries = this->query_tokens(item, head);
        this->pack_tokens(queries, row, rows, next, scratch.queries, scratch.normalized,
                          scratch.inverse_deviation);
        this->pack_gradients(scratch, item.batch, head, row, rows, next);
        this->transpose_values(scratch.gradients, rows, scratch.transposed);
        this->clear(scratch.grad_tokens, s.blocks * token_block());
        for (int b = 0; b * kLanes<T> < rows && !item.quadratic && !state_is_zero; b++)
          this->template gradient_from_state<true>(scratch, b, scratch.delta + b * kLanes<T>,
                                                   scratch.queries + b * token_block(),
                                                   scratch.grad_tokens + b * token_block());
        for (int64_t key = item.quadratic ? item.sequence_begin : row; key <= row; key += s.chunk) {
          const int key_rows = key == row ? rows : s.chunk;
          if (item.quadratic) {
            this->pack_tokens(keys, key, key_rows, Ahead{}, scratch.keys);
            this->pack_values(p.v, item.batch, item.kv_head, key, key_rows, Ahead{}, scratch.values);
          }
          for (int b = 0; b * kLanes<T> < rows; b++) this->meet_keys(scratch, b, key_rows, key == row);
        }
        this->finish_tokens(scratch, queries, row, rows, this->query_target, item.batch, head,
                            scratch.grad_affine + g * 2 * s.feature_dim * kWidth<T>);
      }
      if (ends_fold(row)) this->move_affine(scratch.grad_affine, group, grad_affine);
      if (item.quadratic || last_chunk) continue;
      add_keys_to_state(scratch, rows, scratch.state);
      state_is_zero = false;
    }
    this->move_affine(scratch.grad_affine, group, grad_affine);
  }

  // grad k and grad v of rows [begin, item_end) of an item, from T and M of all that comes after them.
  void sweep_keys(const Item& item, const Scratch& scratch, bool state_is_zero, int64_t begin,
                  int64_t item_end, T* grad_affine) const {
    const BackwardProblem& p = problem;
    const Sizes<T>& s = sizes;
    const int64_t group = this->group();
    const Tokens<T> keys = this->key_tokens(item);
    const bool keep_state = item.first && begin == item.begin && p.grad_initial_state.kv;
    this->clear(scratch.grad_affine, 2 * s.feature_dim * kWidth<T>);
    this->clear(grad_affine, 2 * s.feature_dim);
    if (!item.quadratic && !state_is_zero) this->round_state(scratch);
    for (int64_t row = last_chunk(begin, item_end); row >= begin; row -= s.chunk) {
      scratch.queue->clear();
      const int rows = int(smaller<int64_t>(s.chunk, item_end - row));
      this->pack_tokens(keys, row, rows, Ahead{scratch.queue, -s.chunk}, scratch.keys, scratch.normalized,
                        scratch.inverse_deviation);
      this->pack_values(p.v, item.batch, item.kv_head, row, rows, Ahead{scratch.queue, -s.chunk},
                        scratch.values);
      this->queue_rows(Ahead{scratch.queue, -s.chunk},
                       head_rows<T>(p.grad_v, item.batch, item.kv_head, p.dtype), row, rows,
                       p.grad_v.row_stride, s.head_dim);
      this->transpose_values(scratch.values, rows, scratch.transposed);
      this->clear(scratch.grad_tokens, s.blocks * token_block());
      const bool with_state = !item.quadratic && !state_is_zero;
      if (!with_state) this->clear(scratch.grad_values, int64_t(s.chunk) * s.value_columns);
      for (int b = 0; b * kLanes<T> < rows && with_state; b++) {
        this->template gradient_from_state<false>(scratch, b, nullptr, scratch.keys + b * token_block(),
                                                  scratch.grad_tokens + b * token_block());
        this->values_from_state(scratch, b);
      }
      for (int64_t g = 0; g < group; g++) {
        const int64_t head = item.kv_head * group + g;
        const Tokens<T> queries = this->query_tokens(item, head);
        const Ahead next{scratch.queue, item.quadratic ? s.chunk : -s.chunk};
        const int64_t end = item.quadratic ? item.sequence_end : row + rows;
        for (int64_t query = row; query < end; query += s.chunk) {
          const int query_rows = int(smaller<int64_t>(s.chunk, end - query));
          this->pack_tokens(queries, query, query_rows, next, scratch.queries);
          this->pack_gradients(scratch, item.batch, head, query, query_rows, next);
          for (int b = 0; b * kLanes<T> < rows; b++) this->meet_queries(scratch, b, query_rows, query == row);
        }
        if (!item.quadratic && (row > begin || keep_state))
          add_queries_to_state(scratch, rows, scratch.state);
      }
      state_is_zero = false;
      this->finish_tokens(scratch, keys, row, rows, this->key_target, item.batch, item.kv_head,
                          scratch.grad_affine);
      if (ends_fold(row)) this->move_affine(scratch.grad_affine, 1, grad_affine);
      write_grad_values(scratch, item, row, rows);
    }
    this->move_affine(scratch.grad_affine, 1, grad_affine);
    if (keep_state)
      export_state(s, scratch.state, p.grad_initial_state, item.sequence * p.kv_heads + item.kv_head);
  }

  void write_grad_values(const Scratch& scratch, const Item& item, int64_t row, int rows) const {
    const BackwardProblem& p = problem;
    const char* head = head_rows<T>(p.grad_v, item.batch, item.kv_head, p.dtype);
    with_element<T>(p.dtype, [&](auto element) {
      using E = typename decltype(element)::type;
      E* target = reinterpret_cast<E*>(const_cast<char*>(head));
      for (int b = 0; b * kLanes<T> < rows; b++)
        write_panels<T>(scratch.grad_values + int64_t(b) * kLanes<T> * sizes.value_columns,
                        smaller(rows - b * kLanes<T>, kLanes<T>), sizes.head_dim, kLanes<T>,
                        target + (row + b * kLanes<T>)*p.grad_v.row_stride, p.grad_v.row_stride);
    });
  }

  // The state of an item's rows alone, from zero: S and z of its keys, T and M of its queries.
  void local_key_state(const Item& item, const Scratch& scratch, T* state) const {
    [[maybe_unused]] const typename Products::Registers registers{};
    const Tokens<T> keys = this->key_tokens(item);
    this->clear(state, sizes.state_size);
    start_long_sums(item, scratch, state);
    const Ahead next{scratch.queue, sizes.chunk};
    for (int64_t row = item.begin; row < item.end; row += sizes.chunk) {
      scratch.queue->clear();
      const int rows = int(smaller<int64_t>(sizes.chunk, item.end - row));
      this->pack_tokens(keys, row, rows, next, scratch.keys);
      this->pack_values(problem.v, item.batch, item.kv_head, row, rows, next, scratch.values);
      add_keys_to_state(scratch, rows, state);
    }
  }
  void local_query_state(const Item& item, const Scratch& scratch, T* state) const {
    [[maybe_unused]] const typename Products::Registers registers{};
    this->clear(state, sizes.state_size);
    start_long_sums(item, scratch, state);
    for (int64_t row = item.begin; row < item.end; row += sizes.chunk) {
      scratch.queue->clear();
      add_queries(item, scratch, row, int(smaller<int64_t>(sizes.chunk, item.end - row)), sizes.chunk, state);
    }
  }
  // T and M take in the queries of one chunk. The next chunk lies `ahead` rows on.
  void add_queries(const Item& item, const Scratch& scratch, int64_t row, int rows, int64_t ahead,
                   T* state) const {
    const int64_t group = this->group();
    const Ahead next{scratch.queue, ahead};
    for (int64_t head = item.kv_head * group; head < (item.kv_head + 1) * group; head++) {
      this->pack_tokens(this->query_tokens(item, head), row, rows, next, scratch.queries);
      this->pack_gradients(scratch, item.batch, head, row, rows, next);
      add_queries_to_state(scratch, rows, state);
    }
  }
};

}  // namespace rebased::cpu::REBASED_ISA
