// The small kernels around split and packed sequences: cu_seqlens clamped, segments' local states turned into
// running ones in a fixed order, and rows that belong to no sequence filled.
#pragma once

#include "cuda/device/load_ahead.cuh"
#include "cuda/general/block.cuh"

namespace rebased::REBASED_BACKEND {

constexpr int scan_threads = 256;

// bounds[s] = max(0, cu_seqlens[0 .. s]) limited to seqlen: ascending whatever cu_seqlens holds. One block.
template <int threads>
KERNEL void LAUNCH_BOUNDS(threads, 1)
    clamp_bounds(const int64_t* cu_seqlens, int64_t count, int64_t seqlen, int64_t* bounds) {
  SHARED_MEMORY(int64_t, largest, threads);
  const int64_t length = (count + threads - 1) / threads;
  const int64_t begin = minimum(threadIdx.x * length, count), end = minimum(begin + length, count);
  int64_t running = 0;
  for (int64_t i = begin; i < end; ++i) running = maximum(running, cu_seqlens[i]);
  largest[threadIdx.x] = running;
  sync_threads();
  running = 0;
  for (unsigned thread = 0; thread < threadIdx.x; ++thread) running = maximum(running, largest[thread]);
  for (int64_t i = begin; i < end; ++i) {
    running = maximum(running, cu_seqlens[i]);
    bounds[i] = minimum(running, seqlen);
  }
}

// slots (sequences, kv_heads, segments, slot_size). Forward: slot s = initial + the sum of the local states
// in slots 1 .. s; reverse: slot s = initial + the sum of the local ones in slots s .. segments - 2. A thread
// owns one entry of all segments.
template <class A, bool reverse, class AnyProblem>
KERNEL void LAUNCH_BOUNDS(scan_threads, 1) scan_states(Call<AnyProblem> call, ConstState initial) {
  const AnyProblem& problem = call.problem;
  const int64_t size = call.tiles.slot_size();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * scan_threads + threadIdx.x;
  if (index >= problem.num_sequences * problem.kv_heads * size) return;
  const int64_t state = index / size;
  const int entry = static_cast<int>(index - state * size);
  const Features<A> features(problem.feature_map, problem.feature_dim, problem.scale);
  A* const slots = call.template region<A>(reverse ? call.workspace.reverse_states : call.workspace.states) +
                   state * call.segments * size + entry;
  A running =
      import_entry(initial, state, entry, call.tiles, static_cast<int>(problem.head_dim), features, reverse);
  A* const slot = slots + (reverse ? (call.segments - 1) * size : 0);
  const int64_t step = reverse ? -size : size;
  *slot = running;
  visit_ahead(slot + step, step, call.segments - 1, [&](A* next, A own) { *next = running += own; });
}

// rows of `width` elements that no sequence owns = value. Grid: fill_blocks per head.
constexpr int fill_blocks = 8;
template <class T>
KERNEL void LAUNCH_BOUNDS(scan_threads, 1)
    fill_rows_of_no_sequence(MutableRows rows, int width, T value, const int64_t* bounds,
                             int64_t num_sequences, int64_t seqlen) {
  T* const target = static_cast<T*>(rows.data) + blockIdx.x / fill_blocks * rows.head_stride;
  const int64_t before = bounds[0], after = bounds[num_sequences];
  const int64_t count = before + seqlen - after;
  const int64_t first = blockIdx.x % fill_blocks * scan_threads + threadIdx.x;
  for (int64_t index = first; index < count * width; index += fill_blocks * scan_threads) {
    const int64_t outside = index / width, column = index - outside * width;
    const int64_t row = outside < before ? outside : outside - before + after;
    target[row * rows.row_stride + column] = value;
  }
}

}  // namespace rebased::REBASED_BACKEND
