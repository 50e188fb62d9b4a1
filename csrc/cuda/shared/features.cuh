// The feature maps as the SIMT kernels see them: every feature is a product of two rows of a transposed tile
// of x that has a row of ones (index dim) and a row of zeros (dim + 1) at its end.
//
// The elementwise maps are applied to x as it is loaded and are linear from there on, so that one set of
// loops serves all maps:   constant 1 (taylor)   linear x_i (taylor, square, elu)   circulant x_i x_j (outer,
// taylor) in the public order. The scale is multiplied into q' as it is loaded; what is left of the
// query-side weight is the polynomial's coefficient, and 2 for the circulant entries off the diagonal. States
// inside kernels are unweighted; the side that reads a state applies the weights.
#pragma once

#include "cuda/device/device.cuh"
#include "op/feature_map.h"

namespace rebased::REBASED_BACKEND {

template <class A>
struct Features {
  FeatureMap map;
  int dim, count;
  int linear_begin, circulant_begin;  // of the features that come in; count where there are none
  A constant, linear, quadratic;      // sim = constant + linear u + quadratic u^2
  A query_scale;

  DEVICE Features(FeatureMap feature_map, int64_t feature_dim, double scale)
      : map(feature_map), dim(static_cast<int>(feature_dim)) {
    const bool polynomial_map = is_polynomial(map);
    count = static_cast<int>(num_features(map, feature_dim));
    circulant_begin = polynomial_map ? static_cast<int>(rebased::circulant_begin(map, feature_dim)) : count;
    linear_begin = map == FeatureMap::taylor ? 1 : 0;
    const Polynomial a = polynomial_map ? polynomial(map) : Polynomial{0, 1, 0};
    constant = static_cast<A>(a.a0);
    linear = static_cast<A>(a.a1);
    quadratic = static_cast<A>(a.a2);
    query_scale = polynomial_map ? static_cast<A>(scale) : A(1);
  }

  DEVICE A score(A u) const { return constant + u * (linear + quadratic * u); }
  DEVICE A score_derivative(A u) const { return linear + 2 * quadratic * u; }

  // The two rows of the tile whose product is feature f; past `count` they are zeros.
  struct Pair {
    int first, second;
  };
  DEVICE Pair pair(int f) const {
    if (f >= count) return {dim + 1, dim + 1};
    if (f < linear_begin) return {dim, dim};
    if (f < circulant_begin) return {f - linear_begin, dim};
    const int entry = f - circulant_begin;
    const int offset = entry / dim, first = entry - offset * dim;
    const int second = first + offset;
    return {first, second < dim ? second : second - dim};
  }

  DEVICE A weight(int f) const {
    if (f < linear_begin) return constant;
    if (f < circulant_begin) return linear;
    return f < circulant_begin + dim ? quadratic : 2 * quadratic;
  }

  // The elementwise part, and its derivative (the scale's for the others).
  DEVICE A apply(A x, A scale) const {
    return map == FeatureMap::square ? x * x : map == FeatureMap::elu ? elu_feature(x) : x * scale;
  }
  DEVICE A derivative(A x, A scale) const {
    return map == FeatureMap::square ? 2 * x : map == FeatureMap::elu ? elu_feature_derivative(x) : scale;
  }

  // body(feature, first, second, length) for runs of circulant features: feature + n is the product of rows
  // first + n and second + n. Of the offsets offset_begin, offset_begin + 1, ... up to offset_end or the
  // last.
  template <class Body>
  DEVICE void for_each_run(int offset_begin, int offset_end, const Body& body) const {
    for (int offset = offset_begin; offset < offset_end; ++offset) {
      const int feature = circulant_begin + offset * dim;
      const int length = minimum(dim, count - feature);
      if (length <= 0) return;
      const int straight = minimum(dim - offset, length);
      body(feature, 0, offset, straight);
      if (length > straight) body(feature + straight, straight, 0, length - straight);
    }
  }
};

}  // namespace rebased::REBASED_BACKEND
