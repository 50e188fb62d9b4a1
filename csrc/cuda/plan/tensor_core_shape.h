// Which problems the tensor-core kernels take, and how these cut them; the plan and the launchers read it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/plan/fixed_shape.h"
#include "op/feature_map.h"

namespace rebased {
namespace tensor_core {

using namespace fixed_shape;

constexpr int chunk = 64;  // tokens

// Up to this many segments each block sums the states of the segments before its own by itself. That saves a
// launch, and with up to six segments memory traffic as well.
constexpr int summed_segments = 8;

inline bool supports_features(const Problem& problem) {
  return problem.feature_dim == 16 || (problem.feature_map == FeatureMap::outer &&
                                       (problem.feature_dim == 8 || problem.feature_dim == 32));
}

// The largest of 16, 8, 4 and 2 bytes such that every row of `width` elements of 16 bits begins and ends at a
// multiple of it. What is absent takes any.
template <class Rows>
inline int row_piece(const Rows& rows, int64_t width) {
  if (!rows.data) return 16;
  const int64_t elements = rows.batch_stride | rows.head_stride | rows.row_stride | width;
  const uint64_t bits = reinterpret_cast<uintptr_t>(rows.data) | 2 * static_cast<uint64_t>(elements);
  return bits % 16 == 0 ? 16 : bits % 8 == 0 ? 8 : bits % 4 == 0 ? 4 : 2;
}

// The bytes of the pieces in which the kernels read and write the rows of a problem.
struct Pieces {
  int q, k, v, y = 16, grad_y = 16, grad_q = 16, grad_k = 16, grad_v = 16;
  bool settles;  // whether rows that are read come in pieces of 2 bytes, which have to be settled

  explicit Pieces(const Problem& problem)
      : q(row_piece(problem.q, problem.feature_dim)),
        k(row_piece(problem.k, problem.feature_dim)),
        v(row_piece(problem.v, problem.head_dim)),
        settles(q == 2 || k == 2 || v == 2) {}
  explicit Pieces(const ForwardProblem& problem) : Pieces(static_cast<const Problem&>(problem)) {
    y = row_piece(problem.y, problem.head_dim);
  }
  explicit Pieces(const BackwardProblem& problem) : Pieces(static_cast<const Problem&>(problem)) {
    y = row_piece(problem.y, problem.head_dim);
    grad_y = row_piece(problem.grad_y, problem.head_dim);
    grad_q = row_piece(problem.grad_q, problem.feature_dim);
    grad_k = row_piece(problem.grad_k, problem.feature_dim);
    grad_v = row_piece(problem.grad_v, problem.head_dim);
    settles = settles || y == 2 || grad_y == 2;
  }
  int least() const { return std::min({q, k, v, y, grad_y, grad_q, grad_k, grad_v}); }
};

// float16 is left to the general kernels: these kernels round scores and features to the element type, and
// float16 has no room for the squares of small or of large q and k. Strides within a batch are int here,
// which kernels multiply faster.
template <class AnyProblem>
inline bool supports(const AnyProblem& problem) {
  const auto is_int = [](int64_t stride) { return stride == static_cast<int>(stride); };
  return problem.dtype == Dtype::bfloat16 && supports_sizes(problem) && supports_features(problem) &&
         all_rows(problem,
                  [&](const auto& rows) { return is_int(rows.head_stride) && is_int(rows.row_stride); });
}

// Floats of a block's state in the workspace (Slot in cuda/tensor_core/state.cuh): tiles of 8 features by the
// block's columns, each 128 threads' four floats, of the state; then 32 threads' four floats for each tile of
// the denominator's sums, and for those of taylor's linear features; then the count of keys.
REBASED_HOST_DEVICE constexpr int64_t slot_floats(FeatureMap map, int64_t feature_dim) {
  const int64_t tiles = map == FeatureMap::taylor  ? 20
                        : map != FeatureMap::outer ? 2
                        : feature_dim == 8         ? 5
                        : feature_dim == 16        ? 17
                                                   : 68;
  const int64_t sum_tiles = feature_dim == 32 ? 8 : feature_dim / 8;
  return tiles * 128 * 4 + sum_tiles * 32 * 4 + (map == FeatureMap::taylor ? 32 * 4 : 0) + 16;
}

// Shared memory that a block must be able to have, in bytes; 0 where every device has enough.
inline int64_t shared_memory_bytes(const ForwardProblem&) { return 0; }
inline int64_t shared_memory_bytes(const BackwardProblem& problem) {
  return problem.feature_dim == 32 ? 163 * 1024 : 0;
}

}  // namespace tensor_core
}  // namespace rebased
