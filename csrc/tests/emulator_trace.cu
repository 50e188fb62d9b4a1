// Runs, under the tracer, a kernel whose accesses can be counted by arithmetic, and writes the tracer's JSON
// to standard output. By the marks in the kernel's lines python_tests/cuda/test_emulator.py finds what it
// expects of each line.
#include <cstdio>
#include <vector>

#include "cuda/device/device.cuh"
#include "emulator/tracer.h"

namespace rebased::REBASED_BACKEND {
namespace {

constexpr int warps = 2, count = 4096;

KERNEL LAUNCH_BOUNDS(32 * warps, 1) void known_accesses(const float* input, float* output) {
  SHARED_MEMORY(float, words, 32 * 33);
  SHARED_MEMORY(uint16_t, matrix, 16 * 72);
  SHARED_MEMORY(float, staged, 32 * warps * 4);
  const int thread = threadIdx.x, lane = thread & 31;
  float sum = 0;

  sum += input[thread];                              // mark: coalesced
  sum += input[8 * thread];                          // mark: sector_each
  sum += input[0];                                   // mark: broadcast_global
  sum += load_global<float4>(input + 4 * thread).x;  // mark: vector
  if (lane < 8) sum += input[lane];                  // mark: quarter

  words[lane] = sum;                                       // mark: no_conflict
  words[2 * lane] = sum;                                   // mark: two_way
  words[32 * lane] = sum;                                  // mark: worst
  words[33 * lane] = sum;                                  // mark: padded
  sum += words[0];                                         // mark: broadcast_shared
  store_shared(words + 4 * lane, float4{sum, sum, 0, 0});  // mark: vector_shared
  reinterpret_cast<uint16_t*>(words)[lane] = 1;            // mark: halves

  uint32_t fragment[4];
  for (int i = thread; i < 16 * 72; i += 32 * warps) matrix[i] = 0;  // mark: fill
  sync_threads();
  ldmatrix(fragment, matrix + lane % 16 * 72 + lane / 16 * 8);  // mark: ldmatrix_padded
  ldmatrix(fragment, matrix + lane % 16 * 64 + lane / 16 * 8);  // mark: ldmatrix_conflict

  copy_async<16>(staged + 4 * thread, input + 4 * thread);                      // mark: copy
  copy_async<16>(staged + 4 * thread, input + 4 * thread, lane < 16 ? 16 : 0);  // mark: copy_half
  copy_async_commit();
  copy_async_wait<0>();
  output[thread] = sum + staged[4 * thread] + static_cast<float>(fragment[0]);  // mark: result
}

}  // namespace
}  // namespace rebased::REBASED_BACKEND

int main() {
  using namespace rebased::REBASED_BACKEND;
  using namespace rebased::emulator;
  void* memory = nullptr;  // begins at a sector, as memory of a device does
  if (posix_memalign(&memory, 256, 2 * count * sizeof(float))) return 1;
  float* const input = static_cast<float*>(memory);
  float* const output = input + count;
  for (int i = 0; i < count; ++i) input[i] = 1;
  trace_buffer("input", input, count * sizeof(float));
  trace_buffer("output", output, count * sizeof(float));
  for (int launch = 0; launch < 2; ++launch) {
    const char* const error = LAUNCH(known_accesses, 3, 32 * warps, 0, nullptr, input, output);
    if (*error) {
      fprintf(stderr, "%s\n", error);
      return 1;
    }
  }
  trace_write_json(stdout);
  trace_write_text(stderr);
  free(memory);
  return 0;
}
