// Blocks of a kernel that fit on one multiprocessor, by the calculation of the CUDA runtime
// (cuda_occupancy.h). Lines in:   capability (90 for 9.0), threads per block, registers per thread, static
// and dynamic shared memory
//             in bytes, barriers per block
// Lines out:  blocks per multiprocessor, and the limit of each resource: registers, shared memory, warps,
// blocks,
//             barriers
#include <cuda_occupancy.h>

#include <cstdio>

namespace {

// CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". The number of blocks per
// multiprocessor is in cuda_occupancy.h.
bool describe(int capability, cudaOccDeviceProp* device) {
  int threads, shared_kilobytes;  // per multiprocessor
  switch (capability) {
    case 80:
      threads = 2048, shared_kilobytes = 164;
      break;
    case 86:
    case 89:
    case 120:
      threads = 1536, shared_kilobytes = 100;
      break;
    case 90:
    case 100:
      threads = 2048, shared_kilobytes = 228;
      break;
    default:
      return false;
  }
  device->computeMajor = capability / 10;
  device->computeMinor = capability % 10;
  device->maxThreadsPerBlock = 1024;
  device->maxThreadsPerMultiprocessor = threads;
  device->regsPerBlock = device->regsPerMultiprocessor = 65536;
  device->warpSize = 32;
  device->sharedMemPerBlock = 48 << 10;
  device->sharedMemPerMultiprocessor = static_cast<size_t>(shared_kilobytes) << 10;
  device->reservedSharedMemPerBlock = 1 << 10;
  device->sharedMemPerBlockOptin = device->sharedMemPerMultiprocessor - device->reservedSharedMemPerBlock;
  device->numSms = 1;  // not used for a single block's occupancy
  return true;
}

}  // namespace

int main() {
  int capability, threads, registers, barriers;
  size_t static_shared, dynamic_shared;
  while (std::scanf("%d %d %d %zu %zu %d", &capability, &threads, &registers, &static_shared, &dynamic_shared,
                    &barriers) == 6) {
    cudaOccDeviceProp device;
    if (!describe(capability, &device)) {
      std::fprintf(stderr, "compute capability %d is not in this program's table\n", capability);
      return 1;
    }
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = threads;
    kernel.numRegs = registers;
    kernel.sharedSizeBytes = static_shared;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = device.sharedMemPerBlockOptin - static_shared;
    kernel.numBlockBarriers = barriers;
    cudaOccDeviceState state;
    state.cacheConfig = CACHE_PREFER_SHARED;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, dynamic_shared);
    if (error != CUDA_OCC_SUCCESS) {
      std::fprintf(stderr, "cuda_occupancy.h: error %d for compute capability %d\n", error, capability);
      return 1;
    }
    std::printf("%d %d %d %d %d %d\n", result.activeBlocksPerMultiprocessor, result.blockLimitRegs,
                result.blockLimitSharedMem, result.blockLimitWarps, result.blockLimitBlocks,
                result.blockLimitBarriers);
  }
}
