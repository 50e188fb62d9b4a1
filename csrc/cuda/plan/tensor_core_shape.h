// Which problems the tensor-core kernels take, and how these cut them; the plan and the launchers read it.
#pragma once

#include <cstdint>

#include "cuda/plan/fixed_shape.h"

namespace rebased {
namespace tensor_core {

using namespace fixed_shape;

constexpr int chunk = 64;  // tokens

inline bool supports_features(const Problem& problem) {
  if (problem.feature_map == FeatureMap::identity) return false;
  return problem.feature_dim == 16 || (problem.feature_map == FeatureMap::outer &&
                                       (problem.feature_dim == 8 || problem.feature_dim == 32));
}

// float16 is left to the general kernels: these kernels round scores and features to the element type, and
// float16 has no room for the squares of small or of large q and k. Strides within a batch are int here, which
// kernels multiply faster.
template <class AnyProblem>
inline bool supports(const AnyProblem& problem) {
  const auto is_int = [](int64_t stride) { return stride == static_cast<int>(stride); };
  return problem.dtype == Dtype::bfloat16 && supports_sizes(problem) && supports_features(problem) &&
         problem.head_dim % 16 == 0 && all_rows(problem, [&](const auto& rows) {
           return aligned(rows, 8) && is_int(rows.head_stride) && is_int(rows.row_stride);
         });
}

// Shared memory that a block must be able to have, in bytes; 0 where every device has enough.
inline int64_t shared_memory_bytes(const ForwardProblem&) { return 0; }
inline int64_t shared_memory_bytes(const BackwardProblem& problem) {
  return problem.feature_dim == 32 ? 163 * 1024 : 0;
}

}  // namespace tensor_core
}  // namespace rebased
