// LayerNorm, affine and features of the elementwise maps, and their backward, token by token. Lanes are
// features, so nothing is transposed; sums over a token's features are taken for kWidth tokens at once. It
// includes layer_norm.h alone.
#pragma once

#include "cpu/tokens/layer_norm.h"

namespace rebased::cpu::REBASED_ISA {

// q or k of one head for a run of tokens, with what LayerNorm needs of each token.
template <class T>
struct TokenRows {
  const char* data;
  int64_t stride;
  int64_t ahead;  // how many rows on the ones lie that are fetched into the cache meanwhile
  Dtype dtype;
  FeatureMap map;
  LayerNorm norm;
  int feature_dim, width;  // width: whole vectors
  const T *gamma, *beta;   // [width], zero past feature_dim
  const T *mean, *rstd;    // [token]

  template <class Body>
  REBASED_INLINE void with_rows(const Body& body) const {
    with_element<T>(dtype, [&](auto element) {
      using E = typename decltype(element)::type;
      body(reinterpret_cast<const E*>(data));
    });
  }
};

// mean and rstd of each token's own features; 0 and 1 without a LayerNorm.
template <class T>
inline void head_statistics(const TokenRows<T>& t, int tokens, T eps, T* mean, T* rstd) {
  if (t.norm == LayerNorm::none) {
    for (int i = 0; i < tokens; i++) mean[i] = 0, rstd[i] = 1;
    return;
  }
  const T share = 1 / T(t.feature_dim);
  t.with_rows([&](auto rows) {
    sum_tokens<T>(tokens, mean, [&](int i) {
      Vector<T> sum{};
      for (int e = 0; e < t.width; e += kWidth<T>) sum += read<T>(rows + i * t.stride + e, t.feature_dim - e);
      return sum * share;
    });
    sum_tokens<T>(tokens, rstd, [&](int i) {
      Vector<T> squares{};
      for (int e = 0; e < t.width; e += kWidth<T>) {
        const Vector<T> centered = read<T>(rows + i * t.stride + e, t.feature_dim - e) - mean[i];
        squares +=
            lane_numbers<T>() < typename Simd<T>::Int(t.feature_dim - e) ? centered * centered : Vector<T>{};
      }
      return squares * share;
    });
  });
  for (int i = 0; i < tokens; i += kWidth<T>) store(rstd + i, 1 / square_root(load(rstd + i) + eps));
}

template <class T, FeatureMap Map>
REBASED_INLINE Vector<T> elementwise_feature(Vector<T> x) {
  if (Map == FeatureMap::square) return x * x;
  if (Map == FeatureMap::identity) return x;
  return x > 0 ? x + T(1) : exp_nonpositive<T>(x > 0 ? Vector<T>{} : x);
}
template <class T, FeatureMap Map>
REBASED_INLINE Vector<T> elementwise_derivative(Vector<T> x) {
  if (Map == FeatureMap::square) return 2 * x;
  if (Map == FeatureMap::identity) return broadcast<T>(1);
  return x > 0 ? broadcast<T>(1) : exp_nonpositive<T>(x > 0 ? Vector<T>{} : x);
}

template <FeatureMap Map>
struct MapConstant {
  static constexpr FeatureMap value = Map;
};
template <class Body>
REBASED_INLINE void with_map(FeatureMap map, const Body& body) {
  if (map == FeatureMap::square)
    body(MapConstant<FeatureMap::square>{});
  else if (map == FeatureMap::identity)
    body(MapConstant<FeatureMap::identity>{});
  else
    body(MapConstant<FeatureMap::elu>{});
}

// features: [token][width], phi(q') or phi(k'), zero past feature_dim.
template <class T>
inline void pack_features(const TokenRows<T>& t, int tokens, T* features) {
  with_map(t.map, [&](auto map) {
    t.with_rows([&](auto rows) {
      for (int e = 0; e < t.width; e += kWidth<T>) {
        const Vector<T> gamma = load(t.gamma + e), beta = load(t.beta + e);
        const auto valid = lane_numbers<T>() < typename Simd<T>::Int(t.feature_dim - e);
        for (int i = 0; i < tokens; i++) {
          __builtin_prefetch(rows + (i + t.ahead) * t.stride + e, 0, 2);
          const Vector<T> x = read<T>(rows + i * t.stride + e, t.feature_dim - e);
          const Vector<T> scaled = (x - t.mean[i]) * t.rstd[i] * gamma + beta;
          const Vector<T> feature = elementwise_feature<T, decltype(map)::value>(scaled);
          store(features + i * t.width + e, valid ? feature : Vector<T>{});
        }
      }
    });
  });
}

// From the gradient of phi, which is token_factor (null: 1) times gradient: [token][width], to the gradient
// of q or k in `target`, or, for LayerNorm::token, to gamma * gradient, which finish_token_gradient takes on.
// `gradient` is overwritten. normalized is scratch of its shape, sums is scratch of two numbers a token. The
// gradients of gamma and beta are added to grad_affine: [2][width].
template <class T, class E>
inline void token_rows_backward(const TokenRows<T>& t, int tokens, const T* token_factor, T* gradient,
                                T* normalized, T* sums, E* target, int64_t target_stride, T* grad_affine) {
  const bool head_norm = t.norm == LayerNorm::head;
  with_map(t.map, [&](auto map) {
    t.with_rows([&](auto rows) {
      for (int e = 0; e < t.width; e += kWidth<T>) {
        const Vector<T> gamma = load(t.gamma + e), beta = load(t.beta + e);
        Vector<T> grad_gamma = load(grad_affine + e), grad_beta = load(grad_affine + t.width + e);
        for (int i = 0; i < tokens; i++) {
          const Vector<T> x = read<T>(rows + i * t.stride + e, t.feature_dim - e);
          const Vector<T> centered = (x - t.mean[i]) * t.rstd[i];
          __builtin_prefetch(target + (i + t.ahead) * target_stride + e, 0, 2);
          Vector<T> own = load(gradient + i * t.width + e) *
                          elementwise_derivative<T, decltype(map)::value>(centered * gamma + beta);
          if (token_factor) own *= token_factor[i];
          grad_gamma += own * centered, grad_beta += own;
          own *= gamma;
          if (head_norm) {
            store(gradient + i * t.width + e, own);
            store(normalized + i * t.width + e, centered);
          } else {
            write<T>(target + i * target_stride + e, own, t.feature_dim - e);
          }
        }
        store(grad_affine + e, grad_gamma), store(grad_affine + t.width + e, grad_beta);
      }
    });
  });
  if (!head_norm) return;
  const T share = 1 / T(t.feature_dim);
  T *mean = sums, *mean_product = sums + round_up(tokens, kWidth<T>);
  sum_tokens<T>(tokens, mean, [&](int i) {
    Vector<T> sum{};
    for (int e = 0; e < t.width; e += kWidth<T>) sum += load(gradient + i * t.width + e);
    return sum * share;
  });
  sum_tokens<T>(tokens, mean_product, [&](int i) {
    Vector<T> sum{};  // gradient is zero past feature_dim
    for (int e = 0; e < t.width; e += kWidth<T>)
      sum += load(gradient + i * t.width + e) * load(normalized + i * t.width + e);
    return sum * share;
  });
  for (int e = 0; e < t.width; e += kWidth<T>)
    for (int i = 0; i < tokens; i++) {
      const Vector<T> h = load(gradient + i * t.width + e), x = load(normalized + i * t.width + e);
      write<T>(target + i * target_stride + e, t.rstd[i] * (h - mean[i] - x * mean_product[i]),
               t.feature_dim - e);
    }
}

}  // namespace rebased::cpu::REBASED_ISA
