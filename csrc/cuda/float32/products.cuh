// What the float32 path computes with its shared-memory tiles. No barriers inside. A thread's results are a
// tile of registers, its operands come from shared memory by 16-byte loads that eight lanes read side by side
// or all alike, so that no bank is met twice.
//
// For a circulant map the state's rows are grouped by i: phi(x) S = sum_i x_i (sum_e x_{i+e} S_{e,i}), which
// saves forming the products x_i x_{i+e}; likewise sum_j phi(x_j) v_j = sum_j x_{j,i+e} (x_{j,i} v_j).
#pragma once

#include "cuda/float32/tiles.cuh"

namespace rebased::REBASED_BACKEND::float32_path {

// Offsets e = 0..7 of the circulant entries are whole; of e = 8 there is i = 0..7.
constexpr int whole_offsets = feature_dim / 2;

// Where a thread's tile of (chunk tokens, 64 columns) lies: tokens() rows of 4 columns. A warp has half of
// the tokens and half of the columns.
template <class Shape>
struct OutputTile {
  static constexpr int tokens = Shape::chunk * columns / (4 * threads);
  int token, column;

  DEVICE explicit OutputTile(int thread) {
    const int warp = thread / 32, lane = thread % 32;
    token = (warp / 2 * 4 + lane / 8) * tokens;
    column = warp % 2 * (columns / 2) + lane % 8 * 4;
  }
};

// sums += x y^T
template <int rows, int width>
DEVICE void add_outer(float (&sums)[rows][width], const float (&x)[rows], const float (&y)[width]) {
  UNROLL for (int r = 0; r < rows; ++r) { UNROLL for (int c = 0; c < width; ++c) sums[r][c] += x[r] * y[c]; }
}

// sums += phi(x) S for the tile's tokens and columns; x (features, tokens) from the tile's first token on,
// state from its first column on.
template <FeatureMap map, class Shape, int tokens>
DEVICE void query_state(float (&sums)[tokens][4], const float* x, const float* state) {
  const Features<float> features(map, feature_dim, 1);
  const auto state_row = [&](float (&row)[4], int f) { load_floats(row, state + f * Shape::state_stride); };
  float row[4], other[tokens];
  if constexpr (map == FeatureMap::taylor) {
    state_row(row, 0);
    UNROLL for (int r = 0; r < tokens; ++r) { UNROLL for (int c = 0; c < 4; ++c) sums[r][c] += row[c]; }
  }
  if constexpr (map != FeatureMap::outer) {
    UNROLL for (int i = 0; i < feature_dim; ++i) {
      load_floats(other, x + i * Shape::row_stride);
      state_row(row, features.linear_begin + i);
      add_outer(sums, other, row);
    }
  }
  if constexpr (is_polynomial(map)) {
    NO_UNROLL for (int i = 0; i < feature_dim; i += 2) {  // i and i + 1 share the loads of x
      const float* const first = x + i * Shape::row_stride;
      const int entry = features.circulant_begin + i;
      float inner[2][tokens][4] = {};
      UNROLL for (int e = 0; e <= whole_offsets; ++e) {
        load_floats(other, first + e * Shape::row_stride);
        if (e < whole_offsets || i < whole_offsets) {
          state_row(row, entry + e * feature_dim);
          add_outer(inner[0], other, row);
        }
        if (e > 0) {
          state_row(row, entry + 1 + (e - 1) * feature_dim);
          add_outer(inner[1], other, row);
        }
      }
      if (i < whole_offsets) {
        load_floats(other, first + (whole_offsets + 1) * Shape::row_stride);
        state_row(row, entry + 1 + whole_offsets * feature_dim);
        add_outer(inner[1], other, row);
      }
      UNROLL for (int n = 0; n < 2; ++n) {
        load_floats(other, first + n * Shape::row_stride);
        UNROLL for (int r = 0; r < tokens; ++r) {
          UNROLL for (int c = 0; c < 4; ++c) sums[r][c] += other[r] * inner[n][r][c];
        }
      }
    }
  }
}

// sum += value; `carry`, where there is one, keeps what rounding took.
DEVICE void add_to_sum(float& sum, float value, float* carry) {
  if (carry) {
    add_compensated(sum, value, *carry);
  } else {
    sum += value;
  }
}
DEVICE void add_to_sums(float4& sums, const float4& values, float* carries) {
  if (carries) {
    float4 carry = load_global<float4>(carries);
    add_compensated(sums.x, values.x, carry.x), add_compensated(sums.y, values.y, carry.y);
    add_compensated(sums.z, values.z, carry.z), add_compensated(sums.w, values.w, carry.w);
    store_global(carries, carry);
  } else {
    sums.x += values.x, sums.y += values.y, sums.z += values.z, sums.w += values.w;
  }
}

// The share of thread (i = thread / 8, 8 columns) in the state: rows (e, i) of the circulant entries for
// e < offsets, and the linear entry i. state, values: from the thread's first column on, which is `column`.
template <FeatureMap map, class Shape, int offsets>
DEVICE void add_rows_of_chunk(float* state, Carries place, int column, const float* x, const float* values,
                              int i) {
  constexpr bool has_linear = map != FeatureMap::outer;
  const Features<float> features(map, feature_dim, 1);
  float sums[offsets > 0 ? offsets : 1][8] = {}, linear[8] = {};
  NO_UNROLL for (int token = 0; token < Shape::chunk; token += 4) {
    constexpr int rows = offsets > 0 ? offsets : 1;
    float factors[rows][4];
    UNROLL for (int e = 0; e < rows; ++e) {
      load_floats(factors[e], x + (i + e) * Shape::row_stride + token);
    }
    UNROLL for (int n = 0; n < 4; ++n) {
      float first[4], second[4], products[8];
      load_floats(first, values + (token + n) * Shape::value_stride);
      load_floats(second, values + (token + n) * Shape::value_stride + columns / 2);
      if constexpr (offsets == 0) {
        UNROLL for (int c = 0; c < 4; ++c) {
          linear[c] += factors[0][n] * first[c];
          linear[c + 4] += factors[0][n] * second[c];
        }
      } else {
        UNROLL for (int c = 0; c < 4; ++c) {
          products[c] = factors[0][n] * first[c];
          products[c + 4] = factors[0][n] * second[c];
        }
        UNROLL for (int c = 0; c < 8; ++c) {
          if constexpr (has_linear) linear[c] += products[c];
          UNROLL for (int e = 0; e < offsets; ++e) sums[e][c] += factors[e][n] * products[c];
        }
      }
    }
  }
  const auto add = [&](int f, const float (&sum)[8]) {
    float* const carries = *place;
    const float weight = features.weight(f);
    UNROLL for (int half = 0; half < 2; ++half) {
      float* const target = state + f * Shape::state_stride + half * (columns / 2);
      float4 value = load_shared<float4>(target);
      const float4 added{weight * sum[4 * half], weight * sum[4 * half + 1], weight * sum[4 * half + 2],
                         weight * sum[4 * half + 3]};
      add_to_sums(value, added, carries ? carries + f * columns + half * (columns / 2) + column : nullptr);
      store_shared(target, value);
    }
  };
  if constexpr (has_linear) add(features.linear_begin + i, linear);
  UNROLL for (int e = 0; e < offsets; ++e) add(features.circulant_begin + e * feature_dim + i, sums[e]);
}

// S += sum_j phi(x_j) v_j^T, and the sums += sum_j extra_j phi(x_j); extra null: 1 for `rows` tokens. x and
// values are zeros past the last row. carries: see start_carries, which `place` comes from.
template <FeatureMap map, class Shape>
DEVICE void update_state(float* state, float* sums, Carries place, const float* x, const float* values,
                         const float* extra, int rows) {
  const Features<float> features(map, feature_dim, 1);
  const int thread = static_cast<int>(threadIdx.x), i = thread / 8, column = thread % 8 * 4;
  if constexpr (!is_polynomial(map)) {
    add_rows_of_chunk<map, Shape, 0>(state + column, place, column, x, values + column, i);
  } else if (i < whole_offsets) {
    add_rows_of_chunk<map, Shape, whole_offsets + 1>(state + column, place, column, x, values + column, i);
  } else {
    add_rows_of_chunk<map, Shape, whole_offsets>(state + column, place, column, x, values + column, i);
  }
  if (map == FeatureMap::taylor && thread < columns) {
    float sum = 0;
    for (int token = 0; token < Shape::chunk; ++token) sum += values[token * Shape::value_stride + thread];
    add_to_sum(state[thread], sum, *place ? *place + thread : nullptr);
  }
  for (int f = thread; f < features.count; f += threads) {
    const int entry = f - features.circulant_begin, linear = f - features.linear_begin;
    const bool is_circulant = is_polynomial(map) && entry >= 0, is_constant = linear < 0;
    const float* const first = x + (is_circulant ? entry % feature_dim : linear) * Shape::row_stride;
    const float* const second = first + (is_circulant ? entry / feature_dim : 0) * Shape::row_stride;
    float sum = 0;
    if (is_constant) {
      if (!extra) sum = static_cast<float>(rows);
      for (int token = 0; extra && token < rows; ++token) sum += extra[token];
    } else {
      NO_UNROLL for (int token = 0; token < Shape::chunk; token += 4) {
        float a[4], b[4], w[4];
        load_floats(a, first + token);
        if (is_circulant) load_floats(b, second + token);
        if (extra) load_floats(w, extra + token);
        UNROLL for (int n = 0; n < 4; ++n) {
          const float product = extra ? a[n] * w[n] : a[n];
          sum += is_circulant ? product * b[n] : product;
        }
      }
    }
    add_to_sum(sums[f], features.weight(f) * sum,
               *place ? *place + state_features(map) * columns + f : nullptr);
  }
}

// The part `part` of 2 of phi(x) . sums for one token: features of i = 8 part .. 8 part + 7, and the constant
// in the first.
template <FeatureMap map, class Shape>
DEVICE float query_sums(const float* x, const float* sums, int part) {
  const Features<float> features(map, feature_dim, 1);
  float sum = 0;
  NO_UNROLL for (int i = 8 * part; i < 8 * part + 8; ++i) {
    const float own = x[i * Shape::row_stride];
    float inner = 0;
    if constexpr (is_polynomial(map)) {
      const float* const entries = sums + features.circulant_begin + i;
      UNROLL for (int e = 0; e < whole_offsets; ++e) {
        inner += x[(i + e) * Shape::row_stride] * entries[e * feature_dim];
      }
      if (part == 0) {
        inner += x[(i + whole_offsets) * Shape::row_stride] * entries[whole_offsets * feature_dim];
      }
    }
    if constexpr (map != FeatureMap::outer) inner += sums[features.linear_begin + i];
    sum += own * inner;
  }
  return map == FeatureMap::taylor && part == 0 ? sum + sums[0] : sum;
}

}  // namespace rebased::REBASED_BACKEND::float32_path
