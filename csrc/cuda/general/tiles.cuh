// The general path's shared-memory tiles (cuda/plan/plan.h describes them) in the accumulation type A: how a
// chunk's rows get there, through LayerNorm, affine and the elementwise part of the map. Every thread of the
// block calls each function; none of them holds a barrier, so the caller decides where one is needed.
#pragma once

#include "cuda/shared/block.cuh"
#include "cuda/shared/vector.cuh"

namespace rebased::REBASED_BACKEND {

// Four rows of a 4 x 4 tile, `stride` apart.
template <class A>
DEVICE void load_tile(A (&tile)[4][4], const A* address, int stride) {
  UNROLL for (int r = 0; r < 4; ++r) {
    const Quad<A> row = load_quad(address + r * stride);
    UNROLL for (int c = 0; c < 4; ++c) tile[r][c] = row.x[c];
  }
}
template <class A>
DEVICE void store_tile(A* address, int stride, const A (&tile)[4][4]) {
  UNROLL for (int r = 0; r < 4; ++r) {
    store_quad(address + r * stride, {{tile[r][0], tile[r][1], tile[r][2], tile[r][3]}});
  }
}

// tile[i][row] = source[row][i] for row < rows, 0 from there to `chunk`.
template <class A, class E>
DEVICE void load_features(A* tile, int tile_stride, const E* source, int64_t source_stride, int rows,
                          int chunk, int dim) {
  const int thread = threadIdx.x, threads = blockDim.x;
  constexpr int elements = vector_elements<E>;
  if (rows_aligned(source, source_stride, dim, 16)) {
    const int pieces = dim / elements;
    for (int index = thread; index < chunk * pieces; index += threads) {
      const int row = index / pieces, i = (index - row * pieces) * elements;
      Vector<E, elements> piece{};
      if (row < rows) piece = *reinterpret_cast<const Vector<E, elements>*>(source + row * source_stride + i);
      UNROLL for (int n = 0; n < elements; ++n) tile[(i + n) * tile_stride + row] = convert<A>(piece.x[n]);
    }
  } else {
    for (int index = thread; index < chunk * dim; index += threads) {
      const int row = index / dim, i = index - row * dim;
      tile[i * tile_stride + row] = row < rows ? convert<A>(source[row * source_stride + i]) : A(0);
    }
  }
}

// tile[row][c] = factor[row] source[row][c] for row < rows and c < width, else 0; factor null: 1.
template <class A, class E>
DEVICE void load_values(A* tile, int tile_stride, const E* source, int64_t source_stride, const A* factor,
                        int rows, int chunk, int width) {
  const int thread = threadIdx.x, threads = blockDim.x;
  constexpr int elements = vector_elements<E>;
  if (rows_aligned(source, source_stride, width, 16) && width % 4 == 0) {
    const int pieces = width / elements;
    for (int index = thread; index < chunk * pieces; index += threads) {
      const int row = index / pieces, column = (index - row * pieces) * elements;
      Vector<E, elements> piece{};
      A scale = 1;
      if (row < rows) {
        piece = *reinterpret_cast<const Vector<E, elements>*>(source + row * source_stride + column);
        if (factor) scale = factor[row];
      }
      UNROLL for (int n = 0; n < elements; ++n) {
        tile[row * tile_stride + column + n] = scale * convert<A>(piece.x[n]);
      }
    }
  } else {
    const int padded = (width + 3) & ~3;
    for (int index = thread; index < chunk * padded; index += threads) {
      const int row = index / padded, column = index - row * padded;
      A value = 0;
      if (row < rows && column < width) {
        value = convert<A>(source[row * source_stride + column]);
        if (factor) value *= factor[row];
      }
      tile[row * tile_stride + column] = value;
    }
  }
}

// target[0 .. count) = values; as one vector if `aligned` and count is 4.
template <class E, class A>
DEVICE void store_values(E* target, const A (&values)[4], A factor, int count, bool aligned) {
  if (aligned && count >= 4) {
    Vector<E, 4> packed;
    UNROLL for (int n = 0; n < 4; ++n) packed.x[n] = convert<E>(values[n] * factor);
    if constexpr (sizeof(packed) <= 16) {
      *reinterpret_cast<Vector<E, 4>*>(target) = packed;
    } else {
      Vector<E, 2> half[2] = {{{packed.x[0], packed.x[1]}}, {{packed.x[2], packed.x[3]}}};
      reinterpret_cast<Vector<E, 2>*>(target)[0] = half[0];
      reinterpret_cast<Vector<E, 2>*>(target)[1] = half[1];
    }
  } else {
    UNROLL for (int n = 0; n < 4; ++n) {
      if (n < count) target[n] = convert<E>(values[n] * factor);
    }
  }
}

// Normalises and transforms row `row` of the raw tile: normalized[i][row] = LayerNorm(x)_i (where given) and
// tile[i][row] = what the features are made of. Both may be the raw tile itself. Returns 1 / the standard
// deviation. Rows past the end become zeros after the affine, so that beta does not bring them to life.
template <class A>
DEVICE A normalize_row(const A* raw, A* normalized, A* tile, int stride, int row, bool valid,
                       const Features<A>& features, const Norm<A>& norm) {
  const int dim = features.dim;
  A mean = 0, rstd = 1;
  if (valid && norm.mode == LayerNorm::head) {
    for (int i = 0; i < dim; ++i) mean += raw[i * stride + row];
    mean /= dim;
    A variance = 0;
    for (int i = 0; i < dim; ++i) {
      const A centred = raw[i * stride + row] - mean;
      variance += centred * centred;
    }
    rstd = reciprocal_sqrt(variance / dim + norm.eps);
  } else if (valid && norm.mode == LayerNorm::token) {
    mean = norm.statistics[2 * row];
    rstd = norm.statistics[2 * row + 1];
  }
  for (int i = 0; i < dim; ++i) {
    const A x = (raw[i * stride + row] - mean) * rstd;
    if (normalized) normalized[i * stride + row] = x;
    tile[i * stride + row] = valid ? features.apply(norm.affine(x, i), norm.scale) : A(0);
  }
  tile[dim * stride + row] = valid ? A(1) : A(0);
  tile[(dim + 1) * stride + row] = 0;
  return rstd;
}

// The tiles of one kernel and what it computes with them.
template <class A>
struct Tiles {
  const GeneralTiles& plan;
  A* shared;
  Features<A> features;
  int head_dim;
  A* state;    // in shared memory or in the workspace
  A* carries;  // of the state, laid out as it is, then of sums for gamma and beta; null in short segments

  DEVICE A* at(int offset) const { return shared + offset; }
  DEVICE A* vector(int index) const { return shared + plan.vectors + index * plan.chunk; }
  DEVICE A* thread_vector() const { return vector(GeneralTiles::vector_count); }
  DEVICE A* state_sums() const {
    return state + static_cast<int64_t>(plan.padded_features) * plan.value_stride;
  }
  DEVICE int quads() const { return (head_dim + 3) >> 2; }
};

}  // namespace rebased::REBASED_BACKEND
