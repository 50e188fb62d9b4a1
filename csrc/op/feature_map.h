// The feature maps phi, the weights of their features on the query side, and their derivatives. Host and
// device code of every backend includes this file; it includes problem.h alone.
//
// States enter and leave every backend in the public order of features:
//   outer     circulant: entry (e, i) is x_i x_((i + e) mod d), with offsets e = 0..d/2. For even d the last
//             offset has its first d/2 entries only, since the others repeat them. In all d(d + 1)/2 entries.
//   taylor    the constant 1, then x (d entries), then the circulant entries
//   square    x_i^2
//   elu       elu(x_i) + 1
//   identity  x_i
// The features of keys carry no weight and no scale, so that a state does not depend on `scale`. The query
// side carries both: sim(q', k') = sum_f weight(f) phi_f(q') phi_f(k').
//
// The maps `outer` and `taylor` are polynomials of u = scale q'.k': sim = a0 + a1 u + a2 u^2. Within a chunk
// the backends compute sim from u. A sum over signed features would lose digits where u is near 0.
#pragma once

#include <cmath>

#include "op/problem.h"

#if defined(__CUDACC__)
#define REBASED_HOST_DEVICE __host__ __device__
#else
#define REBASED_HOST_DEVICE
#endif

namespace rebased {

REBASED_HOST_DEVICE constexpr int64_t circulant_features(int64_t feature_dim) {
  return feature_dim * (feature_dim + 1) / 2;
}

REBASED_HOST_DEVICE constexpr int64_t num_features(FeatureMap map, int64_t feature_dim) {
  return map == FeatureMap::outer    ? circulant_features(feature_dim)
         : map == FeatureMap::taylor ? 1 + feature_dim + circulant_features(feature_dim)
                                     : feature_dim;
}

// Whether sim is a polynomial of the dot product u.
REBASED_HOST_DEVICE constexpr bool is_polynomial(FeatureMap map) {
  return map == FeatureMap::outer || map == FeatureMap::taylor;
}

// sim = a0 + a1 u + a2 u^2 for the polynomial maps.
struct Polynomial {
  double a0, a1, a2;
};
REBASED_HOST_DEVICE constexpr Polynomial polynomial(FeatureMap map) {
  return map == FeatureMap::taylor ? Polynomial{1, 1, 0.5} : Polynomial{0, 0, 1};
}

// Where the circulant entries begin in the public order.
REBASED_HOST_DEVICE constexpr int64_t circulant_begin(FeatureMap map, int64_t feature_dim) {
  return map == FeatureMap::taylor ? 1 + feature_dim : 0;
}

// Circulant entry number `entry` (from 0) is x_first x_second. Its weight on the query side, without scale,
// is 1 on the diagonal (first == second) and 2 elsewhere, where the entry stands for two equal products.
struct CirculantEntry {
  int64_t first, second;
};
REBASED_HOST_DEVICE constexpr CirculantEntry circulant_entry(int64_t entry, int64_t feature_dim) {
  const int64_t offset = entry / feature_dim, first = entry % feature_dim;
  const int64_t second = first + offset;
  return {first, second < feature_dim ? second : second - feature_dim};
}

template <class T>
REBASED_HOST_DEVICE inline T elu_feature(T x) {
  return x > T(0) ? x + T(1) : std::exp(x);
}
template <class T>
REBASED_HOST_DEVICE inline T elu_feature_derivative(T x) {
  return x > T(0) ? T(1) : std::exp(x);
}

// Feature f, in the public order, of x: feature_dim numbers that LayerNorm and affine have been applied to.
template <class T>
REBASED_HOST_DEVICE inline T feature(FeatureMap map, int64_t f, const T* x, int64_t feature_dim) {
  if (map == FeatureMap::square) return x[f] * x[f];
  if (map == FeatureMap::elu) return elu_feature(x[f]);
  if (map == FeatureMap::identity) return x[f];
  const int64_t entry = f - circulant_begin(map, feature_dim);
  if (entry >= 0) {
    const CirculantEntry pair = circulant_entry(entry, feature_dim);
    return x[pair.first] * x[pair.second];
  }
  return f == 0 ? T(1) : x[f - 1];  // taylor
}

// The weight of feature f on the query side, scale included.
REBASED_HOST_DEVICE inline double query_weight(FeatureMap map, int64_t f, int64_t feature_dim, double scale) {
  if (!is_polynomial(map)) return 1;
  const Polynomial a = polynomial(map);
  const int64_t entry = f - circulant_begin(map, feature_dim);
  if (entry >= 0) return a.a2 * scale * scale * (entry < feature_dim ? 1 : 2);
  return f == 0 ? a.a0 : a.a1 * scale;  // taylor
}

}  // namespace rebased
