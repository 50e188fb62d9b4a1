// The gradient of a row tile of q' or k' for `outer` with d = 32: gradient.cuh with the state of
// wide_state.cuh. Row tile w % 4 belongs to warp w, and so to two warps, of the halves h = 0 and h = 1. Each
// of the two adds up what its offsets, its rows of the Gram matrix and every other column tile contribute,
// and the warp with h = 0 finishes the sum.
//
// The state, rounded to the element type, reaches all warps in two turns, since shared memory has no room for
// all of it at once. The first turn brings the offsets 8 h + 4 .. 8 h + 7 of both halves and the half offset
// 16, the second the offsets 8 h .. 8 h + 3: the order in which Horner's rule wants them.
#pragma once

#include "cuda/tensor_core/reverse.cuh"
#include "cuda/tensor_core/wide_state.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

constexpr int turn_offsets = 4;                                           // offsets of each half in a turn
constexpr int turn_features = 2 * turn_offsets * Wide::feature_dim + 16;  // and the half offset
constexpr int wide_state_stride = turn_features + 8;                      // an odd number of 16-byte units
static_assert(wide_state_stride / 8 % 2 == 1);

// Writes this warp's columns of a turn's features into the state tile (64 columns, features).
template <class T, int turn>
DEVICE void publish_state(T* state_tile, const WideState& state, Range range, const WideLane& lane) {
  constexpr int half_features = turn_offsets * Wide::feature_dim;
  const auto publish = [&](int n, int feature) {
    UNROLL for (int i = 0; i < 2; ++i) {
      const int column = lane.column + lane.group + 8 * i;
      store_shared(state_tile + column * wide_state_stride + feature + 2 * lane.pair,
                   pack<T>(state.kv[n][2 * i] * range.shrink, state.kv[n][2 * i + 1] * range.shrink));
    }
  };
  constexpr int first = turn == 0 ? Wide::units * turn_offsets : 0;
  UNROLL for (int n = 0; n < Wide::units * turn_offsets; ++n)
      publish(first + n, half_features * lane.half + 8 * n);
  if (turn == 0 && lane.half == 1) {
    UNROLL for (int n = 0; n < 2; ++n) publish(Wide::tiles - 2 + n, 2 * half_features + 8 * n);
  }
}

// The gradient of 16 features of phi(rows), from position `feature` of a turn on: the values of the row tile
// at `token` (16 tokens, 64 columns) times the state. The fragments of the values are loaded again each time,
// since there are no registers to keep them.
template <class T>
DEVICE void wide_slab_gradient(float (&gradient)[2][4], const T* values, int token, const T* state_tile,
                               int feature, const Lane& lane) {
  UNROLL for (int j = 0; j < 4; ++j) gradient[0][j] = gradient[1][j] = 0;
  UNROLL for (int i = 0; i < columns / tile; ++i) {
    uint32_t a[4], b[4];  // b (16 columns, 16 features)
    load_value_rows(a, values, token, tile * i, lane);
    ldmatrix_transposed(b, state_tile + (tile * i + lane.row_of_parity()) * wide_state_stride + feature +
                               lane.column_of_parity());
    UNROLL for (int n = 0; n < 2; ++n) mma_m16n8k16<T>(gradient[n], a, b[2 * n], b[2 * n + 1]);
    if (i % 2 == 1) sync_warp();  // keeps the compiler from loading too far ahead
  }
}

// The gradient of a tile while the sum over the offsets is formed. With gradient.cuh's G, `fixed` sums the
// terms G_{e,a} x_{a+e}, and `moved` sums the terms G_{e,a-e} x_{a-e} by Horner's rule.
struct WideGradient {
  float fixed[Wide::units][4], moved[Wide::units][4];

  DEVICE void clear() {
    UNROLL for (int n = 0; n < Wide::units; ++n) {
      UNROLL for (int j = 0; j < 4; ++j) fixed[n][j] = moved[n][j] = 0;
    }
  }

  // Adds this warp's offsets of a turn. Both warps of a row tile must call it in every turn.
  template <class T, int turn>
  DEVICE void add_turn(const T* values, const T* features, int token, const T* state_tile,
                       const WideLane& lane) {
    constexpr int half_features = turn_offsets * Wide::feature_dim;
    float slab[2][4], x[2][4], other[2][4];
    uint32_t rows[4];
    if (turn == 0 && lane.half == 1) {  // offset 16 exchanges the halves of x: both its terms at once
      wide_slab_gradient(slab, values, token, state_tile, 2 * half_features, lane);
      load_wide_rows(rows, features, token, 0, lane);
      unpack_rows<T>(x, rows);
      load_wide_rows(rows, features, token, tile, lane);
      unpack_rows<T>(other, rows);
      UNROLL for (int n = 0; n < 2; ++n) {
        UNROLL for (int j = 0; j < 4; ++j) {
          fixed[n][j] += slab[n][j] * other[n][j];
          fixed[2 + n][j] += slab[n][j] * x[n][j];
        }
      }
    }
    NO_UNROLL for (int i = turn_offsets - 1; i >= 0; --i) {
      const int offset = 8 * lane.half + (turn == 0 ? turn_offsets : 0) + i;
      UNROLL for (int part = 0; part < 2; ++part) {
        wide_slab_gradient(slab, values, token, state_tile,
                           half_features * lane.half + Wide::feature_dim * i + tile * part, lane);
        load_wide_rows(rows, features, token, tile * part, lane);
        unpack_rows<T>(x, rows);
        load_wide_rows(rows, features, token, tile * part + offset, lane);
        unpack_rows<T>(other, rows);
        UNROLL for (int n = 0; n < 2; ++n) {
          UNROLL for (int j = 0; j < 4; ++j) {
            moved[2 * part + n][j] += slab[n][j] * x[n][j];
            fixed[2 * part + n][j] += slab[n][j] * other[n][j];
          }
        }
      }
      if (turn == 0 || i > 0) rotate(moved, lane);
    }
  }

  // The sum, after both turns. What `moved` of the warp with h = 1 holds is to be moved by 8 more features.
  DEVICE void finish(float (&gradient)[Wide::units][4], Range range, const WideLane& lane) const {
    UNROLL for (int n = 0; n < Wide::units; ++n) {
      UNROLL for (int j = 0; j < 4; ++j) {
        const float forward = lane.half == 1 ? moved[(n + Wide::units - 1) % Wide::units][j] : moved[n][j];
        gradient[n][j] = range.grow * (fixed[n][j] + forward);
      }
    }
  }
};

// gradient += factors[half] 2 Z rows for each half of the rows, in the columns of this warp's half. Z lies in
// `gram`, where WideState keeps it.
template <class T>
DEVICE void add_gram_gradient(float (&gradient)[Wide::units][4], const uint32_t (&rows)[2][4],
                              const float4* gram, const float (&factors)[2], const WideLane& lane) {
  float sums[2][2][4], bound = 0;
  UNROLL for (int part = 0; part < 2; ++part) {
    UNROLL for (int n = 0; n < 2; ++n) {
      const float4 value = load_shared<float4>(gram + (warps * lane.half + 2 * part + n) * 32 + lane.lane);
      sums[part][n][0] = value.x, sums[part][n][1] = value.y;
      sums[part][n][2] = value.z, sums[part][n][3] = value.w;
      UNROLL for (int j = 0; j < 4; ++j) bound = maximum(bound, fabsf(sums[part][n][j]));
    }
  }
  const Range range = is_bfloat16<T> ? Range{1.0f, 1.0f} : range_of(warp_maximum(bound));
  UNROLL for (int n = 0; n < 2; ++n) {  // the features 16 half + 8 n .. + 7
    float product[4] = {};
    UNROLL for (int part = 0; part < 2; ++part)
        multiply_sums<T>(product, rows[part], sums[part], 2 * n, range);
    UNROLL for (int j = 0; j < 4; ++j) {
      const float value = Wide::offset_weight * range.grow * factors[j >> 1] * product[j];
      gradient[n][j] += lane.half == 0 ? value : 0.0f;
      gradient[2 + n][j] += lane.half == 1 ? value : 0.0f;
    }
  }
}

// Adds up the two summands of the gradient of a row tile in the warp with h = 0. `memory` has room for 4
// float4 of each of 128 threads. Contains a barrier.
DEVICE void join_gradients(float (&gradient)[Wide::units][4], float4* memory, const WideLane& lane) {
  float4* const place = memory + threadIdx.x % threads;
  if (lane.half == 1) {
    UNROLL for (int n = 0; n < Wide::units; ++n) store_shared(
        place + n * threads, float4{gradient[n][0], gradient[n][1], gradient[n][2], gradient[n][3]});
  }
  sync_threads();
  if (lane.half == 0) {
    UNROLL for (int n = 0; n < Wide::units; ++n) {
      const float4 value = load_shared<float4>(place + n * threads);
      gradient[n][0] += value.x, gradient[n][1] += value.y;
      gradient[n][2] += value.z, gradient[n][3] += value.w;
    }
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
