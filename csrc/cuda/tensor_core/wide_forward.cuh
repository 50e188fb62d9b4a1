// Forward of `outer` with d = 32 on tensor cores: forward.cuh with the state of wide_state.cuh, in which two
// warps share the same value columns and each of them holds half of the features.
//
// What a warp computes of y of a row tile is therefore one of two summands; its partner, the other warp of
// the same columns, has the other. Of each pair of row tiles the warp of half h finishes tile h, and leaves
// its summand of the other tile in shared memory for its partner. That costs two more barriers a step. Of the
// chunk's own columns each warp takes every other tile of 16. Memory traffic is that of forward.cuh; one
// block fits a multiprocessor.
#pragma once

#include "cuda/tensor_core/forward.cuh"
#include "cuda/tensor_core/wide_state.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

// Writes into row_sums (2, 64) what earlier chunks add to the denominators, q'^T Z q'. Warp w does so for row
// tile w % 4, with the 16 rows of Z that belong to its half.
template <class T>
DEVICE void share_denominators(float* row_sums, const T* queries, const float4* gram, const WideLane& lane) {
  const int token = lane.column;
  uint32_t rows[2][4], own[4];
  float sums[2][2][4], bound = 0, partial[2] = {};
  load_wide_rows(own, queries, token, tile * lane.half, lane);
  UNROLL for (int part = 0; part < 2; ++part) {
    load_wide_rows(rows[part], queries, token, tile * part, lane);
    UNROLL for (int n = 0; n < 2; ++n) {
      const float4 value = load_shared<float4>(gram + (warps * lane.half + 2 * part + n) * 32 + lane.lane);
      sums[part][n][0] = value.x, sums[part][n][1] = value.y;
      sums[part][n][2] = value.z, sums[part][n][3] = value.w;
      UNROLL for (int j = 0; j < 4; ++j) bound = maximum(bound, fabsf(sums[part][n][j]));
    }
  }
  const Range range = is_bfloat16<T> ? Range{1.0f, 1.0f} : range_of(warp_maximum(bound));
  UNROLL for (int n = 0; n < 2; ++n) {  // (q' Z) q' over the features 16 half + 8 n .. + 7
    float product[4] = {};
    UNROLL for (int part = 0; part < 2; ++part)
        multiply_sums<T>(product, rows[part], sums[part], 2 * n, range);
    const float2 first = unpack<T>(own[2 * n]), second = unpack<T>(own[2 * n + 1]);
    partial[0] += product[0] * first.x + product[1] * first.y;
    partial[1] += product[2] * second.x + product[3] * second.y;
  }
  UNROLL for (int i = 0; i < 2; ++i) {
    const float sum = range.grow * quad_sum(partial[i]);
    if (lane.pair == 0) row_sums[chunk * lane.half + token + lane.group + 8 * i] = sum;
  }
}

// Dynamic shared memory of the forward kernel.
template <class T>
struct WideForwardTiles {
  T *values, *queries, *keys;  // two stages each
  Exchange exchange;
  float2* row_sums;  // (pairs, threads): the denominators' summands, exchanged like those of y

  DEVICE explicit WideForwardTiles(char* memory)
      : values(reinterpret_cast<T*>(memory)),
        queries(values + 2 * chunk * columns),
        keys(queries + 2 * Wide::feature_tile),
        exchange{reinterpret_cast<float4*>(keys + 2 * Wide::feature_tile)},
        row_sums(reinterpret_cast<float2*>(exchange.tiles + Exchange::size)) {}
  static constexpr int64_t bytes =
      static_cast<int64_t>(sizeof(T)) * (2 * chunk * columns + 4 * Wide::feature_tile) +
      Exchange::size * static_cast<int64_t>(sizeof(float4)) +
      Exchange::pairs * Wide::threads * static_cast<int64_t>(sizeof(float2));
};

template <class T>
KERNEL void LAUNCH_BOUNDS(Wide::threads, 1) wide_forward_kernel(Arguments<ForwardProblem> arguments) {
  const ForwardProblem& problem = arguments.problem;
  DYNAMIC_SHARED_MEMORY(char, memory);
  SHARED_MEMORY(T, row_elements, threads * Wide::feature_dim);
  SHARED_MEMORY(float2, row_statistics, threads);
  SHARED_MEMORY(T, staging, wide_warps * tile * tile);
  SHARED_MEMORY(float, affine, Wide::affine_floats);
  SHARED_MEMORY(float4, gram, Wide::threads);
  SHARED_MEMORY(float, row_sums, 2 * chunk);
  SHARED_MEMORY(float, warp_maxima, wide_warps);
  SHARED_MEMORY(ForwardOrigins<T>, origins, 1);
  const WideForwardTiles<T> tiles(memory);
  const RowTile<T> row_tile{row_elements, row_statistics};
  const WideLane lane;
  const int group_size = arguments.group_size;
  if (threadIdx.x == 0) {
    origins->set(arguments);
    const Span& span = origins->span;
    const int64_t first_head = span.kv_head * group_size;
    origins->y = first_row<T>(problem.y, span, first_head) + span.first_column;
    origins->r = static_cast<float*>(problem.r) + (span.batch * problem.heads + first_head) * problem.seqlen +
                 span.begin;
  }
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
  const auto bring = [&](const auto& step, int stage, int first, int head) {
    if (has_row && is_key) {
      step.template rows<T, Wide>(row_tile, origins->k, row_stride(problem.k), arguments.pieces.k,
                                  origins->key_statistics, first + token, rows_end);
    } else if (has_row) {
      step.template rows<T, Wide>(row_tile, origins->q + head * problem.q.head_stride, row_stride(problem.q),
                                  arguments.pieces.q, origins->query_statistics, first + token, rows_end);
    }
    step.template values<Wide::threads>(tiles.values + stage * chunk * columns, origins->v,
                                        row_stride(problem.v), arguments.pieces.v, first, rows_end,
                                        columns_left);
    step.commit();
  };

  sync_threads();  // affine
  if (rows_end > 0) bring(Start(), 0, 0, 0);
  int head = 0;
  for (int first = 0; first < rows_end;) {
    const int stage = (first / chunk * group_size + head) & 1;
    T* const queries = tiles.queries + stage * Wide::feature_tile;
    T* const keys = tiles.keys + stage * Wide::feature_tile;
    const T* const chunk_values = tiles.values + stage * chunk * columns;
    copy_async_wait<0>();
    if (arguments.pieces.read == 2) bring(Settle(), stage, first, head);
    sync_warp();
    if (has_row) {
      store_row<T, Wide>(is_key ? keys : queries, token, row_tile, first + token < rows_end,
                         affine + (is_key ? group_size : head) * Wide::affine_size, problem.layer_norm,
                         arguments.layer_norm_eps);
    }
    const bool last_head = head + 1 == group_size;
    const int next_head = last_head ? 0 : head + 1, next = last_head ? first + chunk : first;
    sync_threads();  // the tiles of this step are complete, and the tiles of the step before are free
    if (next < rows_end) bring(Start(), stage ^ 1, next, next_head);

    T* const y = origins->y + head * problem.y.head_stride;
    float* const r = origins->r + head * problem.seqlen;
    share_maximum<T>(warp_maxima, state, lane);
    share_denominators(row_sums, queries, gram, lane);
    NO_UNROLL for (int pair = 0; pair < Exchange::pairs; ++pair) {
      const int begin = tile * tile_pair * pair;
      float out[tile_pair][2][4] = {}, sum[tile_pair][4] = {};
      uint32_t rows[tile_pair][2][4];
      UNROLL for (int i = 0; i < tile_pair; ++i) load_wide_rows(rows[i], queries, begin + tile * i, lane);
      multiply_state<T>(out, rows, queries, begin, state, own_range<T>(warp_maxima, lane), lane);
      NO_UNROLL for (int before = tile * lane.half; before < begin; before += 2 * tile) {
        attend<T, Wide, false>(out, sum, rows, keys, chunk_values, before, -1, nullptr, lane);
      }
      attend<T, Wide, false>(out, sum, rows, keys, chunk_values, begin + tile * lane.half, lane.half, nullptr,
                             lane);
      tiles.exchange.give(pair, out, lane);
      float2* const pair_sums = tiles.row_sums + pair * Wide::threads;
      const bool keeps_second = lane.half == 1;
      store_shared(pair_sums + threadIdx.x,
                   float2{keeps_second ? sum[0][0] : sum[1][0], keeps_second ? sum[0][2] : sum[1][2]});
      sync_threads();
      float tile_out[2][4];
      tiles.exchange.take(pair, tile_out, out, lane);
      const float2 given = load_shared<float2>(pair_sums + (threadIdx.x ^ threads));
      const float tile_sum[2] = {(keeps_second ? sum[1][0] : sum[0][0]) + given.x,
                                 (keeps_second ? sum[1][2] : sum[0][2]) + given.y};
      const int chunk_row = begin + tile * lane.half, tile_row = first + chunk_row;
      UNROLL for (int half = 0; half < 2; ++half) {
        const int row = chunk_row + lane.group + 8 * half;
        const float denominator = tile_sum[half] + (row_sums[row] + row_sums[chunk + row]) + arguments.eps;
        const float inverse = problem.normalize ? fast_reciprocal(denominator) : 1.0f;
        UNROLL for (int n = 0; n < 2; ++n) {
          tile_out[n][2 * half] *= inverse;
          tile_out[n][2 * half + 1] *= inverse;
        }
        if (lane.column == 0 && blockIdx.y == 0 && lane.pair == 0 && first + row < rows_end) {
          r[first + row] = inverse;
        }
      }
      store_tile(staging + lane.warp * tile * tile, tile_out,
                 y + static_cast<int64_t>(tile_row) * row_stride(problem.y) + lane.column,
                 row_stride(problem.y), arguments.pieces.y, rows_end - tile_row, columns_left - lane.column,
                 lane);
    }
    if (last_head) {
      add_chunk<T, false>(state, keys, chunk_values, {}, lane);
    }
    head = next_head;
    first = next;
  }

  if (problem.final_state.kv && span.segment + 1 == arguments.launch.segments) {
    const int64_t index = span.sequence * problem.kv_heads + span.kv_head;
    float* const kv = static_cast<float*>(problem.final_state.kv) +
                      index * Wide::public_features * problem.head_dim + span.first_column;
    float* const k = static_cast<float*>(problem.final_state.k) + index * Wide::public_features;
    export_state(kv, blockIdx.y == 0 ? k : nullptr, state, false, problem.head_dim, columns_left, lane);
  }
}

// Leaves the sums over the rows of each segment in the segment's slot; those of the last segment only where
// launch.all_segments says so.
template <class T>
KERNEL void LAUNCH_BOUNDS(Wide::threads, 1) wide_segment_state_kernel(Arguments<Problem> arguments) {
  const Problem& problem = arguments.problem;
  SHARED_MEMORY(T, value_tiles, 2 * chunk * columns);
  SHARED_MEMORY(T, key_tiles, 2 * Wide::feature_tile);
  SHARED_MEMORY(T, row_elements, threads * Wide::feature_dim);
  SHARED_MEMORY(float2, row_statistics, chunk);
  SHARED_MEMORY(float, affine, Wide::affine_floats);
  SHARED_MEMORY(float4, gram, Wide::threads);
  SHARED_MEMORY(Origins<T>, origins, 1);
  const RowTile<T> row_tile{row_elements, row_statistics};
  const WideLane lane;
  if (threadIdx.x == 0) origins->set(arguments);
  sync_threads();
  const Span& span = origins->span;
  if (span.segment + 1 == arguments.launch.segments && !arguments.launch.all_segments) return;
  const int rows_end = span.rows, columns_left = static_cast<int>(problem.head_dim) - first_column();
  load_affine<Wide>(affine, arguments, span.kv_head);
  const float* const key_affine = affine + arguments.group_size * Wide::affine_size;

  WideState state(gram);
  state.clear();
  const int token = static_cast<int>(threadIdx.x);  // the other threads hold no row
  const auto bring = [&](const auto& step, int stage, int first) {
    if (token < chunk) {
      step.template rows<T, Wide>(row_tile, origins->k, row_stride(problem.k), arguments.pieces.k,
                                  origins->key_statistics, first + token, rows_end);
    }
    step.template values<Wide::threads>(value_tiles + stage * chunk * columns, origins->v,
                                        row_stride(problem.v), arguments.pieces.v, first, rows_end,
                                        columns_left);
    step.commit();
  };

  sync_threads();  // affine
  if (rows_end > 0) bring(Start(), 0, 0);
  int stage = 0;
  for (int first = 0; first < rows_end; first += chunk, stage ^= 1) {
    T* const keys = key_tiles + stage * Wide::feature_tile;
    copy_async_wait<0>();
    if (arguments.pieces.read == 2) bring(Settle(), stage, first);
    sync_warp();
    if (token < chunk) {
      store_row<T, Wide>(keys, token, row_tile, first + token < rows_end, key_affine, problem.layer_norm,
                         arguments.layer_norm_eps);
    }
    sync_threads();
    if (first + chunk < rows_end) bring(Start(), stage ^ 1, first + chunk);
    add_chunk<T, false>(state, keys, value_tiles + stage * chunk * columns, {}, lane);
  }
  store_state(arguments.slots + span.slot * Slot<Wide>::size, state);
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
