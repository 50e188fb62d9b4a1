// What the families of kernels with tiles of a fixed shape (float32, tensor_core) have in common: how a
// head's value columns are cut, and which problems such tiles can hold.
#pragma once

#include <cstdint>

#include "op/problem.h"

namespace rebased {
namespace fixed_shape {

constexpr int columns = 64;         // of the values, per block; wider heads take several blocks
constexpr int max_group_size = 16;  // query heads per kv head

// Blocks that share the columns of one head.
inline int64_t column_groups(const Problem& problem) { return (problem.head_dim + columns - 1) / columns; }

// say(argument, reason, remedy) for each reason why tiles of a fixed shape do not hold a problem.
template <class Say>
inline void refuse_sizes(const Problem& problem, const Say& say) {
  if (problem.num_sequences == 0 || problem.seqlen == 0) {
    say("q", "there are no rows", "a call with rows");
  }
  if (problem.head_dim > 256) say("v", "its head dim is past 256", "a head dim up to 256");
  if (problem.group_size() > max_group_size) {
    say("k", "more than 16 query heads share a kv head", "more heads of k and v");
  }
}
inline bool supports_sizes(const Problem& problem) {
  bool supported = true;
  refuse_sizes(problem, [&](const char*, const char*, const char*) { supported = false; });
  return supported;
}

// Whether every row can be accessed in pieces of 16 bytes, which are `elements` elements.
template <class Rows>
inline bool aligned(const Rows& rows, int64_t elements) {
  return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.batch_stride % elements == 0 &&
         rows.head_stride % elements == 0 && rows.row_stride % elements == 0;
}

// Whether fits(rows) holds of every tensor of rows. What is absent lies nowhere, which is aligned.
template <class Fits>
inline bool all_rows(const ForwardProblem& problem, const Fits& fits) {
  return fits(problem.q) && fits(problem.k) && fits(problem.v) && fits(problem.y);
}
template <class Fits>
inline bool all_rows(const BackwardProblem& problem, const Fits& fits) {
  return fits(problem.q) && fits(problem.k) && fits(problem.v) && fits(problem.y) && fits(problem.grad_y) &&
         fits(problem.grad_q) && fits(problem.grad_k) && fits(problem.grad_v);
}

}  // namespace fixed_shape
}  // namespace rebased
