// What every family of kernels knows of a call: the problem with its plan, which sequence, kv head and
// segment a block works on, where rows begin, and what a state is outside the kernels.
#pragma once

#include <type_traits>

#include "cuda/plan/plan.h"
#include "cuda/shared/features.cuh"
#include "cuda/shared/row_norm.cuh"
#include "op/problem.h"

namespace rebased::REBASED_BACKEND {

template <class E>
using Accumulator = std::conditional_t<std::is_same_v<E, double>, double, float>;

// A call as its kernels get it: the problem, its plan, and the plan's workspace.
template <class AnyProblem>
struct Call {
  AnyProblem problem;
  GeneralTiles tiles;
  int segments;
  // No states: every chunk looks at all others of its sequence that are in reach.
  bool quadratic;
  int carry_rows_log2;
  int64_t carry_size;
  Workspace workspace;

  // Null where the plan has no such region. Offsets of what is kept are made to count from the workspace too.
  template <class T>
  HOST_DEVICE T* region(const Region& region) const {
    return region.bytes ? reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(problem.workspace) +
                                               static_cast<uintptr_t>(region.offset))
                        : nullptr;
  }
};
template <class AnyProblem>
Call<AnyProblem> make_call(const AnyProblem& problem, const Plan& plan) {
  Call<AnyProblem> call{
      problem,         plan.tiles,    plan.segments, plan.path == Path::quadratic, plan.carry_rows_log2,
      plan.carry_size, plan.workspace};
  // so that kernels need not know which memory a region lies in
  const auto apart =
      reinterpret_cast<uintptr_t>(problem.kept) - reinterpret_cast<uintptr_t>(problem.workspace);
  for (Region* region :
       {&call.workspace.query_statistics, &call.workspace.key_statistics, &call.workspace.states}) {
    if (region->kept) region->offset += static_cast<int64_t>(apart);
  }
  return call;
}

DEVICE int64_t group_size(const Problem& problem) { return problem.heads / problem.kv_heads; }

template <class E, class Pointer>
DEVICE auto head_rows(const RowsOf<Pointer>& rows, int64_t batch, int64_t head, int64_t row) {
  using Element = std::conditional_t<std::is_same_v<Pointer, const void*>, const E, E>;
  return static_cast<Element*>(rows.data) + batch * rows.batch_stride + head * rows.head_stride +
         row * rows.row_stride;
}

// blockIdx.x counts segments fastest, then kv heads, then sequences.
struct Block {
  int64_t sequence, kv_head, batch;
  int64_t first_row, rows;  // of the sequence
  int segment, segments;
  int64_t chunks;                  // of the sequence
  int64_t chunk_begin, chunk_end;  // of the segment; every segment but the last ones has equally many
  int chunk_length;
  int64_t index;  // of this block

  template <class AnyProblem>
  DEVICE explicit Block(const Call<AnyProblem>& call)
      : segments(call.segments), chunk_length(call.tiles.chunk), index(blockIdx.x) {
    segment = static_cast<int>(index % segments);
    kv_head = index / segments % call.problem.kv_heads;
    sequence = index / segments / call.problem.kv_heads;
    const int64_t* const bounds = call.template region<int64_t>(call.workspace.bounds);
    batch = bounds ? 0 : sequence;
    first_row = bounds ? bounds[sequence] : 0;
    rows = bounds ? bounds[sequence + 1] - first_row : call.problem.seqlen;
    chunks = (rows + chunk_length - 1) / chunk_length;
    const int64_t chunks_per_segment = (chunks + segments - 1) / segments;
    chunk_begin = minimum(segment * chunks_per_segment, chunks);
    chunk_end = minimum(chunk_begin + chunks_per_segment, chunks);
  }

  // A chunk's first row, counted as `first_row` is, and its number of rows.
  DEVICE int64_t row_of(int64_t chunk) const { return first_row + chunk * chunk_length; }
  DEVICE int rows_of(int64_t chunk) const {
    return static_cast<int>(minimum<int64_t>(chunk_length, rows - chunk * chunk_length));
  }

  // Where this block keeps what rounding takes from its sums: the column group `group` of `groups`; null
  // where its segment is short.
  template <class A, class AnyProblem>
  DEVICE A* carries(const Call<AnyProblem>& call, int groups = 1, int group = 0) const {
    if ((chunk_end - chunk_begin) * chunk_length <= int64_t{1} << call.carry_rows_log2) return nullptr;
    A* const first = call.template region<A>(call.workspace.carries);
    const int64_t slot =
        carry_slot(call.problem.cu_seqlens != nullptr, first_row, sequence, call.carry_rows_log2);
    const int64_t number = (slot * call.problem.kv_heads + kv_head) * segments + segment;
    return first ? first + (number * groups + group) * call.carry_size : nullptr;
  }

  DEVICE bool first_segment() const { return segment == 0; }
  DEVICE bool last_segment() const { return segment == segments - 1; }
  // Which state of (sequences, kv_heads) this block's is.
  DEVICE int64_t state_index() const { return index / segments; }
};

template <class A, class AnyProblem>
DEVICE HeadNorm<A> query_norm(const Call<AnyProblem>& call, const Features<A>& features) {
  return {call.problem.query_affine, call.template region<A>(call.workspace.query_statistics),
          features.query_scale};
}
template <class A, class AnyProblem>
DEVICE HeadNorm<A> key_norm(const Call<AnyProblem>& call) {
  return {call.problem.key_affine, call.template region<A>(call.workspace.key_statistics), A(1)};
}

template <class Pointer>
DEVICE bool given(const StateOf<Pointer>& state) {
  return state.kv != nullptr || state.k != nullptr;
}

// Entry `entry` of a slot from a state or a state's gradient in the public form, which may be absent: 0.
// `unweight`: a gradient of an unweighted state becomes the unweighted sum that kernels keep (weights are
// powers of 2, so nothing is rounded).
template <class A>
DEVICE A import_entry(const ConstState& state, int64_t state_index, int entry, const GeneralTiles& tiles,
                      int head_dim, const Features<A>& features, bool unweight) {
  const int sums_begin = tiles.padded_features * tiles.value_stride;
  A value = 0;
  int f;
  if (entry < sums_begin) {
    f = entry / tiles.value_stride;
    const int column = entry - f * tiles.value_stride;
    if (f < features.count && column < head_dim && state.kv) {
      value = static_cast<const A*>(state.kv)[(state_index * features.count + f) * head_dim + column];
    }
  } else {
    f = entry - sums_begin;
    if (f < features.count && state.k)
      value = static_cast<const A*>(state.k)[state_index * features.count + f];
  }
  return unweight && value != 0 ? value / features.weight(f) : value;
}

// What rounding took from the block's sums so far: nothing.
template <class A>
DEVICE void clear_carries(A* carries, int64_t count) {
  for (int64_t entry = threadIdx.x; carries && entry < count; entry += blockDim.x) carries[entry] = 0;
}

// sum += value. `carry` keeps what rounding took from the sum, which the next call gives back (Kahan).
template <class A>
DEVICE void add_compensated(A& sum, A value, A& carry) {
  const A corrected = value + carry;
  const A next = sum + corrected;
  carry = corrected - (next - sum);
  sum = next;
}

}  // namespace rebased::REBASED_BACKEND
