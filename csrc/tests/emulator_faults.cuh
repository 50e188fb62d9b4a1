// A small kernel that uses what real kernels use, and deliberate faults in it, to see whether the checkers
// find them. Includes cuda/device/device.cuh alone.
//
// Every block walks its own rows in chunks of 64: y_i = sum_j q_i.k_j over the rows j of the chunk, plus
// q_i.z, where z is the sum of k over earlier chunks. The inputs are small integers, so that every sum is
// exact, in bfloat16 too.
#pragma once

#include <stdexcept>

#include "cuda/device/device.cuh"

namespace rebased::REBASED_BACKEND {

enum class Fault {
  none,
  missing_block_barrier,         // a tile is read before others have written it
  missing_barrier_before_write,  // a sum is overwritten while others still read it
  missing_warp_barrier,
  missing_copy_wait,
  early_copy,             // a stage is filled again while others still read it
  forgotten_copy,         // a copy is never waited for
  uninitialised_shared,   // the sum is not set to 0
  write_past_shared,      // past the end of a shared array
  read_past_global,       // a row more than there are
  copy_past_global,       // the same by copy_async
  divergent_barrier,      // one warp skips a barrier
  early_return,           // one warp returns before a barrier
  divergent_shuffle,      // half a warp calls it, with all lanes in the mask
  different_shuffles,     // two halves of a warp at different lines
  shuffle_outside_mask,   // reads a lane that is not in the mask
  racing_blocks,          // all blocks add to one place
  misaligned_vector,      // load_global of 16 bytes at 4 modulo 16
  misaligned_pointer,     // the same by a plain dereference
  misaligned_matrix_row,  // ldmatrix of a row that is not at 16 bytes
  matrix_row_in_global,   // ldmatrix of a row in global memory
  shared_as_global,       // load_global from shared memory
  failed_assertion,
  thrown_exception,
};

constexpr int chunk = 64, width = 16, threads = 128;
constexpr int stride = width + 8;                // rows of a tile are 48 bytes apart: no bank conflicts
constexpr int stage_floats = 2 * chunk * width;  // one chunk of q and one of k
constexpr size_t dynamic_bytes = 2 * stage_floats * sizeof(float);

template <Fault fault>
KERNEL LAUNCH_BOUNDS(threads, 1) void row_sums(const float* q, const float* k, float* y, float* totals,
                                               int rows) {
  SHARED_MEMORY(bfloat16_t, q_tile, chunk * stride);
  SHARED_MEMORY(bfloat16_t, k_tile, chunk * stride);
  SHARED_MEMORY(float, z, width);
  SHARED_MEMORY(float, neighbours, threads);
  DYNAMIC_SHARED_MEMORY(float, stages);  // two stages, each of q (chunk, width) and k (chunk, width)
  const int thread = threadIdx.x, lane = thread & 31, warp = thread / 32;
  const int g = lane / 4;
  float* const past_z = z + width;
  q += static_cast<int64_t>(blockIdx.x) * rows * width;
  k += static_cast<int64_t>(blockIdx.x) * rows * width;
  y += static_cast<int64_t>(blockIdx.x) * rows;

  const auto start_copies = [&](int first_row) {
    float* const stage = stages + first_row / chunk % 2 * stage_floats;
    for (int i = 4 * thread; i < chunk * width; i += 4 * threads) {
      copy_async<16>(stage + i, q + first_row * width + i);
      copy_async<16>(stage + chunk * width + i, k + first_row * width + i);
    }
    copy_async_commit();
  };

  if (fault == Fault::failed_assertion) DEVICE_ASSERT(thread != 70 || rows == 0);
#if defined(REBASED_EMULATED)
  if (fault == Fault::thrown_exception && thread == 70) throw std::out_of_range("planted");
#endif
  if (fault == Fault::early_return && warp == 3) return;
  if (fault != Fault::uninitialised_shared && thread < width) z[thread] = 0;

  start_copies(0);
  for (int first = 0; first < rows; first += chunk) {
    if (first + chunk < rows) {
      start_copies(first + chunk);
      if (fault != Fault::missing_copy_wait) copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    sync_threads();

    const float* const stage = stages + first / chunk % 2 * stage_floats;
    for (int i = thread; i < chunk * width; i += threads) {
      const int at = i / width * stride + i % width;
      q_tile[at] = from_float<bfloat16_t>(stage[i]);
      k_tile[at] = from_float<bfloat16_t>(stage[chunk * width + i]);
    }
    if (fault != Fault::missing_block_barrier) sync_threads();

    // the 16 rows of q of a warp meet all 64 rows of k
    const void* row = &q_tile[(16 * warp + lane % 16) * stride + lane / 16 * 8];
    if (fault == Fault::misaligned_matrix_row && lane == 5) row = &q_tile[16 * warp * stride + 1];
    if (fault == Fault::matrix_row_in_global && lane == 5) row = q;
    uint32_t a[4];
    ldmatrix(a, row);
    float sums[2] = {};  // of the rows g and g + 8, where g = lane / 4
    for (int j = 0; j < chunk; j += 8) {
      uint32_t b[2];
      ldmatrix(b, &k_tile[(j + lane % 8) * stride + lane / 8 % 2 * 8]);
      float scores[4] = {};
      mma_m16n8k16<bfloat16_t>(scores, a, b[0], b[1]);
      sums[0] += scores[0] + scores[1];
      sums[1] += scores[2] + scores[3];
    }
    for (int distance = 1; distance < 4; distance *= 2) {
      if (fault == Fault::different_shuffles && lane < 16) {
        sums[0] += shuffle_xor(sums[0], distance);
      } else if (fault != Fault::divergent_shuffle || lane < 16) {
        sums[0] += shuffle_xor(sums[0], distance);
      }
      sums[1] += shuffle_xor(sums[1], distance);
    }
    if (fault == Fault::shuffle_outside_mask && lane < 16) sums[0] += shuffle(sums[0], lane + 16, 0xffffu);

    if (lane % 4 == 0) {
      for (int half = 0; half < 2; ++half) {
        const int i = 16 * warp + g + 8 * half;
        float sum = sums[half];
        for (int x = 0; x < width; ++x) sum += stage[i * width + x] * z[x];
        y[first + i] = sum;
      }
    }
    if (fault != Fault::missing_barrier_before_write) sync_threads();
    if (thread < width) {
      for (int j = 0; j < chunk; ++j) z[thread] += stage[(chunk + j) * width + thread];
    }
    if (fault == Fault::write_past_shared) *past_z = 0;
    if (fault != Fault::early_copy && (fault != Fault::divergent_barrier || warp != 3)) sync_threads();
  }

  // the number of the neighbouring lane, by way of shared memory within a warp
  neighbours[thread] = static_cast<float>(thread);
  if (fault != Fault::missing_warp_barrier) sync_warp();
  if (neighbours[thread ^ 1] != static_cast<float>(thread ^ 1)) y[0] = -1;

  float extra = 0;
  if (fault == Fault::read_past_global && blockIdx.x + 1 == gridDim.x)
    extra = k[rows * width + thread % width];
  if (fault == Fault::copy_past_global && blockIdx.x + 1 == gridDim.x) {
    copy_async<16>(stages + 4 * thread, k + rows * width);
    copy_async_commit();
    copy_async_wait<0>();
  }
  if (fault == Fault::forgotten_copy) start_copies(0);
  if (fault == Fault::misaligned_vector) extra = load_global<float4>(q + 1).x;
  if (fault == Fault::misaligned_pointer) extra = reinterpret_cast<const float4*>(q + 1)->x;
  if (fault == Fault::shared_as_global) extra = load_global<float4>(stages).x;
  if (extra != extra) y[0] = extra;  // so that the compiler does not drop the faulty loads

  if (thread < width) {
    if (fault == Fault::racing_blocks) {
      totals[thread] += z[thread];
    } else {
      totals[blockIdx.x * width + thread] = z[thread];
    }
  }
}

}  // namespace rebased::REBASED_BACKEND
