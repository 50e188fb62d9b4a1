// What the two backward sweeps share: the gradient of a 16-token tile of q' or k', and its way through map,
// affine and LayerNorm to q or k. A warp owns the rows of one such tile of the chunk.
//
// With ghat = r grad y, delta = ghat . y and c_ij = ghat_i . v_j - delta_i the gradients of the features are
//   sum_{j <= i} c_ij phi(k'_j) + S ghat_i - delta_i z     of phi(q'_i)
//   sum_{i >= j} c_ij phi(q'_i) + T v_j    + M             of phi(k'_j)
// where the sums run over the chunk, S and z hold the chunks before it, and T and M the chunks behind it.
// phi'(x) leads on to q' and k'. `outer` with d = 32 has a factor sim'(u_ij) in the sums, q' and k' in the
// place of phi, and for the state's part what wide_gradient.cuh says; there q' is `scale` times what
// LayerNorm and affine leave.
#pragma once

#include "cuda/tensor_core/product.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

// ---- the part of the other chunks, through the state ----

// Writes this warp's 16 columns of the state, rounded to the element type, into the state tile (64 columns,
// features), which all warps read.
template <class T, class S>
DEVICE void publish_state(T* state_tile, const State<S>& state, Range range, const Lane& lane) {
  UNROLL for (int n = 0; n < S::tiles; ++n) {
    UNROLL for (int half = 0; half < 2; ++half) {
      const int column = tile * lane.warp + lane.group + 8 * half;
      store_shared(state_tile + column * S::state_stride + 8 * n + 2 * lane.pair,
                   pack<T>(state.kv[n][2 * half] * range.shrink, state.kv[n][2 * half + 1] * range.shrink));
    }
  }
}

// Puts x_{a - 1} in the place of x_a, cyclically over the 8 n columns of n C fragments.
template <int n>
DEVICE void rotate(float (&x)[n][4], const Lane& lane) {
  const int previous = (lane.lane & ~3) | ((lane.pair + 3) & 3);
  UNROLL for (int half = 0; half < 2; ++half) {
    float from[n];
    UNROLL for (int i = 0; i < n; ++i) from[i] = shuffle(x[i][2 * half + 1], previous);
    UNROLL for (int i = 0; i < n; ++i) {
      x[i][2 * half + 1] = x[i][2 * half];
      x[i][2 * half] = lane.pair == 0 ? from[(i + n - 1) % n] : from[i];
    }
  }
}

// Unpacks the numbers of a fragment A into the places that they have in two C fragments.
template <class T>
DEVICE void unpack_rows(float (&x)[2][4], const uint32_t (&rows)[4]) {
  UNROLL for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(rows[i]);
    x[i >> 1][2 * (i & 1)] = pair.x;
    x[i >> 1][2 * (i & 1) + 1] = pair.y;
  }
}

// gradient = state values, the part of the other chunks of the gradient of phi(rows): values (16 tokens, 64
// columns), as fragments A, times the state.
template <class T, class S>
DEVICE void state_gradient(float (&gradient)[S::units][4], const uint32_t (&values)[warps][4],
                           const T* state_tile, Range range, const Lane& lane) {
  UNROLL for (int n = 0; n < S::units; ++n) { UNROLL for (int j = 0; j < 4; ++j) gradient[n][j] = 0; }
  UNROLL for (int i = 0; i < columns / tile; ++i) {
    uint32_t b[4];  // (16 columns, 16 features)
    ldmatrix_transposed(
        b, state_tile + (tile * i + lane.row_of_parity()) * S::state_stride + lane.column_of_parity());
    UNROLL for (int n = 0; n < S::units; ++n) mma_m16n8k16<T>(gradient[n], values[i], b[2 * n], b[2 * n + 1]);
  }
  UNROLL for (int n = 0; n < S::units; ++n) {
    UNROLL for (int j = 0; j < 4; ++j) gradient[n][j] *= range.grow;
  }
}

// What the denominator's sums contribute.
template <class S>
DEVICE void sums_gradient(float (&gradient)[S::units][4], const State<S>& state) {
  const Sums<S::units> sums = state.sums();
  UNROLL for (int n = 0; n < S::units; ++n) {
    UNROLL for (int j = 0; j < 4; ++j) gradient[n][j] = sums.k[n][j & 1];
  }
}

// ---- the chunk's own tokens ----

// Adds to the gradient of 16 rows what the 16 columns from `token` on contribute: the sum over the columns of
// c sim'(u) times the column's features. Rows are queries and columns keys, or with queries_are_columns the
// other way round. c is the product of the row's values (row_values, fragments A of 16 tokens and 64 columns)
// and the column's values (column_values, a value tile), minus delta of the query; row_offsets or
// column_offsets hold -delta. With queries_are_columns, in float16, column_values are smaller by a power of
// two, and column_scales make up for it.
template <class T, class S, bool queries_are_columns, class Fragment>
DEVICE void pair_gradient(float (&gradient)[S::units][4], const Fragment& rows,
                          const uint32_t (&row_values)[warps][4], const T* column_features,
                          const T* column_values, int token, bool diagonal, const float (&row_offsets)[2],
                          const float* column_offsets, const float* column_scales, const Lane& lane) {
  float c[2][4] = {};
  UNROLL for (int i = 0; i < columns / tile; ++i) {
    uint32_t b[4];
    load_value_columns(b, column_values, token, tile * i, lane);
    mma_m16n8k16<T>(c[0], row_values[i], b[0], b[1]);
    mma_m16n8k16<T>(c[1], row_values[i], b[2], b[3]);
  }
  float u[2][4] = {};
  if constexpr (S::wide) {
    Fragment tokens;
    load_columns(tokens, column_features, token, lane);
    dot_products<T>(u, rows, tokens);
  }
  UNROLL for (int n = 0; n < 2; ++n) {
    float2 offsets{};
    if (queries_are_columns) offsets = load_shared<float2>(column_offsets + token + 8 * n + 2 * lane.pair);
    UNROLL for (int j = 0; j < 4; ++j) {
      const float offset = queries_are_columns ? (j & 1 ? offsets.y : offsets.x) : row_offsets[j >> 1];
      c[n][j] += offset;
      if (S::map == FeatureMap::outer) c[n][j] *= 2.0f * u[n][j];
      const int row = fragment_row(j, lane), column = fragment_column(n, j, lane);
      if (diagonal && (queries_are_columns ? column < row : column > row)) c[n][j] = 0;
    }
  }
  if constexpr (queries_are_columns && !is_bfloat16<T>) scale_columns(c, column_scales + token, lane);
  uint32_t a[4], terms[4];
  round_tile<T>(a, c);
  UNROLL for (int first = 0; first < S::units; first += 2) {
    if constexpr (S::wide) {
      load_wide_terms(terms, column_features, token, 8 * first, lane);
    } else {
      load_terms(terms, column_features, token, lane);
    }
    UNROLL for (int n = 0; n < 2; ++n)
        mma_m16n8k16<T>(gradient[first + n], a, terms[2 * n], terms[2 * n + 1]);
  }
}

// ---- through the map, affine and LayerNorm ----

// Where the gradient of the rows of a tile goes.
template <class T>
struct RowTarget {
  T* rows;  // grad q or grad k, from the tile's first row on; null where `partial` is written instead
  int stride, piece;
  float* partial;  // (rows, d): the gradient of gamma LayerNorm(x) + beta, from which another kernel goes on
  float* affine_sums;  // (2 d) in shared memory: this warp's sums for grad gamma and grad beta
};

// Takes the gradient of a tile of q' or k' through map, affine and LayerNorm to q or k. `gradient` is the
// gradient of what the map is applied to. For queries of `outer` that is `scale` times gamma
// LayerNorm(x) + beta, and `affine` holds gamma and beta times `scale`. The rows of the tile lie in the row
// tile from first_row on, their means and 1 / deviations in `statistics`.
template <class T, class S>
DEVICE void finish_rows(float (&gradient)[S::units][4], const RowTile<T>& row_tile, int first_row,
                        const float2* statistics, int rows_left, const float* affine, float scale,
                        LayerNorm layer_norm, const RowTarget<T>& target, T* staging, const Lane& lane) {
  float normalized[S::units][4], inverse[2];
  UNROLL for (int half = 0; half < 2; ++half) {
    const int row = lane.group + 8 * half;
    const float2 own = statistics[row];
    inverse[half] = own.y;
    UNROLL for (int n = 0; n < S::units; ++n) {
      const float2 x = unpack<T>(load_shared<uint32_t>(
          row_tile.elements + unit_offset<S::units>(first_row + row, n) + 2 * lane.pair));
      normalized[n][2 * half] = (x.x - own.x) * own.y;
      normalized[n][2 * half + 1] = (x.y - own.x) * own.y;
    }
  }
  float sums[2] = {}, products[2] = {};
  UNROLL for (int n = 0; n < S::units; ++n) {
    const float2 gamma = load_shared<float2>(affine + 8 * n + 2 * lane.pair);
    const float2 beta = load_shared<float2>(affine + S::feature_dim + 8 * n + 2 * lane.pair);
    float gamma_sum[2] = {}, beta_sum[2] = {};
    UNROLL for (int half = 0; half < 2; ++half) {
      const int row = lane.group + 8 * half;
      UNROLL for (int i = 0; i < 2; ++i) {
        float& value = gradient[n][2 * half + i];
        const float hat = normalized[n][2 * half + i];
        const float argument = hat * (i ? gamma.y : gamma.x) + (i ? beta.y : beta.x);
        if (S::map == FeatureMap::square) value *= 2.0f * argument;
        if (S::map == FeatureMap::elu) value *= elu_feature_derivative(argument);
        if (row >= rows_left) value = 0;  // a padded row must add nothing to the sums
        gamma_sum[i] += value * hat;
        beta_sum[i] += value;
      }
      float& first = gradient[n][2 * half];
      float& second = gradient[n][2 * half + 1];
      if (target.partial && row < rows_left) {
        store_global(target.partial + row * S::feature_dim + 8 * n + 2 * lane.pair,
                     float2{first * scale, second * scale});
      }
      first *= gamma.x;
      second *= gamma.y;
      sums[half] += first + second;
      products[half] += first * normalized[n][2 * half] + second * normalized[n][2 * half + 1];
    }
    UNROLL for (int i = 0; i < 2; ++i) {
      UNROLL for (int distance = 4; distance < 32; distance *= 2) {
        gamma_sum[i] += shuffle_xor(gamma_sum[i], distance);
        beta_sum[i] += shuffle_xor(beta_sum[i], distance);
      }
      if (lane.group == 0) {
        target.affine_sums[8 * n + 2 * lane.pair + i] += gamma_sum[i] * scale;
        target.affine_sums[S::feature_dim + 8 * n + 2 * lane.pair + i] += beta_sum[i] * scale;
      }
    }
  }
  if (!target.rows) return;
  if (layer_norm == LayerNorm::head) {
    UNROLL for (int half = 0; half < 2; ++half) {
      const float mean = quad_sum(sums[half]) * (1.0f / S::feature_dim);
      const float product = quad_sum(products[half]) * (1.0f / S::feature_dim);
      UNROLL for (int n = 0; n < S::units; ++n) {
        UNROLL for (int j = 2 * half; j < 2 * half + 2; ++j) {
          gradient[n][j] = inverse[half] * (gradient[n][j] - mean - normalized[n][j] * product);
        }
      }
    }
  }
  constexpr int width = 2;  // C fragments that are stored together
  UNROLL for (int first = 0; first < S::units; first += width) {
    float part[width][4];
    UNROLL for (int n = 0; n < width; ++n) {
      UNROLL for (int j = 0; j < 4; ++j) part[n][j] = gradient[first + n][j];
    }
    store_tile(staging, part, target.rows + 8 * first, target.stride, target.piece, rows_left, 8 * width,
               lane);
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
