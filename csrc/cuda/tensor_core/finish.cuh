// The end of backward for heads wider than 64 columns: each column group has computed a summand of grad q',
// of grad k' and of the gradient of the initial state's denominator, and these kernels add them up.
#pragma once

#include "cuda/tensor_core/rows.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

constexpr int finish_threads = 128;

// partial (groups, rows, d), of all rows of (batch, heads, seqlen): the sum over the groups, in order. For
// "token" LayerNorm it is left in group 0, whose next kernel goes on; else it goes through affine and
// LayerNorm to grad x, as finish_rows does. A thread per row; rows outside bounds[0] .. bounds[num_sequences]
// are left alone.
template <class T, int feature_dim>
KERNEL void LAUNCH_BOUNDS(finish_threads, 1)
    finish_gradient_kernel(float* partial, int groups, ConstRows x, Affine affine, MutableRows grad_x,
                           int64_t heads, int64_t rows, int64_t seqlen, LayerNorm layer_norm,
                           float layer_norm_eps, const int64_t* bounds, int64_t num_sequences) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * finish_threads + threadIdx.x;
  if (index >= rows) return;
  const int64_t row = index % seqlen, head = index / seqlen % heads, batch = index / seqlen / heads;
  if (bounds && (row < bounds[0] || row >= bounds[num_sequences])) return;
  float gradient[feature_dim];
  UNROLL for (int i = 0; i < feature_dim; i += 4) {
    float4 sum = load_global<float4>(partial + index * feature_dim + i);
    for (int group = 1; group < groups; ++group) {
      const float4 value = load_global<float4>(partial + (group * rows + index) * feature_dim + i);
      sum.x += value.x, sum.y += value.y, sum.z += value.z, sum.w += value.w;
    }
    gradient[i] = sum.x, gradient[i + 1] = sum.y, gradient[i + 2] = sum.z, gradient[i + 3] = sum.w;
    if (layer_norm == LayerNorm::token) store_global(partial + index * feature_dim + i, sum);
  }
  if (layer_norm == LayerNorm::token) return;

  const T* const source =
      static_cast<const T*>(x.data) + batch * x.batch_stride + head * x.head_stride + row * x.row_stride;
  float value[feature_dim];
  UNROLL for (int i = 0; i < feature_dim / 8; ++i) {
    unpack_unit<T>(value, i, load_constant<uint4>(source + 8 * i));
  }
  const float2 statistics = row_statistics(value, layer_norm, {}, layer_norm_eps);
  const float* const gamma = static_cast<const float*>(affine.gamma);
  float sum = 0, product = 0;
  UNROLL for (int i = 0; i < feature_dim; ++i) {
    value[i] = (value[i] - statistics.x) * statistics.y;
    if (gamma) gradient[i] *= gamma[head * affine.gamma_head_stride + i];
    sum += gradient[i];
    product += gradient[i] * value[i];
  }
  if (layer_norm == LayerNorm::head) {
    UNROLL for (int i = 0; i < feature_dim; ++i) {
      gradient[i] = statistics.y * (gradient[i] - (sum + value[i] * product) * (1.0f / feature_dim));
    }
  }
  T* const target = static_cast<T*>(grad_x.data) + batch * grad_x.batch_stride + head * grad_x.head_stride +
                    row * grad_x.row_stride;
  UNROLL for (int i = 0; i < feature_dim; i += 8) {
    store_global(target + i,
                 uint4{pack<T>(gradient[i], gradient[i + 1]), pack<T>(gradient[i + 2], gradient[i + 3]),
                       pack<T>(gradient[i + 4], gradient[i + 5]), pack<T>(gradient[i + 6], gradient[i + 7])});
  }
}

// target (count) = sum over the groups of partial (groups, count), in order.
template <class Sum>
KERNEL void LAUNCH_BOUNDS(finish_threads, 1)
    sum_groups_kernel(const Sum* partial, int groups, int64_t count, Sum* target) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * finish_threads + threadIdx.x;
  if (index >= count) return;
  Sum sum = 0;
  for (int group = 0; group < groups; ++group) sum += partial[group * count + index];
  target[index] = sum;
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
