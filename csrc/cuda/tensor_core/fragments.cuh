// Tiles of the tensor-core path, and how a warp reads them as fragments of mma.m16n8k16.
//
// A block is four warps and walks a sequence in chunks of 64 tokens. Warp w owns the value columns 16 w to
// 16 w + 15. Lane l of a warp has g = l / 4 and t = l % 4; device.cuh has the layout of a fragment by these
// two. Four kinds of tile lie in shared memory:
//   feature tile  (d features and some repeated ones, 64 tokens), stride 72: q' or k' transposed. With d = 32
//                 rows from d on repeat rows 0, 1 and so on. A lane may address any row in an ldmatrix, so
//                 that a fragment rotated by e features, x_((i + e) mod d), is loaded like any other, from e
//                 rows further down.
//   row tile      (64 or 128 rows, d features): rows of q and k as they are in memory
//   value tile    (64 tokens, 64 columns): v or grad y; 16-byte units of a row are permuted by token mod 8
//   state tile    (64 columns, features), stride an odd number of 16-byte units, in backward alone: a state
//                 rounded to the element type
// The strides and the permutation make eight lanes of an ldmatrix touch all 32 banks. In this folder the
// template parameter T is the element type, bfloat16_t.
#pragma once

#include "cuda/device/device.cuh"
#include "cuda/plan/tensor_core_shape.h"
#include "op/feature_map.h"

namespace rebased::REBASED_BACKEND::tensor_core {

using namespace rebased::tensor_core;

constexpr int tile = 16;               // tokens, features or columns of one fragment
constexpr int warps = columns / tile;  // registers let three blocks of 4 warps run, but one block of 8
constexpr int threads = 32 * warps;
constexpr int feature_stride = chunk + 8;

// What a kernel is compiled for: a feature map and the number d of its inputs. Kernels call their Slabs S.
//
// The maps that act on each feature have d = 16 features, one k-step of an mma. `outer` is here with d = 32
// (`wide`): a block then has twice the warps, and each warp holds half of the offsets; wide_state.cuh says
// how. `tiles` counts a warp's tiles of 8 features of the state.
template <FeatureMap feature_map, int dim>
struct Slabs {
  static constexpr bool wide = dim == 32;
  static_assert(wide ? feature_map == FeatureMap::outer : dim == 16 && !is_polynomial(feature_map));
  static constexpr FeatureMap map = feature_map;
  static constexpr int feature_dim = dim;
  static constexpr int units = dim / 8;  // units of 8 features in a row, and in the columns of a fragment
  static constexpr int threads = wide ? 2 * tensor_core::threads : tensor_core::threads;
  static constexpr int public_features = static_cast<int>(num_features(map, dim));
  static constexpr int tiles = wide ? 34 : 2;

  static constexpr int feature_rows = wide ? dim + dim / 2 - 1 : dim;
  static constexpr int feature_tile = feature_rows * feature_stride;
  static constexpr int state_stride = 8 * (tiles % 2 ? tiles : tiles + 1);
  // Of two equal products x_i x_j and x_j x_i one is kept, and stands for both. Inside these kernels the
  // state carries this weight, so that features of queries and keys are plain products.
  static constexpr float offset_weight = 2;  // of the products of all offsets but 0
  HOST_DEVICE static constexpr float tile_weight(int feature_tile) {
    return wide && feature_tile >= units ? offset_weight : 1.0f;
  }
  // The number of the warp's tile n among the tiles of the whole state.
  HOST_DEVICE static constexpr int state_tile(int n, int warp) {
    return !wide ? n : n < 32 ? n + 32 * (warp / warps) : n + 32 + 2 * (1 - warp / warps);
  }

  // Sizes of arrays in shared memory, in floats: gamma and beta of one head, of the query heads and the kv
  // head of a block, and of one query head and the kv head. Then, in float4, the Sums of all threads.
  static constexpr int affine_size = 2 * dim, affine_floats = (max_group_size + 1) * affine_size,
                       ungrouped_affine_floats = 2 * affine_size;
  static constexpr int sums_size = units * threads;
};

struct Lane {
  int warp, lane, group, pair;  // group is g and pair is t of the comments
  DEVICE Lane()
      : warp(static_cast<int>(threadIdx.x / 32)),
        lane(static_cast<int>(threadIdx.x % 32)),
        group(static_cast<int>(threadIdx.x % 32 / 4)),
        pair(static_cast<int>(threadIdx.x % 4)) {}
  // The row and the column that this lane addresses in an ldmatrix of four 8x8 matrices. Matrix m = lane / 8
  // covers rows 8 (m / 2) .. + 7 and columns 8 (m % 2) .. + 7 of a 16x16 tile (halves), or rows 8 (m % 2) ..
  // + 7 and columns 8 (m / 2) .. + 7 (parity).
  DEVICE int row_of_halves(int half_rows = 8) const { return (lane & 7) + (lane >> 4) * half_rows; }
  DEVICE int column_of_halves() const { return ((lane >> 3) & 1) << 3; }
  DEVICE int row_of_parity() const { return (lane & 7) + (((lane >> 3) & 1) << 3); }
  DEVICE int column_of_parity() const { return (lane >> 4) << 3; }
};

// ---- feature tiles ----

// Loads a fragment A (16 tokens, 16 features) of the tile that begins at `token`.
template <class T>
DEVICE void load_rows(uint32_t (&a)[4], const T* features, int token, const Lane& lane) {
  ldmatrix_transposed(a, features + lane.row_of_halves() * feature_stride + token + lane.column_of_halves());
}

// The same fragments for d = 32, of the features `feature` .. + 15. Rotated by e they begin at feature + e.
template <class T>
DEVICE void load_wide_rows(uint32_t (&a)[4], const T* features, int token, int feature, const Lane& lane) {
  ldmatrix_transposed(
      a, features + (lane.row_of_halves() + feature) * feature_stride + token + lane.column_of_halves());
}
template <class T>  // the fragments of all 32 features
DEVICE void load_wide_rows(uint32_t (&a)[2][4], const T* features, int token, const Lane& lane) {
  UNROLL for (int part = 0; part < 2; ++part) load_wide_rows(a[part], features, token, tile * part, lane);
}
template <class T>
DEVICE void load_wide_terms(uint32_t (&b)[4], const T* features, int token, int feature, const Lane& lane) {
  ldmatrix(b, features + (lane.row_of_halves() + feature) * feature_stride + token + lane.column_of_halves());
}

// Loads a fragment B of the product for scores (features, 16 tokens): {b[0], b[1]} are the first 8 tokens,
// {b[2], b[3]} the others.
template <class T>
DEVICE void load_columns(uint32_t (&b)[4], const T* features, int token, const Lane& lane) {
  ldmatrix_transposed(b, features + lane.row_of_parity() * feature_stride + token + lane.column_of_parity());
}

template <class T>
DEVICE void load_columns(uint32_t (&b)[2][4], const T* features, int token, const Lane& lane) {
  UNROLL for (int part = 0; part < 2; ++part) {
    ldmatrix_transposed(b[part], features + (lane.row_of_parity() + tile * part) * feature_stride + token +
                                     lane.column_of_parity());
  }
}

// Loads a fragment B of a sum over tokens (16 tokens, 16 features): {b[0], b[1]} are the first 8 features.
template <class T>
DEVICE void load_terms(uint32_t (&b)[4], const T* features, int token, const Lane& lane) {
  ldmatrix(b, features + lane.row_of_halves() * feature_stride + token + lane.column_of_halves());
}

template <class T>
DEVICE void multiply(uint32_t (&product)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  UNROLL for (int i = 0; i < 4; ++i) product[i] = multiply_pairs<T>(a[i], b[i]);
}

// ---- value tiles ----

DEVICE int value_offset(int token, int column) {
  return token * columns + ((((column >> 3) ^ (token & 7)) << 3) | (column & 7));
}

// Loads a fragment A (16 columns, 16 tokens). The same registers are a fragment B (16 tokens, 16 columns),
// with the first 8 columns in {v[0], v[2]} and the others in {v[1], v[3]}.
template <class T>
DEVICE void load_values(uint32_t (&v)[4], const T* values, int token, int column, const Lane& lane) {
  ldmatrix_transposed(v,
                      values + value_offset(token + lane.row_of_halves(), column + lane.column_of_halves()));
}

// Loads a fragment A (16 tokens, 16 columns).
template <class T>
DEVICE void load_value_rows(uint32_t (&a)[4], const T* values, int token, int column, const Lane& lane) {
  ldmatrix(a, values + value_offset(token + lane.row_of_parity(), column + lane.column_of_parity()));
}

// Loads a fragment B (16 columns, 16 tokens): {b[0], b[1]} are the first 8 tokens.
template <class T>
DEVICE void load_value_columns(uint32_t (&b)[4], const T* values, int token, int column, const Lane& lane) {
  ldmatrix(b, values + value_offset(token + lane.row_of_halves(), column + lane.column_of_halves()));
}

// The offset of the 16-byte unit `which` of a row that has n units. The units change places from one 128
// bytes to the next, so that neither a column of units nor one word of each of eight rows meets a bank twice.
template <int n>
DEVICE int unit_offset(int row, int which) {
  return 8 * (n * row + (which ^ row / (8 / n) % n));
}

// ---- sums over the four lanes of a quad, which hold one row's columns ----

DEVICE float quad_sum(float value) {
  value += shuffle_xor(value, 1);
  return value + shuffle_xor(value, 2);
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
