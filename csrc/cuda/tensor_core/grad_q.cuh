// Backward on tensor cores, the forward sweep, which makes grad q from the delta / r that the reverse sweep
// has left.
//
// A block walks its segment as the forward does, with S and the denominator's sums of all earlier chunks.
// Once a chunk all warps get S through shared memory, and each warp owns 16 rows of queries. With g = grad y
// and d = g . y = delta / r
//   grad phi(q'_i) = r_i (sum_{j in chunk, j <= i} (g_i . v_j - d_i) phi(k'_j) + S g_i - d_i z)
// r is multiplied last, so that the numbers which are rounded to the element type are of the size of g.
// Memory: q, k, v, grad y, r and delta / r are read once per column group, grad q is written once.
#pragma once

#include "cuda/tensor_core/sweep.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

template <class T, class S, bool grouped>
KERNEL void LAUNCH_BOUNDS(threads, backward_blocks(grouped))
    grad_q_kernel(Arguments<BackwardProblem> arguments, BackwardBuffers buffers) {
  DYNAMIC_SHARED_MEMORY(char, memory);
  SHARED_MEMORY(T, queries, S::feature_tile);
  SHARED_MEMORY(T, keys, S::feature_tile);
  SHARED_MEMORY(T, row_elements, 2 * threads * S::feature_dim);
  SHARED_MEMORY(float2, given_statistics, threads);
  SHARED_MEMORY(float2, query_statistics, chunk);
  SHARED_MEMORY(T, staging, warps * tile * tile);
  SHARED_MEMORY(float, affine, S::affine_floats);
  SHARED_MEMORY(float, r_stages, 2 * chunk);
  SHARED_MEMORY(float, delta_stages, 2 * chunk);
  SHARED_MEMORY(float, warp_maxima, warps);
  SHARED_MEMORY(float4, sums_places, S::sums_size);
  SHARED_MEMORY(BackwardOrigins<T>, origins, 1);
  const BackwardProblem& problem = arguments.problem;
  const SweepTiles<T, S> tiles(memory, false, false);
  const Lane lane;
  const int group_size = grouped ? arguments.group_size : 1;
  // (query heads, warps, 2 d)
  float* const affine_sums = reinterpret_cast<float*>(tiles.rest);
  for (int i = static_cast<int>(threadIdx.x); i < group_size * warps * S::affine_size; i += threads)
    affine_sums[i] = 0;
  if (threadIdx.x == 0) origins->set(arguments);
  sync_threads();
  const Span& span = origins->span;
  const int rows_end = span.rows, columns_left = static_cast<int>(problem.head_dim) - first_column();
  load_affine<S>(affine, arguments, span.kv_head);

  State<S> state(sums_places);
  start_state(state, arguments, span, false, lane);

  // threads 0..63 hold a row of q each, threads 64..127 one of k
  const bool is_key = static_cast<int>(threadIdx.x) >= chunk;
  const int token = static_cast<int>(threadIdx.x % chunk);
  const auto stage_of = [&](int first, int head) { return (first / chunk * group_size + head) & 1; };
  const auto row_tile = [&](int stage) {
    return RowTile<T>{row_elements + stage * threads * S::feature_dim, given_statistics};
  };
  const auto bring = [&](const auto& step, int first, int head) {
    const int stage = stage_of(first, head);
    if (is_key) {
      step.template rows<T, S>(row_tile(stage), origins->k, row_stride(problem.k), arguments.pieces.k,
                               origins->key_statistics, first + token, rows_end);
    } else {
      step.template rows<T, S>(row_tile(stage), origins->q + head * problem.q.head_stride,
                               row_stride(problem.q), arguments.pieces.q, origins->query_statistics,
                               first + token, rows_end);
    }
    step.values(tiles.values + stage * tiles.value_tile, origins->v, row_stride(problem.v),
                arguments.pieces.v, first, rows_end, columns_left);
    step.values(tiles.gradients + stage * tiles.value_tile,
                origins->grad_y + head * problem.grad_y.head_stride, row_stride(problem.grad_y),
                arguments.pieces.grad_y, first, rows_end, columns_left);
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
    const Range range = shared_range<T>(warp_maxima);
    const float2 statistics = store_row<T, S>(
        is_key ? keys : queries, token, row_tile(stage), first + token < rows_end,
        affine + (is_key ? group_size : head) * S::affine_size, problem.layer_norm, arguments.layer_norm_eps);
    if (!is_key) query_statistics[token] = statistics;
    if (head == 0) publish_state(tiles.state, state, range, lane);
    const bool last_head = head + 1 == group_size;
    const int next_head = last_head ? 0 : head + 1, next = last_head ? first + chunk : first;
    sync_threads();
    if (next < rows_end) bring(Start(), next, next_head);

    const int begin = tile * lane.warp;
    uint32_t rows_a[4], row_gradients[warps][4];
    load_rows(rows_a, queries, begin, lane);
    UNROLL for (int i = 0; i < columns / tile; ++i)
        load_value_rows(row_gradients[i], gradients, begin, tile * i, lane);
    float minus_delta[2], r[2];
    UNROLL for (int half = 0; half < 2; ++half) {
      const int index = stage * chunk + begin + lane.group + 8 * half;
      minus_delta[half] = -delta_stages[index];
      r[half] = r_stages[index];
    }
    float gradient[S::units][4], sums[S::units][4];
    sums_gradient(sums, state);
    state_gradient<T, S>(gradient, row_gradients, tiles.state, range, lane);
    UNROLL for (int n = 0; n < S::units; ++n) {
      UNROLL for (int j = 0; j < 4; ++j) gradient[n][j] += minus_delta[j >> 1] * sums[n][j];
    }
    NO_UNROLL for (int other = 0; other <= begin; other += tile) {
      pair_gradient<T, S, false>(gradient, rows_a, row_gradients, keys, values, other, other == begin,
                                 minus_delta, nullptr, nullptr, lane);
    }
    UNROLL for (int n = 0; n < S::units; ++n) {
      UNROLL for (int j = 0; j < 4; ++j) gradient[n][j] *= r[j >> 1];
    }

    const int tile_row = first + begin;
    const int64_t row_index = blockIdx.y * problem.batch * problem.heads * problem.seqlen + origins->row +
                              head * problem.seqlen + tile_row;
    const RowTarget<T> target{
        buffers.query_gradient ? nullptr
                               : first_row<T>(problem.grad_q, span, span.kv_head * group_size + head) +
                                     static_cast<int64_t>(tile_row) * row_stride(problem.grad_q),
        row_stride(problem.grad_q), arguments.pieces.grad_q,
        buffers.query_gradient ? buffers.query_gradient + row_index * S::feature_dim : nullptr,
        affine_sums + (head * warps + lane.warp) * S::affine_size};
    finish_rows<T, S>(gradient, row_tile(stage), begin, query_statistics + begin, rows_end - tile_row,
                      affine + head * S::affine_size, 1.0f, problem.layer_norm, target,
                      staging + lane.warp * tile * tile, lane);
    if (last_head) {
      add_chunk<T, S, false>(state, keys, values, {}, lane);
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
    store_affine_sums<S>(buffers.query_affine, affine_sums + i * warps * S::affine_size,
                         block * gridDim.y + blockIdx.y);
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
