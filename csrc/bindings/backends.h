// Where the work of an operator goes: the native CPU backend, the CUDA kernels, or in a test build the CUDA
// kernels emulated on the CPU. Each has the backend's functions as members, over one call's resources, and
// what a call is planned with, which is made once and handed on: plan(problem), then the bytes of workspace,
// then run.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "bindings/cuda_stream.h"
#include "bindings/tensors.h"
#include "cuda/plan/plan.h"
#include "op/backend.h"

namespace rebased {

class NativeBackend {
 public:
  explicit NativeBackend(const Tensor&) {}
  // A step looks at the size of its state itself.
  Parallel plan(const StepProblem&) const { return parallel_; }
  Parallel plan(const Problem& p) const {
    const double tokens = static_cast<double>(p.batch) * static_cast<double>(p.heads * p.seqlen);
    const double operations =
        4 * tokens * static_cast<double>(num_features(p.feature_map, p.feature_dim) * p.head_dim);
    Parallel few = parallel_;
    if (operations < kOperationsPerThread * few.threads)
      few.threads = 1 + static_cast<int>(operations / kOperationsPerThread);
    return few;
  }
  template <class AnyProblem>
  static int64_t workspace_bytes(const AnyProblem& problem, const Parallel& plan) {
    return cpu::workspace_bytes(problem, plan.threads);
  }
  static int64_t kept_bytes(const Parallel&) { return 0; }
  void run(const ForwardProblem& problem, const Parallel& plan) const { cpu::forward(problem, plan); }
  void run(const BackwardProblem& problem, const Parallel& plan) const { cpu::backward(problem, plan); }
  void run(const StepProblem& problem, const Parallel& plan) const { cpu::step(problem, plan); }
  static constexpr bool on_host = true;

 private:
  // Waking a thread takes about as long as this many operations of the forward's products with a state.
  static constexpr double kOperationsPerThread = 4e6;

  using Body = void (*)(int64_t, int64_t, void*);
  static void parallel_for(int64_t count, Body body, void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
  }
  Parallel parallel_{static_cast<int>(torch::stable::get_num_threads()), parallel_for};
};

#if defined(REBASED_CUDA)
// "12.4", the newest CUDA that this machine's driver serves; "none" where there is no driver.
inline std::string cuda_of_the_driver() {
  void* const library = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL);
  void* const function = library ? dlsym(library, "cuDriverGetVersion") : nullptr;
  int version = 0;
  if (!function || reinterpret_cast<int (*)(int*)>(function)(&version) != 0) return "none";
  return std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}
#endif

[[maybe_unused]] inline void require_success(const char* error) {
  if (*error == '\0') return;
  std::string message = std::string("rebased_cuda: ") + error;
#if defined(REBASED_CUDA)
  if (std::strstr(error, "driver version is insufficient") != nullptr) {
    message += ": the kernels were built by CUDA " REBASED_CUDA_VERSION
               " and need a driver of its major version or a later one; this machine's serves CUDA " +
               cuda_of_the_driver();
  }
  if (std::strstr(error, "no kernel image") != nullptr ||
      std::strstr(error, "invalid device function") != nullptr) {
    message += ": this build has code for " REBASED_CUDA_ARCHITECTURES
               " only; rebuild with this GPU's compute capability in TORCH_CUDA_ARCH_LIST";
  }
#endif
  throw std::runtime_error(message);
}

#if defined(REBASED_EMULATOR)
class EmulatedBackend {
 public:
  explicit EmulatedBackend(const Tensor&) { require_success(emulated::query_device(0, &device_)); }
  template <class AnyProblem>
  Plan plan(const AnyProblem& problem) const {
    return make_plan(problem, device_);
  }
  static int64_t workspace_bytes(const Problem&, const Plan& plan) { return plan.workspace.bytes; }
  static int64_t kept_bytes(const Plan& plan) { return plan.kept_bytes; }
  template <class AnyProblem>
  void run(const AnyProblem& problem, const Plan& plan) const {
    require_success(emulated::run(problem, plan, nullptr));
  }
  static constexpr bool on_host = true;

 private:
  Device device_;
};
#endif

#if defined(REBASED_CUDA)
class CudaBackend {
 public:
  explicit CudaBackend(const Tensor& q)
      : guard_(q.get_device_index()), stream_(current_cuda_stream(q.get_device_index())) {
    require_success(cuda::query_device(q.get_device_index(), &device_));
  }
  template <class AnyProblem>
  Plan plan(const AnyProblem& problem) const {
    return make_plan(problem, device_);
  }
  static int64_t workspace_bytes(const Problem&, const Plan& plan) { return plan.workspace.bytes; }
  static int64_t kept_bytes(const Plan& plan) { return plan.kept_bytes; }
  template <class AnyProblem>
  void run(const AnyProblem& problem, const Plan& plan) const {
    require_success(cuda::run(problem, plan, stream_));
  }
  static constexpr bool on_host = false;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  void* stream_;
  Device device_;
};
#endif

template <class Backend>
struct BackendType {
  using type = Backend;
};
// Calls body(BackendType<the backend of CPU tensors>). Operators are registered once per process: a test
// build reads here which one that is.
template <class Body>
void with_cpu_backend(const Body& body) {
#if defined(REBASED_EMULATOR)
  const char* wanted = std::getenv("REBASED_CPU_BACKEND");
  if (wanted != nullptr && std::strcmp(wanted, "emulated") == 0) return body(BackendType<EmulatedBackend>{});
#endif
  body(BackendType<NativeBackend>{});
}

}  // namespace rebased
