// The host's side of device.cuh, which includes this file: the limits of a device, and launches of kernels.
#pragma once

#include <map>
#include <mutex>
#include <utility>

// LAUNCH(kernel, grid, block, dynamic_shared_bytes, stream, arguments...) queues the kernel on the stream, a
// cudaStream_t as void*, and returns an error text, which is empty when all is well. Under emulation the
// kernel has run to its end when LAUNCH returns.
#define LAUNCH(...) ::rebased::REBASED_BACKEND::launch_kernel(__VA_ARGS__)

namespace rebased::REBASED_BACKEND {

struct DeviceAttributes {
  int multiprocessors;
  int compute_capability;       // 80 for 8.0
  int shared_memory_per_block;  // in bytes, the most that a kernel may ask for
};

#if defined(REBASED_EMULATED)

inline const char* device_attributes(int, DeviceAttributes* attributes) {
  emulator::Limits limits{};
  const char* const error = emulator::limits(&limits);
  *attributes = {limits.multiprocessors, limits.compute_capability,
                 static_cast<int>(limits.shared_memory_per_block)};
  return error;
}

template <class... Parameters, class... Arguments>
const char* launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                          void*, const Arguments&... arguments) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "CUDA's limit on the size of a kernel's parameters");
  const auto run = [&] { kernel(static_cast<Parameters>(arguments)...); };
  using Run = decltype(run);
  return emulator::launch(
      {reinterpret_cast<const void*>(kernel), grid, block, dynamic_shared_bytes},
      [](const void* context) { (*static_cast<const Run*>(context))(); }, &run);
}

#else

inline const char* error_text(cudaError_t error) {
  return error == cudaSuccess ? "" : cudaGetErrorString(error);
}

// They are asked for once a device.
inline const char* device_attributes(int index, DeviceAttributes* attributes) {
  static std::mutex mutex;
  static std::map<int, DeviceAttributes> known;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(index); found != known.end()) {
    *attributes = found->second;
    return "";
  }
  int major = 0, minor = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (!error) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
  if (!error) {
    error = cudaDeviceGetAttribute(&attributes->multiprocessors, cudaDevAttrMultiProcessorCount, index);
  }
  if (!error) {
    error = cudaDeviceGetAttribute(&attributes->shared_memory_per_block,
                                   cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  }
  attributes->compute_capability = 10 * major + minor;
  if (!error) known[index] = *attributes;
  return error_text(error);
}

// Dynamic shared memory past 48 KB less the static arrays needs the kernel's consent on each device. It is
// asked for once, raised once, to the most there is, and never lowered: another host thread may be launching
// the same kernel with another size.
inline cudaError_t allow_dynamic_shared_memory(const void* kernel, size_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<int, const void*>, size_t> allowed;
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto entry = allowed.try_emplace({device, kernel}, 0).first;
  if (bytes <= entry->second) return cudaSuccess;
  cudaFuncAttributes attributes;
  error = cudaFuncGetAttributes(&attributes, kernel);
  if (error) return error;
  entry->second = static_cast<size_t>(attributes.maxDynamicSharedSizeBytes);
  if (bytes <= entry->second) return cudaSuccess;
  error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error) return error;
  const int most = limit - static_cast<int>(attributes.sharedSizeBytes);
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (!error) entry->second = static_cast<size_t>(most);
  return error;
}

template <class... Parameters, class... Arguments>
const char* launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t dynamic_shared_bytes,
                          void* stream, const Arguments&... arguments) {
  if (dynamic_shared_bytes > 0) {
    const cudaError_t error =
        allow_dynamic_shared_memory(reinterpret_cast<const void*>(kernel), dynamic_shared_bytes);
    if (error) return error_text(error);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = dynamic_shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
  cudaGetLastError();  // forgets the error, so that the next launch does not find it again
  return error_text(error);
}

#endif

// Blocks of a grid, which may be none, or more than there can be.
struct Grid {
  int64_t x, y, z;
  Grid(int64_t x, int64_t y = 1, int64_t z = 1) : x(x), y(y), z(z) {}
};

// A chain of launches, which stops at the first error.
class Launches {
 public:
  explicit Launches(void* stream) : stream_(stream) {}

  template <class... Parameters, class... Arguments>
  void add(void (*kernel)(Parameters...), const Grid& grid, int threads, int64_t shared_bytes,
           const Arguments&... arguments) {
    if (*error_ || grid.x == 0 || grid.y == 0 || grid.z == 0) return;
    if (grid.x > INT32_MAX || grid.y > UINT16_MAX || grid.z > UINT16_MAX) {
      error_ = "more blocks than a grid can have";
      return;
    }
    error_ = LAUNCH(
        kernel,
        dim3(static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z)),
        dim3(static_cast<unsigned>(threads)), static_cast<size_t>(shared_bytes), stream_, arguments...);
  }
  const char* error() const { return error_; }

 private:
  void* stream_;
  const char* error_ = "";
};

inline int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace rebased::REBASED_BACKEND
