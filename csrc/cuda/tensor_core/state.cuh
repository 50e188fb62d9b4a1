// The running state of the tensor-core path, in registers: sums over tokens of phi(k') v^T, and of what the
// denominator needs. The reverse state of the backward is the same sum with q', ghat and -delta in the places
// of k', v and 1.
//
// The state is float32. The sum over a chunk is formed apart and then added to the state: tensor cores
// truncate as they accumulate, and over many chunks that would become a drift.
#pragma once

#include "cuda/tensor_core/rows.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

// The denominator's sums of a thread. They are needed twice a chunk only, so that they live in shared memory,
// as an array (units, threads) of float4 of which each thread reads and writes its own part alone.
template <int units>
struct Sums {
  float k[units][4];
};

template <class S>
struct State {
  // kv[n] is the C fragment (16 columns of this warp, features 8 n .. 8 n + 7). Rounded to T in pairs, the
  // same registers are a fragment B (features, columns), and the product with phi(q') takes them as they are.
  float kv[S::tiles][4];
  float4* place;

  DEVICE explicit State(float4* sums) : place(sums + threadIdx.x) {}

  DEVICE void clear() {
    UNROLL for (int n = 0; n < S::tiles; ++n) { UNROLL for (int i = 0; i < 4; ++i) kv[n][i] = 0; }
    set_sums({});
  }

  // The denominator's sums z, the sum of phi(k'), which are the same in every warp: the features 8 n + 2t and
  // 8 n + 2t + 1 are in k[n][0] and k[n][1], and again in k[n][2] and k[n][3].
  DEVICE Sums<S::units> sums() const {
    Sums<S::units> result;
    UNROLL for (int n = 0; n < S::units; ++n) {
      const float4 value = load_shared<float4>(place + n * threads);
      result.k[n][0] = value.x, result.k[n][1] = value.y, result.k[n][2] = value.z, result.k[n][3] = value.w;
    }
    return result;
  }
  DEVICE void set_sums(const Sums<S::units>& value) {
    UNROLL for (int n = 0; n < S::units; ++n) {
      store_shared(place + n * threads, float4{value.k[n][0], value.k[n][1], value.k[n][2], value.k[n][3]});
    }
  }
};

// Two powers of two: `shrink` brings numbers into the range of T before they are rounded, `grow` brings the
// products of these numbers back. float16 ends at 65504, which a sum over a few thousand tokens passes, and r
// grad y is soon below the smallest float16. bfloat16 has the range of float and needs neither.
struct Range {
  float shrink, grow;
};

// The range for numbers up to `bound`, which become at most 16. That leaves room for products with values of
// ordinary size.
DEVICE Range range_of(float bound) {
  const int exponent =
      static_cast<int>(bit_cast<uint32_t>(minimum(maximum(bound, 1e-30f), 1e30f)) >> 23) - 127;
  const int shift = exponent - 3;
  return {bit_cast<float>(static_cast<uint32_t>(127 - shift) << 23),
          bit_cast<float>(static_cast<uint32_t>(127 + shift) << 23)};
}

DEVICE float warp_maximum(float value) {
  UNROLL for (int distance = 1; distance < 32; distance *= 2) value =
      maximum(value, shuffle_xor(value, distance));
  return value;
}

// The largest magnitude in this warp's columns of the state; and the range of the denominator's sums.
template <class S>
DEVICE float state_maximum(const State<S>& state) {
  float bound = 0;
  UNROLL for (int n = 0; n < S::tiles; ++n) {
    UNROLL for (int i = 0; i < 4; ++i) bound = maximum(bound, fabsf(state.kv[n][i]));
  }
  return warp_maximum(bound);
}
template <class T, class S>
DEVICE Range sums_range(const State<S>& state) {
  if constexpr (is_bfloat16<T>) {
    return {1.0f, 1.0f};
  } else {
    const Sums<S::units> sums = state.sums();
    float bound = 0;
    UNROLL for (int n = 0; n < S::units; ++n) {
      UNROLL for (int i = 0; i < 4; ++i) bound = maximum(bound, fabsf(sums.k[n][i]));
    }
    return range_of(warp_maximum(bound));
  }
}

// The range of a state. share_maximum leaves the maximum of the warp's columns in shared memory; then
// own_range gives the range of this warp's columns and, after a barrier, shared_range the range of the whole
// state. Kernels call them where the range is used: known before a loop, it would make the compiler multiply
// all of the state there, in further registers.
template <class T, class S>
DEVICE void share_maximum(float* warp_maxima, const State<S>& state, const Lane& lane) {
  if constexpr (!is_bfloat16<T>) {
    const float bound = state_maximum(state);
    sync_warp();  // all lanes have read the maximum of the chunk before
    if (lane.lane == 0) warp_maxima[lane.warp] = bound;
    sync_warp();
  }
}
template <class T>
DEVICE Range own_range(const float* warp_maxima, const Lane& lane) {
  if constexpr (is_bfloat16<T>) {
    return {1.0f, 1.0f};
  } else {
    return range_of(warp_maxima[lane.warp]);
  }
}
template <class T>
DEVICE Range shared_range(const float* warp_maxima) {
  if constexpr (is_bfloat16<T>) {
    return {1.0f, 1.0f};
  } else {
    float bound = 0;
    for (int warp = 0; warp < warps; ++warp) bound = maximum(bound, warp_maxima[warp]);
    return range_of(bound);
  }
}

// ---- slots in the workspace: registers as they are, 16 bytes per thread side by side ----

template <class S>
struct Slot {
  static constexpr int sum_tiles = S::units * (S::wide ? 2 : 1);
  static constexpr int kv = 0, k = kv + S::tiles * S::threads * 4, size = k + sum_tiles * 32 * 4;
  static_assert(size == slot_floats(S::feature_dim), "the plan has sized the workspace by this");
};

DEVICE void add(float (&sums)[4], const float4& value) {
  sums[0] += value.x, sums[1] += value.y, sums[2] += value.z, sums[3] += value.w;
}

template <class S>
DEVICE void add_slot(State<S>& state, const float* slot, const Lane& lane) {
  const float* const of_thread = slot + 4 * (32 * lane.warp + lane.lane);
  UNROLL for (int n = 0; n < S::tiles; ++n) {
    add(state.kv[n], load_global<float4>(of_thread + n * threads * 4));
  }
  const float* const of_lane = slot + 4 * lane.lane;
  Sums<S::units> sums = state.sums();
  UNROLL for (int n = 0; n < S::units; ++n) {
    add(sums.k[n], load_global<float4>(of_lane + Slot<S>::k + n * 32 * 4));
  }
  state.set_sums(sums);
}

// Sets the state that a block begins with. Where scan_kernel has run, it is what that kernel has left in the
// block's slot. Otherwise it is the sum of the slots before the block's, or in `reverse` of those behind it,
// in the order in which scan_kernel adds them, and so with the same bits.
template <class S, class AnyProblem>
DEVICE void start_state(State<S>& state, const Arguments<AnyProblem>& arguments, const Span& span,
                        bool reverse, const Lane& lane) {
  state.clear();
  if (!arguments.slots) return;
  const int step = reverse ? -1 : 1;
  const int first = reverse ? arguments.launch.segments - 1 : 0;
  const int end = arguments.scanned ? span.segment + step : span.segment;
  NO_UNROLL for (int segment = arguments.scanned ? span.segment : first; segment != end; segment += step) {
    const int64_t slot = span.slot + (segment - span.segment) * static_cast<int64_t>(gridDim.y);
    add_slot(state, arguments.slots + slot * Slot<S>::size, lane);
  }
}

template <class S>
DEVICE void store_state(float* slot, const State<S>& state, const Lane& lane) {
  const int thread = 32 * lane.warp + lane.lane;
  UNROLL for (int n = 0; n < S::tiles; ++n) {
    store_global(slot + (n * threads + thread) * 4,
                 float4{state.kv[n][0], state.kv[n][1], state.kv[n][2], state.kv[n][3]});
  }
  if (lane.warp > 0) return;
  const Sums<S::units> sums = state.sums();
  UNROLL for (int n = 0; n < S::units; ++n) {
    store_global(slot + Slot<S>::k + (n * 32 + lane.lane) * 4,
                 float4{sums.k[n][0], sums.k[n][1], sums.k[n][2], sums.k[n][3]});
  }
}

// ---- the public order of features (feature_map.h), which is also that of the tiles of 8 features ----
//
// With d = 32 the last two tiles of the warps whose half does not have offset 16 are not used; their numbers
// are past the last feature.

// The public number of the product x_i x_j.
template <class S>
HOST_DEVICE constexpr int public_product(int i, int j) {
  const int offset = (j - i + S::feature_dim) % S::feature_dim;
  return offset < S::feature_dim / 2    ? S::feature_dim * offset + i
         : offset == S::feature_dim / 2 ? S::feature_dim * offset + (i < j ? i : j)
                                        : S::feature_dim * (S::feature_dim - offset) + j;
}

// By what these kernels multiply an entry of a public state: a state carries the weight of its tile. The
// gradient of a state is taken as it is.
template <class S>
HOST_DEVICE constexpr float state_weight(int feature_tile, bool gradient) {
  return gradient ? 1.0f : S::tile_weight(feature_tile);
}
// The same for entry (i, j) of the Gram matrix. A public gradient is shared by the entries (i, j) and (j, i).
template <class S>
HOST_DEVICE constexpr float gram_weight(int i, int j, bool gradient) {
  return gradient && i != j ? 1.0f / S::offset_weight : 1.0f;
}

// Stores a state, or the gradient of a state, in the public order: kv (features, head_dim) from this block's
// first column on, and k (features), which is null where another block stores it.
template <class S>
DEVICE void export_state(float* kv, float* k, const State<S>& state, int64_t head_dim, int columns_left,
                         const Lane& lane) {
  UNROLL for (int n = 0; n < S::tiles; ++n) {
    UNROLL for (int i = 0; i < 4; ++i) {
      const int feature = 8 * n + 2 * lane.pair + (i & 1);
      const int column = tile * lane.warp + lane.group + 8 * (i >> 1);
      if (column < columns_left) kv[feature * head_dim + column] = state.kv[n][i];
    }
  }
  if (!k || lane.warp > 0 || lane.group > 0) return;
  const Sums<S::units> sums = state.sums();
  UNROLL for (int n = 0; n < S::units; ++n) {
    UNROLL for (int i = 0; i < 2; ++i) k[8 * n + 2 * lane.pair + i] = sums.k[n][i];
  }
}

// ---- a chunk's contribution ----

// How add_chunk weighs tokens, by arrays of 64 floats in shared memory. The terms of the denominator are
// multiplied by `sums`; in float16 these terms and the values are multiplied by `scales` as well. All that is
// added is multiplied by `grow`.
struct TokenWeights {
  const float *sums, *scales;
  float grow;

  template <class T>
  DEVICE float of_sum(int token) const {
    return is_bfloat16<T> ? sums[token] : sums[token] * scales[token];
  }
};

// Adds to the state the sums over the chunk's tokens of phi(k') v^T and of the denominator's terms.
template <class T, class S, bool weighted>
DEVICE void add_chunk(State<S>& state, const T* features, const T* values, const TokenWeights& weights,
                      const Lane& lane) {
  // Half a chunk at a time, in a loop that is not unrolled: the fragments of a whole chunk would not fit
  // beside the state.
  constexpr int part = chunk / 2;
  NO_UNROLL for (int begin = 0; begin < chunk; begin += part) {
    uint32_t v[part / tile][4], terms[part / tile][4];
    UNROLL for (int i = 0; i < part / tile; ++i) {
      load_values(v[i], values, begin + tile * i, tile * lane.warp, lane);
      load_terms(terms[i], features, begin + tile * i, lane);
      if constexpr (weighted && !is_bfloat16<T>) {
        const float* const w = weights.scales + begin + tile * i + 2 * lane.pair;
        const uint32_t first = pack<T>(w[0], w[1]), second = pack<T>(w[8], w[9]);
        v[i][0] = multiply_pairs<T>(v[i][0], first), v[i][1] = multiply_pairs<T>(v[i][1], first);
        v[i][2] = multiply_pairs<T>(v[i][2], second), v[i][3] = multiply_pairs<T>(v[i][3], second);
      }
    }
    const float grow = weighted && !is_bfloat16<T> ? weights.grow : 1.0f;
    float kv[2][4] = {}, sum[2][4] = {};
    UNROLL for (int i = 0; i < part / tile; ++i) {
      const uint32_t one = pack<T>(1.0f, 1.0f);
      uint32_t ones[4] = {one, one, one, one};  // fragment A: the weights of the tokens in every row
      if constexpr (weighted) {
        const int token = begin + tile * i + 2 * lane.pair;
        const auto weight = [&](int next) { return weights.of_sum<T>(token + next); };
        ones[0] = ones[1] = pack<T>(weight(0), weight(1));
        ones[2] = ones[3] = pack<T>(weight(8), weight(9));
      }
      UNROLL for (int n = 0; n < 2; ++n) {
        mma_m16n8k16<T>(kv[n], v[i], terms[i][2 * n], terms[i][2 * n + 1]);
        mma_m16n8k16<T>(sum[n], ones, terms[i][2 * n], terms[i][2 * n + 1]);
      }
    }
    Sums<S::units> sums = state.sums();
    UNROLL for (int n = 0; n < S::units; ++n) {
      UNROLL for (int j = 0; j < 4; ++j) {
        state.kv[n][j] += grow * kv[n][j];
        sums.k[n][j] += grow * sum[n][j];
      }
    }
    state.set_sums(sums);
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
