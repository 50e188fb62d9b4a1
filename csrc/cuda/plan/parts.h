// What the files of the plan know of each other; plan.h is what others see.
#pragma once

#include "cuda/plan/plan.h"
#include "op/backend.h"

namespace rebased {

inline int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
inline int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

inline int64_t features_of(const Problem& problem) {
  return num_features(problem.feature_map, problem.feature_dim);
}

// The rows of a sequence, on average: the lengths of packed ones are on the device.
inline int64_t mean_rows(const Problem& problem) {
  return problem.cu_seqlens && problem.num_sequences ? problem.seqlen / problem.num_sequences
                                                     : problem.seqlen;
}

// What is asked of a family of kernels: a forward, or of a backward the gradients of the queries, of the keys
// and values, or both; neither means the gradient of the initial state alone.
struct Sweep {
  bool backward, queries, keys;
  Keep keep;           // what forward keeps
  int64_t kept_bytes;  // what backward is given; whether states are among it shows in its size

  bool keeps_statistics() const { return keep != Keep::nothing || kept_bytes > 0; }
  bool has_states() const { return !backward || queries; }
  bool has_reverse_states() const { return backward && (keys || !queries); }
};
inline Sweep sweep_of(const ForwardProblem& problem) { return {false, true, true, problem.keep, 0}; }
inline Sweep sweep_of(const BackwardProblem& problem) {
  return {true, problem.wants_queries(), problem.wants_keys(), Keep::nothing, problem.kept_bytes};
}

constexpr const char* not_taken = "this path does not take this problem";

// general.cpp
Plan plan_general(const Problem&, const Device&, Sweep, bool quadratic);

// fixed_shape.cpp: the plans of the families with tiles of a fixed shape, with an error where the family does
// not take the problem.
Plan plan_float32(const ForwardProblem&, const Device&);
Plan plan_float32(const BackwardProblem&, const Device&);
Plan plan_tensor_core(const ForwardProblem&, const Device&);
Plan plan_tensor_core(const BackwardProblem&, const Device&);

// workspace.cpp: each of these adds regions to the plan's workspace, once the plan has segments and column
// groups.

// Clamped bounds, and the statistics of "token" LayerNorm.
void add_preparation_regions(const Problem&, Sweep, Plan*);
// One slot of `slot_bytes` for each block of a sweep, where `states` and `reverse_states` say that there are
// any. `keepable`: whether a family's forward leaves its states as its grad_q reads them. To be added after
// the statistics: backward, which is told how many bytes were kept, sees by that whether they hold states of
// its own cut.
void add_state_regions(const Problem&, Sweep, int64_t slot_bytes, bool states, bool reverse_states,
                       bool keepable, Plan*);
// What a backward needs beside states. `delta_of_groups`: each column group has a delta of its own.
void add_gradient_regions(const Problem&, Sweep, bool delta_of_groups, Plan*);
// The column groups' parts of the gradient of the initial state's sums.
void add_initial_sums_region(const BackwardProblem&, Plan*);
// Room for what rounding takes from the sums of blocks that may walk more than compensated_rows tokens:
// `size` numbers for each block. A block of one chunk must have no carries, as packed sequences that are so
// short would share a slot.
void add_carries(const Problem&, int64_t size, Plan*);

// text.cpp: gives the plan back, having left its configuration to be taken where record_launches says so.
template <class AnyProblem>
Plan record(const AnyProblem&, const Plan&);

}  // namespace rebased
