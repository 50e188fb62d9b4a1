// What a block of the general path works on: its sequence, kv head and segment, its rows of every tensor, and
// its state's way in and out.
#pragma once

#include <type_traits>

#include "cuda/general/products.cuh"
#include "cuda/plan/plan.h"
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

  // Null where the plan has no such region.
  template <class T>
  HOST_DEVICE T* region(const Region& region) const {
    return region.bytes ? reinterpret_cast<T*>(static_cast<char*>(problem.workspace) + region.offset)
                        : nullptr;
  }
};
template <class AnyProblem>
Call<AnyProblem> make_call(const AnyProblem& problem, const Plan& plan) {
  return {problem,         plan.tiles,    plan.segments, plan.path == Path::quadratic, plan.carry_rows_log2,
          plan.carry_size, plan.workspace};
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

// Which operand a tile is loaded from, at the head of a block and at a chunk.
template <class A>
struct HeadNorm {
  const Affine& affine;
  const A* statistics;  // (batch, seqlen, 2) or null
  A scale;

  template <class AnyProblem>
  DEVICE Norm<A> at(const AnyProblem& problem, int64_t batch, int64_t head, int64_t row) const {
    Norm<A> norm;
    norm.mode = problem.layer_norm;
    norm.eps = static_cast<A>(problem.layer_norm_eps);
    norm.gamma =
        affine.gamma ? static_cast<const A*>(affine.gamma) + head * affine.gamma_head_stride : nullptr;
    norm.beta = affine.beta ? static_cast<const A*>(affine.beta) + head * affine.beta_head_stride : nullptr;
    norm.statistics = statistics ? statistics + 2 * (batch * problem.seqlen + row) : nullptr;
    norm.scale = scale;
    return norm;
  }
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

// Where the block keeps its state: in shared memory, or in its slot of a workspace region; null without
// states.
template <class A, class AnyProblem>
DEVICE A* state_storage(const Call<AnyProblem>& call, A* shared, const Region& slots) {
  if (call.tiles.state_in_shared) return shared + call.tiles.state;
  A* const first = call.template region<A>(slots);
  return first ? first + static_cast<int64_t>(blockIdx.x) * call.tiles.slot_size() : nullptr;
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

// Fills the block's state: from its slot where a scan has been there, else from the given state or zeros.
template <class A, class AnyProblem>
DEVICE void start_state(const Call<AnyProblem>& call, const Tiles<A>& tiles, const Block& block,
                        const Region& slots, const ConstState& initial, bool unweight) {
  const int size = static_cast<int>(call.tiles.slot_size());
  clear_carries(tiles.carries, call.carry_size);
  if (block.segments == 1) {
    const bool is_given = given(initial);
    for (int entry = threadIdx.x; entry < size; entry += blockDim.x) {
      tiles.state[entry] = is_given ? import_entry(initial, block.state_index(), entry, call.tiles,
                                                   tiles.head_dim, tiles.features, unweight)
                                    : A(0);
    }
  } else if (call.tiles.state_in_shared) {
    const A* const slot = call.template region<A>(slots) + block.index * size;
    for (int entry = threadIdx.x; entry < size; entry += blockDim.x) tiles.state[entry] = slot[entry];
  }
}

// Writes the block's state in the public form, times the query-side weights when `weighted`.
template <class A>
DEVICE void export_state(const Tiles<A>& tiles, const MutableState& target, int64_t state_index,
                         bool weighted) {
  const int count = tiles.features.count, head_dim = tiles.head_dim;
  A* const kv = static_cast<A*>(target.kv);
  A* const k = static_cast<A*>(target.k);
  for (int entry = threadIdx.x; kv && entry < count * head_dim; entry += blockDim.x) {
    const int f = entry / head_dim, column = entry - f * head_dim;
    const A value = tiles.state[f * tiles.plan.value_stride + column];
    kv[state_index * count * head_dim + entry] = weighted ? value * tiles.features.weight(f) : value;
  }
  for (int f = threadIdx.x; k && f < count; f += blockDim.x) {
    const A value = tiles.state_sums()[f];
    k[state_index * count + f] = weighted ? value * tiles.features.weight(f) : value;
  }
}

// Brings query head `head`'s q', r grad_y and -delta of a chunk into the tiles of the "others" (not yet
// normalised).
template <class E, class A>
DEVICE void load_query_others(const Call<BackwardProblem>& call, const Tiles<A>& tiles, const Block& block,
                              int64_t head, int64_t row0, int rows) {
  const BackwardProblem& problem = call.problem;
  const GeneralTiles& plan = call.tiles;
  const int64_t row_index = (block.batch * problem.heads + head) * problem.seqlen + row0;
  load_features(tiles.at(plan.other_features), plan.row_stride,
                head_rows<E>(problem.q, block.batch, head, row0), problem.q.row_stride, rows, plan.chunk,
                tiles.features.dim);
  load_values(tiles.at(plan.other_values), plan.value_stride,
              head_rows<E>(problem.grad_y, block.batch, head, row0), problem.grad_y.row_stride,
              problem.normalize ? static_cast<const A*>(problem.r) + row_index : nullptr, rows, plan.chunk,
              tiles.head_dim);
  const A* const delta = call.template region<A>(call.workspace.delta);
  for (int row = threadIdx.x; row < plan.chunk; row += plan.threads) {
    tiles.vector(plan.other_extra)[row] = delta && row < rows ? -delta[row_index + row] : A(0);
  }
}

// The same for the kv head's k', v and 1.
template <class E, class A, class AnyProblem>
DEVICE void load_key_others(const Call<AnyProblem>& call, const Tiles<A>& tiles, const Block& block,
                            int64_t row0, int rows) {
  const AnyProblem& problem = call.problem;
  const GeneralTiles& plan = call.tiles;
  load_features(tiles.at(plan.other_features), plan.row_stride,
                head_rows<E>(problem.k, block.batch, block.kv_head, row0), problem.k.row_stride, rows,
                plan.chunk, tiles.features.dim);
  load_values(tiles.at(plan.other_values), plan.value_stride,
              head_rows<E>(problem.v, block.batch, block.kv_head, row0), problem.v.row_stride,
              static_cast<const A*>(nullptr), rows, plan.chunk, tiles.head_dim);
  for (int row = threadIdx.x; row < plan.chunk; row += plan.threads) tiles.vector(plan.other_extra)[row] = 1;
}

template <class A, class AnyProblem>
DEVICE Tiles<A> make_tiles(const Call<AnyProblem>& call, const Block& block, A* shared, A* state) {
  const AnyProblem& problem = call.problem;
  return {call.tiles,
          shared,
          Features<A>(problem.feature_map, problem.feature_dim, problem.scale),
          static_cast<int>(problem.head_dim),
          state,
          block.carries<A>(call)};
}

}  // namespace rebased::REBASED_BACKEND
