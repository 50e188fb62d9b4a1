// Sums of the segments' states, in the order of the segments and so with the same bits every time.
// scan_kernel makes the states that the segments start from, sum_slots_kernel the state that all segments
// together leave behind.
//
// Before scan_kernel the slot of each segment holds the sums of its own rows; the slot of the last segment,
// in the order of the scan, holds nothing. Afterwards a slot holds the sums over all segments before its own,
// from the initial state on. For the state of the backward the order is reversed. One thread takes one float
// of all slots, so that accesses are side by side.
#pragma once

#include "cuda/device/load_ahead.cuh"
#include "cuda/tensor_core/state.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

// Entry `index` of the slot of column group `group`, from the public state, or the gradient of a state, of
// one kv head.
template <class S>
DEVICE float public_entry(const float* kv, const float* k, int index, int group, int64_t head_dim,
                          bool gradient) {
  using L = Slot<S>;
  const int j = index % 4, lane = index / 4 % 32, g = lane / 4, t = lane % 4;
  if (index < L::k) {
    const int warp = index / 128 % (S::threads / 32), n = S::state_tile(index / (4 * S::threads), warp);
    const int64_t column = columns * group + tile * (warp % warps) + g + 8 * (j >> 1);
    const int feature = 8 * n + 2 * t + (j & 1);
    if (feature >= S::public_features || column >= head_dim) return 0.0f;
    return kv[feature * head_dim + column] * state_weight<S>(n, gradient);
  }
  const int n = (index - L::k) / 128, row = tile * (n / S::units) + g + 8 * (j >> 1);
  const int column = 8 * (n % S::units) + 2 * t + (j & 1);
  if constexpr (!S::wide) return k[column];
  return k[public_product<S>(row, column)] * gram_weight<S>(row, column, gradient);
}

constexpr int scan_threads = 256;

// grid (num_sequences * kv_heads, blocks of slot entries, column groups)
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
    // the gradients of the Gram matrix and of the other sums count once, not once for each column group
    if (reverse && group > 0 && index >= Slot<S>::k) sum = 0;
  }
  const int64_t step = static_cast<int64_t>(gridDim.z) * Slot<S>::size;
  float* const first = slots + (head * segments * gridDim.z + group) * Slot<S>::size + index;
  float* const last = first + (segments - 1) * step;
  visit_ahead(reverse ? last : first, reverse ? -step : step, segments - 1, [&](float* entry, float own) {
    *entry = sum;
    sum += own;
  });
  *(reverse ? first : last) = sum;
}

// Writes the public state, or the gradient of a state, of each kv head: the sum of the slots of its segments.
// The denominator's terms of a gradient differ from one column group to the next, and are summed over the
// groups. Those of a state are the same in all groups. grid (num_sequences * kv_heads, blocks of slot
// entries, column groups)
template <class S>
KERNEL void LAUNCH_BOUNDS(scan_threads, 1)
    sum_slots_kernel(const float* slots, int segments, float* kv, float* k, int64_t head_dim, bool gradient) {
  using L = Slot<S>;
  const int index = static_cast<int>(blockIdx.y * scan_threads + threadIdx.x),
            group = static_cast<int>(blockIdx.z), groups = static_cast<int>(gridDim.z);
  if (index >= L::size) return;
  const int64_t head = blockIdx.x;
  const auto sum_of = [&](int of_group) {
    const int64_t step = static_cast<int64_t>(groups) * L::size;
    const float* const first = slots + (head * segments * groups + of_group) * L::size + index;
    float sum = 0;
    visit_ahead(gradient ? first + (segments - 1) * step : first, gradient ? -step : step, segments,
                [&](const float*, float own) { sum += own; });
    return sum;
  };
  const int j = index % 4, lane = index / 4 % 32, g = lane / 4, t = lane % 4;
  if (index < L::k) {
    const int warp = index / 128 % (S::threads / 32), n = S::state_tile(index / (4 * S::threads), warp);
    const int64_t column = columns * group + tile * (warp % warps) + g + 8 * (j >> 1);
    const int feature = 8 * n + 2 * t + (j & 1);
    if (feature >= S::public_features || column >= head_dim) return;
    kv[(head * S::public_features + feature) * head_dim + column] =
        sum_of(group) * (1.0f / state_weight<S>(n, gradient));
    return;
  }
  // of an entry that a slot holds several times, one thread stores the public one
  const int n = (index - L::k) / 128, row = tile * (n / S::units) + g + 8 * (j >> 1);
  const int column = 8 * (n % S::units) + 2 * t + (j & 1);
  int feature = row == 0 ? column : -1;
  float weight = 1;
  if constexpr (S::wide) {
    constexpr int half = S::feature_dim / 2;
    const int offset = (column - row + S::feature_dim) % S::feature_dim;
    const bool is_public = offset < half || (offset == half && row < half);
    feature = is_public ? public_product<S>(row, column) : -1;
    weight = 1.0f / gram_weight<S>(row, column, gradient);
  }
  if (feature < 0 || group > 0) return;
  float sum = sum_of(0);
  for (int other = 1; gradient && other < groups; ++other) sum += sum_of(other);
  k[head * S::public_features + feature] = sum * weight;
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
