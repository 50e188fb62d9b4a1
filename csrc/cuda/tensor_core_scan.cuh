// Running sums of the segments' states, in the order of the segments and so with the same bits every time.
//
// Before: the slot of each segment holds its own sums (of the last one, in scan order, nothing). After: the
// sums of all segments before it, from the initial state on; in reverse order for the backward's state. One
// thread per float of a slot, so that all accesses are side by side.
#pragma once

#include "cuda/tensor_core_state.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

// Entry `index` of the slot of column group `group`, from a public state (or state gradient) of one kv head.
template <class S>
DEVICE float public_entry(const float* kv, const float* k, int index, int group, int64_t head_dim,
                          bool gradient) {
  using L = Slot<S>;
  const int j = index % 4, lane = index / 4 % 32, g = lane / 4, t = lane % 4;
  if (index < L::k) {
    const int warp = index / 128 % (S::threads / 32), n = S::state_tile(index / (4 * S::threads), warp);
    const int64_t column = columns * group + tile * (warp % warps) + g + 8 * (j >> 1);
    const int feature = public_feature<S>(n, 2 * t + (j & 1));
    if (feature < 0 || column >= head_dim) return 0.0f;
    return kv[feature * head_dim + column] * state_weight<S>(n, gradient);
  }
  if (index < L::linear) {
    const int n = (index - L::k) / 128;
    const int row = (tile * (n / S::units) + g + 8 * (j >> 1)) % S::feature_dim;
    const int column = 8 * (n % S::units) + 2 * t + (j & 1);
    if (!S::polynomial) return k[column];
    return k[public_product<S>(row, column)] * gram_weight<S>(row, column, gradient);
  }
  if (index < L::count) return k[1 + 8 * (j >> 1) + 2 * t + (j & 1)];
  return S::taylor && index == L::count ? k[0] : 0.0f;
}

// grid (blocks of slot entries, num_sequences * kv_heads, column groups)
constexpr int scan_threads = 256;

template <class S>
KERNEL void LAUNCH_BOUNDS(scan_threads, 1)
    scan_kernel(float* slots, int segments, ConstState start, int64_t head_dim, bool reverse) {
  const int index = static_cast<int>(blockIdx.y * scan_threads + threadIdx.x),
            group = static_cast<int>(blockIdx.z);
  if (index >= Slot<S>::size) return;
  const int64_t head = blockIdx.x, features = S::public_features;
  float sum = 0;
  if (start.kv) {
    sum = public_entry<S>(static_cast<const float*>(start.kv) + head * features * head_dim,
                          static_cast<const float*>(start.k) + head * features, index, group, head_dim,
                          reverse);
    // the Gram gradient and the others of the denominator count once, not once for each column group
    if (reverse && group > 0 && index >= Slot<S>::k) sum = 0;
  }
  for (int i = 0; i < segments; ++i) {
    const int64_t slot = (head * segments + (reverse ? segments - 1 - i : i)) * gridDim.z + group;
    float* const entry = slots + slot * Slot<S>::size + index;
    const float own = i + 1 < segments ? *entry : 0.0f;
    *entry = sum;
    sum += own;
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
