// Packed sequences: their bounds, clamped to what there is, and the rows that belong to no sequence.
#pragma once

#include "cuda/device/device.cuh"
#include "op/problem.h"

namespace rebased::REBASED_BACKEND {

constexpr int bounds_threads = 256;

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

// rows of `width` elements that no sequence owns = value. Grid: fill_blocks per head.
constexpr int fill_blocks = 8;
template <class T>
KERNEL void LAUNCH_BOUNDS(bounds_threads, 1)
    fill_rows_of_no_sequence(MutableRows rows, int width, T value, const int64_t* bounds,
                             int64_t num_sequences, int64_t seqlen) {
  T* const target = static_cast<T*>(rows.data) + blockIdx.x / fill_blocks * rows.head_stride;
  const int64_t before = bounds[0], after = bounds[num_sequences];
  const int64_t count = before + seqlen - after;
  const int64_t first = blockIdx.x % fill_blocks * bounds_threads + threadIdx.x;
  for (int64_t index = first; index < count * width; index += fill_blocks * bounds_threads) {
    const int64_t outside = index / width, column = index - outside * width;
    const int64_t row = outside < before ? outside : outside - before + after;
    target[row * rows.row_stride + column] = value;
  }
}

}  // namespace rebased::REBASED_BACKEND
