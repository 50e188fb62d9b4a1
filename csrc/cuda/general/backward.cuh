// Backward of the general path: two kernels, each with one block per (sequence, kv head, segment).
//
// With ghat = r grad y, delta = ghat . y and c_ij = ghat_i . v_j - delta_i for j <= i:
//   general_grad_q   walks forward with S and z:
//                    grad q' = (c * sim') k' + J(q')^T (S ghat - delta z)
//   general_grad_kv  walks back with T, the sum over later i of phi(q'_i) ghat_i^T, and M, the sum of
//                    -delta_i phi(q'_i):
//                    grad v  = sim^T ghat + phi(k') T
//                    grad k' = (c * sim')^T q' + J(k')^T (T v + M)
// J is the derivative of the features. The side that reads a state applies the weights of the features. Each
// block owns the rows that it writes. The gradient of the initial state is T, M at the start of the sequence.
//
// The quadratic path has no states: the gradients of a chunk are summed over all chunks that its rows reach.
#pragma once

#include "cuda/general/gradients.cuh"

namespace rebased::REBASED_BACKEND {

// Where a block's partial sums for gamma and beta go: (sequences, heads, segments, 2, dim), or null.
template <class A>
DEVICE A* affine_partial(const Call<BackwardProblem>& call, const Region& region, const Block& block,
                         int64_t head, int64_t heads) {
  A* const partials = call.template region<A>(region);
  const int64_t index = (block.sequence * heads + head) * block.segments + block.segment;
  return partials ? partials + index * 2 * call.problem.feature_dim : nullptr;
}
template <class A>
DEVICE void clear_affine_partial(A* partial, int dim) {
  for (int a = threadIdx.x; partial && a < dim; a += blockDim.x) partial[a] = partial[dim + a] = 0;
}

template <class E>
KERNEL void LAUNCH_BOUNDS(256, 1) general_grad_q(Call<BackwardProblem> call) {
  using A = Accumulator<E>;
  DYNAMIC_SHARED_MEMORY(A, shared);
  const BackwardProblem& problem = call.problem;
  const GeneralTiles& plan = call.tiles;
  const Block block(call);
  const Tiles<A> tiles = make_tiles(call, block, shared, state_storage(call, shared, call.workspace.states));
  const HeadNorm<A> query = query_norm(call, tiles.features), key = key_norm<A>(call);
  const int threads = plan.threads, stride = plan.row_stride, dim = tiles.features.dim;
  const int64_t group = group_size(problem);
  const A* const delta = call.template region<A>(call.workspace.delta);
  A* const unfinished = call.template region<A>(call.workspace.query_gradient);
  bool state_is_zero = call.quadratic || (block.first_segment() && !given(problem.initial_state));

  if (!call.quadratic) start_state(call, tiles, block, call.workspace.states, problem.initial_state, false);
  for (int64_t member = 0; member < group; ++member) {
    const int64_t head = block.kv_head * group + member;
    clear_affine_partial(affine_partial<A>(call, call.workspace.query_affine, block, head, problem.heads),
                         dim);
  }

  for (int64_t chunk = block.chunk_begin; chunk < block.chunk_end; ++chunk) {
    const int64_t row0 = block.row_of(chunk);
    const int rows = block.rows_of(chunk);
    for (int64_t member = 0; member < group; ++member) {
      const int64_t head = block.kv_head * group + member;
      const int64_t row_index = (block.batch * problem.heads + head) * problem.seqlen + row0;
      const Norm<A> norm = query.at(problem, block.batch, head, row0);
      load_features(tiles.at(plan.row_normalized), stride, head_rows<E>(problem.q, block.batch, head, row0),
                    problem.q.row_stride, rows, plan.chunk, dim);
      load_values(tiles.at(plan.row_values), plan.value_stride,
                  head_rows<E>(problem.grad_y, block.batch, head, row0), problem.grad_y.row_stride,
                  problem.normalize ? static_cast<const A*>(problem.r) + row_index : nullptr, rows,
                  plan.chunk, tiles.head_dim);
      for (int row = threadIdx.x; row < plan.chunk; row += threads) {
        tiles.vector(plan.row_extra)[row] = delta && row < rows ? -delta[row_index + row] : A(0);
      }
      clear_gradients(tiles);
      const int64_t first_other = call.quadratic ? 0 : chunk;
      for (int64_t other = first_other; other <= chunk; ++other) {
        const bool first = other == first_other, new_keys = call.quadratic || member == 0;
        const int64_t other_row0 = block.row_of(other);
        const Reach reach{false, row0 - other_row0, rows, block.rows_of(other)};
        if (new_keys) load_key_others<E>(call, tiles, block, other_row0, reach.others);
        sync_threads();
        for (int index = threadIdx.x; index < 2 * plan.chunk; index += threads) {
          const bool is_query = index < plan.chunk;
          const int row = is_query ? index : index - plan.chunk;
          if (is_query && first) {
            A* const normalized = tiles.at(plan.row_normalized);
            tiles.vector(plan.row_scale)[row] =
                normalize_row(normalized, normalized, tiles.at(plan.row_features), stride, row, row < rows,
                              tiles.features, norm);
          } else if (!is_query && new_keys) {
            A* const tile = tiles.at(plan.other_features);
            normalize_row(tile, static_cast<A*>(nullptr), tile, stride, row, row < reach.others,
                          tiles.features, key.at(problem, block.batch, block.kv_head, other_row0));
          }
        }
        sync_threads();
        if (!state_is_zero) {
          add_state_gradients(tiles);
          sync_threads();
        }
        score_tiles<true>(tiles, reach, false);
        sync_threads();
        add_score_gradients(tiles, reach);
        sync_threads();
      }
      finish_gradients(tiles, rows, norm, head_rows<E>(problem.grad_q, block.batch, head, row0),
                       problem.grad_q.row_stride, unfinished ? unfinished + row_index * dim : nullptr,
                       affine_partial<A>(call, call.workspace.query_affine, block, head, problem.heads),
                       static_cast<int>(member));
      sync_threads();
    }
    if (!call.quadratic && chunk + 1 < block.chunk_end) {
      update_state(tiles, rows);
      state_is_zero = false;
      sync_threads();
    }
  }
}

template <class E>
KERNEL void LAUNCH_BOUNDS(256, 1) general_grad_kv(Call<BackwardProblem> call) {
  using A = Accumulator<E>;
  DYNAMIC_SHARED_MEMORY(A, shared);
  const BackwardProblem& problem = call.problem;
  const GeneralTiles& plan = call.tiles;
  const Block block(call);
  const Tiles<A> tiles =
      make_tiles(call, block, shared, state_storage(call, shared, call.workspace.reverse_states));
  const HeadNorm<A> query = query_norm(call, tiles.features), key = key_norm<A>(call);
  const int threads = plan.threads, stride = plan.row_stride, dim = tiles.features.dim;
  const int64_t group = group_size(problem);
  const bool keep_state = problem.grad_initial_state.kv && block.first_segment();
  A* const unfinished = call.template region<A>(call.workspace.key_gradient);
  A* const affine =
      affine_partial<A>(call, call.workspace.key_affine, block, block.kv_head, problem.kv_heads);
  bool state_is_zero = call.quadratic || (block.last_segment() && !given(problem.grad_final_state));

  if (!call.quadratic) {
    start_state(call, tiles, block, call.workspace.reverse_states, problem.grad_final_state, true);
  }
  clear_affine_partial(affine, dim);
  for (int row = threadIdx.x; row < plan.chunk; row += threads) tiles.vector(plan.row_extra)[row] = 1;

  for (int64_t chunk = block.chunk_end - 1; chunk >= block.chunk_begin; --chunk) {
    const int64_t row0 = block.row_of(chunk);
    const int rows = block.rows_of(chunk);
    const int64_t last_other = call.quadratic ? block.chunks - 1 : chunk;
    const bool update = !call.quadratic && (chunk > block.chunk_begin || keep_state);
    const bool read_state = !state_is_zero;  // the state before this chunk joins it
    const Norm<A> norm = key.at(problem, block.batch, block.kv_head, row0);
    E* const grad_v = head_rows<E>(problem.grad_v, block.batch, block.kv_head, row0);
    const bool aligned =
        rows_aligned(grad_v, problem.grad_v.row_stride, tiles.head_dim, minimum<int>(16, 4 * sizeof(E)));
    load_features(tiles.at(plan.row_normalized), stride,
                  head_rows<E>(problem.k, block.batch, block.kv_head, row0), problem.k.row_stride, rows,
                  plan.chunk, dim);
    load_values(tiles.at(plan.row_values), plan.value_stride,
                head_rows<E>(problem.v, block.batch, block.kv_head, row0), problem.v.row_stride,
                static_cast<const A*>(nullptr), rows, plan.chunk, tiles.head_dim);
    clear_gradients(tiles);
    for (int64_t member = 0; member < group; ++member) {
      const int64_t head = block.kv_head * group + member;
      for (int64_t other = chunk; other <= last_other; ++other) {
        const bool first = member == 0 && other == chunk, last = member + 1 == group && other == last_other;
        const int64_t other_row0 = block.row_of(other);
        const Reach reach{true, other_row0 - row0, rows, block.rows_of(other)};
        load_query_others<E>(call, tiles, block, head, other_row0, reach.others);
        sync_threads();
        for (int index = threadIdx.x; index < (first ? 2 : 1) * plan.chunk; index += threads) {
          if (index < plan.chunk) {
            A* const tile = tiles.at(plan.other_features);
            normalize_row(tile, static_cast<A*>(nullptr), tile, stride, index, index < reach.others,
                          tiles.features, query.at(problem, block.batch, head, other_row0));
          } else {
            const int row = index - plan.chunk;
            A* const normalized = tiles.at(plan.row_normalized);
            tiles.vector(plan.row_scale)[row] =
                normalize_row(normalized, normalized, tiles.at(plan.row_features), stride, row, row < rows,
                              tiles.features, norm);
          }
        }
        sync_threads();
        if (first && read_state) {
          add_state_gradients(tiles);
          sync_threads();
        }
        score_tiles<true>(tiles, reach, true);
        sync_threads();
        add_score_gradients(tiles, reach);
        for (int tile = threadIdx.x; tile < plan.chunk / 4 * tiles.quads(); tile += threads) {
          const int row = tile / tiles.quads() * 4, column = tile % tiles.quads() * 4;
          if (row >= rows) break;
          A sums[4][4] = {};
          A* const gathered = tiles.at(plan.gathered_values) + row * plan.value_stride + column;
          if (!first) {
            load_tile(sums, gathered, plan.value_stride);
          } else if (read_state) {
            query_state(sums, tiles, row, column);
          }
          add_scored_values(sums, tiles, row, column, reach);
          if (!last) {
            store_tile(gathered, plan.value_stride, sums);
            continue;
          }
          UNROLL for (int r = 0; r < 4; ++r) {
            if (row + r >= rows) continue;
            store_values(grad_v + (row + r) * problem.grad_v.row_stride + column, sums[r], A(1),
                         tiles.head_dim - column, aligned);
          }
        }
        sync_threads();
        if (update) {
          update_state(tiles, reach.others);
          state_is_zero = false;
          sync_threads();
        }
      }
    }
    const int64_t row_index = (block.batch * problem.kv_heads + block.kv_head) * problem.seqlen + row0;
    finish_gradients(tiles, rows, norm, head_rows<E>(problem.grad_k, block.batch, block.kv_head, row0),
                     problem.grad_k.row_stride, unfinished ? unfinished + row_index * dim : nullptr, affine,
                     0);
    sync_threads();
  }
  if (keep_state) {
    sync_threads();  // after start_state, where there was no chunk
    export_state(tiles, problem.grad_initial_state, block.state_index(), true);
  }
}

}  // namespace rebased::REBASED_BACKEND
