// delta of every row, by itself: what the division contributes to the gradient of the row's scores.
#pragma once

#include "cuda/shared/block.cuh"
#include "cuda/shared/warp_rows.cuh"

namespace rebased::REBASED_BACKEND {

// delta (column groups, batch, heads, seqlen) = r sum of grad_y y over the `columns` of each group, or delta
// / r where r is null. Grid: blocks of rows, column groups. `count`: the rows of (batch, heads, seqlen).
template <class E>
KERNEL void LAUNCH_BOUNDS(row_threads, 1)
    row_deltas(ConstRows y, ConstRows grad_y, const Accumulator<E>* r, Accumulator<E>* delta, int64_t count,
               int64_t heads, int64_t seqlen, int columns, int head_dim) {
  using A = Accumulator<E>;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / 32;
  if (index >= count) return;
  const int64_t row = index % seqlen, head = index / seqlen % heads, batch = index / seqlen / heads;
  const E* const y_row = head_rows<E>(y, batch, head, row);
  const E* const grad_row = head_rows<E>(grad_y, batch, head, row);
  const int first = columns * static_cast<int>(blockIdx.y), end = minimum(first + columns, head_dim);
  A sum = 0;
  for (int column = first + static_cast<int>(threadIdx.x % 32); column < end; column += 32) {
    sum += convert<A>(y_row[column]) * convert<A>(grad_row[column]);
  }
  // neighbours first, as where a sweep of the tensor cores leaves delta: the two then differ by less
  UNROLL for (int distance = 1; distance < 32; distance *= 2) sum += shuffle_xor(sum, distance);
  if (threadIdx.x % 32 == 0) delta[blockIdx.y * count + index] = r ? r[index] * sum : sum;
}

}  // namespace rebased::REBASED_BACKEND
