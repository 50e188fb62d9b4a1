// Heads wider than one block's value columns: several blocks then share a head, and the end of backward sums
// what each of them has of grad q', of grad k' and of the initial state's sums.
#pragma once

#include "cuda/plan/fixed_shape.h"
#include "cuda/shared/block.cuh"

namespace rebased::REBASED_BACKEND {

// The block's first value column, where blockIdx.y counts the column groups.
DEVICE int first_column() { return fixed_shape::columns * static_cast<int>(blockIdx.y); }

constexpr int finish_threads = 128;

// partial (groups, batch, heads, seqlen, dim): the sum over the column groups, in order. For "token"
// LayerNorm it is left in group 0, whose next kernel goes on; else it goes through affine and LayerNorm to
// grad x. A thread per entry, dim a power of two up to 32; rows outside bounds[0] .. bounds[num_sequences]
// are left alone. Grid: for each head of the batch head_blocks blocks, so that 32-bit numbers tell where a
// thread's entry is.
template <class E>
KERNEL void LAUNCH_BOUNDS(finish_threads, 1)
    finish_gradients(Accumulator<E>* partial, int groups, ConstRows x, Affine affine, MutableRows grad_x,
                     unsigned head_blocks, unsigned heads, int64_t seqlen, int dim, LayerNorm layer_norm,
                     double layer_norm_eps, const int64_t* bounds, int64_t num_sequences) {
  using A = Accumulator<E>;
  const unsigned number = blockIdx.x / head_blocks, block = blockIdx.x - number * head_blocks;
  const unsigned batch = number / heads, head = number - batch * heads;
  const unsigned block_row = threadIdx.x / dim, i = threadIdx.x - block_row * dim;
  const int64_t row = static_cast<int64_t>(block) * (finish_threads / dim) + block_row;
  const bool present = row < seqlen && !(bounds && (row < bounds[0] || row >= bounds[num_sequences]));
  A* const entry = partial + (number * seqlen + row) * dim + i;
  const int64_t group_step = static_cast<int64_t>(gridDim.x / head_blocks) * seqlen * dim;
  A gradient = 0;
  for (int group = 0; present && group < groups; ++group) gradient += entry[group * group_step];
  if (layer_norm == LayerNorm::token) {
    if (present) *entry = gradient;
    return;
  }
  const auto mean_of_row = [&](A value) {
    for (int distance = 1; distance < dim; distance *= 2) value += shuffle_xor(value, distance);
    return value / dim;
  };
  if (present && affine.gamma) {
    gradient *= static_cast<const A*>(affine.gamma)[head * affine.gamma_head_stride + i];
  }
  if (layer_norm == LayerNorm::head) {
    const A value = present ? convert<A>(head_rows<E>(x, batch, head, row)[i]) : A(0);
    const A centred = value - mean_of_row(value);
    const A deviation = reciprocal_sqrt(mean_of_row(centred * centred) + static_cast<A>(layer_norm_eps));
    const A normalized = centred * deviation, mean = mean_of_row(gradient),
            dot = mean_of_row(gradient * normalized);
    gradient = deviation * (gradient - mean - normalized * dot);
  }
  if (present) head_rows<E>(grad_x, batch, head, row)[i] = convert<E>(gradient);
}

// target (count) = sum over the groups of partial (groups, count), in order.
template <class A>
KERNEL void LAUNCH_BOUNDS(finish_threads, 1)
    sum_groups(const A* partial, int groups, int64_t count, A* target) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * finish_threads + threadIdx.x;
  if (index >= count) return;
  A sum = 0;
  for (int group = 0; group < groups; ++group) sum += partial[group * count + index];
  target[index] = sum;
}

}  // namespace rebased::REBASED_BACKEND
