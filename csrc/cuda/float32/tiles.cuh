// Between global memory and the shared-memory tiles of the float32 path (cuda/plan/float32_shape.h has their
// shapes): LayerNorm + affine + map of a row of q or k on its way into a feature tile, value rows, and the
// state in and out. Features and states are in the public order. No barriers inside.
//
// blockIdx.x counts (sequence, kv head, segment) as the general path does, blockIdx.y groups of 64 columns.
#pragma once

#include "cuda/plan/float32_shape.h"
#include "cuda/shared/affine.cuh"
#include "cuda/shared/block.cuh"
#include "cuda/shared/column_groups.cuh"

namespace rebased::REBASED_BACKEND::float32_path {

using namespace rebased::float32_path;

// target = a multiple of 4 floats from an aligned address in shared memory on.
template <int count>
DEVICE void load_floats(float (&target)[count], const float* shared) {
  UNROLL for (int i = 0; i < count; i += 4) {
    const float4 value = load_shared<float4>(shared + i);
    target[i] = value.x, target[i + 1] = value.y, target[i + 2] = value.z, target[i + 3] = value.w;
  }
}

template <FeatureMap map>
DEVICE Features<float> make_features(const Problem& problem) {
  return Features<float>(map, feature_dim, problem.scale);
}

// affine = gamma and beta of each query head of the block, then of its kv head.
DEVICE void load_affine(float* affine, const Problem& problem, int64_t kv_head) {
  const int group = static_cast<int>(problem.heads / problem.kv_heads);
  rebased::REBASED_BACKEND::load_affine<feature_dim, threads>(affine, problem, kv_head, group,
                                                              [](float value, bool) { return value; });
}

// The norm with gamma and beta from shared memory.
DEVICE Norm<float> with_affine(Norm<float> norm, const float* affine) {
  norm.gamma = affine;
  norm.beta = affine + feature_dim;
  return norm;
}

// Brings row `token` of a chunk, zeros past its end, into that column of a feature tile, and LayerNorm(x)
// into that of `normalized`, where given; gives 1 / its standard deviation. A thread's work.
template <FeatureMap map, class Shape>
DEVICE float load_feature_row(float* tile, float* normalized, int token, const float* source, bool present,
                              const Features<float>& features, const Norm<float>& norm) {
  float x[feature_dim] = {};
  float2 statistics{0.0f, 1.0f};
  if (present) {
    UNROLL for (int i = 0; i < feature_dim; i += 4) {
      const float4 value = load_constant<float4>(source + i);
      x[i] = value.x, x[i + 1] = value.y, x[i + 2] = value.z, x[i + 3] = value.w;
    }
    float2 given{};
    if (norm.mode == LayerNorm::token) given = {norm.statistics[2 * token], norm.statistics[2 * token + 1]};
    statistics = row_statistics(x, norm.mode, given, norm.eps);
  }
  UNROLL for (int begin = 0; begin < feature_dim; begin += 4) {
    float gamma[4], beta[4];
    load_floats(gamma, norm.gamma + begin);
    load_floats(beta, norm.beta + begin);
    UNROLL for (int n = 0; n < 4; ++n) {
      const int i = begin + n;
      const float centred = (x[i] - statistics.x) * statistics.y;
      // a padded row is zeroed last: beta would bring it to life
      const float value = present ? features.apply(gamma[n] * centred + beta[n], norm.scale) : 0.0f;
      tile[i * Shape::row_stride + token] = value;
      if (i + feature_dim < feature_rows(map)) tile[(i + feature_dim) * Shape::row_stride + token] = value;
      if (normalized) normalized[i * Shape::row_stride + token] = centred;
    }
  }
  return statistics.y;
}

// Starts the copy of a chunk's value rows into a value tile, zeros past the last row and the last column.
template <class Shape>
DEVICE void copy_values(float* tile, const float* source, int64_t stride, int rows, int columns_left) {
  constexpr int quads = columns / 4, step = threads / quads;
  const int column = static_cast<int>(threadIdx.x % quads) * 4;
  UNROLL for (int begin = 0; begin < Shape::chunk; begin += step) {
    const int token = begin + static_cast<int>(threadIdx.x / quads);
    const bool present = token < rows && column < columns_left;
    copy_async<16>(tile + token * Shape::value_stride + column,
                   present ? source + token * stride + column : source, present ? 16 : 0);
  }
}

// Fills the block's columns of the state, and its sums, from the block's slot where the sequence is split,
// else from the given state or zeros. `reverse`: from the gradient of a state, which carries the query side's
// weights already.
template <FeatureMap map, class Shape, class AnyProblem>
DEVICE void start_state(float* state, float* sums, const Call<AnyProblem>& call, const Block& block,
                        const Region& slots, const ConstState& initial, bool reverse) {
  constexpr int count = state_features(map);
  const Features<float> features = make_features<map>(call.problem);
  const int head_dim = static_cast<int>(call.problem.head_dim), column0 = first_column();
  const bool split = block.segments > 1;
  const float* kv = static_cast<const float*>(initial.kv);
  const float* k = static_cast<const float*>(initial.k);
  if (split) {
    kv = call.template region<const float>(slots) + block.index * call.tiles.slot_size();
    k = kv + call.tiles.padded_features * head_dim;
  } else {
    if (kv) kv += block.state_index() * count * head_dim;
    if (k) k += block.state_index() * count;
  }
  const bool weighted = split || !reverse;
  const int column = static_cast<int>(threadIdx.x % columns), step = threads / columns;
  const bool present = kv && column0 + column < head_dim;
  for (int f = static_cast<int>(threadIdx.x / columns); f < count; f += step) {
    const float weight = weighted ? features.weight(f) : 1.0f;
    state[f * Shape::state_stride + column] =
        present ? weight * kv[static_cast<int64_t>(f) * head_dim + column0 + column] : 0.0f;
  }
  for (int f = static_cast<int>(threadIdx.x); f < count; f += threads) {
    sums[f] = k ? k[f] * (weighted ? features.weight(f) : 1.0f) : 0.0f;
  }
}

// What rounding takes from a block's sums: of its columns of the state as (features, columns), then of the
// state's sums, then of the sums for gamma and beta; null in short segments. The whole block clears it and,
// past the next barrier, finds it where `place` points, in shared memory: kernels that use every register
// have none for an address that is needed once a chunk.
using Carries = float* const*;
template <class AnyProblem>
DEVICE void start_carries(float** place, const Call<AnyProblem>& call, const Block& block) {
  float* const carries =
      block.carries<float>(call, static_cast<int>(gridDim.y), static_cast<int>(blockIdx.y));
  clear_carries(carries, call.carry_size);
  if (threadIdx.x == 0) *place = carries;
}

// Writes the block's columns of the state to kv (features, head_dim), and where this is the first column
// group its sums to k: as they are, or without weights, which are powers of 2.
template <FeatureMap map, class Shape>
DEVICE void store_state(const float* state, const float* sums, float* kv, float* k, int head_dim,
                        bool weighted, const Features<float>& features) {
  constexpr int count = state_features(map);
  const int column0 = first_column();
  const int column = static_cast<int>(threadIdx.x % columns), step = threads / columns;
  for (int f = static_cast<int>(threadIdx.x / columns); column0 + column < head_dim && f < count; f += step) {
    kv[static_cast<int64_t>(f) * head_dim + column0 + column] =
        state[f * Shape::state_stride + column] * (weighted ? 1.0f : 1.0f / features.weight(f));
  }
  for (int f = static_cast<int>(threadIdx.x); k && f < count; f += threads) {
    k[f] = weighted ? sums[f] : sums[f] / features.weight(f);
  }
}

}  // namespace rebased::REBASED_BACKEND::float32_path
