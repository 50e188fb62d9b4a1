// LayerNorm over all heads of a token, whose statistics no block of one head can know: a prepass, and the
// last step of backward. Also what backward needs around the per-head kernels: delta, and the sums of the
// blocks' partial gradients of gamma and beta.
#pragma once

#include "cuda/general_block.cuh"

namespace rebased::REBASED_BACKEND {

constexpr int row_threads = 128;
constexpr int rows_per_block = row_threads / 32;  // a warp each

template <class A>
DEVICE A warp_sum(A value) {
  for (int distance = 16; distance > 0; distance /= 2) value += shuffle_xor(value, distance);
  return value;
}

// statistics (tokens, 2) = mean and 1 / standard deviation over (heads, dim) of each token.
template <class E>
KERNEL void LAUNCH_BOUNDS(row_threads, 1)
    token_statistics(ConstRows rows, int64_t heads, int64_t tokens, int64_t seqlen, int dim, double eps,
                     Accumulator<E>* statistics) {
  using A = Accumulator<E>;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / 32;
  if (token >= tokens) return;
  const int lane = threadIdx.x % 32;
  const E* const x = head_rows<E>(rows, token / seqlen, 0, token % seqlen);
  const int count = static_cast<int>(heads) * dim;
  const auto at = [&](int index) {
    const int head = index / dim;
    return convert<A>(x[head * rows.head_stride + index - head * dim]);
  };
  A mean = 0;
  for (int index = lane; index < count; index += 32) mean += at(index);
  mean = warp_sum(mean) / count;
  A variance = 0;
  for (int index = lane; index < count; index += 32) variance += (at(index) - mean) * (at(index) - mean);
  variance = warp_sum(variance) / count;
  if (lane == 0) {
    statistics[2 * token] = mean;
    statistics[2 * token + 1] = reciprocal_sqrt(variance + static_cast<A>(eps));
  }
}

// grad x from gradient (batch, heads, seqlen, dim) = d loss / d (gamma LayerNorm(x) + beta), over a token's
// heads:
//   grad x = rstd (h - mean(h) - x^ mean(h x^)),   h = gamma gradient,   x^ = (x - mean) rstd
// Tokens outside bounds[0] .. bounds[num_sequences] are left alone.
template <class E>
KERNEL void LAUNCH_BOUNDS(row_threads, 1)
    token_norm_backward(ConstRows rows, Affine affine, const Accumulator<E>* statistics,
                        const Accumulator<E>* gradient, MutableRows grad_x, int64_t heads, int64_t tokens,
                        int64_t seqlen, int dim, const int64_t* bounds, int64_t num_sequences) {
  using A = Accumulator<E>;
  const int64_t token = static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / 32;
  if (token >= tokens) return;
  const int64_t batch = token / seqlen, row = token % seqlen;
  if (bounds && (row < bounds[0] || row >= bounds[num_sequences])) return;
  const int lane = threadIdx.x % 32;
  const E* const x = head_rows<E>(rows, batch, 0, row);
  E* const target = head_rows<E>(grad_x, batch, 0, row);
  const A* const gamma = static_cast<const A*>(affine.gamma);
  const A mean = statistics[2 * token], rstd = statistics[2 * token + 1];
  const int count = static_cast<int>(heads) * dim;
  struct Entry {
    int head, i;
    A normalized, h;
  };
  const auto at = [&](int index) {
    const int head = index / dim, i = index - head * dim;
    const A value = gradient[((batch * heads + head) * seqlen + row) * dim + i];
    return Entry{head, i, (convert<A>(x[head * rows.head_stride + i]) - mean) * rstd,
                 gamma ? gamma[head * affine.gamma_head_stride + i] * value : value};
  };
  A sum = 0, dot = 0;
  for (int index = lane; index < count; index += 32) {
    const Entry entry = at(index);
    sum += entry.h;
    dot += entry.h * entry.normalized;
  }
  sum = warp_sum(sum) / count;
  dot = warp_sum(dot) / count;
  for (int index = lane; index < count; index += 32) {
    const Entry entry = at(index);
    target[entry.head * grad_x.head_stride + entry.i] =
        convert<E>(rstd * (entry.h - sum - entry.normalized * dot));
  }
}

// delta (batch, heads, seqlen) = r sum_c grad_y y
template <class E>
KERNEL void LAUNCH_BOUNDS(row_threads, 1)
    row_deltas(ConstRows y, ConstRows grad_y, const Accumulator<E>* r, Accumulator<E>* delta, int64_t count,
               int64_t heads, int64_t seqlen, int head_dim) {
  using A = Accumulator<E>;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * rows_per_block + threadIdx.x / 32;
  if (index >= count) return;
  const int64_t row = index % seqlen, head = index / seqlen % heads, batch = index / seqlen / heads;
  const E* const value = head_rows<E>(y, batch, head, row);
  const E* const gradient = head_rows<E>(grad_y, batch, head, row);
  A sum = 0;
  for (int column = threadIdx.x % 32; column < head_dim; column += 32) {
    sum += convert<A>(value[column]) * convert<A>(gradient[column]);
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) delta[index] = r[index] * sum;
}

// partials (sequences, heads, segments, 2, dim): grad gamma and grad beta of the blocks, summed in a fixed
// order into target (dim), or (heads, dim) where head_stride is not 0. `which` picks gamma (0) or beta (1). A
// block per head of the target; its warps share the terms of 32 features at a time.
constexpr int affine_threads = 256;
template <class A>
KERNEL void LAUNCH_BOUNDS(affine_threads, 1)
    sum_affine_gradients(const A* partials, int64_t sequences, int64_t heads, int64_t segments, int dim,
                         int which, int64_t head_stride, A* target) {
  SHARED_MEMORY(A, sums, affine_threads);
  const int64_t first_head = head_stride ? blockIdx.x : 0, heads_summed = head_stride ? 1 : heads;
  const int64_t terms = sequences * heads_summed * segments;
  for (int begin = 0; begin < dim; begin += 32) {
    const int i = begin + threadIdx.x % 32;
    A sum = 0;
    for (int64_t term = threadIdx.x / 32; i < dim && term < terms; term += affine_threads / 32) {
      const int64_t segment = term % segments, head = first_head + term / segments % heads_summed;
      const int64_t sequence = term / segments / heads_summed;
      sum += partials[(((sequence * heads + head) * segments + segment) * 2 + which) * dim + i];
    }
    sums[threadIdx.x] = sum;
    sync_threads();
    if (threadIdx.x < 32 && i < dim) {
      for (int part = 1; part < affine_threads / 32; ++part) sum += sums[threadIdx.x + 32 * part];
      target[first_head * head_stride + i] = sum;
    }
    sync_threads();
  }
}

}  // namespace rebased::REBASED_BACKEND
