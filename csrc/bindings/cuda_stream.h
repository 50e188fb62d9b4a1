// torch's current CUDA stream, without linking libtorch_cuda: one build must import on a CPU wheel too.
#pragma once

#include <dlfcn.h>

#include <cstdint>
#include <stdexcept>

namespace rebased {

inline void* current_cuda_stream(int32_t device) {
  using GetStream = int32_t (*)(int32_t device, void** stream);  // aoti_torch_get_current_cuda_stream
  static const GetStream get_stream = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library != nullptr
               ? reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"))
               : nullptr;
  }();
  void* stream = nullptr;
  if (get_stream == nullptr || get_stream(device, &stream) != 0) {
    throw std::runtime_error("rebased_cuda: this torch gives no CUDA stream (is it a CUDA build?)");
  }
  return stream;
}

}  // namespace rebased
