// The products of the sweep that makes grad v and grad k which no other sweep has: phi(k') T, and a chunk's
// own pairs. grad_kv.cuh has the letters.
#pragma once

#include "cuda/tensor_core/polynomial/reverse.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::polynomial {

// The high half of a and the low half of b.
DEVICE uint32_t middle_halves(uint32_t a, uint32_t b) { return a >> 16 | b << 16; }

// Puts x_(a + 1) in the place of x_a, cyclically, in fragments A of rows.
template <class S>
DEVICE void rotate_rows(uint32_t (&x)[2 * S::units], const Lane& lane) {
  const int next = (lane.lane & ~3) | ((lane.pair + 1) & 3);
  UNROLL for (int half = 0; half < 2; ++half) {
    const uint32_t from = shuffle(x[half], next);
    if constexpr (S::units == 2) {
      x[half] = middle_halves(x[half], x[2 + half]);
      x[2 + half] = middle_halves(x[2 + half], from);
    } else {
      x[half] = middle_halves(x[half], from);
    }
  }
}

// Adds the published rows of one slab, `place` on, times phi.
template <class T, int own_tiles>
DEVICE void multiply_slab(float (&out)[own_tiles][columns / 8][4], const uint32_t (&phi)[own_tiles][4],
                          const T* place) {
  UNROLL for (int i = 0; i < columns / tile; ++i) {
    uint32_t b[4];
    ldmatrix_transposed(b, place + tile * i);
    UNROLL for (int o = 0; o < own_tiles; ++o) {
      mma_m16n8k16<T>(out[o][2 * i], phi[o], b[0], b[1]);
      mma_m16n8k16<T>(out[o][2 * i + 1], phi[o], b[2], b[3]);
    }
  }
}

// out += phi(rows) T, for taylor twice that. Slabs come in a loop that is not unrolled, so that their
// products do not begin while the state's gradient still needs the registers.
template <class T, class S>
DEVICE void multiply_state(float (&out)[S::own_tiles][columns / 8][4],
                           const uint32_t (&rows)[S::own_tiles][2 * S::units], const T* published,
                           const Lane& lane) {
  using Spread = StateShape<S>;
  constexpr int words = 2 * S::units, shift = published_shift<S>;
  constexpr int slab_stride = published_row<shift>(tile), half_slab = published_row<shift>(Spread::half_row);
  const int feature = S::units == 2 ? Order<S>::feature(lane.row_of_parity()) : lane.row_of_parity();
  const T* const place = published + published_row<shift>(feature) + lane.column_of_parity();
  uint32_t other[S::own_tiles][words], twice[S::own_tiles][words], phi[S::own_tiles][4];
  UNROLL for (int o = 0; o < S::own_tiles; ++o) {
    UNROLL for (int i = 0; i < words; ++i) other[o][i] = rows[o][i],
                                           twice[o][i] = add_pairs<T>(rows[o][i], rows[o][i]);
  }
  if constexpr (S::units == 2) {
    const T* slab = place;
    NO_UNROLL for (int e = 1; e < Spread::slabs; ++e) {
      slab += slab_stride;
      UNROLL for (int o = 0; o < S::own_tiles; ++o) {
        rotate_rows<S>(other[o], lane);
        multiply<T>(phi[o], other[o], twice[o]);
      }
      multiply_slab<T>(out, phi, slab);
    }
    UNROLL for (int o = 0; o < S::own_tiles; ++o) multiply<T>(phi[o], rows[o], rows[o]);
    multiply_slab<T>(out, phi, place);
    // the last offset has the features of lanes t = 0, 1; the products of the others would be the same ones
    UNROLL for (int o = 0; o < S::own_tiles; ++o) {
      UNROLL for (int i = 0; i < words; ++i) {
        const uint32_t across = shuffle_xor(rows[o][i], 2);
        phi[o][i] = lane.pair < 2 ? multiply_pairs<T>(across, twice[o][i]) : 0u;
        if (S::taylor && i < 2 && lane.pair == 2) phi[o][i] = pack<T>(2.0f, 0.0f);  // the constant, twice
      }
    }
    // whose row is the ninth
    const int last_row = S::taylor && feature == 8 ? feature : feature & 7;
    multiply_slab<T>(out, phi,
                     published + half_slab + published_row<shift>(last_row) + lane.column_of_parity());
    if constexpr (S::taylor) multiply_slab<T>(out, twice, place + published_row<shift>(Spread::linear_row));
  } else {
    NO_UNROLL for (int slab = 0; slab < Spread::slabs; ++slab) {
      UNROLL for (int o = 0; o < S::own_tiles; ++o) {
        UNROLL for (int n = 0; n < 2; ++n) {
          UNROLL for (int half = 0; half < 2; ++half) {
            const uint32_t factor = slab + n == 0 ? rows[o][half] : twice[o][half];
            phi[o][2 * n + half] = multiply_pairs<T>(other[o][half], factor);
          }
          rotate_rows<S>(other[o], lane);
        }
      }
      multiply_slab<T>(out, phi, place + slab_stride * slab);
    }
    UNROLL for (int o = 0; o < S::own_tiles; ++o) {
      UNROLL for (int half = 0; half < 2; ++half) {
        phi[o][half] = lane.pair < 2 ? multiply_pairs<T>(other[o][half], twice[o][half]) : 0u;
        phi[o][2 + half] = 0u;
      }
    }
    // half a slab has 8 rows
    multiply_slab<T>(out, phi,
                     published + half_slab + (feature & 7) * value_stride + lane.column_of_parity());
  }
}

// Adds a step's queries: to grad v (out) and grad k' (sum) of the warp's rows what those of them contribute
// that do not come before the rows, and all of them to the reverse state. `ordered`: q" transposed with its
// features in the order of gradient.cuh, which with d = 8 is the feature tile.
template <class T, class S>
DEVICE void add_step(float (&out)[S::own_tiles][columns / 8][4], float (&sum)[S::own_tiles][S::units][4],
                     State<T, S>& state, const uint32_t (&rows)[S::own_tiles][2 * S::units],
                     const uint32_t (&row_values)[S::own_tiles][columns / tile][4], char* memory,
                     const T* ordered, int stage, const Lane& lane) {
  using Queries = QueryTiles<S>;
  constexpr int words = 2 * S::units;
  const T* const gradients = reinterpret_cast<const T*>(memory + Queries::gradients) + stage * S::value_tile;
  const T* const features = reinterpret_cast<const T*>(memory + Queries::queries);
  const T* gradient_rows = gradients + lane.row_of_halves() * value_stride + lane.column_of_halves();
  const T* gradient_place = gradients + lane.row_of_parity() * value_stride + lane.column_of_parity();
  const int row = S::units == 2 ? lane.row_of_parity() : lane.lane & 7,
            column = S::units == 2 ? lane.column_of_parity() : lane.column_of_halves();
  const T* score_place = ordered + row * S::feature_stride + column;
  const T* back_place =
      ordered + (S::units == 2 ? lane.row_of_halves() : row) * S::feature_stride + lane.column_of_halves();
  const char* delta_place = memory + Queries::minus_delta + 16 * lane.pair;
  const int first_tile = own_tile(lane.warp, 0), last_tile = own_tile(lane.warp, S::own_tiles - 1);
  NO_UNROLL for (int token = 0; token < S::chunk; token += tile) {
    uint32_t g[columns / tile][4], p[S::own_tiles][4];
    const bool seen = token >= first_tile, both = token >= last_tile;
    if (seen) {  // counted 5/8, 13/16: from its own tile on
      uint32_t tokens[words], terms[words];
      ldmatrix_transposed(tokens, score_place);
      ldmatrix(terms, back_place);
      float c[S::own_tiles][2][4];
      const float4 deltas[2] = {load_shared<float4>(delta_place), load_shared<float4>(delta_place + 64)};
      UNROLL for (int i = 0; i < columns / tile; ++i) {
        uint32_t b[4];
        ldmatrix(b, gradient_rows + tile * i);
        UNROLL for (int o = 0; o < S::own_tiles; ++o) {
          if (o == 1 && !both) continue;  // counted 5/8, 9/16 from here
          UNROLL for (int n = 0; n < 2; ++n) {
            if (i == 0) {
              c[o][n][0] = deltas[n].x, c[o][n][1] = deltas[n].y;
              c[o][n][2] = deltas[n].z, c[o][n][3] = deltas[n].w;
            }
            mma_m16n8k16<T>(c[o][n], row_values[o][i], b[2 * n], b[2 * n + 1]);
          }
        }
      }
      float2 roots[2];  // of taylor
      if constexpr (S::taylor) {
        UNROLL for (int n = 0; n < 2; ++n) roots[n] =
            load_shared<float2>(delta_place + Queries::roots - Queries::minus_delta + 64 * n);
      }
      UNROLL for (int o = 0; o < S::own_tiles; ++o) {
        if (o == 1 && !both) continue;  // counted 5/8, 9/16 from here
        float u[2][4];
        UNROLL for (int n = 0; n < 2; ++n) {
          UNROLL for (int j = 0; j < 4; ++j) u[n][j] = 0;
          if constexpr (S::taylor) u[n][0] = u[n][2] = roots[n].x, u[n][1] = u[n][3] = roots[n].y;
          multiply_features<T, S>(u[n], rows[o], tokens + S::units * n);
        }
        const bool diagonal = token == own_tile(lane.warp, o);
        const auto mask = [&](float (&x)[2][4]) {
          UNROLL for (int n = 0; n < 2; ++n) {
            UNROLL for (int j = 0; j < 4; ++j) {
              if (fragment_column(n, j, lane) < fragment_row(j, lane)) x[n][j] = 0;
            }
          }
        };
        if (diagonal) mask(u);
        UNROLL for (int n = 0; n < 2; ++n) {
          UNROLL for (int j = 0; j < 4; ++j) {
            c[o][n][j] *= u[n][j];
            u[n][j] *= u[n][j];
            if constexpr (S::taylor) u[n][j] += j & 1 ? roots[n].y * roots[n].y : roots[n].x * roots[n].x;
          }
        }
        if (S::taylor && diagonal) mask(u);
        uint32_t a[4];
        round_tile<T>(p[o], u);
        round_tile<T>(a, c[o]);
        UNROLL for (int n = 0; n < S::units; ++n)
            mma_m16n8k16<T>(sum[o][n], a, terms[2 * n], terms[2 * n + 1]);
      }
    }
    UNROLL for (int i = 0; i < columns / tile; ++i) ldmatrix_transposed(g[i], gradient_place + tile * i);
    if (seen) {  // counted 5/8, 13/16: from its own tile on
      UNROLL for (int o = 0; o < S::own_tiles; ++o) {
        if (o == 1 && !both) continue;  // counted 5/8, 9/16 from here
        UNROLL for (int i = 0; i < columns / tile; ++i) {
          mma_m16n8k16<T>(out[o][2 * i], p[o], g[i][0], g[i][1]);
          mma_m16n8k16<T>(out[o][2 * i + 1], p[o], g[i][2], g[i][3]);
        }
      }
    }
    add_queries<T, S>(state, memory, features, gradients, g, token, lane);
    gradient_rows += tile * value_stride, gradient_place += tile * value_stride;
    score_place += tile, back_place += tile, delta_place += 8 * tile;
  }
  if (lane.warp == 0) add_sums<true>(state, memory, lane);  // counted 1/4: one warp
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::polynomial
