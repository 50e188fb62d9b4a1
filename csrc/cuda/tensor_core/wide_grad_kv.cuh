// Backward of `outer` with d = 32 on tensor cores, the reverse sweep, which makes grad v and grad k:
// grad_kv.cuh with the state of wide_state.cuh and the gradients of wide_gradient.cuh. Memory traffic is that
// of grad_kv.cuh; one block fits a multiprocessor.
#pragma once

#include "cuda/tensor_core/grad_kv.cuh"  // gather, scale_tiles
#include "cuda/tensor_core/wide_reverse.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

// grad v of the chunk: this warp finishes its 16 columns of one row tile of each pair.
template <class T>
DEVICE void value_gradient(const WideState& state, const QueryRows<T>& query_rows, const ChunkScale& scales,
                           const float* warp_maxima, const WideSweepTiles<T>& tiles, const T* gradients,
                           T* target, int stride, int piece, int rows_left, int columns_left, bool first_step,
                           bool last_step, const WideLane& lane) {
  NO_UNROLL for (int pair = 0; pair < Exchange::pairs; ++pair) {
    const int begin = tile * tile_pair * pair;
    float out[tile_pair][2][4] = {}, unused[tile_pair][4];
    uint32_t rows[tile_pair][2][4];
    UNROLL for (int i = 0; i < tile_pair; ++i) load_wide_rows(rows[i], tiles.keys, begin + tile * i, lane);
    if (first_step) {
      multiply_state<T>(out, rows, tiles.keys, begin, state, own_range<T>(warp_maxima, lane), lane);
      scale_tiles(out, scales.scale);
    }
    attend<T, Wide, true>(out, unused, rows, tiles.queries, gradients, begin + tile * lane.half, lane.half,
                          query_rows.column_scales, lane);
    NO_UNROLL for (int after = begin + tile * (tile_pair + lane.half); after < chunk; after += 2 * tile) {
      attend<T, Wide, true>(out, unused, rows, tiles.queries, gradients, after, tile_pair,
                            query_rows.column_scales, lane);
    }
    scale_tiles(out, scales.inverse);
    tiles.exchange.give(pair, out, lane);
    sync_threads();
    float whole[2][4];
    tiles.exchange.take(pair, whole, out, lane);
    if (!first_step || !last_step) {
      UNROLL for (int n = 0; n < 2; ++n) {
        gather(whole[n], tiles.gathered_values + (2 * pair + n) * Wide::threads + threadIdx.x, first_step,
               last_step);
      }
    }
    const int row = begin + tile * lane.half;
    if (last_step) {
      store_tile(tiles.staging + lane.warp * tile * tile, whole,
                 target + static_cast<int64_t>(row) * stride + lane.column, stride, piece, rows_left - row,
                 columns_left - lane.column, lane);
    }
  }
}

template <class T>
KERNEL void LAUNCH_BOUNDS(Wide::threads, 1)
    wide_grad_kv_kernel(Arguments<BackwardProblem> arguments, BackwardBuffers buffers) {
  DYNAMIC_SHARED_MEMORY(char, memory);
  SHARED_MEMORY(float2, given_statistics, threads);
  SHARED_MEMORY(float2, key_statistics, chunk);
  SHARED_MEMORY(float, affine, Wide::affine_floats);
  SHARED_MEMORY(float, affine_sums, warps* Wide::affine_size);
  SHARED_MEMORY(float, r, chunk);
  SHARED_MEMORY(float, row_floats, QueryRows<T>::size);
  SHARED_MEMORY(float, warp_maxima, wide_warps);
  SHARED_MEMORY(float4, gram, Wide::threads);
  SHARED_MEMORY(BackwardOrigins<T>, origins, 1);
  const BackwardProblem& problem = arguments.problem;
  const WideSweepTiles<T> tiles(memory, true);
  const QueryRows<T> query_rows(row_floats);
  const WideLane lane;
  const int group_size = arguments.group_size;
  if (threadIdx.x == 0) origins->set(arguments);
  if (threadIdx.x < warps * Wide::affine_size) affine_sums[threadIdx.x] = 0;
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
    origins->template bring_gradients<Wide::threads>(step, tiles.gradients + stage * tiles.value_tile,
                                                     tiles.y, r, arguments, first, head, rows_end,
                                                     columns_left);
    step.commit();
  };

  const int last_chunk = (rows_end + chunk - 1) / chunk * chunk - chunk;  // negative: no rows
  sync_threads();                                                         // affine
  if (last_chunk >= 0) bring(Start(), last_chunk, group_size - 1);
  int head = group_size - 1;
  for (int first = last_chunk; first >= 0;) {
    const int stage = stage_of(first, head);
    T* const gradients = tiles.gradients + stage * tiles.value_tile;
    const bool first_step = head + 1 == group_size, last_step = head == 0;
    share_maximum<T>(warp_maxima, state, lane);
    copy_async_wait<0>();
    if (arguments.pieces.read == 2) bring(Settle(), first, head);
    sync_threads();  // the copies have arrived, and the tiles of the step before are free
    const Range range = wide_shared_range<T>(warp_maxima);
    const ChunkScale scales = chunk_scale<T>(r, rows_end - first, lane);
    if (has_row) {
      const float2 statistics = store_row<T, Wide>(is_key ? tiles.keys : tiles.queries, token,
                                                   row_tile(stage), first + token < rows_end,
                                                   affine + (is_key ? group_size : head) * Wide::affine_size,
                                                   problem.layer_norm, arguments.layer_norm_eps);
      if (is_key) key_statistics[token] = statistics;
    }
    if (first_step) publish_state<T, 0>(tiles.state, state, range, lane);
    float* const delta = buffers.delta + blockIdx.y * problem.batch * problem.heads * problem.seqlen +
                         origins->row + head * problem.seqlen + first;
    scale_gradients<T, Wide::threads>(gradients, tiles.y, r, query_rows, scales, delta, rows_end - first,
                                      problem.normalize);
    const int next_head = last_step ? group_size - 1 : head - 1, next = last_step ? first - chunk : first;
    sync_threads();
    if (next >= 0) bring(Start(), next, next_head);

    T* const grad_v = first_row<T>(problem.grad_v, span, span.kv_head) + first_column() +
                      static_cast<int64_t>(first) * row_stride(problem.grad_v);
    value_gradient(state, query_rows, scales, warp_maxima, tiles, gradients, grad_v,
                   row_stride(problem.grad_v), arguments.pieces.grad_v, rows_end - first, columns_left,
                   first_step, last_step, lane);

    float gradient[Wide::units][4] = {};
    const int begin = lane.column;  // of this warp's row tile
    const T* const values = tiles.values + stage * tiles.value_tile;
    if (first_step) {
      WideGradient through_state;
      through_state.clear();
      through_state.add_turn<T, 0>(values, tiles.keys, begin, tiles.state, lane);
      sync_threads();
      publish_state<T, 1>(tiles.state, state, range, lane);
      sync_threads();
      through_state.add_turn<T, 1>(values, tiles.keys, begin, tiles.state, lane);
      through_state.finish(gradient, range, lane);
    }
    uint32_t rows[2][4];
    load_wide_rows(rows, tiles.keys, begin, lane);
    if (first_step) {
      add_gram_gradient<T>(gradient, rows, gram, {1.0f, 1.0f}, lane);
      UNROLL for (int n = 0; n < Wide::units; ++n) {
        UNROLL for (int j = 0; j < 4; ++j) gradient[n][j] *= scales.scale;
      }
    }
    uint32_t row_values[warps][4];
    UNROLL for (int i = 0; i < columns / tile; ++i)
        load_value_rows(row_values[i], values, begin, tile * i, lane);
    NO_UNROLL for (int other = begin + tile * lane.half; other < chunk; other += 2 * tile) {
      pair_gradient<T, Wide, true>(gradient, rows, row_values, tiles.queries, gradients, other,
                                   other == begin, {0, 0}, query_rows.minus_delta, query_rows.column_scales,
                                   lane);
    }
    UNROLL for (int n = 0; n < Wide::units; ++n) {
      UNROLL for (int j = 0; j < 4; ++j) gradient[n][j] *= scales.inverse;
    }
    join_gradients(gradient, tiles.exchange.tiles, lane);
    if (lane.half == 0) {
      UNROLL for (int n = 0; n < Wide::units; ++n) {
        if (first_step && last_step) continue;
        gather(gradient[n], tiles.gathered_gradients + n * threads + threadIdx.x, first_step, last_step);
      }
    }
    if (lane.half == 0 && last_step) {
      const int tile_row = first + begin;
      const int64_t row_index =
          ((blockIdx.y * problem.batch + span.batch) * problem.kv_heads + span.kv_head) * problem.seqlen +
          span.begin + tile_row;
      const RowTarget<T> target{
          buffers.key_gradient ? nullptr
                               : first_row<T>(problem.grad_k, span, span.kv_head) +
                                     static_cast<int64_t>(tile_row) * row_stride(problem.grad_k),
          row_stride(problem.grad_k), arguments.pieces.grad_k,
          buffers.key_gradient ? buffers.key_gradient + row_index * Wide::feature_dim : nullptr,
          affine_sums + lane.warp * Wide::affine_size};
      finish_rows<T, Wide>(gradient, row_tile(stage), chunk + begin, key_statistics + begin,
                           rows_end - tile_row, affine + group_size * Wide::affine_size, 1.0f,
                           problem.layer_norm, target, tiles.staging + lane.warp * tile * tile, lane);
    }
    add_chunk<T, true>(state, tiles.queries, gradients,
                       {query_rows.minus_delta, query_rows.sum_scales, scales.sum_inverse}, lane);
    head = next_head;
    first = next;
  }

  sync_threads();
  if (buffers.key_affine) {
    store_affine_sums<Wide>(buffers.key_affine, affine_sums,
                            static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y);
  }
  if (problem.grad_initial_state.kv && span.segment == 0) {
    const int64_t index = span.sequence * problem.kv_heads + span.kv_head;
    const int64_t heads = problem.num_sequences * problem.kv_heads, features = Wide::public_features;
    float* const kv = static_cast<float*>(problem.grad_initial_state.kv) +
                      index * features * problem.head_dim + first_column();
    export_state(kv, buffers.initial_sums + (blockIdx.y * heads + index) * features, state, true,
                 problem.head_dim, columns_left, lane);
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
