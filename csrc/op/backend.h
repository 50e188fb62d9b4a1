// What every backend implements: forward, backward and step of a Problem on raw pointers. bindings/ and
// tests/ call these functions; this file includes problem.h alone.
//
// All backends keep to one contract. Outputs are written whole, and rows of no sequence get zeros. Inputs are
// never modified. Results are the same bits on every call with the same Problem and the same resources. A
// backend allocates nothing: what it needs beyond registers and stack comes as the problem's workspace, of
// the size that workspace_bytes names beforehand. The CPU backend keeps nothing from forward for backward.
#pragma once

#include "op/problem.h"

namespace rebased {

// Runs body(begin, end, context) over [0, count) on the caller's threads and returns when all is done.
struct Parallel {
  int threads;
  void (*run)(int64_t count, void (*body)(int64_t begin, int64_t end, void* context), void* context);
};

namespace cpu {
const char* instruction_set();  // the one that this process runs; dispatch.cpp has the names
int64_t workspace_bytes(const ForwardProblem&, int threads);
int64_t workspace_bytes(const BackwardProblem&, int threads);
int64_t workspace_bytes(const StepProblem&, int threads);
void forward(const ForwardProblem&, const Parallel&);
void backward(const BackwardProblem&, const Parallel&);
void step(const StepProblem&, const Parallel&);
}  // namespace cpu

// The limits of the device that a launch is planned for.
struct Device {
  int multiprocessors;
  int compute_capability;           // 80 for 8.0
  int64_t shared_memory_per_block;  // bytes, opt-in maximum
};

struct Plan;  // cuda/plan/plan.h

// The CUDA kernels, as nvcc compiles them (namespace cuda) and as the emulator runs them on the CPU
// (namespace emulated). A call comes with the plan that was made for it: its workspace has the plan's
// workspace.bytes, and what it keeps or is given the plan's kept_bytes. The device of the call is the calling
// thread's current one. Functions return an error text, empty when all went well. The stream is a
// cudaStream_t.
#define REBASED_DECLARE_KERNELS                                       \
  const char* query_device(int index, Device* device);                \
  const char* run(const ForwardProblem&, const Plan&, void* stream);  \
  const char* run(const BackwardProblem&, const Plan&, void* stream); \
  const char* run(const StepProblem&, const Plan&, void* stream);

namespace cuda {
REBASED_DECLARE_KERNELS
}
namespace emulated {
REBASED_DECLARE_KERNELS
}
#undef REBASED_DECLARE_KERNELS

}  // namespace rebased
