// LayerNorm and affine of the rows of one head, as every family of kernels has them.
#pragma once

#include "cuda/device/device.cuh"
#include "op/problem.h"

namespace rebased::REBASED_BACKEND {

// How the rows of one head are normalised.
template <class A>
struct Norm {
  LayerNorm mode;
  A eps;
  const A* gamma;  // of this head, or null
  const A* beta;
  const A* statistics;  // of the "token" LayerNorm: mean and 1 / standard deviation of the chunk's rows
  A scale;              // of the polynomial maps' input: the query side's

  DEVICE A affine(A x, int i) const { return (gamma ? gamma[i] : A(1)) * x + (beta ? beta[i] : A(0)); }
};

// The normalisation of a head's rows; `at` is that of the rows from `row` on.
template <class A>
struct HeadNorm {
  const Affine& affine;
  const A* statistics;  // (batch, seqlen, 2) or null
  A scale;

  template <class AnyProblem>
  DEVICE Norm<A> at(const AnyProblem& problem, int64_t batch, int64_t head, int64_t row) const {
    Norm<A> norm;
    norm.mode = problem.layer_norm;
    norm.eps = static_cast<A>(problem.layer_norm_eps);
    norm.gamma =
        affine.gamma ? static_cast<const A*>(affine.gamma) + head * affine.gamma_head_stride : nullptr;
    norm.beta = affine.beta ? static_cast<const A*>(affine.beta) + head * affine.beta_head_stride : nullptr;
    norm.statistics = statistics ? statistics + 2 * (batch * problem.seqlen + row) : nullptr;
    norm.scale = scale;
    return norm;
  }
};

// Mean and 1 / standard deviation of a row that one thread holds. `given`: those of the "token" LayerNorm.
template <int dim>
DEVICE float2 row_statistics(const float (&x)[dim], LayerNorm layer_norm, float2 given, float epsilon) {
  if (layer_norm == LayerNorm::none) return {0.0f, 1.0f};
  if (layer_norm == LayerNorm::token) return given;
  float mean = 0, variance = 0;
  UNROLL for (int i = 0; i < dim; ++i) mean += x[i];
  mean *= 1.0f / dim;
  UNROLL for (int i = 0; i < dim; ++i) variance += (x[i] - mean) * (x[i] - mean);
  return {mean, reciprocal_sqrt(variance * (1.0f / dim) + epsilon)};
}

}  // namespace rebased::REBASED_BACKEND
