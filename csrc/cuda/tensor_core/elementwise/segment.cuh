// The pass that leaves the states of segments in the workspace, for the elementwise maps: the forward's walk
// over k and v alone.
#pragma once

#include "cuda/tensor_core/elementwise/state.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::elementwise {

// Leaves the sums over the rows of each segment in the segment's slot; those of the last segment only where
// launch.all_segments says so.
template <class T, class S>
KERNEL void LAUNCH_BOUNDS(threads, 6) segment_state_kernel(Arguments<Problem> arguments) {
  const Problem& problem = arguments.problem;
  SHARED_MEMORY(T, value_tiles, 2 * S::value_tile);
  SHARED_MEMORY(T, key_tiles, 2 * S::row_tile);
  SHARED_MEMORY(float2, statistics, warps * 2 * tile);
  SHARED_MEMORY(float4, affine, S::affine_size);
  SHARED_MEMORY(float, sums, S::feature_dim);
  SHARED_MEMORY(Origins<T>, origins, 1);
  Lane lane;
  lane.warp = shuffle(lane.warp, 0);
  if (threadIdx.x == 0) origins->set(arguments, S::chunk);
  float2* const own_statistics = statistics + lane.warp * 2 * tile;
  if (problem.layer_norm == LayerNorm::none) own_statistics[lane.lane] = float2{0, 1};
  sync_threads();
  const Span& span = origins->span;
  if (span.segment + 1 == arguments.launch.segments && !arguments.launch.all_segments) return;
  const int rows_end = span.rows, columns_left = static_cast<int>(problem.head_dim) - first_column();
  load_affine<S>(affine, arguments, span.kv_head, 0);

  State<S> state;
  state.z = sums;
  if (lane.warp == 0 && lane.lane < S::feature_dim) sums[lane.lane] = 0;
  NextRows<T, S> next_rows(*origins, problem, lane);
  const auto copy_chunk = [&](int first, auto whole) {
    constexpr bool all = decltype(whole)::value;
    const int stage = first / S::chunk % 2, rows_left = rows_end - first;
    next_rows.template copy_keys<all>(key_tiles + stage * S::row_tile, value_tiles + stage * S::value_tile,
                                      problem, rows_left, columns_left);
    if (problem.layer_norm == LayerNorm::token) {
      next_rows.template copy_statistics<all>(own_statistics, first, rows_left, lane);
    }
  };
  const auto copy = [&](int first) {
    if (first + S::chunk <= rows_end && columns_left >= columns) {
      copy_chunk(first, std::true_type());
    } else {
      copy_chunk(first, std::false_type());  // counted 0: rows or columns are missing
    }
    copy_async_commit();
    next_rows.advance_keys(problem);
  };

  if (rows_end > 0) copy(0);
  sync_threads();  // affine
  NO_UNROLL for (int first = 0; first < rows_end; first += S::chunk) {
    const int stage = first / S::chunk % 2, token = tile * lane.warp;
    T* const keys = key_tiles + stage * S::row_tile;
    T* const key_rows = keys + token * S::raw_stride;
    copy_async_wait<0>();
    sync_warp();
    if (problem.layer_norm == LayerNorm::head) {  // counted 0: "head" LayerNorm
      polynomial::head_statistics<S>(own_statistics, key_rows, key_rows, arguments.layer_norm_eps, lane);
      sync_warp();
    }
    finish_keys<S>(key_rows, own_statistics, affine, rows_end - first - token, lane);
    sync_threads();  // phi(k') and v are there, and those of the chunk before are free
    if (first + S::chunk < rows_end) copy(first + S::chunk);
    add_chunk(state, keys, value_tiles + stage * S::value_tile, lane);
  }
  sync_warp();  // z
  state.store(arguments.slots + span.slot * S::Slot::size, lane);
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::elementwise
