// What kernels have in common in which every warp takes a row, of queries and keys alike.
#pragma once

#include "cuda/device/device.cuh"

namespace rebased::REBASED_BACKEND {

constexpr int row_threads = 128;
constexpr int rows_per_block = row_threads / 32;  // a warp each

template <class A>
DEVICE A warp_sum(A value) {
  for (int distance = 16; distance > 0; distance /= 2) value += shuffle_xor(value, distance);
  return value;
}

// What one launch does for queries and keys alike, or for those of them that want it: blockIdx.y picks.
template <class Part>
struct Parts {
  Part part[2];
  int count = 0;

  HOST_DEVICE void add(const Part& next) { part[count++] = next; }
  // not by a variable index, which would take a copy in local memory
  DEVICE Part chosen() const { return blockIdx.y == 0 ? part[0] : part[1]; }
};

}  // namespace rebased::REBASED_BACKEND
