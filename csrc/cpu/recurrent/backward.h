// Backward of one item of the elementwise maps, each gradient by a recurrence of its own. Letters are those
// of csrc/README.md; all sums include the token itself:
//   queries, forwards, lanes are features:        S += v phi(k)^T
//                                                 grad phi(q) = r (grad_y S - (grad_y . y) z)
//   keys, backwards, lanes are features:          T += grad_y (r phi(q))^T,  M -= (grad_y . y) r phi(q)
//                                                 grad phi(k) = v T + M
//   values, backwards, lanes are value columns:   T as above,  grad v = phi(k) T
// ghat = r grad_y itself is made nowhere: r goes into phi(q). It includes recurrent/common.h alone.
#pragma once

#include "cpu/recurrent/common.h"

namespace rebased::cpu::REBASED_ISA {

template <class T>
struct ElementwiseBackward : ElementwiseCall<T>, GradientTargets<T> {
  using Scratch = ElementwiseScratch<T>;
  using Base = ElementwiseCall<T>;
  using Base::sizes, Base::group, Base::width;
  const BackwardProblem& problem;
  int shared_columns = 0;  // columns of grad_v that the worker of the queries makes, where it shares work

  ElementwiseBackward(const BackwardProblem& p, int threads, Arena& arena, bool needs_state, int64_t parts)
      : Base(p, threads, arena, needs_state, parts), GradientTargets<T>(p, arena), problem(p) {
    // the keys' sweep is twice as long as the queries': where nothing else keeps a thread busy they share
    this->share_keys = arena.base && p.part == BackwardPart::all && this->schedule.items() <= threads &&
                       !p.grad_initial_state.kv;
    if (this->share_keys) shared_columns = sizes.value_columns / 2 / kLanes<T> * kLanes<T>;
  }
  Scratch scratch(Arena& arena) const { return Scratch(sizes, group(), arena, true, this->all_heads()); }

  // `ahead`, here and below: how many rows on the sweep goes on.
  Stream<const T*> gradient_rows(const Scratch& scratch, const Item& item, int64_t row, int tokens,
                                 int64_t ahead) const {
    return this->value_rows(problem.grad_y, item.batch, item.kv_head * group(), group(), row, tokens,
                            scratch.rows, ahead);
  }
  Stream<const T*> values(const Scratch& scratch, const Item& item, int64_t row, int tokens,
                          int64_t ahead) const {
    return this->value_rows(problem.v, item.batch, item.kv_head, 1, row, tokens, scratch.values, ahead);
  }
  const T* r_of(const Item& item, int64_t g, int64_t row) const {
    return static_cast<const T*>(problem.r) +
           (item.batch * problem.heads + item.kv_head * group() + g) * problem.seqlen + row;
  }

  // factors: -grad_y . y of each query, 0 where the op does not normalise.
  void dot_outputs(const Scratch& scratch, const Item& item, int64_t row, int tokens,
                   const Stream<const T*>& gradients, int64_t ahead) const {
    if (!problem.normalize) return this->clear(scratch.factors, group() * sizes.chunk);
    const Stream<const T*> y = this->value_rows(problem.y, item.batch, item.kv_head * group(), group(), row,
                                                tokens, scratch.outputs, ahead);
    for (int64_t g = 0; g < group(); g++)
      sum_tokens<T>(tokens, scratch.factors + g * sizes.chunk, [&](int i) {
        const T* a = gradients.data + g * gradients.head_stride + i * gradients.token_stride;
        const T* b = y.data + g * y.head_stride + i * y.token_stride;
        Vector<T> sum{};
        for (int n = 0; n < sizes.value_columns; n += kWidth<T>) {
          __builtin_prefetch(b + y.ahead + n, 0, 2);
          sum -= load(a + n) * load(b + n);
        }
        return sum;
      });
  }

  // r phi(q) of the group's queries.
  void pack_weighted_queries(const Scratch& scratch, const Item& item, int64_t row, int tokens,
                             int64_t ahead) const {
    for (int64_t g = 0; g < group(); g++) {
      this->pack_queries(scratch, item, g, row, tokens, ahead);
      const T* r = r_of(item, g, row);
      T* queries = this->queries_of(scratch, g);
      for (int i = 0; i < tokens; i++)
        for (int e = 0; e < width(); e += kWidth<T>)
          store(queries + i * width() + e, load(queries + i * width() + e) * r[i]);
    }
  }
  // M takes in the chunk's queries, from the last one on; after: [token][width] is M after each token.
  void sum_denominators(const Scratch& scratch, int tokens, T* m, T* after) const {
    for (int e = 0; e < width(); e += kWidth<T>) {
      Vector<T> sum = load(m + e);
      for (int i = tokens - 1; i >= 0; i--) {
        for (int64_t g = 0; g < group(); g++)
          sum += load(this->queries_of(scratch, g) + i * width() + e) * scratch.factors[g * sizes.chunk + i];
        store(after + i * width() + e, sum);
      }
      store(m + e, sum);
    }
  }

  // Makes the gradient of q or k of that of phi in grad_tokens, and writes it out.
  void finish(const Scratch& scratch, const TokenRows<T>& rows, int64_t place, const T* token_factor,
              const MutableRows& target, int64_t batch, int64_t head, int64_t row, int tokens) const {
    const bool query = place < group();
    const auto write_out = [&](auto element) {
      using E = typename decltype(element)::type;
      E* data = static_cast<E*>(target.data) + batch * target.batch_stride + head * target.head_stride +
                row * target.row_stride;
      const int64_t own = query ? place : 0;
      token_rows_backward(rows, tokens, token_factor, scratch.grad_tokens + own * sizes.chunk * width(),
                          scratch.normalized, scratch.sums, data, target.row_stride,
                          scratch.grad_affine + own * 2 * width());
    };
    if (this->accumulator_target)
      write_out(ElementType<T>{});
    else
      with_element<T>(problem.dtype, write_out);
  }
  // The sums for gamma and beta join rows of [2][feature_dim], and begin anew.
  void move_affine(const Scratch& scratch, int64_t heads, T* target) const {
    for (int64_t i = 0; i < heads * 2; i++)
      for (int e = 0; e < sizes.feature_dim; e++)
        target[i * sizes.feature_dim + e] += scratch.grad_affine[i * width() + e];
    this->clear(scratch.grad_affine, heads * 2 * width());
  }
  T* query_affine_of(const Item& item) const {
    return this->query_affine + item.number * group() * 2 * sizes.feature_dim;
  }
  T* key_affine_of(const Item& item) const { return this->key_affine + item.number * 2 * sizes.feature_dim; }

  // Brings S or T to `turned`, and z or M to `state`, as the sums of a long item have them.
  void take_sums(const Scratch& scratch) const {
    const LongSums<T>& sums = *scratch.long_sums[0];
    sums.copy(0, sizes.state_kv, scratch.turned);
    sums.copy(sizes.state_kv, sizes.feature_pad, scratch.state + sizes.state_kv);
  }

  // The state that a sweep begins with, the other way round.
  void start_turned(const Scratch& scratch, bool zero) const {
    if (zero)
      return this->clear(scratch.turned, sizes.state_kv);  // of few tokens, turning it is most of the work
    turn_state(scratch.state, width(), sizes.value_columns, scratch.turned);
  }

  // grad q of a chunk. scratch.turned holds S before it, and scratch.state z.
  void query_chunk(const Item& item, const Scratch& scratch, int64_t row) const {
    T* z = scratch.state + sizes.state_kv;
    const int tokens = int(smaller<int64_t>(sizes.chunk, item.end - row));
    this->pack_keys(scratch, item, row, tokens, sizes.chunk);
    const Stream<const T*> gradients = gradient_rows(scratch, item, row, tokens, sizes.chunk);
    dot_outputs(scratch, item, row, tokens, gradients, sizes.chunk);
    for (int64_t g = group() - 1; g >= 0; g--)
      for (int e = 0; e < width(); e += kWidth<T>) {
        Vector<T> sum = load(z + e);
        for (int i = 0; i < tokens; i++) {
          sum += load(scratch.keys + i * width() + e);
          store(scratch.grad_tokens + (g * sizes.chunk + i) * width() + e,
                sum * scratch.factors[g * sizes.chunk + i]);
        }
        if (g == 0) store(z + e, sum);
      }
    Recurrence<T> s{};
    s.tokens = tokens, s.rows = sizes.value_columns, s.lanes = width(), s.state = scratch.turned;
    s.updates = 1, s.queries = int(group()), s.accumulate = true;
    s.update_rows = values(scratch, item, row, tokens, sizes.chunk);
    s.update_lanes = this->template packed<const T*>(scratch.keys, width());
    s.query_rows = gradients;
    s.sums = this->packed(scratch.grad_tokens, width());
    recur(s);
    LongSums<T>& sums = *scratch.long_sums[0];
    if (sums.active) {
      add_updates(s, sums.recent);
      this->add_keys_apart(scratch, tokens, sums.recent + sizes.state_kv);
    }
    for (int64_t g = 0; g < group(); g++)
      finish(scratch, this->token_rows(scratch, item, g, row, tokens, sizes.chunk), g, r_of(item, g, row),
             this->query_target, item.batch, item.kv_head * group() + g, row, tokens);
    if (sums.active && sums.add(tokens)) {
      take_sums(scratch);
      move_affine(scratch, group(), query_affine_of(item));
    }
  }

  // grad v of columns [begin, end) of a chunk and, with_keys, grad k. scratch.state holds T and M after the
  // chunk; with_keys, scratch.turned holds T too.
  void key_chunk(const Item& item, const Scratch& scratch, int64_t row, bool with_keys, int begin,
                 int end) const {
    const BackwardProblem& p = problem;
    const int tokens = int(smaller<int64_t>(sizes.chunk, item.end - row));
    const TokenRows<T> keys = this->pack_keys(scratch, item, row, tokens, -sizes.chunk);
    pack_weighted_queries(scratch, item, row, tokens, -sizes.chunk);
    const auto back = [&](const auto& stream) { return this->reversed(stream, tokens); };
    const Stream<const T*> gradients = gradient_rows(scratch, item, row, tokens, -sizes.chunk);
    const Stream<const T*> queries = back(this->template packed<const T*>(scratch.queries, width()));
    LongSums<T>& sums = *scratch.long_sums[0];
    Recurrence<T> t{};
    t.tokens = tokens, t.updates = int(group()), t.queries = 1;
    if (with_keys) {
      dot_outputs(scratch, item, row, tokens, gradients, -sizes.chunk);
      if (sums.active) sum_denominators(scratch, tokens, sums.recent + sizes.state_kv, scratch.grad_tokens);
      sum_denominators(scratch, tokens, scratch.state + sizes.state_kv, scratch.grad_tokens);
      t.rows = sizes.value_columns, t.lanes = width(), t.state = scratch.turned, t.accumulate = true;
      t.update_rows = back(gradients), t.update_lanes = queries;
      t.query_rows = back(values(scratch, item, row, tokens, -sizes.chunk));
      t.sums = back(this->packed(scratch.grad_tokens, width()));
      recur(t);
      if (sums.active) add_updates(t, sums.recent);
      finish(scratch, keys, group(), nullptr, this->key_target, item.batch, item.kv_head, row, tokens);
    }
    t.rows = width(), t.lanes = end - begin, t.accumulate = false;
    t.state = scratch.state + int64_t(begin) * width();
    t.update_rows = queries, t.update_lanes = back(gradients).from(begin);
    t.query_rows = back(this->template packed<const T*>(scratch.keys, width()));
    t.sums = back(this->value_sums(p.grad_v, item.batch, item.kv_head, row, scratch.outputs, -sizes.chunk))
                 .from(begin);
    recur(t);
    if (sums.active && !with_keys) add_updates(t, sums.recent + int64_t(begin) * width());
    if (sums.active && sums.add(tokens)) {
      if (with_keys) {
        take_sums(scratch);
        turn_state(scratch.turned, sizes.value_columns, width(), scratch.state);
        move_affine(scratch, 1, key_affine_of(item));
      } else {
        sums.copy(0, sizes.state_kv, scratch.state);
      }
    }
    this->write_values(p.grad_v, item.batch, item.kv_head, 1, row, tokens, scratch.outputs, begin, end,
                       -sizes.chunk);
  }

  // grad q of `count` heads from that of `first` on. start_state(item, queries, state) brings the state
  // before an item's queries, or after its keys.
  template <class Start>
  void sweep_queries(const Item& first, int64_t count, const Scratch& scratch,
                     const Start& start_state) const {
    this->for_heads(first, count, scratch, [&](const Item& item, const Scratch& own) {
      const bool zero = start_state(item, true, own.state);
      this->pad_affine(own, item);
      this->clear(own.grad_affine, group() * 2 * width());
      this->clear(query_affine_of(item), group() * 2 * sizes.feature_dim);
      start_turned(own, zero);
      own.long_sums[0]->start(sizes, item.end - item.begin, own.turned, own.state + sizes.state_kv);
    });
    for (int64_t row = first.begin; row < first.end; row += sizes.chunk)
      this->for_heads(first, count, scratch,
                      [&](const Item& item, const Scratch& own) { query_chunk(item, own, row); });
    this->for_heads(first, count, scratch, [&](const Item& item, const Scratch& own) {
      move_affine(own, group(), query_affine_of(item));
    });
  }
  // grad v of columns [begin, end) and, with_keys, grad k.
  template <class Start>
  void sweep_keys(const Item& first, int64_t count, const Scratch& scratch, const Start& start_state,
                  bool with_keys, int begin, int end) const {
    this->for_heads(first, count, scratch, [&](const Item& item, const Scratch& own) {
      const bool zero = start_state(item, false, own.state);
      this->pad_affine(own, item);
      this->clear(own.grad_affine, 2 * width());
      LongSums<T>& sums = *own.long_sums[0];
      if (!with_keys) return sums.start(sizes, item.end - item.begin, own.state);
      this->clear(key_affine_of(item), 2 * sizes.feature_dim);
      start_turned(own, zero);
      sums.start(sizes, item.end - item.begin, own.turned, own.state + sizes.state_kv);
    });
    const int64_t chunks = (first.end - first.begin + sizes.chunk - 1) / sizes.chunk;
    for (int64_t row = first.begin + (chunks - 1) * sizes.chunk; row >= first.begin; row -= sizes.chunk)
      this->for_heads(first, count, scratch, [&](const Item& item, const Scratch& own) {
        key_chunk(item, own, row, with_keys, begin, end);
      });
    if (!with_keys) return;
    const MutableState& initial = problem.grad_initial_state;
    this->for_heads(first, count, scratch, [&](const Item& item, const Scratch& own) {
      move_affine(own, 1, key_affine_of(item));
      if (item.first && initial.kv)
        export_state(sizes, own.state, initial, item.sequence * problem.kv_heads + item.kv_head);
    });
  }

  template <class Start>
  void run(const Item& first, int64_t count, const Scratch& scratch, const Start& start_state) const {
    if (first.part == 0)
      return sweep_keys(first, count, scratch, start_state, true, shared_columns, sizes.value_columns);
    sweep_queries(first, count, scratch, start_state);
    if (shared_columns) sweep_keys(first, count, scratch, start_state, false, 0, shared_columns);
  }

  void local_key_state(const Item& item, const Scratch& scratch, T* state) const {
    this->add_keys(item, scratch, state);
  }
  // T and M that an item's queries leave behind, from zero.
  void local_query_state(const Item& item, const Scratch& scratch, T* state) const {
    this->sum_segment(item, scratch, state, [&](int64_t row, int tokens, T* target) {
      pack_weighted_queries(scratch, item, row, tokens, sizes.chunk);
      const Stream<const T*> gradients = gradient_rows(scratch, item, row, tokens, sizes.chunk);
      dot_outputs(scratch, item, row, tokens, gradients, sizes.chunk);
      sum_denominators(scratch, tokens, target + sizes.state_kv, scratch.grad_tokens);
      Recurrence<T> t{};
      t.tokens = tokens, t.rows = width(), t.lanes = sizes.value_columns, t.state = target;
      t.updates = int(group());
      t.update_rows = this->template packed<const T*>(scratch.queries, width());
      t.update_lanes = gradients;
      recur(t);
    });
  }
};

}  // namespace rebased::cpu::REBASED_ISA
