// What the two backward sweeps of the float32 path share: the gradient of q' or k' of a chunk, and its way
// through the map, affine and LayerNorm. No barriers inside.
//
// "Rows" are the tokens whose gradients are computed, "others" the ones they look at: queries and keys in the
// forward sweep, keys and queries in the reverse one. Thread (i = lane % 16, four rows) owns feature i of
// its rows, from the state's rows down to grad q or grad k; what feature i owes to x_{i + e} passes by
// shuffles.
//   grad x_i = sum over others of c sim'(u) other_x_i + sum_e (G_{e,i} x_{i+e} + G_{e,i-e} x_{i-e})
// with G = S values + sums extra, weighted.
#pragma once

#include "cuda/float32/products.cuh"

namespace rebased::REBASED_BACKEND::float32_path {

struct RowOwner {
  int i, token, warp_token;  // feature, first of four rows, first of the warp's eight

  DEVICE RowOwner()
      : i(static_cast<int>(threadIdx.x % feature_dim)),
        token(static_cast<int>(threadIdx.x / feature_dim) * 4),
        warp_token(static_cast<int>(threadIdx.x / 32) * 8) {}
};

// Fills score_gradients[other][row] = (row_values . other_values - delta) d sim / d u, and with `later` also
// scores[other][row] = sim; 0 where other > row, or with `later` where other < row. Queries are the others
// where `later`. `minus_delta` null: 0. A thread has 4 rows x 2 others, apart so that lanes read rows of the
// tiles that are neighbours.
template <FeatureMap map, bool later>
DEVICE void fill_score_gradients(float* scores, float* score_gradients, const float* row_x,
                                 const float* other_x, const float* row_values, const float* other_values,
                                 const float* minus_delta) {
  using Shape = BackwardShape;
  const Features<float> features(map, feature_dim, 1);
  const int lane = static_cast<int>(threadIdx.x % 32), row = lane % 8,
            other = static_cast<int>(threadIdx.x / 32) * 4 + lane / 8;
  // whether any of the 8 rows n meets any of the 16 others m
  const auto meets = [](int n, int m) { return later ? n < 2 || m == 1 : n >= 2 || m == 0; };
  float c[4][2] = {}, u[4][2] = {};
  NO_UNROLL for (int column = 0; column < columns; column += 4) {
    float x[4][4], y[2][4];
    UNROLL for (int n = 0; n < 4; ++n)
        load_floats(x[n], row_values + (row + 8 * n) * Shape::value_stride + column);
    UNROLL for (int m = 0; m < 2; ++m)
        load_floats(y[m], other_values + (other + 16 * m) * Shape::value_stride + column);
    UNROLL for (int n = 0; n < 4; ++n) {
      UNROLL for (int m = 0; m < 2; ++m) {
        if (!meets(n, m)) continue;
        UNROLL for (int k = 0; k < 4; ++k) c[n][m] += x[n][k] * y[m][k];
      }
    }
  }
  UNROLL for (int i = 0; i < feature_dim; ++i) {
    float x[4], y[2];
    UNROLL for (int n = 0; n < 4; ++n) x[n] = row_x[i * Shape::row_stride + row + 8 * n];
    UNROLL for (int m = 0; m < 2; ++m) y[m] = other_x[i * Shape::row_stride + other + 16 * m];
    UNROLL for (int n = 0; n < 4; ++n) {
      UNROLL for (int m = 0; m < 2; ++m) {
        if (meets(n, m)) u[n][m] += x[n] * y[m];
      }
    }
  }
  UNROLL for (int n = 0; n < 4; ++n) {
    UNROLL for (int m = 0; m < 2; ++m) {
      const int r = row + 8 * n, o = other + 16 * m, place = o * BackwardTiles::score_stride + r;
      const bool in_reach = later ? o >= r : o <= r;
      const float sum = c[n][m] + (minus_delta ? minus_delta[later ? o : r] : 0.0f);
      store_shared(score_gradients + place, in_reach ? sum * features.score_derivative(u[n][m]) : 0.0f);
      if (later) store_shared(scores + place, in_reach ? features.score(u[n][m]) : 0.0f);
    }
  }
}

// gradient += sum over others of score_gradients[other][row] other_x_i
template <bool later>
DEVICE void add_score_gradients(float (&gradient)[4], const float* score_gradients, const float* other_x,
                                const RowOwner& owner) {
  const int begin = later ? owner.warp_token : 0, end = later ? BackwardShape::chunk : owner.warp_token + 8;
  const float* const x = other_x + owner.i * BackwardShape::row_stride;
  NO_UNROLL for (int other = begin; other < end; other += 4) {
    float y[4];
    load_floats(y, x + other);
    UNROLL for (int n = 0; n < 4; ++n) {
      float weights[4];
      load_floats(weights, score_gradients + (other + n) * BackwardTiles::score_stride + owner.token);
      UNROLL for (int r = 0; r < 4; ++r) gradient[r] += weights[r] * y[n];
    }
  }
}

// gradient += the state's part. x: the rows' feature tile; values: theirs. `extra` of each row goes with the
// sums; null: 1. with_sums: whether this block's column group counts them.
template <FeatureMap map>
DEVICE void add_state_gradients(float (&gradient)[4], const float* x, const float* values, const float* state,
                                const float* sums, const float* extra, bool with_sums,
                                const RowOwner& owner) {
  using Shape = BackwardShape;
  constexpr int linear = map != FeatureMap::outer;  // entries of a feature i: linear ones, offsets 0..8
  constexpr int entries = linear + (is_polynomial(map) ? whole_offsets + 1 : 0);
  const Features<float> features(map, feature_dim, 1);
  const int i = owner.i;
  const auto entry_of = [&](int n) {
    if (n < linear) return features.linear_begin + i;
    const int e = n - linear;
    // of e = 8 there are only 8: the others read them again, and drop them
    return features.circulant_begin + e * feature_dim + (e < whole_offsets ? i : i % whole_offsets);
  };
  float g[entries][4] = {};
  const float* const row_values = values + owner.token * Shape::value_stride;
  NO_UNROLL for (int column = 0; column < columns; column += 4) {
    float v[4][4];
    UNROLL for (int r = 0; r < 4; ++r) load_floats(v[r], row_values + r * Shape::value_stride + column);
    UNROLL for (int n = 0; n < entries; ++n) {
      float s[4];
      load_floats(s, state + entry_of(n) * Shape::state_stride + column);
      UNROLL for (int r = 0; r < 4; ++r) { UNROLL for (int k = 0; k < 4; ++k) g[n][r] += s[k] * v[r][k]; }
    }
  }
  if (with_sums) {
    float factor[4] = {1, 1, 1, 1};
    if (extra) load_floats(factor, extra + owner.token);
    UNROLL for (int n = 0; n < entries; ++n) {
      const float sum = sums[entry_of(n)];
      UNROLL for (int r = 0; r < 4; ++r) g[n][r] += sum * factor[r];
    }
  }
  if constexpr (linear) {
    UNROLL for (int r = 0; r < 4; ++r) gradient[r] += g[0][r];
  }
  if constexpr (is_polynomial(map)) {
    const float* const own_x = x + i * Shape::row_stride + owner.token;
    float own[4];
    load_floats(own, own_x);
    UNROLL for (int r = 0; r < 4; ++r) gradient[r] += 2 * g[linear][r] * own[r];
    UNROLL for (int e = 1; e <= whole_offsets; ++e) {
      const int from = static_cast<int>(threadIdx.x & 16) | ((i - e) & (feature_dim - 1));
      const bool counts = e < whole_offsets || i < whole_offsets;
      float other[4];
      load_floats(other,
                  x + (e < whole_offsets ? i + e : (i + e) % feature_dim) * Shape::row_stride + owner.token);
      UNROLL for (int r = 0; r < 4; ++r) {
        const float value = counts ? g[linear + e][r] : 0.0f;
        gradient[r] += value * other[r];
        gradient[r] += shuffle(value * own[r], from);
      }
    }
  }
}

// Where gradients of a chunk's rows go.
struct RowTarget {
  float* rows;  // grad q or grad k from the chunk's first row on
  int64_t stride;
  float* partial;  // (rows, feature_dim) in the workspace, of what another kernel finishes; or null
  float* affine;   // this warp's sums of grad gamma, then of grad beta
  float* carries;  // what rounding took from this warp's sums; or null
};

// This warp's place among the carries of the sums for gamma and beta of a query head, or of the kv head.
template <FeatureMap map>
DEVICE float* affine_carries(float* carries, int member) {
  const int warp = static_cast<int>(threadIdx.x / 32);
  return carries ? carries + state_features(map) * columns + padded_features(map) +
                       (member * (threads / 32) + warp) * affine_size
                 : nullptr;
}

// From the gradient of what features are made of to that of the rows as they were given. normalized and
// deviations: the rows', as load_feature_row leaves them. Every thread of the block calls it.
template <FeatureMap map>
DEVICE void finish_rows(const float (&gradient)[4], const float* normalized_rows, const float* deviations,
                        int rows, const Norm<float>& norm, const RowTarget& target, const RowOwner& owner) {
  const Features<float> features(map, feature_dim, 1);
  const int i = owner.i;
  const float gamma = norm.gamma[i], beta = norm.beta[i];
  float gamma_sum = 0, beta_sum = 0, x[4], deviation[4];
  load_floats(x, normalized_rows + i * BackwardShape::row_stride + owner.token);
  load_floats(deviation, deviations + owner.token);
  UNROLL for (int r = 0; r < 4; ++r) {
    const int row = owner.token + r;
    const bool present = row < rows;
    const float normalized = x[r], derivative = features.derivative(gamma * normalized + beta, norm.scale);
    const float value = present ? gradient[r] * derivative : 0.0f;
    gamma_sum += value * normalized;
    beta_sum += value;
    if (target.partial) {
      if (present) target.partial[row * feature_dim + i] = value;
      continue;
    }
    float h = gamma * value;
    if (norm.mode == LayerNorm::head) {
      float sum = h, dot = h * normalized;
      UNROLL for (int distance = 1; distance < feature_dim; distance *= 2) {
        sum += shuffle_xor(sum, distance);
        dot += shuffle_xor(dot, distance);
      }
      h = deviation[r] * (h - (sum + normalized * dot) * (1.0f / feature_dim));
    }
    if (present) target.rows[row * target.stride + i] = h;
  }
  gamma_sum += shuffle_xor(gamma_sum, feature_dim);
  beta_sum += shuffle_xor(beta_sum, feature_dim);
  const int lane = static_cast<int>(threadIdx.x % 32);
  add_to_sum(target.affine[lane], lane < feature_dim ? gamma_sum : beta_sum,
             target.carries ? target.carries + lane : nullptr);
}

// The block's sums of the gradients of gamma and beta, over its warps.
DEVICE void store_affine_sums(float* target, const float* sums) {
  if (threadIdx.x >= affine_size) return;
  float sum = 0;
  for (int warp = 0; warp < threads / 32; ++warp) sum += sums[warp * affine_size + threadIdx.x];
  target[threadIdx.x] = sum;
}

}  // namespace rebased::REBASED_BACKEND::float32_path
