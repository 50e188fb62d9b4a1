// gamma and beta: how the kernels with fixed tiles hold them in shared memory, and the sums of the blocks'
// partial gradients of them.
#pragma once

#include "cuda/shared/warp_rows.cuh"
#include "op/problem.h"

namespace rebased::REBASED_BACKEND {

// affine (group + 1, 2, dim) in shared memory = gamma and beta of each query head of a block of `threads`,
// then of its kv head; 1 and 0 where absent. adjust(value, is_key) is what is kept of one of them.
template <int dim, int threads, class Adjust>
DEVICE void load_affine(float* affine, const Problem& problem, int64_t kv_head, int group,
                        const Adjust& adjust) {
  constexpr int size = 2 * dim;
  for (int n = static_cast<int>(threadIdx.x); n < (group + 1) * size; n += threads) {
    const int member = n / size, i = n % dim;
    const bool is_beta = n % size >= dim, is_key = member == group;
    const Affine& source = is_key ? problem.key_affine : problem.query_affine;
    const int64_t head = is_key ? kv_head : kv_head * group + member;
    const float* const values = static_cast<const float*>(is_beta ? source.beta : source.gamma);
    const int64_t stride = is_beta ? source.beta_head_stride : source.gamma_head_stride;
    const float value = values ? values[head * stride + i] : (is_beta ? 0.0f : 1.0f);
    affine[n] = adjust(value, is_key);
  }
}

// Where the blocks' sums of the gradients of gamma and beta, partials (sequences, heads, segments, 2, dim),
// go: target (dim), or (heads, dim) where head_stride is not 0; null where not wanted. 0 is gamma, 1 beta.
template <class A>
struct AffineSums {
  const A* partials;
  int64_t heads, segments;
  A* target[2];
  int64_t head_stride[2];
};

// Sums the partials in a fixed order. Grid: heads of the target, queries and keys, gamma and beta. The warps
// of a block share the terms of 32 features at a time, `terms_at_once` of them under way in each.
constexpr int affine_threads = 512, terms_at_once = 4;
template <class A>
KERNEL void LAUNCH_BOUNDS(affine_threads, 1)
    sum_affine_gradients(Parts<AffineSums<A>> parts, int64_t sequences, int dim) {
  SHARED_MEMORY(A, sums, affine_threads);
  const AffineSums<A> of = parts.chosen();
  const unsigned which = blockIdx.z;
  const int64_t head = blockIdx.x;
  A* const target = which == 0 ? of.target[0] : of.target[1];
  const int64_t head_stride = which == 0 ? of.head_stride[0] : of.head_stride[1];
  const bool per_head = head_stride != 0;
  if (!target || head >= (per_head ? of.heads : 1)) return;

  // of each sequence, a run of terms side by side: a head's segments, or all heads'
  constexpr int warps = affine_threads / 32;
  const int64_t run = per_head ? of.segments : of.heads * of.segments;
  const int64_t sequence_step = warps / run, term_step = warps % run;
  const A* const terms = of.partials + (head * of.segments * 2 + which) * dim;
  for (int begin = 0; begin < dim; begin += 32) {
    const int warp = threadIdx.x / 32, i = begin + threadIdx.x % 32;
    int64_t sequence = warp / run, term = warp % run;
    A sum = 0;
    while (i < dim && sequence < sequences) {
      A values[terms_at_once];
      UNROLL for (int n = 0; n < terms_at_once; ++n) {
        values[n] =
            sequence < sequences ? terms[(sequence * of.heads * of.segments + term) * 2 * dim + i] : A(0);
        sequence += sequence_step;
        term += term_step;
        if (term >= run) {
          term -= run;
          ++sequence;
        }
      }
      UNROLL for (int n = 0; n < terms_at_once; ++n) sum += values[n];
    }
    sums[threadIdx.x] = sum;
    sync_threads();
    if (warp == 0 && i < dim) {
      for (int part = 1; part < warps; ++part) sum += sums[threadIdx.x + 32 * part];
      target[head * head_stride + i] = sum;
    }
    sync_threads();
  }
}

}  // namespace rebased::REBASED_BACKEND
