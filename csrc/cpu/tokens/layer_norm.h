// LayerNorm, affine and scale on the way from a tensor's rows to a transposed block, whose lanes are tokens,
// and their backward on the way out. LayerNorm::token runs over all heads of a token: its statistics come
// from a pass before (token_statistics), and its backward ends in a pass after (finish_token_gradient). It
// includes schedule.h alone.
#pragma once

#include "cpu/schedule.h"

namespace rebased::cpu::REBASED_ISA {

// The rows of q or of k of one head, and what is done to them.
template <class T>
struct Tokens {
  const char* data;
  int64_t row_stride;
  Dtype dtype;
  FeatureMap map;
  LayerNorm norm;
  const T *gamma, *beta;  // null: 1, 0
  const T *mean, *rstd;   // by row, for LayerNorm::token
  T scale, eps;
  int feature_dim, feature_rows;
};

template <class T>
inline Tokens<T> head_tokens(const Problem& p, const Sizes<T>& s, bool query, const T* statistics,
                             int64_t batch, int64_t head) {
  const Affine& affine = query ? p.query_affine : p.key_affine;
  const ConstRows& rows = query ? p.q : p.k;
  Tokens<T> t;
  t.data = head_rows<T>(rows, batch, head, p.dtype);
  t.row_stride = rows.row_stride;
  t.dtype = p.dtype, t.map = p.feature_map, t.norm = p.layer_norm;
  t.gamma = affine.gamma ? static_cast<const T*>(affine.gamma) + head * affine.gamma_head_stride : nullptr;
  t.beta = affine.beta ? static_cast<const T*>(affine.beta) + head * affine.beta_head_stride : nullptr;
  const int64_t tokens = p.batch * p.seqlen;  // statistics: mean of q, rstd of q, mean of k, rstd of k
  t.mean = statistics ? statistics + (query ? 0 : 2) * tokens + batch * p.seqlen : nullptr;
  t.rstd = statistics ? t.mean + tokens : nullptr;
  t.scale = query && s.polynomial ? T(p.scale) : T(1);
  t.eps = T(p.layer_norm_eps);
  t.feature_dim = s.feature_dim, t.feature_rows = s.feature_rows;
  return t;
}

// Calls body(i, head, e, lanes) for tokens i < count, all heads, and every vector of their features, which
// begins at e and has `lanes` of them or more. Tokens are innermost, since a head's rows are often closer
// together than a token's heads.
template <class T, class Body>
REBASED_INLINE void for_token_vectors(int count, int64_t heads, int feature_dim, const Body& body) {
  for (int64_t head = 0; head < heads; head++)
    for (int e = 0; e < feature_dim; e += kWidth<T>) {
      const int lanes = feature_dim - e;
      if (count == kWidth<T> && lanes >= kWidth<T>) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth<T>; i++) body(i, head, e, kWidth<T>);
      } else {
        for (int i = 0; i < count; i++) body(i, head, e, lanes);
      }
    }
}

// mean and rstd of tokens [begin, end) over all heads.
template <class T, class E>
inline void token_statistics(const RowsOf<const void*>& rows, int64_t batch, int64_t heads, int feature_dim,
                             int64_t begin, int64_t end, T eps, T* mean, T* rstd) {
  const T share = 1 / T(heads * feature_dim);
  for (int64_t row = begin; row < end; row += kWidth<T>) {
    const int count = int(smaller<int64_t>(kWidth<T>, end - row));
    const E* token = static_cast<const E*>(rows.data) + batch * rows.batch_stride + row * rows.row_stride;
    const auto features = [&](int i, int64_t head, int e) {
      return token + head * rows.head_stride + i * rows.row_stride + e;
    };
    Vector<T> sums[kWidth<T>] = {}, squares[kWidth<T>] = {};
    for_token_vectors<T>(count, heads, feature_dim, [&](int i, int64_t head, int e, int lanes) {
      __builtin_prefetch(features(i, head, e) + kWidth<T> * rows.row_stride, 0, 2);
      sums[i] += read<T>(features(i, head, e), lanes);
    });
    T center[kWidth<T>];
    store(center, sum_rows<T>(sums) * share);
    for_token_vectors<T>(count, heads, feature_dim, [&](int i, int64_t head, int e, int lanes) {
      const Vector<T> x = read<T>(features(i, head, e), lanes) - center[i];
      squares[i] += lane_numbers<T>() < typename Simd<T>::Int(lanes) ? x * x : Vector<T>{};
    });
    write<T>(mean + row, load(center), count);
    write<T>(rstd + row, 1 / square_root(sum_rows<T>(squares) * share + eps), count);
  }
}

// Normalizes a block of which X holds the rows as they were; the arguments are those of pack_block, and Keep
// says whether H and inv are given.
template <class T, bool Keep>
inline void normalize_block(const Tokens<T>& t, int64_t row, int rows, T* X, T* H, T* inv) {
  const int d = t.feature_dim;
  for (int n = 0; n < kLanes<T>; n += kWidth<T>) {
    T* x = X + n;
    const auto valid = lane_numbers<T>() < typename Simd<T>::Int(rows - n);
    Vector<T> mean{}, rstd = broadcast<T>(1);
    if (t.norm == LayerNorm::head) {
      for (int e = 0; e < d; e++) mean += load(x + e * kLanes<T>);
      mean *= 1 / T(d);
      Vector<T> variance{};
      for (int e = 0; e < d; e++) {
        const Vector<T> centered = load(x + e * kLanes<T>) - mean;
        variance += centered * centered;
      }
      rstd = 1 / square_root(variance * (1 / T(d)) + t.eps);
    } else if (t.norm == LayerNorm::token) {
      mean = read<T>(t.mean + row + n, rows - n);
      rstd = read<T>(t.rstd + row + n, rows - n);
    }
    if (Keep) store(inv + n, rstd);
    for (int e = 0; e < d; e++) {
      const T scaled_gamma = t.gamma ? t.gamma[e] * t.scale : t.scale;
      const T scaled_beta = t.beta ? t.beta[e] * t.scale : T(0);
      const Vector<T> normalized = (load(x + e * kLanes<T>) - mean) * rstd;
      if (Keep) store(H + e * kLanes<T> + n, valid ? normalized : Vector<T>{});
      store(x + e * kLanes<T>, valid ? normalized * scaled_gamma + scaled_beta : Vector<T>{});
    }
    store(x + d * kLanes<T>, valid ? broadcast<T>(1) : Vector<T>{});
    for (int e = d + 1; e < t.feature_rows; e++) store(x + e * kLanes<T>, Vector<T>{});
  }
}

// X takes q' or k' of `rows` tokens, transposed, with zeros in the lanes after them. Its first row past
// feature_dim is ones in the lanes of tokens, the others are zeros. H and inv, both null or both given, take
// what the backward needs: the normalized input and 1 / deviation.
template <class T>
inline void pack_block(const Tokens<T>& t, int64_t row, int rows, T* X, T* H, T* inv) {
  with_element<T>(t.dtype, [&](auto element) {
    using E = typename decltype(element)::type;
    read_transposed<T>(reinterpret_cast<const E*>(t.data) + row * t.row_stride, t.row_stride, rows,
                       t.feature_dim, X);
  });
  if (H)
    normalize_block<T, true>(t, row, rows, X, H, inv);
  else
    normalize_block<T, false>(t, row, rows, X, H, inv);
}

// From dX, the gradient of q' or k' of a block, which is overwritten, to the gradient of q or k in `target`,
// or, for LayerNorm::token, to gamma * gradient, which finish_token_gradient takes on. The gradients of gamma
// and beta are summed lane by lane into grad_affine: [2][feature_dim][kWidth].
template <class T, class E>
inline void layer_norm_backward(const Tokens<T>& t, int rows, T* dX, const T* H, const T* inv, E* target,
                                int64_t stride, T* grad_affine) {
  const int d = t.feature_dim;
  for (int n = 0; n < kLanes<T> && n < rows; n += kWidth<T>) {
    Vector<T> mean{}, mean_product{};
    for (int e = 0; e < d; e++) {
      const Vector<T> gradient = load(dX + e * kLanes<T> + n) * t.scale;
      const Vector<T> normalized = load(H + e * kLanes<T> + n);
      T* gamma = grad_affine + e * kWidth<T>;
      T* beta = gamma + d * kWidth<T>;
      store(gamma, load(gamma) + gradient * normalized);
      store(beta, load(beta) + gradient);
      const Vector<T> h = t.gamma ? gradient * t.gamma[e] : gradient;
      mean += h;
      mean_product += h * normalized;
      store(dX + e * kLanes<T> + n, h);
    }
    if (t.norm != LayerNorm::head) continue;
    mean *= 1 / T(d), mean_product *= 1 / T(d);
    const Vector<T> rstd = load(inv + n);
    for (int e = 0; e < d; e++) {
      T* x = dX + e * kLanes<T> + n;
      store(x, rstd * (load(x) - mean - load(H + e * kLanes<T> + n) * mean_product));
    }
  }
  write_transposed<T>(dX, rows, d, target, stride);
}

// The end of LayerNorm::token's backward for all heads of rows [begin, end): `source` holds gamma * gradient,
// `target` takes the gradient of q or k.
template <class T, class S, class E>
inline void finish_token_gradient(const RowsOf<const void*>& input, const RowsOf<const void*>& source,
                                  const RowsOf<void*>& target, int64_t batch, int64_t heads, int feature_dim,
                                  int64_t begin, int64_t end, const T* mean, const T* rstd) {
  const T share = 1 / T(heads * feature_dim);
  for (int64_t row = begin; row < end; row += kWidth<T>) {
    const int count = int(smaller<int64_t>(kWidth<T>, end - row));
    const E* x = static_cast<const E*>(input.data) + batch * input.batch_stride + row * input.row_stride;
    const S* h = static_cast<const S*>(source.data) + batch * source.batch_stride + row * source.row_stride;
    E* out = static_cast<E*>(target.data) + batch * target.batch_stride + row * target.row_stride;
    const auto gradient = [&](int i, int64_t head, int e, int lanes) {
      return read<T>(h + head * source.head_stride + i * source.row_stride + e, lanes);
    };
    const auto normalized = [&](int i, int64_t head, int e, int lanes) {
      const Vector<T> value = read<T>(x + head * input.head_stride + i * input.row_stride + e, lanes);
      return (value - mean[row + i]) * rstd[row + i];
    };
    Vector<T> sums[kWidth<T>] = {}, products[kWidth<T>] = {};  // lanes past feature_dim hold gradients of 0
    for_token_vectors<T>(count, heads, feature_dim, [&](int i, int64_t head, int e, int lanes) {
      __builtin_prefetch(x + head * input.head_stride + (i + kWidth<T>)*input.row_stride + e, 0, 2);
      __builtin_prefetch(h + head * source.head_stride + (i + kWidth<T>)*source.row_stride + e, 0, 2);
      const Vector<T> value = gradient(i, head, e, lanes);
      sums[i] += value, products[i] += value * normalized(i, head, e, lanes);
    });
    T mean_gradient[kWidth<T>], mean_product[kWidth<T>];
    store(mean_gradient, sum_rows<T>(sums) * share), store(mean_product, sum_rows<T>(products) * share);
    for_token_vectors<T>(count, heads, feature_dim, [&](int i, int64_t head, int e, int lanes) {
      write<T>(out + head * target.head_stride + i * target.row_stride + e,
               rstd[row + i] * (gradient(i, head, e, lanes) - mean_gradient[i] -
                                normalized(i, head, e, lanes) * mean_product[i]),
               lanes);
    });
  }
}

}  // namespace rebased::cpu::REBASED_ISA
