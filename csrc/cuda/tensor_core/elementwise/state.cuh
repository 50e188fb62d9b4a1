// The running state of the elementwise maps: S, the sum over tokens of phi(k') v^T, in registers, and z, the
// sum of phi(k'), in shared memory. Warp w holds the columns 16 w to 16 w + 15 of S.
//
// The sum over a chunk is formed apart and then added to the state: tensor cores truncate as they accumulate,
// and over many chunks that would become a drift. Once a chunk the state is rounded and published as a tile
// (columns, features), of which ldmatrix makes fragments B of phi(q') S. Slots in the workspace are those of
// tensor_core/state.cuh, so that the backward's kernels start from them as well.
#pragma once

#include "cuda/tensor_core/elementwise/rows.cuh"
#include "cuda/tensor_core/product.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::elementwise {

// The published tile, and z as fragments B for the lanes of a quad: the rounded numbers of the features 2t,
// 2t + 1 and 2t + 8, 2t + 9, then what rounding took from them.
template <class S>
struct Published {
  static constexpr int elements = columns * S::raw_stride, terms = 4;
};

template <class S>
struct State {
  using Slot = typename S::Slot;

  // kv[n] is the C fragment (16 columns of this warp, features 8 n .. 8 n + 7)
  float kv[S::units][4] = {};
  float* z;  // (16) in shared memory; warp 0 alone touches it

  // Sets the state that the block begins with.
  template <class AnyProblem>
  DEVICE void start(const Arguments<AnyProblem>& arguments, const Span& span, const Lane& lane) {
    float sum = 0;
    const int feature = lane.lane % S::feature_dim;
    polynomial::visit_start<Slot>(arguments, span, false, [&](const float* slot) {
      UNROLL for (int n = 0; n < S::units; ++n) add(kv[n], load_global<float4>(slot + kv_place(n, lane)));
      if (lane.warp == 0)
        sum += load_global<float>(slot + z_place(feature / 8, feature % 8 / 2) + feature % 2);
    });
    if (lane.warp == 0 && lane.lane < S::feature_dim) z[feature] = sum;
  }

  // Stores the state in a slot.
  DEVICE void store(float* slot, const Lane& lane) const {
    UNROLL for (int n = 0; n < S::units; ++n) {
      store_global(slot + kv_place(n, lane), float4{kv[n][0], kv[n][1], kv[n][2], kv[n][3]});
    }
    if (lane.warp > 0) return;
    UNROLL for (int n = 0; n < S::units; ++n) {
      const float2 pair = load_shared<float2>(z + 8 * n + 2 * lane.pair);
      store_global(slot + z_place(n, lane.lane), float4{pair.x, pair.y, pair.x, pair.y});
    }
  }

  // Stores the state in its public form: kv (16, head_dim) from the block's first column on, and k (16),
  // which is null where another block stores it.
  DEVICE void store_public(float* public_kv, float* k, int64_t head_dim, int columns_left,
                           const Lane& lane) const {
    UNROLL for (int n = 0; n < S::units; ++n) {
      UNROLL for (int j = 0; j < 4; ++j) {
        const int feature = 8 * n + 2 * lane.pair + (j & 1),
                  column = tile * lane.warp + fragment_row(j, lane);
        if (column < columns_left) public_kv[feature * head_dim + column] = kv[n][j];
      }
    }
    if (k && lane.warp == 0 && lane.lane < S::feature_dim) k[lane.lane] = z[lane.lane];
  }

  // Where the numbers of a lane lie in a slot: those of kv[n], and z of the features 8 n + 2t and 8 n + 2t +
  // 1.
  static DEVICE int kv_place(int n, const Lane& lane) {
    return Slot::kv + 4 * (threads * n + 32 * lane.warp + lane.lane);
  }
  static DEVICE int z_place(int n, int lane) { return Slot::k + 4 * (32 * n + lane); }
};

// Adds a chunk: its row tile of phi(k'), and its value tile.
template <class T, class S>
DEVICE void add_chunk(State<S>& state, const T* keys, const T* values, const Lane& lane) {
  const T* const key_place = keys + lane.row_of_parity() * S::raw_stride + lane.column_of_parity();
  const T* const value_place =
      values + lane.row_of_halves() * value_stride + tile * lane.warp + lane.column_of_halves();
  float sum[S::units][4] = {};
  UNROLL for (int token = 0; token < S::chunk; token += tile) {
    uint32_t phi[4], v[4];  // fragments B (16 tokens, 16 features) and A (16 columns, 16 tokens)
    ldmatrix_transposed(phi, key_place + token * S::raw_stride);
    ldmatrix_transposed(v, value_place + token * value_stride);
    mma_m16n8k16<T>(sum[0], v, phi[0], phi[1]);
    mma_m16n8k16<T>(sum[1], v, phi[2], phi[3]);
  }
  UNROLL for (int n = 0; n < S::units; ++n) {
    UNROLL for (int j = 0; j < 4; ++j) state.kv[n][j] += sum[n][j];
  }
  if (lane.warp > 0) return;
  const T* place = keys + lane.row_of_halves() * S::raw_stride + lane.column_of_halves();
  float of_keys[4] = {};
  NO_UNROLL for (int token = 0; token < S::chunk; token += tile) {
    uint32_t phi[4];  // fragment A (16 features, 16 tokens)
    ldmatrix_transposed(phi, place);
    mma_m16n8k16<T>(of_keys, phi, pack<T>(1.0f, 1.0f), pack<T>(1.0f, 1.0f));
    place += tile * S::raw_stride;
  }
  if (lane.pair > 0) return;
  state.z[lane.group] += of_keys[0];
  state.z[lane.group + 8] += of_keys[2];
}

template <class T, class S>
DEVICE void publish_state(const State<S>& state, T* published, uint4* terms, const Lane& lane) {
  const float (&kv)[S::units][4] = state.kv;
  const uint32_t words[4] = {pack<T>(kv[0][0], kv[0][1]), pack<T>(kv[0][2], kv[0][3]),
                             pack<T>(kv[1][0], kv[1][1]), pack<T>(kv[1][2], kv[1][3])};
  stmatrix<S::raw_stride * 2>(published + tile * lane.warp * S::raw_stride, words);
  if (lane.warp > 0 || lane.lane >= Published<S>::terms) return;
  uint32_t high[S::units], low[S::units];
  UNROLL for (int n = 0; n < S::units; ++n) {
    const float2 sum = load_shared<float2>(state.z + 8 * n + 2 * lane.pair);
    high[n] = pack<T>(sum.x, sum.y);
    const float2 rounded = unpack<T>(high[n]);
    low[n] = pack<T>(sum.x - rounded.x, sum.y - rounded.y);
  }
  store_shared(terms + lane.pair, uint4{high[0], high[1], low[0], low[1]});
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::elementwise
