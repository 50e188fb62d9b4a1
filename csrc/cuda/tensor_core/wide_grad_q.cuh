// Backward of `outer` with d = 32 on tensor cores, the forward sweep, which makes grad q: grad_q.cuh with the
// state of wide_state.cuh and the gradients of wide_gradient.cuh. One block fits a multiprocessor.
#pragma once

#include "cuda/tensor_core/wide_reverse.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

template <class T>
KERNEL void LAUNCH_BOUNDS(Wide::threads, 1)
    wide_grad_q_kernel(Arguments<BackwardProblem> arguments, BackwardBuffers buffers) {
  DYNAMIC_SHARED_MEMORY(char, memory);
  SHARED_MEMORY(float2, given_statistics, threads);
  SHARED_MEMORY(float2, query_statistics, chunk);
  SHARED_MEMORY(float, affine, Wide::affine_floats);
  SHARED_MEMORY(float, r_stages, 2 * chunk);
  SHARED_MEMORY(float, delta_stages, 2 * chunk);
  SHARED_MEMORY(float, warp_maxima, wide_warps);
  SHARED_MEMORY(float4, gram, Wide::threads);
  SHARED_MEMORY(BackwardOrigins<T>, origins, 1);
  const BackwardProblem& problem = arguments.problem;
  const WideSweepTiles<T> tiles(memory, false);
  const WideLane lane;
  const int group_size = arguments.group_size;
  // (query heads, warps, 64), in the memory where the reverse sweep gathers
  float* const affine_sums = reinterpret_cast<float*>(tiles.gathered_values);
  for (int i = static_cast<int>(threadIdx.x); i < group_size * warps * Wide::affine_size; i += Wide::threads)
    affine_sums[i] = 0;
  if (threadIdx.x == 0) origins->set(arguments);
  sync_threads();
  const Span& span = origins->span;
  const int rows_end = span.rows, columns_left = static_cast<int>(problem.head_dim) - first_column();
  load_affine<Wide>(affine, arguments, span.kv_head);

  WideState state(gram);
  if (arguments.slots) {
    load_state(state, arguments.slots + span.slot * Slot<Wide>::size);
  } else {
    state.clear();
  }

  // threads 0..63 hold a row of q each, threads 64..127 one of k
  const bool has_row = threadIdx.x < threads, is_key = static_cast<int>(threadIdx.x) >= chunk;
  const int token = static_cast<int>(threadIdx.x % chunk);
  const auto stage_of = [&](int first, int head) { return (first / chunk * group_size + head) & 1; };
  const auto row_tile = [&](int stage) {
    return RowTile<T>{tiles.rows + stage * tiles.row_tile, given_statistics};
  };
  const auto bring = [&](const auto& step, int first, int head) {
    const int stage = stage_of(first, head);
    if (has_row && is_key) {
      step.template rows<T, Wide>(row_tile(stage), origins->k, row_stride(problem.k), arguments.pieces.k,
                                  origins->key_statistics, first + token, rows_end);
    } else if (has_row) {
      step.template rows<T, Wide>(row_tile(stage), origins->q + head * problem.q.head_stride,
                                  row_stride(problem.q), arguments.pieces.q, origins->query_statistics,
                                  first + token, rows_end);
    }
    step.template values<Wide::threads>(tiles.values + stage * tiles.value_tile, origins->v,
                                        row_stride(problem.v), arguments.pieces.v, first, rows_end,
                                        columns_left);
    step.template values<Wide::threads>(
        tiles.gradients + stage * tiles.value_tile, origins->grad_y + head * problem.grad_y.head_stride,
        row_stride(problem.grad_y), arguments.pieces.grad_y, first, rows_end, columns_left);
    step.floats(r_stages + stage * chunk, origins->r + head * problem.seqlen, first, rows_end);
    const float* const delta = buffers.delta + blockIdx.y * problem.batch * problem.heads * problem.seqlen +
                               origins->row + head * problem.seqlen;
    step.floats(delta_stages + stage * chunk, delta, first, rows_end);
    step.commit();
  };

  sync_threads();  // affine
  if (rows_end > 0) bring(Start(), 0, 0);
  int head = 0;
  for (int first = 0; first < rows_end;) {
    const int stage = stage_of(first, head);
    const T* const values = tiles.values + stage * tiles.value_tile;
    const T* const gradients = tiles.gradients + stage * tiles.value_tile;
    share_maximum<T>(warp_maxima, state, lane);
    copy_async_wait<0>();
    if (arguments.pieces.read == 2) bring(Settle(), first, head);
    sync_threads();  // the copies have arrived, and the tiles of the step before are free
    const Range range = wide_shared_range<T>(warp_maxima);
    if (has_row) {
      const float2 statistics = store_row<T, Wide>(is_key ? tiles.keys : tiles.queries, token,
                                                   row_tile(stage), first + token < rows_end,
                                                   affine + (is_key ? group_size : head) * Wide::affine_size,
                                                   problem.layer_norm, arguments.layer_norm_eps);
      if (!is_key) query_statistics[token] = statistics;
    }
    publish_state<T, 0>(tiles.state, state, range, lane);
    const bool last_head = head + 1 == group_size;
    const int next_head = last_head ? 0 : head + 1, next = last_head ? first + chunk : first;
    sync_threads();
    if (next < rows_end) bring(Start(), next, next_head);

    const int begin = lane.column;  // of this warp's row tile
    float gradient[Wide::units][4];
    WideGradient through_state;
    through_state.clear();
    through_state.add_turn<T, 0>(gradients, tiles.queries, begin, tiles.state, lane);
    sync_threads();
    publish_state<T, 1>(tiles.state, state, range, lane);
    sync_threads();
    through_state.add_turn<T, 1>(gradients, tiles.queries, begin, tiles.state, lane);
    through_state.finish(gradient, range, lane);
    uint32_t rows[2][4];
    load_wide_rows(rows, tiles.queries, begin, lane);
    float minus_delta[2];
    UNROLL for (int half = 0; half < 2; ++half) minus_delta[half] =
        -delta_stages[stage * chunk + begin + lane.group + 8 * half];
    add_gram_gradient<T>(gradient, rows, gram, minus_delta, lane);
    uint32_t row_gradients[warps][4];
    UNROLL for (int i = 0; i < columns / tile; ++i)
        load_value_rows(row_gradients[i], gradients, begin, tile * i, lane);
    NO_UNROLL for (int other = begin - tile * lane.half; other >= 0; other -= 2 * tile) {
      pair_gradient<T, Wide, false>(gradient, rows, row_gradients, tiles.keys, values, other, other == begin,
                                    minus_delta, nullptr, nullptr, lane);
    }
    UNROLL for (int n = 0; n < Wide::units; ++n) {
      UNROLL for (int j = 0; j < 4; ++j) gradient[n][j] *=
          r_stages[stage * chunk + begin + lane.group + 8 * (j >> 1)];
    }
    join_gradients(gradient, tiles.exchange.tiles, lane);
    if (lane.half == 0) {
      const int tile_row = first + begin;
      const int64_t row_index = blockIdx.y * problem.batch * problem.heads * problem.seqlen + origins->row +
                                head * problem.seqlen + tile_row;
      const RowTarget<T> target{
          buffers.query_gradient ? nullptr
                                 : first_row<T>(problem.grad_q, span, span.kv_head * group_size + head) +
                                       static_cast<int64_t>(tile_row) * row_stride(problem.grad_q),
          row_stride(problem.grad_q), arguments.pieces.grad_q,
          buffers.query_gradient ? buffers.query_gradient + row_index * Wide::feature_dim : nullptr,
          affine_sums + (head * warps + lane.warp) * Wide::affine_size};
      finish_rows<T, Wide>(gradient, row_tile(stage), begin, query_statistics + begin, rows_end - tile_row,
                           affine + head * Wide::affine_size, arguments.scale, problem.layer_norm, target,
                           tiles.staging + lane.warp * tile * tile, lane);
    }
    if (last_head) {
      add_chunk<T, false>(state, tiles.keys, values, {}, lane);
    }
    head = next_head;
    first = next;
  }

  sync_threads();
  if (!buffers.query_affine) return;
  for (int i = 0; i < group_size; ++i) {
    const int64_t block =
        (span.sequence * problem.heads + span.kv_head * group_size + i) * arguments.launch.segments +
        span.segment;
    store_affine_sums<Wide>(buffers.query_affine, affine_sums + i * warps * Wide::affine_size,
                            block * gridDim.y + blockIdx.y);
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
