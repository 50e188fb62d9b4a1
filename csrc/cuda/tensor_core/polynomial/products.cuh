// The products of a warp's tiles of query rows in the polynomial maps' forward: with the state of earlier
// chunks, and with the tokens of their own.
#pragma once

#include "cuda/tensor_core/polynomial/state.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::polynomial {

// The products with Z and with taylor's sums: what earlier chunks add to the denominators of rows g and g +
// 8.
template <class T, class S>
DEVICE void denominator(float (&sum)[4], const uint32_t (&rows)[2 * S::units], const uint32_t* gram_terms,
                        float count, const Lane& lane) {
  float product[S::units][4] = {};
  if constexpr (S::taylor) {  // sim has u itself too, and half of its square
    UNROLL for (int n = 0; n < S::units; ++n) {
      const float2 pair = load_shared<float2>(gram_terms + StateShape<S>::gram_words + 8 * n + 2 * lane.pair);
      product[n][0] = product[n][2] = 2 * pair.x, product[n][1] = product[n][3] = 2 * pair.y;
    }
  }
  if constexpr (S::units == 2) {
    const uint4 high = load_shared<uint4>(gram_terms + 4 * lane.lane),
                low = load_shared<uint4>(gram_terms + 128 + 4 * lane.lane);
    mma_m16n8k16<T>(product[0], rows, high.x, high.y);
    mma_m16n8k16<T>(product[1], rows, high.z, high.w);
    mma_m16n8k16<T>(product[0], rows, low.x, low.y);
    mma_m16n8k16<T>(product[1], rows, low.z, low.w);
  } else {
    const uint2 terms = load_shared<uint2>(gram_terms + 2 * lane.lane);
    mma_m16n8k8<T>(product[0], rows[0], rows[1], terms.x);
    mma_m16n8k8<T>(product[0], rows[0], rows[1], terms.y);
  }
  UNROLL for (int half = 0; half < 2; ++half) {
    float part = 0;
    UNROLL for (int n = 0; n < S::units; ++n) {
      const float2 x = unpack<T>(rows[2 * n + half]);
      part += product[n][2 * half] * x.x + product[n][2 * half + 1] * x.y;
    }
    part = quad_sum(part);
    sum[2 * half] = sum[2 * half + 1] = S::taylor ? 0.5f * part + count : part;
  }
}

// out += phi(q') S for the warp's tiles of rows. `own` is where the lane's ldmatrix of a tile reads the
// feature tile without a rotation.
template <class T, class S>
DEVICE void multiply_state(float (&out)[S::own_tiles][8][4],
                           const uint32_t (&rows)[S::own_tiles][2 * S::units],
                           const T* const (&tiles)[S::own_tiles], const T* published, const Lane& lane) {
  using Spread = StateShape<S>;
  // products off the diagonal stand for two; sim of taylor has half of them all
  uint32_t off_diagonal[S::own_tiles][2 * S::units];
  UNROLL for (int o = 0; o < S::own_tiles; ++o) {
    UNROLL for (int i = 0; i < 2 * S::units; ++i) {
      off_diagonal[o][i] = S::taylor ? rows[o][i] : add_pairs<T>(rows[o][i], rows[o][i]);
    }
  }
  const auto square = [](uint32_t x) {
    return multiply_pairs<T>(S::taylor ? multiply_pairs<T>(x, pack<T>(0.5f, 0.5f)) : x, x);
  };
  const auto multiply_rows = [&](const uint32_t (&phi)[S::own_tiles][4], int row) {  // 16 features
    const T* const place = published + (row + lane.row_of_parity()) * value_stride + lane.column_of_parity();
    UNROLL for (int i = 0; i < columns / tile; ++i) {
      uint32_t b[4];
      ldmatrix_transposed(b, place + tile * i);
      UNROLL for (int o = 0; o < S::own_tiles; ++o) {
        mma_m16n8k16<T>(out[o][2 * i], phi[o], b[0], b[1]);
        mma_m16n8k16<T>(out[o][2 * i + 1], phi[o], b[2], b[3]);
      }
    }
  };
  const int rotated = halves_row(lane, S::rotated_half_rows) * S::feature_stride;
  uint32_t phi[S::own_tiles][4];
  UNROLL for (int slab = 0; slab < Spread::slabs; ++slab) {
    UNROLL for (int o = 0; o < S::own_tiles; ++o) {
      const bool diagonal_only = slab == 0 && S::units == 2;
      if (!diagonal_only) {
        ldmatrix_transposed(phi[o], tiles[o] + rotated + Spread::slab_offsets * slab * S::feature_stride);
      }
      UNROLL for (int i = 0; i < 4; ++i) {
        const int x = i % (2 * S::units);
        phi[o][i] = slab == 0 && i < 2 * S::units ? square(rows[o][x])
                                                  : multiply_pairs<T>(phi[o][i], off_diagonal[o][x]);
      }
    }
    multiply_rows(phi, tile * slab);
  }
  UNROLL for (int o = 0; o < S::own_tiles; ++o) {  // the half slab
    uint32_t other[2] = {rows[o][2 * S::units - 2], rows[o][2 * S::units - 1]};
    if constexpr (S::units == 1) {
      ldmatrix_transposed(other, tiles[o] + ((lane.lane & 7) + S::feature_dim / 2) * S::feature_stride);
    }
    UNROLL for (int i = 0; i < 2; ++i) phi[o][i] = multiply_pairs<T>(off_diagonal[o][i], other[i]);
  }
  if constexpr (S::taylor) {
    UNROLL for (int o = 0; o < S::own_tiles; ++o) phi[o][2] = phi[o][3] =
        lane.pair == 0 ? pack<T>(1.0f, 0.0f) : 0u;
    multiply_rows(phi, Spread::half_row);
    multiply_rows(rows, Spread::linear_row);
  } else {
    const T* const place =
        published + (Spread::half_row + (lane.lane & 7)) * value_stride + (lane.lane >> 3) * 8;
    UNROLL for (int i = 0; i < 2; ++i) {
      uint32_t b[4];
      ldmatrix_transposed(b, place + 32 * i);
      UNROLL for (int o = 0; o < S::own_tiles; ++o) {
        UNROLL for (int n = 0; n < 4; ++n) mma_m16n8k8<T>(out[o][4 * i + n], phi[o][0], phi[o][1], b[n]);
      }
    }
  }
}

// p = sim of 16 rows and 16 tokens, rounded, as a fragment A. `diagonal`: the tokens are those of the rows.
template <class T, class S>
DEVICE void scores(uint32_t (&p)[4], const uint32_t (&rows)[2 * S::units], const uint32_t (&tokens)[4],
                   bool diagonal, const Lane& lane) {
  float u[2][4] = {};
  UNROLL for (int n = 0; n < 2; ++n) {
    if constexpr (S::units == 2) {
      mma_m16n8k16<T>(u[n], rows, tokens[2 * n], tokens[2 * n + 1]);
    } else {
      mma_m16n8k8<T>(u[n], rows[0], rows[1], tokens[2 * n]);
    }
    UNROLL for (int j = 0; j < 4; ++j) u[n][j] =
        S::taylor ? 1 + u[n][j] * (1 + 0.5f * u[n][j]) : u[n][j] * u[n][j];
  }
  if (diagonal) {  // counted 1/4, 1/8: its own tile
    UNROLL for (int n = 0; n < 2; ++n) {
      UNROLL for (int j = 0; j < 4; ++j) {
        if (fragment_column(n, j, lane) > fragment_row(j, lane)) u[n][j] = 0;
      }
    }
  }
  round_tile<T>(p, u);
}

// Walks the chunk's tokens, 16 at a time: adds their part of y to the warp's rows that see them and, with
// `add`, adds them to the state.
template <class T, class S>
DEVICE void walk_tokens(float (&out)[S::own_tiles][8][4], float (&sum)[S::own_tiles][4],
                        const uint32_t (&rows)[S::own_tiles][2 * S::units], State<T, S>& state, const T* keys,
                        const T* values, bool add, const Lane& lane) {
  constexpr int last = S::own_tiles - 1;
  const int last_tile = tile * lane.warp + last * tiles_apart(lane.warp);
  const T* of_values = value_place(values, lane);
  const T* terms = term_place<S>(keys, lane);
  NO_UNROLL for (int token = 0; token < S::chunk; token += tile) {
    uint32_t v[columns / tile][4];
    UNROLL for (int i = 0; i < columns / tile; ++i) ldmatrix_transposed(v[i], of_values + tile * i);
    if (token <= last_tile) {  // counted 5/8, 13/16: up to its own tile
      uint32_t tokens[4];      // fragment B (features, 16 tokens)
      ldmatrix_transposed(tokens, terms);
      UNROLL for (int o = last; o >= 0; --o) {
        const int own = tile * lane.warp + o * tiles_apart(lane.warp);
        if (o < last && token > own) continue;  // counted 5/8, 9/16 from here
        uint32_t p[4];
        scores<T, S>(p, rows[o], tokens, token == own, lane);
        UNROLL for (int i = 0; i < columns / tile; ++i) {
          mma_m16n8k16<T>(out[o][2 * i], p, v[i][0], v[i][1]);
          mma_m16n8k16<T>(out[o][2 * i + 1], p, v[i][2], v[i][3]);
        }
        mma_m16n8k16<T>(sum[o], p, pack<T>(1.0f, 1.0f), pack<T>(1.0f, 1.0f));
      }
    }
    if (add) add_tokens(state, terms, v, of_values, lane);
    of_values += tile * value_stride;
    terms += tile;
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::polynomial
