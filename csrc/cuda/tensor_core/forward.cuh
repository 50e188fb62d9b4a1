// Forward on tensor cores of the maps that act on each feature, with d = 16. wide_forward.cuh is the same for
// `outer` with d = 32, and polynomial/ has the other polynomial maps.
//
// A block walks one segment of one sequence for one kv head, all its query heads, and 64 value columns:
//   y_i = (sum_{j in chunk, j <= i} sim(i, j) v_j + phi(q'_i) S) / (the same with v = 1, + eps)
// and then adds the chunk to S. S stays in registers from the first chunk to the last, and the denominator's
// sums in shared memory. Both start from slots of the workspace that segment_state_kernel has filled, and
// scan_kernel where there are more than a few segments.
//
// A step is a chunk of one query head. Asynchronous copies bring v and the rows of q and k of the next step
// into shared memory while a step computes. Value tiles and feature tiles are double buffered, so that one
// barrier a step is enough. The row tile is single: a warp copies into it only what it has read itself.
//
// Memory: q, k and v are read once per column group, y and r are written once. Of the slots a block reads
// those of the segments before its own, or after a scan its own alone.
#pragma once

#include "cuda/tensor_core/product.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

// What earlier chunks add to the denominator of a row tile, as a C fragment whose columns are all the same.
template <class T, class S>
DEVICE void denominator(float (&sum)[4], const uint32_t (&rows)[4], const State<S>& state, Range range) {
  const Sums<S::units> sums = state.sums();
  UNROLL for (int j = 0; j < 4; ++j) sum[j] = 0;
  multiply_sums<T>(sum, rows, sums.k, 0, range);
  UNROLL for (int j = 0; j < 4; ++j) sum[j] *= range.grow;
}

template <class T>
struct ForwardOrigins : Origins<T> {
  T* y;
  float* r;
};

// How many blocks per multiprocessor the registers must suffice for. With three blocks a thread has 168
// registers. The bookkeeping of several query heads needs more.
constexpr int forward_blocks(bool grouped) { return grouped ? 2 : 3; }

template <class T, class S, bool grouped>
KERNEL void LAUNCH_BOUNDS(threads, forward_blocks(grouped))
    forward_kernel(Arguments<ForwardProblem> arguments) {
  const ForwardProblem& problem = arguments.problem;
  const Launch& launch = arguments.launch;
  SHARED_MEMORY(T, value_tiles, 2 * chunk * columns);
  SHARED_MEMORY(T, query_tiles, 2 * S::feature_tile);
  SHARED_MEMORY(T, key_tiles, 2 * S::feature_tile);
  SHARED_MEMORY(T, row_elements, threads * S::feature_dim);
  SHARED_MEMORY(float2, row_statistics, threads);
  SHARED_MEMORY(T, staging, warps * tile * tile);
  SHARED_MEMORY(float, affine, S::affine_floats);
  SHARED_MEMORY(float4, sums, S::sums_size);
  SHARED_MEMORY(float, warp_maxima, warps);
  SHARED_MEMORY(ForwardOrigins<T>, origins, 1);
  const RowTile<T> row_tile{row_elements, row_statistics};
  const Lane lane;
  const int group_size = grouped ? arguments.group_size : 1;
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
  load_affine<S>(affine, arguments, span.kv_head);

  State<S> state(sums);
  start_state(state, arguments, span, false, lane);

  // threads 0..63 hold a row of q each, threads 64..127 one of k
  const bool is_key = static_cast<int>(threadIdx.x) >= chunk;
  const int token = static_cast<int>(threadIdx.x % chunk);

  const auto bring = [&](const auto& step, int stage, int first, int head) {
    if (is_key) {
      step.template rows<T, S>(row_tile, origins->k, row_stride(problem.k), arguments.pieces.k,
                               origins->key_statistics, first + token, rows_end);
    } else {
      step.template rows<T, S>(row_tile, origins->q + head * problem.q.head_stride, row_stride(problem.q),
                               arguments.pieces.q, origins->query_statistics, first + token, rows_end);
    }
    step.values(value_tiles + stage * chunk * columns, origins->v, row_stride(problem.v), arguments.pieces.v,
                first, rows_end, columns_left);
    step.commit();
  };

  sync_threads();  // affine
  if (rows_end > 0) bring(Start(), 0, 0, 0);
  int head = 0;
  for (int first = 0; first < rows_end;) {
    const int stage = (first / chunk * group_size + head) & 1;
    T* const queries = query_tiles + stage * S::feature_tile;
    T* const keys = key_tiles + stage * S::feature_tile;
    const T* const chunk_values = value_tiles + stage * chunk * columns;
    copy_async_wait<0>();
    if (arguments.pieces.read == 2) bring(Settle(), stage, first, head);
    sync_warp();
    store_row<T, S>(is_key ? keys : queries, token, row_tile, first + token < rows_end,
                    affine + (is_key ? group_size : head) * S::affine_size, problem.layer_norm,
                    arguments.layer_norm_eps);
    const bool last_head = head + 1 == group_size;
    const int next_head = last_head ? 0 : head + 1, next = last_head ? first + chunk : first;
    sync_threads();  // the tiles of this step are complete, and the tiles of the step before are free
    if (next < rows_end) bring(Start(), stage ^ 1, next, next_head);

    T* const y = origins->y + head * problem.y.head_stride;
    float* const r = origins->r + head * problem.seqlen;
    share_maximum<T>(warp_maxima, state, lane);
    NO_UNROLL for (int begin = 0; begin < chunk; begin += tile * tile_pair) {
      float out[tile_pair][2][4] = {}, sum[tile_pair][4];
      uint32_t rows[tile_pair][4];
      UNROLL for (int i = 0; i < tile_pair; ++i) load_rows(rows[i], queries, begin + tile * i, lane);
      UNROLL for (int i = 0; i < tile_pair; ++i)
          denominator<T, S>(sum[i], rows[i], state, sums_range<T>(state));
      multiply_state<T>(out, rows, state, own_range<T>(warp_maxima, lane));
      NO_UNROLL for (int before = 0; before < begin; before += tile) {
        attend<T, S, false>(out, sum, rows, keys, chunk_values, before, -1, nullptr, lane);
      }
      UNROLL for (int i = 0; i < tile_pair; ++i) {
        attend<T, S, false>(out, sum, rows, keys, chunk_values, begin + tile * i, i, nullptr, lane);
      }
      UNROLL for (int i = 0; i < tile_pair; ++i) {
        const int tile_row = first + begin + tile * i;
        UNROLL for (int half = 0; half < 2; ++half) {
          const float inverse = problem.normalize ? fast_reciprocal(sum[i][2 * half] + arguments.eps) : 1.0f;
          UNROLL for (int n = 0; n < 2; ++n) {
            out[i][n][2 * half] *= inverse;
            out[i][n][2 * half + 1] *= inverse;
          }
          const int index = tile_row + lane.group + 8 * half;
          if (threadIdx.x < 32 && blockIdx.y == 0 && lane.pair == 0 && index < rows_end) {
            r[index] = inverse;
          }
        }
        store_tile(staging + lane.warp * tile * tile, out[i],
                   y + static_cast<int64_t>(tile_row) * row_stride(problem.y) + tile * lane.warp,
                   row_stride(problem.y), arguments.pieces.y, rows_end - tile_row,
                   columns_left - tile * lane.warp, lane);
      }
    }
    if (last_head) {
      add_chunk<T, S, false>(state, keys, chunk_values, {}, lane);
    }
    head = next_head;
    first = next;
  }

  if (problem.final_state.kv && span.segment + 1 == launch.segments) {
    const int64_t index = span.sequence * problem.kv_heads + span.kv_head;
    const int64_t features = S::public_features;
    float* const kv =
        static_cast<float*>(problem.final_state.kv) + index * features * problem.head_dim + span.first_column;
    float* const k = static_cast<float*>(problem.final_state.k) + index * features;
    export_state(kv, blockIdx.y == 0 ? k : nullptr, state, problem.head_dim, columns_left, lane);
  }
}

// Leaves the sums over the rows of each segment in the segment's slot; those of the last segment only where
// launch.all_segments says so.
template <class T, class S>
KERNEL void LAUNCH_BOUNDS(threads, forward_blocks(false)) segment_state_kernel(Arguments<Problem> arguments) {
  const Problem& problem = arguments.problem;
  const Launch& launch = arguments.launch;
  SHARED_MEMORY(T, value_tiles, 2 * chunk * columns);
  SHARED_MEMORY(T, key_tiles, 2 * S::feature_tile);
  SHARED_MEMORY(T, row_elements, threads * S::feature_dim);
  SHARED_MEMORY(float2, row_statistics, threads);
  SHARED_MEMORY(float, affine, S::affine_floats);
  SHARED_MEMORY(float4, sums, S::sums_size);
  SHARED_MEMORY(Origins<T>, origins, 1);
  const RowTile<T> row_tile{row_elements, row_statistics};
  const Lane lane;
  if (threadIdx.x == 0) origins->set(arguments);
  sync_threads();
  const Span& span = origins->span;
  if (span.segment + 1 == launch.segments && !launch.all_segments) return;
  const int rows_end = span.rows, columns_left = static_cast<int>(problem.head_dim) - first_column();
  load_affine<S>(affine, arguments, span.kv_head);
  const float* const key_affine = affine + arguments.group_size * S::affine_size;

  State<S> state(sums);
  state.clear();
  const int token = static_cast<int>(threadIdx.x);  // threads 64..127 hold no row
  const auto bring = [&](const auto& step, int stage, int first) {
    if (token < chunk) {
      step.template rows<T, S>(row_tile, origins->k, row_stride(problem.k), arguments.pieces.k,
                               origins->key_statistics, first + token, rows_end);
    }
    step.values(value_tiles + stage * chunk * columns, origins->v, row_stride(problem.v), arguments.pieces.v,
                first, rows_end, columns_left);
    step.commit();
  };

  sync_threads();  // affine
  if (rows_end > 0) bring(Start(), 0, 0);
  int stage = 0;
  for (int first = 0; first < rows_end; first += chunk, stage ^= 1) {
    T* const keys = key_tiles + stage * S::feature_tile;
    copy_async_wait<0>();
    if (arguments.pieces.read == 2) bring(Settle(), stage, first);
    sync_warp();
    if (token < chunk) {
      store_row<T, S>(keys, token, row_tile, first + token < rows_end, key_affine, problem.layer_norm,
                      arguments.layer_norm_eps);
    }
    sync_threads();
    if (first + chunk < rows_end) bring(Start(), stage ^ 1, first + chunk);
    add_chunk<T, S, false>(state, keys, value_tiles + stage * chunk * columns, {}, lane);
  }
  store_state(arguments.slots + span.slot * Slot<S>::size, state, lane);
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
