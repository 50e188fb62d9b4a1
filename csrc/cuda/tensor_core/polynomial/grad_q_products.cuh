// The products of the sweep that makes grad q which no other sweep has: a chunk's own pairs, and taylor's
// linear features. grad_q.cuh has the letters H and G.
#pragma once

#include "cuda/tensor_core/polynomial/gradient.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::polynomial {

// 16 tokens of v, and of k' transposed with features in their order, as what rows of queries are multiplied
// with.
template <class T, class S>
struct KeyTile {
  uint32_t values[columns / tile][4];  // B (columns, tokens)
  uint32_t tokens[2 * S::units];       // B (d, tokens)
  uint32_t terms[2 * S::units];        // B (tokens, d)

  // All are where the lane's ldmatrix reads: v and k of rows by halves, k_parity of rows by parity, which
  // with d = 8 is the same.
  DEVICE KeyTile(const T* v, const T* k, const T* k_parity) {
    UNROLL for (int i = 0; i < columns / tile; ++i) ldmatrix(values[i], v + tile * i);
    ldmatrix_transposed(tokens, k_parity);
    ldmatrix(terms, k);
  }

  // Adds to H and G of a tile of 16 queries, and for taylor to `dots` the lane's part of the sum of c sim of
  // rows g and g + 8. With has_deltas c is c - delta / r, and deltas has delta / r of the 16 rows.
  // `diagonal`: the tokens are those of the rows.
  DEVICE void add_pairs(float (&h_sum)[S::units][4], float (&g_sum)[S::units][4], float (&dots)[2],
                        const uint32_t (&rows)[2 * S::units],
                        const uint32_t (&row_gradients)[columns / tile][4], bool diagonal, bool has_deltas,
                        const float* deltas, const Lane& lane) const {
    float c[2][4] = {}, u[2][4] = {};
    UNROLL for (int i = 0; i < columns / tile; ++i) {
      mma_m16n8k16<T>(c[0], row_gradients[i], values[i][0], values[i][1]);
      mma_m16n8k16<T>(c[1], row_gradients[i], values[i][2], values[i][3]);
    }
    UNROLL for (int n = 0; n < 2; ++n) multiply_features<T, S>(u[n], rows, tokens + S::units * n);
    if (has_deltas) {
      UNROLL for (int j = 0; j < 4; ++j) {
        const float delta = load_shared<float>(deltas + lane.group + 8 * (j >> 1));
        c[0][j] -= delta, c[1][j] -= delta;
      }
    }
    if (diagonal) {  // counted 1/4, 1/8: its own tile
      UNROLL for (int n = 0; n < 2; ++n) {
        UNROLL for (int j = 0; j < 4; ++j) {
          if (fragment_column(n, j, lane) <= fragment_row(j, lane)) continue;
          c[n][j] = 0;
          u[n][j] = S::taylor ? -1 : 0;  // what is added to G becomes 0
        }
      }
    }
    UNROLL for (int n = 0; n < 2; ++n) {
      UNROLL for (int j = 0; j < 4; ++j) {
        if constexpr (S::taylor) {  // the derivative 1 + u of sim = 1 + u + u^2 / 2
          dots[j >> 1] += c[n][j] * (1.0f + u[n][j] * (1.0f + 0.5f * u[n][j]));
          u[n][j] += 1.0f;
        }
        c[n][j] *= u[n][j];
      }
    }
    uint32_t a[4];
    round_tile<T>(a, c);
    UNROLL for (int n = 0; n < S::units; ++n) mma_m16n8k16<T>(h_sum[n], a, terms[2 * n], terms[2 * n + 1]);
    round_tile<T>(a, u);
    UNROLL for (int n = 0; n < S::units; ++n) mma_m16n8k16<T>(g_sum[n], a, terms[2 * n], terms[2 * n + 1]);
  }
};

// Adds taylor's linear features to the gradient of its products, and sets `dots` to the lane's part of
// phi(x).(S g) of rows g and g + 8, of all features. A product is of degree 2 and comes twice in x .
// gradient.
template <class T, class S>
DEVICE void linear_gradient(float (&gradient)[S::own_tiles][Order<S>::numbers],
                            float (&dots)[S::own_tiles][2], const float (&x)[S::own_tiles][Order<S>::numbers],
                            const uint32_t (&values)[S::own_tiles][columns / tile][4], const T* published,
                            const Lane& lane) {
  using Spread = StateShape<S>;
  constexpr int shift = published_shift<S>;
  float slab[S::own_tiles][S::units][4], constant[S::own_tiles][4] = {};
  offset_gradient<T, S>(slab, values, published, Spread::linear_row, false, lane);
  // the constant is the ninth row of the half slab, and the rows behind it are zeros
  const T* const rows = published + published_row<shift>(Spread::half_row + 8) +
                        (lane.lane & 7) * value_stride + 8 * (lane.lane >> 3);
  UNROLL for (int i = 0; i < 2; ++i) {
    uint32_t b[4];  // (32 columns, 8 features)
    ldmatrix(b, rows + 32 * i);
    UNROLL for (int o = 0; o < S::own_tiles; ++o) {
      mma_m16n8k16<T>(constant[o], values[o][2 * i], b[0], b[1]);
      mma_m16n8k16<T>(constant[o], values[o][2 * i + 1], b[2], b[3]);
    }
  }
  UNROLL for (int o = 0; o < S::own_tiles; ++o) {
    UNROLL for (int half = 0; half < 2; ++half) dots[o][half] = lane.pair == 0 ? constant[o][2 * half] : 0.0f;
    UNROLL for (int n = 0; n < S::units; ++n) {
      UNROLL for (int j = 0; j < 4; ++j) {
        const int i = Order<S>::place(n, j);
        dots[o][j >> 1] += x[o][i] * (0.5f * gradient[o][i] + slab[o][n][j]);
        gradient[o][i] += slab[o][n][j];
      }
    }
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::polynomial
