// Forward of the general path: one block per (sequence, kv head, segment) walks its chunks in order.
//
// Per chunk of C rows: k', v and one query head's q' are brought into shared memory; scores of the lower
// triangle; y = (scores V + phi(q') S) / (row sums + phi(q') z + eps); after the last query head of the group
// S += phi(k')^T V, z += sum phi(k'). Reads q, k, v once, writes y and r once; the state stays in shared
// memory or, where it is too large, in the block's workspace slot.
//
// Quadratic: no state; each chunk's y is gathered in shared memory over all chunks of keys before it.
#pragma once

#include "cuda/general/block.cuh"

namespace rebased::REBASED_BACKEND {

// r of a row from the parts of its denominator.
template <class A>
DEVICE A row_reciprocal(const Tiles<A>& tiles, const Problem& problem, int row) {
  if (!problem.normalize) return 1;
  A denominator = static_cast<A>(problem.eps);
  for (int part = 0; part < denominator_part_count(tiles.plan); ++part) {
    denominator += tiles.thread_vector()[part * tiles.plan.chunk + row];
  }
  return reciprocal(denominator);
}

template <class E>
KERNEL void LAUNCH_BOUNDS(256, 1) general_forward(Call<ForwardProblem> call) {
  using A = Accumulator<E>;
  DYNAMIC_SHARED_MEMORY(A, shared);
  const ForwardProblem& problem = call.problem;
  const GeneralTiles& plan = call.tiles;
  const Block block(call);
  const Tiles<A> tiles = make_tiles(call, block, shared, state_storage(call, shared, call.workspace.states));
  const HeadNorm<A> query = query_norm(call, tiles.features), key = key_norm<A>(call);
  const int thread = threadIdx.x, threads = plan.threads, stride = plan.row_stride;
  const int64_t group = group_size(problem);
  const bool keep_state = problem.final_state.kv && block.last_segment();
  bool state_is_zero = call.quadratic || (block.first_segment() && !given(problem.initial_state));

  if (!call.quadratic) start_state(call, tiles, block, call.workspace.states, problem.initial_state, false);

  for (int64_t chunk = block.chunk_begin; chunk < block.chunk_end; ++chunk) {
    const int64_t row0 = block.row_of(chunk);
    const int rows = block.rows_of(chunk);
    for (int64_t member = 0; member < group; ++member) {
      const int64_t head = block.kv_head * group + member;
      const int64_t row_index = (block.batch * problem.heads + head) * problem.seqlen + row0;
      E* const y = head_rows<E>(problem.y, block.batch, head, row0);
      const bool aligned =
          rows_aligned(y, problem.y.row_stride, tiles.head_dim, minimum<int>(16, 4 * sizeof(E)));
      load_features(tiles.at(plan.row_features), stride, head_rows<E>(problem.q, block.batch, head, row0),
                    problem.q.row_stride, rows, plan.chunk, tiles.features.dim);
      const int64_t first_other = call.quadratic ? 0 : chunk;
      for (int64_t other = first_other; other <= chunk; ++other) {
        const bool first = other == first_other, last = other == chunk;
        const bool new_keys = call.quadratic || member == 0;
        const int64_t other_row0 = block.row_of(other);
        const Reach reach{false, row0 - other_row0, rows, block.rows_of(other)};
        if (new_keys) load_key_others<E>(call, tiles, block, other_row0, reach.others);
        sync_threads();
        for (int index = thread; index < 2 * plan.chunk; index += threads) {
          const bool is_query = index < plan.chunk;
          if (is_query ? !first : !new_keys) continue;
          const int row = is_query ? index : index - plan.chunk;
          A* const tile = tiles.at(is_query ? plan.row_features : plan.other_features);
          normalize_row(tile, static_cast<A*>(nullptr), tile, stride, row,
                        row < (is_query ? rows : reach.others), tiles.features,
                        is_query ? query.at(problem, block.batch, head, row0)
                                 : key.at(problem, block.batch, block.kv_head, other_row0));
        }
        sync_threads();
        score_tiles<false>(tiles, reach, true);
        sync_threads();
        if (problem.normalize) {
          denominator_parts(tiles, reach, !state_is_zero, !first);
          if (last) sync_threads();
        }
        if (last && thread < rows) {
          static_cast<A*>(problem.r)[row_index + thread] = row_reciprocal(tiles, problem, thread);
        }
        for (int tile = thread; tile < plan.chunk / 4 * tiles.quads(); tile += threads) {
          const int row = tile / tiles.quads() * 4, column = tile % tiles.quads() * 4;
          if (row >= rows) break;
          A sums[4][4] = {};
          A* const gathered = tiles.at(plan.gathered_values) + row * plan.value_stride + column;
          if (!first) {
            load_tile(sums, gathered, plan.value_stride);
          } else if (!state_is_zero) {
            query_state(sums, tiles, row, column);
          }
          add_scored_values(sums, tiles, row, column, reach);
          if (!last) {
            store_tile(gathered, plan.value_stride, sums);
            continue;
          }
          UNROLL for (int n = 0; n < 4; ++n) {
            if (row + n >= rows) continue;
            store_values(y + (row + n) * problem.y.row_stride + column, sums[n],
                         row_reciprocal(tiles, problem, row + n), tiles.head_dim - column, aligned);
          }
        }
        if (!last) sync_threads();
      }
      if (member + 1 < group) sync_threads();
    }
    if (!call.quadratic && (chunk + 1 < block.chunk_end || keep_state)) {
      sync_threads();  // every thread has read the state
      update_state(tiles, rows);
      state_is_zero = false;
    }
    sync_threads();
  }
  if (keep_state) {
    sync_threads();  // after start_state, where there was no chunk
    export_state(tiles, problem.final_state, block.state_index(), false);
  }
}

}  // namespace rebased::REBASED_BACKEND
