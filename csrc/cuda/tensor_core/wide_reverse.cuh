// What the two backward sweeps of `outer` with d = 32 on tensor cores share: their tiles in shared memory, as
// sweep.cuh has them, and the kernel that sums the reverse state over the rows of each segment, as
// reverse.cuh has it.
#pragma once

#include "cuda/tensor_core/wide_gradient.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

// The tiles of a sweep in dynamic shared memory.
template <class T>
struct WideSweepTiles {
  static constexpr int value_tile = chunk * columns, row_tile = threads * Wide::feature_dim;
  static constexpr int state_tile = columns * wide_state_stride, staging_size = wide_warps * tile * tile;
  static constexpr int joined = Wide::units * threads;  // float4

  T *values, *gradients, *rows;  // two stages each
  T *queries, *keys, *state, *staging;
  T* y;                        // in the reverse sweep alone
  Exchange exchange;           // its tiles; the sweep for grad q needs only `joined` of them
  float4* gathered_values;     // with several query heads: as many as the tiles of `exchange`
  float4* gathered_gradients;  // with several query heads: `joined`

  DEVICE WideSweepTiles(char* memory, bool reverse)
      : values(reinterpret_cast<T*>(memory)),
        gradients(values + 2 * value_tile),
        rows(gradients + 2 * value_tile),
        queries(rows + 2 * row_tile),
        keys(queries + Wide::feature_tile),
        state(keys + Wide::feature_tile),
        staging(state + state_tile),
        y(staging + staging_size),
        exchange{reinterpret_cast<float4*>(y + (reverse ? value_tile : 0))},
        gathered_values(exchange.tiles + (reverse ? Exchange::size : joined)),
        gathered_gradients(gathered_values + Exchange::size) {}

  static constexpr int64_t bytes(bool reverse, bool gathers) {
    return static_cast<int64_t>(sizeof(T)) * ((reverse ? 5 : 4) * value_tile + 2 * row_tile +
                                              2 * Wide::feature_tile + state_tile + staging_size) +
           static_cast<int64_t>(sizeof(float4)) *
               ((reverse ? Exchange::size : joined) + (gathers ? Exchange::size + joined : 0));
  }
};

// The range of the whole state, as shared_range gives it for the state of four warps.
template <class T>
DEVICE Range wide_shared_range(const float* warp_maxima) {
  if constexpr (is_bfloat16<T>) {
    return {1.0f, 1.0f};
  } else {
    float bound = 0;
    for (int warp = 0; warp < wide_warps; ++warp) bound = maximum(bound, warp_maxima[warp]);
    return range_of(bound);
  }
}

// Leaves the reverse sums over the rows of each segment in the segment's slot; those of the first segment
// only where launch.all_segments says so.
template <class T>
KERNEL void LAUNCH_BOUNDS(Wide::threads, 1)
    wide_reverse_segment_kernel(Arguments<BackwardProblem> arguments) {
  DYNAMIC_SHARED_MEMORY(T, gradient_tiles);  // two stages
  SHARED_MEMORY(T, y, chunk * columns);
  SHARED_MEMORY(T, queries, Wide::feature_tile);
  SHARED_MEMORY(T, row_elements, threads * Wide::feature_dim);
  SHARED_MEMORY(float2, given_statistics, threads);
  SHARED_MEMORY(float, affine, Wide::affine_floats);
  SHARED_MEMORY(float, r, chunk);
  SHARED_MEMORY(float, row_floats, QueryRows<T>::size);
  SHARED_MEMORY(float4, gram, Wide::threads);
  SHARED_MEMORY(BackwardOrigins<T>, origins, 1);
  const BackwardProblem& problem = arguments.problem;
  const RowTile<T> row_tile{row_elements, given_statistics};
  const QueryRows<T> query_rows(row_floats);
  const WideLane lane;
  if (threadIdx.x == 0) origins->set(arguments);
  sync_threads();
  const Span& span = origins->span;
  if (span.segment == 0 && !arguments.launch.all_segments) return;
  const int group_size = arguments.group_size, rows_end = span.rows;
  const int columns_left = static_cast<int>(problem.head_dim) - first_column();
  load_affine<Wide>(affine, arguments, span.kv_head);
  WideState state(gram);
  state.clear();

  const int token = static_cast<int>(threadIdx.x);  // the other threads hold no row
  const auto stage_of = [&](int first, int head) { return (first / chunk * group_size + head) & 1; };
  const auto bring = [&](const auto& step, int first, int head) {
    if (token < chunk) {
      step.template rows<T, Wide>(row_tile, origins->q + head * problem.q.head_stride, row_stride(problem.q),
                                  arguments.pieces.q, origins->query_statistics, first + token, rows_end);
    }
    origins->template bring_gradients<Wide::threads>(step,
                                                     gradient_tiles + stage_of(first, head) * chunk * columns,
                                                     y, r, arguments, first, head, rows_end, columns_left);
    step.commit();
  };
  sync_threads();  // affine
  int first = (rows_end + chunk - 1) / chunk * chunk - chunk, head = group_size - 1;
  if (first >= 0) bring(Start(), first, head);
  while (first >= 0) {
    T* const gradients = gradient_tiles + stage_of(first, head) * chunk * columns;
    copy_async_wait<0>();
    if (arguments.pieces.read == 2) bring(Settle(), first, head);
    sync_threads();
    if (token < chunk) {
      store_row<T, Wide>(queries, token, row_tile, first + token < rows_end,
                         affine + head * Wide::affine_size, problem.layer_norm, arguments.layer_norm_eps);
    }
    const ChunkScale scales = chunk_scale<T>(r, rows_end - first, lane);
    scale_gradients<T, Wide::threads>(gradients, y, r, query_rows, scales, nullptr, 0, problem.normalize);
    if (head == 0) first -= chunk;
    head = head == 0 ? group_size - 1 : head - 1;
    sync_threads();
    if (first >= 0) bring(Start(), first, head);
    add_chunk<T, true>(state, queries, gradients,
                       {query_rows.minus_delta, query_rows.sum_scales, scales.sum_inverse}, lane);
  }
  store_state(arguments.slots + span.slot * Slot<Wide>::size, state);
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
