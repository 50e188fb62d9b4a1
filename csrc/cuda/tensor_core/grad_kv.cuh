// Backward on tensor cores, the reverse sweep, which makes grad v and grad k.
//
// A block walks one segment from its last chunk to its first and holds the reverse state of all later chunks:
// T, the sum of phi(q') ghat^T, in registers, and M, the negative sum of delta q' q'^T, in shared memory.
// ghat is r grad y and delta is ghat . y.
//   grad v_j = sum_{i in chunk, i >= j} sim(i, j) ghat_i + phi(k'_j) T, as y of the forward, roles exchanged
//   grad k'  as gradient.cuh has it; once a chunk all warps get T through shared memory
// A step is a chunk of one query head. With several query heads grad v and grad k' of the chunk gather in
// shared memory, where each thread reads and writes its own part, until the step of the last head stores
// them.
//
// Memory: q, k, v, grad y, y and r are read once per column group. grad k, grad v and, for the other sweep,
// grad y . y are written once.
#pragma once

#include "cuda/tensor_core/reverse.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

// Adds what the steps before have left in `place`, and leaves the sum there unless this is the last step.
DEVICE void gather(float (&value)[4], float4* place, bool first_step, bool last_step) {
  if (!first_step) {
    const float4 before = *place;
    value[0] += before.x, value[1] += before.y, value[2] += before.z, value[3] += before.w;
  }
  if (!last_step) *place = float4{value[0], value[1], value[2], value[3]};
}

DEVICE void scale_tiles(float (&out)[tile_pair][2][4], float scale) {
  UNROLL for (int i = 0; i < tile_pair; ++i) {
    UNROLL for (int j = 0; j < 4; ++j) {
      out[i][0][j] *= scale;
      out[i][1][j] *= scale;
    }
  }
}

// grad v of this warp's 16 columns, for all 64 rows of the chunk.
template <class T, class S>
DEVICE void value_gradient(const State<S>& state, const QueryRows<T>& query_rows, const ChunkScale& scales,
                           const float* warp_maxima, const T* queries, const T* keys, const T* gradients,
                           T* staging, T* target, int stride, int piece, int rows_left, int columns_left,
                           bool first_step, bool last_step, float4* gathered, const Lane& lane) {
  NO_UNROLL for (int begin = 0; begin < chunk; begin += tile * tile_pair) {
    float out[tile_pair][2][4] = {}, unused[tile_pair][4];
    uint32_t rows[tile_pair][4];
    UNROLL for (int i = 0; i < tile_pair; ++i) load_rows(rows[i], keys, begin + tile * i, lane);
    if (first_step) {
      multiply_state<T>(out, rows, state, own_range<T>(warp_maxima, lane));
      scale_tiles(out, scales.scale);
    }
    UNROLL for (int i = 0; i < tile_pair; ++i) {
      attend<T, S, true>(out, unused, rows, queries, gradients, begin + tile * i, i, query_rows.column_scales,
                         lane);
    }
    NO_UNROLL for (int after = begin + tile * tile_pair; after < chunk; after += tile) {
      attend<T, S, true>(out, unused, rows, queries, gradients, after, tile_pair, query_rows.column_scales,
                         lane);
    }
    scale_tiles(out, scales.inverse);
    UNROLL for (int i = 0; i < tile_pair; ++i) {
      UNROLL for (int n = 0; n < 2; ++n) {
        float4* const place = gathered + ((begin / tile + i) * 2 + n) * threads + threadIdx.x;
        if (!first_step || !last_step) gather(out[i][n], place, first_step, last_step);
      }
      const int row = begin + tile * i;
      if (last_step) {
        store_tile(staging, out[i], target + static_cast<int64_t>(row) * stride, stride, piece,
                   rows_left - row, columns_left - tile * lane.warp, lane);
      }
    }
  }
}

// grad k' of this warp's 16 rows, over all 64 columns: `gradient` gets the part of the chunk's queries and,
// in the first step of a chunk, the parts of T and M.
template <class T, class S>
DEVICE void key_gradient(float (&gradient)[S::units][4], const State<S>& state, Range range,
                         const QueryRows<T>& query_rows, const ChunkScale& scales, const T* queries,
                         const T* keys, const T* values, const T* gradients, const T* state_tile,
                         bool first_step, const Lane& lane) {
  const int token = tile * lane.warp;
  uint32_t rows[4], row_values[warps][4];
  load_rows(rows, keys, token, lane);
  UNROLL for (int i = 0; i < columns / tile; ++i)
      load_value_rows(row_values[i], values, token, tile * i, lane);
  if (first_step) {
    float sums[S::units][4];
    sums_gradient(sums, state);
    state_gradient<T, S>(gradient, row_values, state_tile, range, lane);
    UNROLL for (int n = 0; n < S::units; ++n) {
      UNROLL for (int j = 0; j < 4; ++j) gradient[n][j] = scales.scale * (gradient[n][j] + sums[n][j]);
    }
  }
  NO_UNROLL for (int other = token; other < chunk; other += tile) {
    pair_gradient<T, S, true>(gradient, rows, row_values, queries, gradients, other, other == token, {0, 0},
                              query_rows.minus_delta, query_rows.column_scales, lane);
  }
  UNROLL for (int n = 0; n < S::units; ++n) {
    UNROLL for (int j = 0; j < 4; ++j) gradient[n][j] *= scales.inverse;
  }
}

template <class T, class S, bool grouped>
KERNEL void LAUNCH_BOUNDS(threads, backward_blocks(grouped))
    grad_kv_kernel(Arguments<BackwardProblem> arguments, BackwardBuffers buffers) {
  DYNAMIC_SHARED_MEMORY(char, memory);
  SHARED_MEMORY(T, queries, S::feature_tile);
  SHARED_MEMORY(T, keys, S::feature_tile);
  SHARED_MEMORY(T, row_elements, 2 * threads * S::feature_dim);
  SHARED_MEMORY(float2, given_statistics, threads);
  SHARED_MEMORY(float2, key_statistics, chunk);
  SHARED_MEMORY(float, affine, grouped ? S::affine_floats : S::ungrouped_affine_floats);
  SHARED_MEMORY(float, affine_sums, warps* S::affine_size);
  SHARED_MEMORY(float, r, chunk);
  SHARED_MEMORY(float, row_floats, QueryRows<T>::size);
  SHARED_MEMORY(float, warp_maxima, warps);
  SHARED_MEMORY(float4, sums, S::sums_size);
  SHARED_MEMORY(BackwardOrigins<T>, origins, 1);
  const BackwardProblem& problem = arguments.problem;
  const SweepTiles<T, S> tiles(memory, true, grouped);
  const QueryRows<T> query_rows(row_floats);
  const Lane lane;
  const int group_size = grouped ? arguments.group_size : 1;
  if (threadIdx.x == 0) origins->set(arguments);
  if (threadIdx.x < warps * S::affine_size) affine_sums[threadIdx.x] = 0;
  sync_threads();
  const Span& span = origins->span;
  const int rows_end = span.rows, columns_left = static_cast<int>(problem.head_dim) - first_column();
  load_affine<S>(affine, arguments, span.kv_head);

  State<S> state(sums);
  start_state(state, arguments, span, true, lane);

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
    origins->bring_gradients(step, tiles.gradients + stage * tiles.value_tile, tiles.y, r, arguments, first,
                             head, rows_end, columns_left);
    step.commit();
  };

  const int last_chunk = (rows_end + chunk - 1) / chunk * chunk - chunk;  // negative: no rows
  sync_threads();                                                         // affine
  if (last_chunk >= 0) bring(Start(), last_chunk, group_size - 1);
  // query heads from the last to the first too, so that stages alternate
  int head = group_size - 1;
  for (int first = last_chunk; first >= 0;) {
    const int stage = stage_of(first, head);
    const T* const values = tiles.values + stage * tiles.value_tile;
    T* const gradients = tiles.gradients + stage * tiles.value_tile;
    const bool first_step = head + 1 == group_size, last_step = head == 0;
    share_maximum<T>(warp_maxima, state, lane);
    copy_async_wait<0>();
    if (arguments.pieces.read == 2) bring(Settle(), first, head);
    sync_threads();  // the copies have arrived, and the tiles of the step before are free
    const Range range = shared_range<T>(warp_maxima);
    const ChunkScale scales = chunk_scale<T>(r, rows_end - first, lane);
    const float2 statistics = store_row<T, S>(
        is_key ? keys : queries, token, row_tile(stage), first + token < rows_end,
        affine + (is_key ? group_size : head) * S::affine_size, problem.layer_norm, arguments.layer_norm_eps);
    if (is_key) key_statistics[token] = statistics;
    if (first_step) publish_state(tiles.state, state, range, lane);
    float* const delta = buffers.delta + blockIdx.y * problem.batch * problem.heads * problem.seqlen +
                         origins->row + head * problem.seqlen + first;
    scale_gradients(gradients, tiles.y, r, query_rows, scales, delta, rows_end - first, problem.normalize);
    const int next_head = last_step ? group_size - 1 : head - 1, next = last_step ? first - chunk : first;
    sync_threads();
    if (next >= 0) bring(Start(), next, next_head);

    // the rows of q have gone into the feature tile, so that their place is free until the next step but one
    T* const warp_staging = row_tile(stage).elements + lane.warp * tile * tile;

    float gradient[S::units][4] = {};
    key_gradient<T, S>(gradient, state, range, query_rows, scales, queries, keys, values, gradients,
                       tiles.state, first_step, lane);
    if constexpr (grouped) {
      UNROLL for (int n = 0; n < S::units; ++n) {
        gather(gradient[n], tiles.rest + n * threads + threadIdx.x, first_step, last_step);
      }
    }
    if (last_step) {
      const int tile_row = first + tile * lane.warp;
      const int64_t row_index =
          ((blockIdx.y * problem.batch + span.batch) * problem.kv_heads + span.kv_head) * problem.seqlen +
          span.begin + tile_row;
      const RowTarget<T> target{
          buffers.key_gradient ? nullptr
                               : first_row<T>(problem.grad_k, span, span.kv_head) +
                                     static_cast<int64_t>(tile_row) * row_stride(problem.grad_k),
          row_stride(problem.grad_k), arguments.pieces.grad_k,
          buffers.key_gradient ? buffers.key_gradient + row_index * S::feature_dim : nullptr,
          affine_sums + lane.warp * S::affine_size};
      finish_rows<T, S>(gradient, row_tile(stage), chunk + tile * lane.warp,
                        key_statistics + tile * lane.warp, rows_end - tile_row,
                        affine + group_size * S::affine_size, 1.0f, problem.layer_norm, target, warp_staging,
                        lane);
    }
    if (grouped && first_step) sync_threads();  // all have read T, in whose place grad v gathers
    T* const grad_v = first_row<T>(problem.grad_v, span, span.kv_head) + first_column() + tile * lane.warp +
                      static_cast<int64_t>(first) * row_stride(problem.grad_v);
    value_gradient<T, S>(state, query_rows, scales, warp_maxima, queries, keys, gradients, warp_staging,
                         grad_v, row_stride(problem.grad_v), arguments.pieces.grad_v, rows_end - first,
                         columns_left, first_step, last_step, tiles.gathered_values, lane);

    add_chunk<T, S, true>(state, queries, gradients, chunk_weights(query_rows, scales), lane);
    head = next_head;
    first = next;
  }

  sync_threads();
  if (buffers.key_affine) {
    store_affine_sums<S>(buffers.key_affine, affine_sums,
                         static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y);
  }
  if (problem.grad_initial_state.kv && span.segment == 0) {
    const int64_t index = span.sequence * problem.kv_heads + span.kv_head;
    const int64_t heads = problem.num_sequences * problem.kv_heads, features = S::public_features;
    float* const kv = static_cast<float*>(problem.grad_initial_state.kv) +
                      index * features * problem.head_dim + first_column();
    export_state(kv, buffers.initial_sums + (blockIdx.y * heads + index) * features, state, problem.head_dim,
                 columns_left, lane);
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
