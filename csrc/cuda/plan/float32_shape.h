// Which problems the float32 kernels take, and how these cut them and their shared memory; the plan and the
// kernels read it.
#pragma once

#include <cstdint>

#include "cuda/plan/fixed_shape.h"
#include "op/feature_map.h"

namespace rebased {
namespace float32_path {

using namespace fixed_shape;

constexpr int feature_dim = 16;
constexpr int threads = 128;

// A sweep's tiles. A row of a feature tile is one feature of all tokens of a chunk; of a value tile, one
// token's columns; of the state, one feature's columns. Feature tiles of circulant maps repeat their first
// rows, so that x_{i + e} is found e rows after x_i without a division.
constexpr int repeated_rows = 7;
REBASED_HOST_DEVICE constexpr int feature_rows(FeatureMap map) {
  return feature_dim + (is_polynomial(map) ? repeated_rows : 0);
}
REBASED_HOST_DEVICE constexpr int state_features(FeatureMap map) {
  return static_cast<int>(num_features(map, feature_dim));
}
REBASED_HOST_DEVICE constexpr int padded_features(FeatureMap map) {
  return (state_features(map) + 3) / 4 * 4;
}

// gamma and beta of each query head of a block, then of its kv head.
constexpr int affine_size = 2 * feature_dim;
REBASED_HOST_DEVICE constexpr int affine_floats(int64_t group_size) {
  return static_cast<int>(group_size + 1) * affine_size;
}

// What a block keeps beside its sums in a long segment (plan.h, compensated_rows): for its columns of the
// state (state_features, columns), for the state's sums, and in backward for those of the gradients of gamma
// and beta.
REBASED_HOST_DEVICE constexpr int64_t carry_size(FeatureMap map, int64_t group_size) {
  return state_features(map) * columns + padded_features(map) + group_size * (threads / 32) * affine_size;
}

// Strides are an odd number of 16-byte quads where eight lanes read eight rows; else rows are contiguous.
struct ForwardShape {
  static constexpr int chunk = 64, row_stride = chunk + 4, value_stride = columns, state_stride = columns;
};

// Shared memory of the forward, as offsets in floats.
struct ForwardTiles {
  int state, sums;    // (features, columns) and (features), weighted as the query side weighs them
  int queries, keys;  // feature tiles
  int values;
  int scores;  // the lower triangle by halves: (32 keys, 64 queries), then (32 keys, the last 32 queries)
  int parts;   // (2, chunk): two parts of each token's denominator
  int affine;  // (query heads, then the kv head; 2, feature_dim): gamma, beta
  int size;

  static constexpr int half = ForwardShape::chunk / 2, half_stride = half + 4;

  REBASED_HOST_DEVICE constexpr ForwardTiles(FeatureMap map, int64_t group_size)
      : state(0),
        sums(state + state_features(map) * ForwardShape::state_stride),
        queries(sums + padded_features(map)),
        keys(queries + feature_rows(map) * ForwardShape::row_stride),
        values(keys + feature_rows(map) * ForwardShape::row_stride),
        scores(values + ForwardShape::chunk * ForwardShape::value_stride),
        parts(scores + half * (ForwardShape::row_stride + half_stride)),
        affine(parts + 2 * ForwardShape::chunk),
        size(affine + affine_floats(group_size)) {}
};

struct BackwardShape {
  static constexpr int chunk = 32, row_stride = chunk + 4, value_stride = columns + 4,
                       state_stride = columns + 4;
};

// Shared memory of either sweep of backward, as offsets in floats.
struct BackwardTiles {
  int state, sums;  // S, or T and M
  int queries, keys;
  int values, gradients;  // v, and r grad y
  int scores;             // (others, score_stride): sim of each pair; in the reverse sweep alone
  int score_gradients;    // the same: d loss / d u
  int minus_delta;        // (chunk): -r grad y . y of the queries
  int normalized;         // (feature_dim, row_stride): LayerNorm(x) of the rows
  int deviations;         // (chunk): 1 / standard deviation of the rows
  int affine;             // as in the forward
  int affine_sums;        // (query heads or 1, warps, 2, feature_dim): grad gamma, grad beta
  int size;

  // 8 of an odd multiple: lanes of four others and eight rows store to different banks
  static constexpr int score_stride = BackwardShape::chunk + 8;

  REBASED_HOST_DEVICE constexpr BackwardTiles(FeatureMap map, bool reverse, int64_t group_size)
      : state(0),
        sums(state + state_features(map) * BackwardShape::state_stride),
        queries(sums + padded_features(map)),
        keys(queries + feature_rows(map) * BackwardShape::row_stride),
        values(keys + feature_rows(map) * BackwardShape::row_stride),
        gradients(values + BackwardShape::chunk * BackwardShape::value_stride),
        scores(gradients + BackwardShape::chunk * BackwardShape::value_stride),
        score_gradients(scores + (reverse ? BackwardShape::chunk * score_stride : 0)),
        minus_delta(score_gradients + BackwardShape::chunk * score_stride),
        normalized(minus_delta + BackwardShape::chunk),
        deviations(normalized + feature_dim * BackwardShape::row_stride),
        affine(deviations + BackwardShape::chunk),
        affine_sums(affine + affine_floats(group_size)),
        size(affine_sums + static_cast<int>(reverse ? 1 : group_size) * (threads / 32) * affine_size) {}
};

// Shared memory of the kernel that forms a segment's sums by themselves, as offsets in floats.
template <class Shape>
struct StateTiles {
  int state, sums, features, values;
  int extra;   // (chunk): in backward minus_delta
  int affine;  // as in the forward
  int size;

  REBASED_HOST_DEVICE constexpr StateTiles(FeatureMap map, int64_t group_size)
      : state(0),
        sums(state + state_features(map) * Shape::state_stride),
        features(sums + padded_features(map)),
        values(features + feature_rows(map) * Shape::row_stride),
        extra(values + Shape::chunk * Shape::value_stride),
        affine(extra + Shape::chunk),
        size(affine + affine_floats(group_size)) {}
};

// States by themselves and halves of the backward take the general kernels.
inline bool is_whole(const ForwardProblem& problem) { return !problem.state_only; }
inline bool is_whole(const BackwardProblem& problem) { return problem.part == BackwardPart::all; }

template <class AnyProblem>
inline bool supports(const AnyProblem& problem) {
  return problem.dtype == Dtype::float32 && problem.feature_map != FeatureMap::identity &&
         problem.feature_dim == feature_dim && problem.head_dim >= 16 && problem.head_dim % 4 == 0 &&
         is_whole(problem) && supports_sizes(problem) &&
         all_rows(problem, [](const auto& rows) { return aligned(rows, 4); });
}

}  // namespace float32_path
}  // namespace rebased
