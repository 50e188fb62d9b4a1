// The tensor-core path, seen from the host: how it is launched. No device code.
#pragma once

#include "cuda/plan/tensor_core_shape.h"
#include "op/backend.h"
#include "op/problem.h"

namespace rebased {

namespace tensor_core {

// What a launch needs beyond the problem.
struct Launch {
  int segments = 1;                         // runs of chunks of a sequence that different blocks walk
  const int64_t* bounds = nullptr;          // clamped cu_seqlens on the device, or null
  const float* query_statistics = nullptr;  // "token" LayerNorm: (batch, seqlen, 2), mean and 1 / deviation
  const float* key_statistics = nullptr;
  void* workspace = nullptr;  // of workspace_bytes(problem, segments), 64-byte aligned
  bool all_segments = false;  // whether the last segment's own state is wanted too (in reverse the first's)
};

}  // namespace tensor_core

#define REBASED_DECLARE_TENSOR_CORE                                          \
  namespace tensor_core {                                                    \
  using namespace rebased::tensor_core;                                      \
  int64_t workspace_bytes(const ForwardProblem&, int segments);              \
  const char* forward(const ForwardProblem&, const Launch&, void* stream);   \
  int64_t workspace_bytes(const BackwardProblem&, int segments);             \
  const char* backward(const BackwardProblem&, const Launch&, void* stream); \
  }

namespace cuda {
REBASED_DECLARE_TENSOR_CORE
}
namespace emulated {
REBASED_DECLARE_TENSOR_CORE
}
#undef REBASED_DECLARE_TENSOR_CORE

}  // namespace rebased
