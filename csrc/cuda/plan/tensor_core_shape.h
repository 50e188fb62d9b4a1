// Which problems the tensor-core kernels take, and how these cut them; the plan and the launchers read it.
#pragma once

#include <cstdint>

#include "op/problem.h"

namespace rebased {
namespace tensor_core {

constexpr int columns = 64;         // of the values, per block; wider heads take several blocks
constexpr int chunk = 64;           // tokens
constexpr int max_group_size = 16;  // query heads per kv head

// 16-byte accesses to every row; strides within a batch as int, which kernels multiply faster.
template <class Rows>
inline bool aligned(const Rows& rows) {
  const auto fits = [](int64_t stride) { return stride % 8 == 0 && stride == static_cast<int>(stride); };
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.batch_stride % 8 == 0 &&
         fits(rows.head_stride) && fits(rows.row_stride);
}

// Blocks that share the columns of one head.
inline int64_t column_groups(const Problem& problem) { return (problem.head_dim + columns - 1) / columns; }

inline bool supports_features(const Problem& problem) {
  if (problem.feature_map == FeatureMap::identity) return false;
  return problem.feature_dim == 16 || (problem.feature_map == FeatureMap::outer &&
                                       (problem.feature_dim == 8 || problem.feature_dim == 32));
}

// float16 is left to the general kernels: these kernels round scores and features to the element type, and
// float16 has no room for the squares of small or of large q and k.
inline bool supports_sizes(const Problem& problem) {
  return problem.dtype == Dtype::bfloat16 && problem.num_sequences > 0 && problem.seqlen > 0 &&
         supports_features(problem) && problem.head_dim > 0 && problem.head_dim % 16 == 0 &&
         problem.head_dim <= 256 && problem.group_size() <= max_group_size && aligned(problem.q) &&
         aligned(problem.k) && aligned(problem.v);
}

// What is absent lies nowhere, which is aligned.
inline bool supports(const ForwardProblem& problem) { return supports_sizes(problem) && aligned(problem.y); }

inline bool supports(const BackwardProblem& problem) {
  return supports_sizes(problem) && aligned(problem.y) && aligned(problem.grad_y) &&
         aligned(problem.grad_q) && aligned(problem.grad_k) && aligned(problem.grad_v);
}

// Shared memory that a block must be able to have, in bytes; 0 where every device has enough.
inline int64_t shared_memory_bytes(const ForwardProblem&) { return 0; }
inline int64_t shared_memory_bytes(const BackwardProblem& problem) {
  return problem.feature_dim == 32 ? 163 * 1024 : 0;
}

}  // namespace tensor_core
}  // namespace rebased
