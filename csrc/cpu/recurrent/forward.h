// Forward of one item of the elementwise maps, token by token and a chunk of tokens at a time:
//   S += phi(k) v^T,  z += phi(k),  then  y = phi(q) S / (phi(q) z + eps)
// The division is made in phi(q), so that the recurrence writes y itself. It includes recurrent/common.h
// alone.
#pragma once

#include "cpu/recurrent/common.h"

namespace rebased::cpu::REBASED_ISA {

template <class T>
struct ElementwiseForward : ElementwiseCall<T> {
  using Scratch = ElementwiseScratch<T>;
  using Base = ElementwiseCall<T>;
  using Base::sizes, Base::group, Base::width;
  const ForwardProblem& problem;

  ElementwiseForward(const ForwardProblem& p, int threads, Arena& arena, bool needs_state, int64_t parts)
      : Base(p, threads, arena, needs_state, parts), problem(p) {}
  Scratch scratch(Arena& arena) const { return Scratch(sizes, group(), arena, false, this->all_heads()); }

  void local_state(const Item& item, const Scratch& scratch, T* state) const {
    this->add_keys(item, scratch, state);
  }

  // Makes r of every query of the chunk and multiplies phi(q) by it; z takes in the chunk's keys.
  void divide(const Scratch& scratch, const Item& item, int64_t row, int tokens) const {
    const ForwardProblem& p = problem;
    T* z = scratch.state + sizes.state_kv;
    for (int64_t g = group() - 1; g >= 0; g--) {
      T* queries = this->queries_of(scratch, g);
      for (int e = 0; e < width(); e += kWidth<T>) {
        Vector<T> sum = load(z + e);
        for (int i = 0; i < tokens; i++) {
          sum += load(scratch.keys + i * width() + e);
          const Vector<T> product = load(queries + i * width() + e) * sum;
          T* products = scratch.products + i * kWidth<T>;
          store(products, e ? load(products) + product : product);
        }
        if (g == 0) store(z + e, sum);
      }
      T* r = scratch.factors + g * sizes.chunk;
      sum_tokens<T>(tokens, r, [&](int i) { return load(scratch.products + i * kWidth<T>); });
      for (int i = 0; i < tokens; i += kWidth<T>)
        store(r + i, p.normalize ? 1 / (load(r + i) + T(p.eps)) : broadcast<T>(1));
      for (int i = 0; i < tokens && p.normalize; i++)
        for (int e = 0; e < width(); e += kWidth<T>)
          store(queries + i * width() + e, load(queries + i * width() + e) * r[i]);
      if (sizes.first_column) continue;
      T* target = static_cast<T*>(p.r) + (item.batch * p.heads + item.kv_head * group() + g) * p.seqlen + row;
      __builtin_memcpy(target, r, tokens * sizeof(T));
    }
  }

  void run_chunk(const Item& item, const Scratch& scratch, int64_t row) const {
    const ForwardProblem& p = problem;
    const int tokens = int(smaller<int64_t>(sizes.chunk, item.end - row));
    this->pack_keys(scratch, item, row, tokens, sizes.chunk);
    for (int64_t g = 0; g < group(); g++) this->pack_queries(scratch, item, g, row, tokens, sizes.chunk);
    divide(scratch, item, row, tokens);
    Recurrence<T> s{};
    s.tokens = tokens, s.rows = width(), s.lanes = sizes.value_columns, s.state = scratch.state;
    s.updates = 1, s.queries = int(group());
    s.update_rows = this->template packed<const T*>(scratch.keys, width());
    s.update_lanes =
        this->value_rows(p.v, item.batch, item.kv_head, 1, row, tokens, scratch.values, sizes.chunk);
    s.query_rows = this->template packed<const T*>(scratch.queries, width());
    s.sums = this->value_sums(p.y, item.batch, item.kv_head * group(), row, scratch.outputs, sizes.chunk);
    recur(s);
    LongSums<T>& sums = *scratch.long_sums[0];
    if (sums.active) {
      add_updates(s, sums.recent);
      this->add_keys_apart(scratch, tokens, sums.recent + sizes.state_kv);
      if (sums.add(tokens)) sums.copy(0, sizes.state_size, scratch.state);
    }
    this->write_values(p.y, item.batch, item.kv_head * group(), group(), row, tokens, scratch.outputs, 0,
                       sizes.value_columns, sizes.chunk);
  }

  // Runs `count` heads from that of `first` on. start_state(item, state) brings the state before an item.
  template <class Start>
  void run(const Item& first, int64_t count, const Scratch& scratch, const Start& start_state) const {
    this->for_heads(first, count, scratch, [&](const Item& item, const Scratch& own) {
      start_state(item, own.state);
      own.long_sums[0]->start(sizes, item.end - item.begin, own.state);
      this->pad_affine(own, item);
    });
    for (int64_t row = first.begin; row < first.end; row += sizes.chunk)
      this->for_heads(first, count, scratch,
                      [&](const Item& item, const Scratch& own) { run_chunk(item, own, row); });
    const MutableState& target = problem.final_state;
    if (!first.last || !target.kv) return;
    this->for_heads(first, count, scratch, [&](const Item& item, const Scratch& own) {
      export_state(sizes, own.state, target, item.sequence * problem.kv_heads + item.kv_head);
    });
  }
};

}  // namespace rebased::cpu::REBASED_ISA
