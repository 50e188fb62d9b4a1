// The running state of `outer` with d = 32 on tensor cores. It has 544 features, too many for the registers
// of four warps.
//
// A block has eight warps. Warp w belongs to the half h = w / 4 and holds the value columns 16 (w % 4) .. +
// 15 of the features of the offsets 8 h .. 8 h + 7; with h = 1 it holds those of offset 16 as well. That
// makes at most 17 k-steps of 16 features, in 136 registers. A product with the state, or with the chunk's
// own tokens, is then the sum of what two warps compute, each from its own offsets and, within the chunk,
// from every other column tile.
//
// The Gram matrix of the denominator is divided among the warps too. Warp w keeps the tile of the rows 16 h
// .. + 15 and the columns 8 (w % 4) .. + 7, in shared memory, where the other warps read it.
#pragma once

#include "cuda/tensor_core/product.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

using Wide = Slabs<FeatureMap::outer, 32>;
constexpr int wide_warps = Wide::threads / 32;
constexpr int wide_steps =
    Wide::tiles / 2;  // k-steps of 16 features; the last one is offset 16, which half of the warps have

struct WideLane : Lane {
  int half, column;  // h, and the first of the warp's value columns
  DEVICE WideLane() : half(warp / warps), column(tile * (warp % warps)) {}
};

struct WideState {
  float kv[Wide::tiles][4];  // laid out as in State; Wide::state_tile says which features a tile holds
  float4* place;             // where this thread's part of the Gram matrix lies

  // `gram` (warps, lanes) lies in shared memory. add_chunk changes it, and a barrier must stand between that
  // and the last read by another warp.
  DEVICE explicit WideState(float4* gram) : place(gram + threadIdx.x) {}

  DEVICE void clear() {
    UNROLL for (int n = 0; n < Wide::tiles; ++n) { UNROLL for (int i = 0; i < 4; ++i) kv[n][i] = 0; }
    store_shared(place, float4{0, 0, 0, 0});
  }
};

// ---- in the workspace ----

DEVICE void load_state(WideState& state, const float* slot) {
  const float* const own = slot + 4 * threadIdx.x;
  UNROLL for (int n = 0; n < Wide::tiles; ++n) {
    const float4 value = load_global<float4>(own + n * Wide::threads * 4);
    state.kv[n][0] = value.x, state.kv[n][1] = value.y, state.kv[n][2] = value.z, state.kv[n][3] = value.w;
  }
  store_shared(state.place, load_global<float4>(own + Slot<Wide>::k));
}

DEVICE void store_state(float* slot, const WideState& state) {
  float* const own = slot + 4 * threadIdx.x;
  UNROLL for (int n = 0; n < Wide::tiles; ++n) {
    store_global(own + n * Wide::threads * 4,
                 float4{state.kv[n][0], state.kv[n][1], state.kv[n][2], state.kv[n][3]});
  }
  store_global(own + Slot<Wide>::k, load_shared<float4>(state.place));
}

// Stores the state in the public order, as export_state of state.cuh does.
DEVICE void export_state(float* kv, float* k, const WideState& state, bool gradient, int64_t head_dim,
                         int columns_left, const WideLane& lane) {
  UNROLL for (int n = 0; n < Wide::tiles; ++n) {
    UNROLL for (int i = 0; i < 4; ++i) {
      const int feature_tile = Wide::state_tile(n, lane.warp);
      const int feature = 8 * feature_tile + 2 * lane.pair + (i & 1);
      const int column = lane.column + lane.group + 8 * (i >> 1);
      if (feature >= Wide::public_features || column >= columns_left) continue;
      kv[feature * head_dim + column] = state.kv[n][i] * (1.0f / state_weight<Wide>(feature_tile, gradient));
    }
  }
  if (!k) return;
  const float4 value = load_shared<float4>(state.place);
  const float gram[4] = {value.x, value.y, value.z, value.w};
  UNROLL for (int i = 0; i < 4; ++i) {
    const int row = tile * lane.half + lane.group + 8 * (i >> 1);
    const int column = lane.column / 2 + 2 * lane.pair + (i & 1);
    const int offset = (column - row + Wide::feature_dim) % Wide::feature_dim;
    if (offset < 16 || (offset == 16 && row < 16)) {
      k[public_product<Wide>(row, column)] = gram[i] * (1.0f / gram_weight<Wide>(row, column, gradient));
    }
  }
}

// ---- products ----

// Leaves the largest magnitude in this warp's part of the state in warp_maxima, as share_maximum of state.cuh
// does.
template <class T>
DEVICE void share_maximum(float* warp_maxima, const WideState& state, const Lane& lane) {
  if constexpr (!is_bfloat16<T>) {
    float bound = 0;
    UNROLL for (int n = 0; n < Wide::tiles; ++n) {
      UNROLL for (int i = 0; i < 4; ++i) bound = maximum(bound, fabsf(state.kv[n][i]));
    }
    bound = warp_maximum(bound);
    sync_warp();  // all lanes have read the maximum of the chunk before
    if (lane.lane == 0) warp_maxima[lane.warp] = bound;
    sync_warp();
  }
}

// Calls take(step, feature) for each of this warp's k-steps that has an even (part 0) or odd (part 1) number.
// The features of such a step are the products of the rows 16 part + i and feature + i of a feature tile, for
// i = 0..15. All lanes of a warp take the same steps. sync_warp keeps the compiler from loading for many
// steps at once, for which there are no registers.
template <int part, class Take>
DEVICE void for_wide_steps(const WideLane& lane, const Take& take) {
  UNROLL for (int step = part; step < wide_steps; step += 2) {
    const int offset = 8 * lane.half + step / 2;
    if (step + 1 < wide_steps || lane.half == 1) take(step, offset + tile * part);
    sync_warp();
  }
}

// out[i] = phi(rows[i]) S for two row tiles, over the features of this warp alone.
template <class T>
DEVICE void multiply_state(float (&out)[tile_pair][2][4], const uint32_t (&rows)[tile_pair][2][4],
                           const T* features, int token, const WideState& state, Range range,
                           const WideLane& lane) {
  const auto take = [&](int step, int feature) {
    const auto round = [&](int n, int j) {
      const float (&sums)[4] = state.kv[2 * step + n];
      return pack<T>(sums[j] * range.shrink, sums[j + 1] * range.shrink);
    };
    const uint32_t b[4] = {round(0, 0), round(1, 0), round(0, 2), round(1, 2)};
    UNROLL for (int i = 0; i < tile_pair; ++i) {
      uint32_t phi[4];
      load_wide_rows(phi, features, token + tile * i, feature, lane);
      multiply<T>(phi, phi, rows[i][step % 2]);
      mma_m16n8k16<T>(out[i][0], phi, b[0], b[1]);
      mma_m16n8k16<T>(out[i][1], phi, b[2], b[3]);
    }
  };
  for_wide_steps<0>(lane, take);
  for_wide_steps<1>(lane, take);
  UNROLL for (int i = 0; i < tile_pair; ++i) {
    UNROLL for (int j = 0; j < 4; ++j) {
      out[i][0][j] *= range.grow;
      out[i][1][j] *= range.grow;
    }
  }
}

// What the two warps of the same value columns exchange through shared memory: for each pair of row tiles of
// the chunk, two C fragments of each thread.
struct Exchange {
  static constexpr int pairs = chunk / (tile * tile_pair), size = 2 * pairs * Wide::threads;
  float4* tiles;  // (pairs, 2, threads)

  // Gives the other warp this warp's summand of one tile of the pair. This warp keeps tile lane.half.
  DEVICE void give(int pair, const float (&out)[tile_pair][2][4], const WideLane& lane) const {
    UNROLL for (int n = 0; n < 2; ++n) {
      float value[4];
      UNROLL for (int j = 0; j < 4; ++j) value[j] = lane.half == 0 ? out[1][n][j] : out[0][n][j];
      store_shared(tiles + (2 * pair + n) * Wide::threads + threadIdx.x,
                   float4{value[0], value[1], value[2], value[3]});
    }
  }

  // To be called after a barrier: the tile that this warp keeps, summed over all features and column tiles.
  DEVICE void take(int pair, float (&whole)[2][4], const float (&out)[tile_pair][2][4],
                   const WideLane& lane) const {
    const int partner = static_cast<int>(threadIdx.x) ^ threads;
    UNROLL for (int n = 0; n < 2; ++n) {
      const float4 given = load_shared<float4>(tiles + (2 * pair + n) * Wide::threads + partner);
      const float values[4] = {given.x, given.y, given.z, given.w};
      UNROLL for (int j = 0; j < 4; ++j) whole[n][j] =
          (lane.half == 0 ? out[0][n][j] : out[1][n][j]) + values[j];
    }
  }
};

// Adds to the state the sums over the chunk's tokens of phi(k') v^T and of k' k'^T, as add_chunk of state.cuh
// does.
template <class T, bool weighted>
DEVICE void add_chunk(WideState& state, const T* features, const T* values, const TokenWeights& weights,
                      const WideLane& lane) {
  constexpr int part = tile;
  const float grow = weighted && !is_bfloat16<T> ? weights.grow : 1.0f;
  const float weight = Wide::offset_weight * grow;
  const float first_weight = lane.half == 0 ? grow : weight;
  NO_UNROLL for (int begin = 0; begin < chunk; begin += part) {
    uint32_t v[part / tile][4], terms[part / tile][4];
    float gram[4] = {};
    UNROLL for (int i = 0; i < part / tile; ++i) {
      const int token = begin + tile * i;
      load_values(v[i], values, token, lane.column, lane);
      if constexpr (weighted && !is_bfloat16<T>) {
        const float* const w = weights.scales + token + 2 * lane.pair;
        const uint32_t first = pack<T>(w[0], w[1]), second = pack<T>(w[8], w[9]);
        v[i][0] = multiply_pairs<T>(v[i][0], first), v[i][1] = multiply_pairs<T>(v[i][1], first);
        v[i][2] = multiply_pairs<T>(v[i][2], second), v[i][3] = multiply_pairs<T>(v[i][3], second);
      }
      load_wide_terms(terms[i], features, token, tile * lane.half, lane);
      uint32_t rows[4] = {terms[i][0], terms[i][2], terms[i][1], terms[i][3]};
      if constexpr (weighted) {
        const auto weight = [&](int next) { return weights.of_sum<T>(token + 2 * lane.pair + next); };
        const uint32_t first = pack<T>(weight(0), weight(1)), second = pack<T>(weight(8), weight(9));
        rows[0] = multiply_pairs<T>(rows[0], first), rows[1] = multiply_pairs<T>(rows[1], first);
        rows[2] = multiply_pairs<T>(rows[2], second), rows[3] = multiply_pairs<T>(rows[3], second);
      }
      uint32_t b[2];  // (16 tokens, 8 features)
      ldmatrix(b, features + (lane.column / 2 + (lane.lane & 7)) * feature_stride + token +
                      lane.column_of_halves());
      mma_m16n8k16<T>(gram, rows, b[0], b[1]);
    }
    const float4 before = load_shared<float4>(state.place);
    store_shared(state.place, float4{before.x + grow * gram[0], before.y + grow * gram[1],
                                     before.z + grow * gram[2], before.w + grow * gram[3]});
    const auto load = [&](int feature) {
      UNROLL for (int i = 0; i < part / tile; ++i)
          load_wide_terms(terms[i], features, begin + tile * i, feature, lane);
    };
    const auto take = [&](int step, int feature) {
      float sum[2][4] = {};
      UNROLL for (int i = 0; i < part / tile; ++i) {
        uint32_t phi[4];
        load_wide_terms(phi, features, begin + tile * i, feature, lane);
        multiply<T>(phi, phi, terms[i]);
        mma_m16n8k16<T>(sum[0], v[i], phi[0], phi[1]);
        mma_m16n8k16<T>(sum[1], v[i], phi[2], phi[3]);
      }
      UNROLL for (int n = 0; n < 2; ++n) {
        UNROLL for (int j = 0; j < 4; ++j) state.kv[2 * step + n][j] +=
            (step < 2 ? first_weight : weight) * sum[n][j];
      }
    };
    load(0);
    for_wide_steps<0>(lane, take);
    load(tile);
    for_wide_steps<1>(lane, take);
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
