// Which problems the tensor-core kernels take, and how these cut them; the plan and the launchers read it.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cuda/plan/fixed_shape.h"
#include "op/feature_map.h"

namespace rebased {
namespace tensor_core {

using namespace fixed_shape;

// Tokens of a chunk, but of the kernels of cuda/tensor_core/polynomial/.
constexpr int chunk = 64;

// Tensor cores truncate as they accumulate, so that a sum over n tokens of one sign is too small: by 5e-5 of
// itself at 4,096 and by 2e-3 at 131,072. These kernels accumulate over a segment in place, and add segments
// in float32: segments are no longer than this, those of packed sequences on average.
constexpr int64_t drifting_rows = 4096;

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
  int read;  // the least of those that are read; where it is 2, rows have to be settled

  explicit Pieces(const Problem& problem)
      : q(row_piece(problem.q, problem.feature_dim)),
        k(row_piece(problem.k, problem.feature_dim)),
        v(row_piece(problem.v, problem.head_dim)),
        read(std::min({q, k, v})) {}
  explicit Pieces(const ForwardProblem& problem) : Pieces(static_cast<const Problem&>(problem)) {
    y = row_piece(problem.y, problem.head_dim);
  }
  explicit Pieces(const BackwardProblem& problem) : Pieces(static_cast<const Problem&>(problem)) {
    y = row_piece(problem.y, problem.head_dim);
    grad_y = row_piece(problem.grad_y, problem.head_dim);
    grad_q = row_piece(problem.grad_q, problem.feature_dim);
    grad_k = row_piece(problem.grad_k, problem.feature_dim);
    grad_v = row_piece(problem.grad_v, problem.head_dim);
    read = std::min({read, y, grad_y});
  }
  int least() const { return std::min({q, k, v, y, grad_y, grad_q, grad_k, grad_v}); }
};

// Whether a call takes the kernels of cuda/tensor_core/polynomial/.
inline bool polynomial_kernels(const Problem& problem) {
  return is_polynomial(problem.feature_map) && problem.feature_dim <= 16;
}
// Whether a walk over the rows of these pieces takes the kernels of cuda/tensor_core/elementwise/. Other rows
// take older kernels, whose states are laid out alike.
inline bool elementwise_kernels(const Problem& problem, int least_piece) {
  return !is_polynomial(problem.feature_map) && least_piece == 16;
}

// Chunks of 128 tokens read each fragment of the state half as often, and take up to 113 KB of shared memory.
// They are for devices where two blocks have room on a multiprocessor. There a block may have all but 1 KB,
// which each block takes beside its own.
constexpr int64_t longer_chunk_bytes = 113 * 1024;
inline bool has_room_for_longer_chunks(int64_t shared_memory_per_block) {
  return shared_memory_per_block + 1024 >= 2 * (longer_chunk_bytes + 1024);
}
// Whether kernels have registers enough for them: with d = 16 the backward of taylor and that of several
// query heads would spill. Forward takes the chunks of its backward.
REBASED_HOST_DEVICE constexpr bool takes_longer_chunks(FeatureMap map, int64_t feature_dim, bool grouped) {
  return feature_dim == 8 || (map == FeatureMap::outer && !grouped);
}

// say(argument, reason, remedy) for each reason why these kernels do not take a problem.
//
// float16 is left to the general kernels: these kernels round scores and features to the element type, and
// float16 has no room for the squares of small or of large q and k. Strides within a batch are int here,
// which kernels multiply faster.
template <class AnyProblem, class Say>
inline void refuse(const AnyProblem& problem, const Say& say) {
  const auto is_int = [](int64_t stride) { return stride == static_cast<int>(stride); };
  if (problem.dtype != Dtype::bfloat16) {
    say("q", "its dtype is not bfloat16", "q, k and v in bfloat16");
  }
  if (!supports_features(problem)) {
    say("q", "its feature dim has no tensor-core kernels with this feature_map",
        "a feature dim of 16, or with feature_map \"outer\" of 8, 16 or 32");
  }
  refuse_sizes(problem, say);
  if (!all_rows(problem,
                [&](const auto& rows) { return is_int(rows.head_stride) && is_int(rows.row_stride); })) {
    say("q", "rows of q, k, v or y are 2^31 elements or more apart",
        "contiguous q, k and v, or fewer rows a call");
  }
}
template <class AnyProblem>
inline bool supports(const AnyProblem& problem) {
  bool supported = true;
  refuse(problem, [&](const char*, const char*, const char*) { supported = false; });
  return supported;
}

// Floats of a block's state in the workspace (cuda/tensor_core/polynomial/slot.cuh): its features by the
// block's columns, the Gram matrix, and of taylor the sums of k' and the count of keys.
REBASED_HOST_DEVICE constexpr int64_t polynomial_slot_floats(FeatureMap map, int64_t feature_dim) {
  const int64_t sums = feature_dim * feature_dim + (map == FeatureMap::taylor ? feature_dim + 1 : 0);
  return (num_features(map, feature_dim) * columns + sums + 3) / 4 * 4;
}

// Floats of a block's state in the workspace (Slot in cuda/tensor_core/state.cuh): tiles of 8 features by the
// block's columns, each 128 threads' four floats, of the state; then 32 threads' four floats for each tile of
// the denominator's sums.
REBASED_HOST_DEVICE constexpr int64_t slot_floats(int64_t feature_dim) {
  const bool wide = feature_dim == 32;
  return (wide ? 68 : 2) * 128 * 4 + (wide ? 8 : 2) * 32 * 4;
}

// Dynamic shared memory of a block of the polynomial maps' forward, in bytes (ForwardTiles in
// cuda/tensor_core/polynomial/forward.cuh): value tiles, feature tiles, rows, statistics, the Gram matrix and
// its fragments, the state, tiles of y, gamma and beta.
REBASED_HOST_DEVICE constexpr int64_t polynomial_forward_bytes(FeatureMap map, int64_t feature_dim,
                                                               int64_t chunk, int64_t group_size) {
  const bool taylor = map == FeatureMap::taylor;
  const int64_t units = feature_dim / 8, value_row = 2 * (columns + 8);
  const int64_t state_rows = feature_dim == 8 ? 40 : taylor ? 160 : 136;
  return 2 * chunk * value_row + 4 * (feature_dim + 8) * (chunk + 8) +
         4 * chunk * (feature_dim == 8 ? 8 : 24) + 16 * chunk + 512 * units + 256 * units * units +
         (taylor ? 128 : 0) + state_rows * value_row + columns * value_row +
         8 * (group_size + 1) * feature_dim;
}

// Shared memory that a block must be able to have, in bytes; 0 where every device has enough.
inline int64_t shared_memory_bytes(const ForwardProblem&) { return 0; }
inline int64_t shared_memory_bytes(const BackwardProblem& problem) {
  return problem.feature_dim == 32 ? 163 * 1024 : 0;
}

}  // namespace tensor_core
}  // namespace rebased
