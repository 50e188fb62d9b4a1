// What a block of the general path does with its tiles: its state's way in and out, and a chunk's rows of the
// "others" on their way in.
#pragma once

#include "cuda/general/products.cuh"

namespace rebased::REBASED_BACKEND {

// Where the block keeps its state: in shared memory, or in its slot of a workspace region; null without
// states.
template <class A, class AnyProblem>
DEVICE A* state_storage(const Call<AnyProblem>& call, A* shared, const Region& slots) {
  if (call.tiles.state_in_shared) return shared + call.tiles.state;
  A* const first = call.template region<A>(slots);
  return first ? first + static_cast<int64_t>(blockIdx.x) * call.tiles.slot_size() : nullptr;
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
