// Local states of the segments of a split sequence: one block per (sequence, kv head, segment) sums its own
// rows from zero. scan.cuh then turns the local sums into the state at every segment's start.
//
//   forward  S = sum phi(k') v^T, z = sum phi(k')              into the next segment's slot
//   reverse  T = sum phi(q') (r grad_y)^T, M = -sum delta phi(q')  into the previous segment's slot,
//            over all query heads of the kv head
#pragma once

#include "cuda/general/block.cuh"

namespace rebased::REBASED_BACKEND {

// Adds the rows of the block's segment to its state.
template <class E, bool reverse, class AnyProblem, class A>
DEVICE void add_segment(const Call<AnyProblem>& call, const Tiles<A>& tiles, const Block& block) {
  const AnyProblem& problem = call.problem;
  const GeneralTiles& plan = call.tiles;
  const HeadNorm<A> norm = reverse ? query_norm(call, tiles.features) : key_norm<A>(call);
  const int64_t group = reverse ? group_size(problem) : 1;
  for (int64_t chunk = block.chunk_begin; chunk < block.chunk_end; ++chunk) {
    const int64_t row0 = block.row_of(chunk);
    const int rows = block.rows_of(chunk);
    for (int64_t member = 0; member < group; ++member) {
      const int64_t head = reverse ? block.kv_head * group + member : block.kv_head;
      if constexpr (reverse) {
        load_query_others<E>(call, tiles, block, head, row0, rows);
      } else {
        load_key_others<E>(call, tiles, block, row0, rows);
      }
      sync_threads();
      for (int row = threadIdx.x; row < plan.chunk; row += plan.threads) {
        A* const tile = tiles.at(plan.other_features);
        normalize_row(tile, static_cast<A*>(nullptr), tile, plan.row_stride, row, row < rows, tiles.features,
                      norm.at(problem, block.batch, head, row0));
      }
      sync_threads();
      update_state(tiles, rows);
      sync_threads();
    }
  }
}

template <class E, bool reverse, class AnyProblem>
KERNEL void LAUNCH_BOUNDS(256, 1) general_local_states(Call<AnyProblem> call) {
  using A = Accumulator<E>;
  DYNAMIC_SHARED_MEMORY(A, shared);
  const GeneralTiles& plan = call.tiles;
  const Block block(call);
  if (reverse ? block.first_segment() : block.last_segment()) return;
  A* const slot = call.template region<A>(reverse ? call.workspace.reverse_states : call.workspace.states) +
                  (reverse ? block.index - 1 : block.index + 1) * plan.slot_size();
  const Tiles<A> tiles = make_tiles(call, block, shared, plan.state_in_shared ? shared + plan.state : slot);
  for (int64_t entry = threadIdx.x; entry < plan.slot_size(); entry += plan.threads) tiles.state[entry] = 0;
  clear_carries(tiles.carries, call.carry_size);
  add_segment<E, reverse>(call, tiles, block);
  sync_threads();
  if (plan.state_in_shared) {
    for (int64_t entry = threadIdx.x; entry < plan.slot_size(); entry += plan.threads) {
      slot[entry] = tiles.state[entry];
    }
  }
}

// Where only the state is asked for: the segment that the others come before, on top of their sums, and out.
template <class E, bool reverse, class AnyProblem>
KERNEL void LAUNCH_BOUNDS(256, 1) general_whole_state(Call<AnyProblem> call) {
  using A = Accumulator<E>;
  DYNAMIC_SHARED_MEMORY(A, shared);
  const Block block(call);
  if (reverse ? !block.first_segment() : !block.last_segment()) return;
  const Region& slots = reverse ? call.workspace.reverse_states : call.workspace.states;
  const Tiles<A> tiles = make_tiles(call, block, shared, state_storage(call, shared, slots));
  start_state(call, tiles, block, slots, ConstState{}, reverse);
  add_segment<E, reverse>(call, tiles, block);
  sync_threads();  // after start_state, where there was no chunk
  if constexpr (reverse) {
    export_state(tiles, call.problem.grad_initial_state, block.state_index(), true);
  } else {
    export_state(tiles, call.problem.final_state, block.state_index(), false);
  }
}

}  // namespace rebased::REBASED_BACKEND
