// What a forward of `outer` and `taylor` needs beside its products: a worker's scratch, and the way of y and
// r from there to the tensors. The products are made in float.h, bf16.h and amx.h, the walk over the chunks
// in forward_sweep.h. It includes call.h alone.
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

// How a block of queries meets a chunk of keys.
template <class T>
struct Meeting {
  int key_rows;
  bool quadratic;
  bool diagonal;     // the chunk of keys is the queries' own: later keys are masked
  bool first, last;  // whether this chunk of keys starts the queries' sums, and whether it ends them
  const T* state;    // null: none
  T* y;              // where the block's rows go in the end; null: to the sums, which write_block takes on
};

template <class T>
struct ForwardCall : Call<T> {
  using Call<T>::sizes, Call<T>::token_block;
  const ForwardProblem& problem;

  ForwardCall(const ForwardProblem& p, int threads, Arena& arena, bool needs_state, int64_t parts)
      : Call<T>(p, threads, arena, needs_state, parts), problem(p) {}

  // r of queries from their denominators.
  REBASED_INLINE Vector<T> inverse(Vector<T> denominators) const {
    return problem.normalize ? 1 / (denominators + T(problem.eps)) : broadcast<T>(1);
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
                   int rows, bool y_is_there) const {
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
};

}  // namespace rebased::cpu::REBASED_ISA
