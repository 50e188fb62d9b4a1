// The product of tiles of 16 tokens with a state, and with the chunk's own tokens. Forward takes it for y,
// where rows are q', columns are k' and values are v. The reverse sweep takes it for grad v, where rows are
// k', columns are q', values are ghat and the mask is the other way round.
#pragma once

#include "cuda/tensor_core/state.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

// How many row tiles are taken together. Each fragment of the state and of the columns is then used twice.
// For four row tiles there are too few registers.
constexpr int tile_pair = 2;

// out[i] = phi(rows[i]) S for two row tiles, where S is this warp's 16 columns of the state.
template <class T, class S>
DEVICE void multiply_state(float (&out)[tile_pair][2][4], const uint32_t (&rows)[tile_pair][4],
                           const State<S>& state, Range range) {
  const auto round = [&](int feature_tile, int j) {
    const float (&sums)[4] = state.kv[feature_tile];
    return pack<T>(sums[j] * range.shrink, sums[j + 1] * range.shrink);
  };
  // two fragments B (16 features, 8 columns)
  const uint32_t b[4] = {round(0, 0), round(1, 0), round(0, 2), round(1, 2)};
  UNROLL for (int i = 0; i < tile_pair; ++i) {
    mma_m16n8k16<T>(out[i][0], rows[i], b[0], b[1]);
    mma_m16n8k16<T>(out[i][1], rows[i], b[2], b[3]);
  }
  UNROLL for (int i = 0; i < tile_pair; ++i) {
    UNROLL for (int j = 0; j < 4; ++j) {
      out[i][0][j] *= range.grow;
      out[i][1][j] *= range.grow;
    }
  }
}

// result += rows B, where B (features, 8 columns) comes from the denominator's sums: sums[i][first] and its
// neighbour hold the features 8 i + 2t and 8 i + 2t + 1. Each sum is split into two numbers of type T, a high
// and a low part, so that r is as exact as q' and k' are.
template <class T, int units, int width>
DEVICE void multiply_sums(float (&result)[4], const uint32_t (&rows)[4], const float (&sums)[units][width],
                          int first, Range range) {
  uint32_t high[2] = {}, low[2] = {};
  UNROLL for (int i = 0; i < units; ++i) {
    const float x = sums[i][first] * range.shrink, y = sums[i][first + 1] * range.shrink;
    high[i] = pack<T>(x, y);
    const float2 rounded = unpack<T>(high[i]);
    low[i] = pack<T>(x - rounded.x, y - rounded.y);
  }
  mma_m16n8k16<T>(result, rows, high[0], high[1]);
  mma_m16n8k16<T>(result, rows, low[0], low[1]);
}

// u = rows . tokens for a row tile and a column tile, as C fragments.
template <class T>
DEVICE void dot_products(float (&u)[2][4], const uint32_t (&rows)[4], const uint32_t (&tokens)[4]) {
  UNROLL for (int n = 0; n < 2; ++n) {
    UNROLL for (int j = 0; j < 4; ++j) u[n][j] = 0;
    mma_m16n8k16<T>(u[n], rows, tokens[2 * n], tokens[2 * n + 1]);
  }
}
template <class T>  // with d = 32
DEVICE void dot_products(float (&u)[2][4], const uint32_t (&rows)[2][4], const uint32_t (&tokens)[2][4]) {
  UNROLL for (int n = 0; n < 2; ++n) {
    UNROLL for (int j = 0; j < 4; ++j) u[n][j] = 0;
    UNROLL for (int part = 0; part < 2; ++part)
        mma_m16n8k16<T>(u[n], rows[part], tokens[part][2 * n], tokens[part][2 * n + 1]);
  }
}

template <class T, class S, class Fragment>
DEVICE void similarities(float (&sim)[2][4], const Fragment& rows, const Fragment& tokens) {
  dot_products<T>(sim, rows, tokens);
  UNROLL for (int n = 0; n < 2; ++n) {
    UNROLL for (int j = 0; j < 4; ++j) {
      const float u = sim[n][j];
      if (S::map == FeatureMap::outer) sim[n][j] = u * u;
    }
  }
}

// The row and the column of element j of C fragment n of a (16, 16) tile.
DEVICE int fragment_row(int j, const Lane& lane) { return lane.group + 8 * (j >> 1); }
DEVICE int fragment_column(int n, int j, const Lane& lane) { return 8 * n + 2 * lane.pair + (j & 1); }

// Multiplies each column of a (16, 16) tile by its scale.
DEVICE void scale_columns(float (&values)[2][4], const float* scales, const Lane& lane) {
  UNROLL for (int n = 0; n < 2; ++n) {
    const float2 scale = load_shared<float2>(scales + 8 * n + 2 * lane.pair);
    UNROLL for (int j = 0; j < 4; ++j) values[n][j] *= j & 1 ? scale.y : scale.x;
  }
}

// Rounds two C fragments of a (16, 16) tile into a fragment A.
template <class T>
DEVICE void round_tile(uint32_t (&a)[4], const float (&values)[2][4]) {
  UNROLL for (int n = 0; n < 2; ++n) {
    a[2 * n] = pack<T>(values[n][0], values[n][1]);
    a[2 * n + 1] = pack<T>(values[n][2], values[n][3]);
  }
}

// Adds what the 16 columns from `token` on contribute to two row tiles of the same chunk: out += sim v and,
// in forward, sum += sim. In reverse, for float16, sim is multiplied by its column's scale before it is
// rounded.
//
// In forward a row sees the columns that are not later than itself, in reverse those that are not earlier.
// `diagonal` is the number, 0 or 1, of the row tile that consists of the same tokens as the columns: there
// the mask falls within the tile. In forward row tiles before it see none of these columns and row tiles
// behind it see all; in reverse it is the other way round. A caller gives -1 in forward, or 2 in reverse,
// where both row tiles see all columns.
template <class T, class S, bool reverse, class Fragment>
DEVICE void attend(float (&out)[tile_pair][2][4], float (&sum)[tile_pair][4],
                   const Fragment (&rows)[tile_pair], const T* columns_features, const T* values, int token,
                   int diagonal, const float* column_scales, const Lane& lane) {
  uint32_t v[4];
  Fragment tokens;
  load_values(v, values, token, tile * (S::wide ? lane.warp % warps : lane.warp), lane);
  load_columns(tokens, columns_features, token, lane);
  UNROLL for (int i = 0; i < tile_pair; ++i) {
    if (reverse ? i > diagonal : i < diagonal) continue;
    float sim[2][4];
    similarities<T, S>(sim, rows[i], tokens);
    if constexpr (reverse && !is_bfloat16<T>) scale_columns(sim, column_scales + token, lane);
    if (i == diagonal) {
      UNROLL for (int n = 0; n < 2; ++n) {
        UNROLL for (int j = 0; j < 4; ++j) {
          const int row = fragment_row(j, lane), column = fragment_column(n, j, lane);
          if (reverse ? column < row : column > row) sim[n][j] = 0;
        }
      }
    }
    uint32_t a[4];
    round_tile<T>(a, sim);
    mma_m16n8k16<T>(out[i][0], a, v[0], v[2]);
    mma_m16n8k16<T>(out[i][1], a, v[1], v[3]);
    if constexpr (!reverse) {  // sums the rounded scores, which the numerator takes too
      const uint32_t one = pack<T>(1.0f, 1.0f);
      mma_m16n8k16<T>(sum[i], a, one, one);
    }
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
