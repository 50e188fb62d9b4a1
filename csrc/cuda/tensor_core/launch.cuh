// Host side of the tensor-core forward for one element type, map and feature dim.
#pragma once

#include "cuda/tensor_core/forward.cuh"
#include "cuda/tensor_core/scan.cuh"
#include "cuda/tensor_core/wide_forward.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

// Calls function with the Slabs of the problem's map and feature dim. supports() has checked that there are
// such Slabs.
template <class Function>
auto with_slabs(const Problem& problem, Function&& function) {
  if (problem.feature_dim == 8) return function(Slabs<FeatureMap::outer, 8>());
  if (problem.feature_dim == 32) return function(Slabs<FeatureMap::outer, 32>());
  switch (problem.feature_map) {
    case FeatureMap::outer:
      return function(Slabs<FeatureMap::outer, 16>());
    case FeatureMap::square:
      return function(Slabs<FeatureMap::square, 16>());
    case FeatureMap::taylor:
      return function(Slabs<FeatureMap::taylor, 16>());
    default:
      return function(Slabs<FeatureMap::elu, 16>());
  }
}

inline int64_t slot_floats(const Problem& problem) {
  return with_slabs(problem, [](auto slabs) { return static_cast<int64_t>(Slot<decltype(slabs)>::size); });
}

// The grid of a sweep: one block per (sequence, kv head, segment) and column group.
inline dim3 sweep_grid(const Problem& problem, int segments) {
  return dim3(static_cast<unsigned>(problem.num_sequences * problem.kv_heads * segments),
              static_cast<unsigned>(column_groups(problem)));
}

inline int64_t slot_count(const Problem& problem, int segments) {
  return problem.num_sequences * problem.kv_heads * segments * column_groups(problem);
}

// Up to this many segments each block sums the states of the segments before its own by itself. That saves a
// launch, and with up to six segments memory traffic as well.
constexpr int summed_segments = 8;

// Whether scan_kernel makes the states that segments start from out of the sums of each segment.
template <class S>
bool needs_scan(const Launch& launch, const ConstState& start) {
  return S::wide || start.kv || launch.segments > summed_segments;
}

template <class S>
const char* launch_scan(const Problem& problem, float* slots, int segments, ConstState start, bool reverse,
                        void* stream) {
  const dim3 grid(static_cast<unsigned>(problem.num_sequences * problem.kv_heads),
                  (Slot<S>::size + scan_threads - 1) / scan_threads,
                  static_cast<unsigned>(column_groups(problem)));
  return LAUNCH(scan_kernel<S>, grid, dim3(scan_threads), 0, stream, slots, segments, start, problem.head_dim,
                reverse);
}

template <class T, class S>
auto* segment_state_kernel_of() {
  if constexpr (S::wide) {
    return &wide_segment_state_kernel<T>;
  } else {
    return &segment_state_kernel<T, S>;
  }
}

// Fills the slots that start_state reads. Where `slots` is null there is one segment, which starts from an
// empty state.
template <class T, class S>
const char* launch_segment_states(const Problem& problem, const Launch& launch, ConstState initial_state,
                                  float* slots, void* stream) {
  if (!slots) return "";
  if (launch.segments > 1) {
    const auto kernel = segment_state_kernel_of<T, S>();
    const char* error = LAUNCH(kernel, sweep_grid(problem, launch.segments), dim3(S::threads), 0, stream,
                               Arguments<Problem>(problem, launch, slots, false));
    if (*error) return error;
  }
  if (!needs_scan<S>(launch, initial_state)) return "";
  return launch_scan<S>(problem, slots, launch.segments, initial_state, false, stream);
}

// Writes the public state that the slots of all segments add up to. All of them must have been filled.
template <class S>
const char* launch_slot_sums(const Problem& problem, const float* slots, int segments,
                             const MutableState& target, bool gradient, void* stream) {
  const dim3 grid(static_cast<unsigned>(problem.num_sequences * problem.kv_heads),
                  (Slot<S>::size + scan_threads - 1) / scan_threads,
                  static_cast<unsigned>(column_groups(problem)));
  return LAUNCH(sum_slots_kernel<S>, grid, dim3(scan_threads), 0, stream, slots, segments,
                static_cast<float*>(target.kv), static_cast<float*>(target.k), problem.head_dim, gradient);
}

template <class T, class S>
const char* launch_whole_state(const ForwardProblem& problem, Launch launch, void* stream) {
  launch.all_segments = true;
  float* const slots = static_cast<float*>(launch.workspace);
  const auto kernel = segment_state_kernel_of<T, S>();
  const char* const error = LAUNCH(kernel, sweep_grid(problem, launch.segments), dim3(S::threads), 0, stream,
                                   Arguments<Problem>(problem, launch, slots, false));
  if (*error) return error;
  return launch_slot_sums<S>(problem, slots, launch.segments, problem.final_state, false, stream);
}

template <class T, class S>
const char* launch_forward(const ForwardProblem& problem, const Launch& launch, void* stream) {
  if (problem.state_only) return launch_whole_state<T, S>(problem, launch, stream);
  const bool has_slots = launch.segments > 1 || problem.initial_state.kv;
  float* const slots = has_slots ? static_cast<float*>(launch.workspace) : nullptr;
  const char* error = launch_segment_states<T, S>(problem, launch, problem.initial_state, slots, stream);
  if (*error) return error;
  const dim3 grid = sweep_grid(problem, launch.segments), block(S::threads);
  const Arguments<ForwardProblem> arguments(problem, launch, slots,
                                            needs_scan<S>(launch, problem.initial_state));
  if constexpr (S::wide) {
    return LAUNCH(wide_forward_kernel<T>, grid, block, static_cast<size_t>(WideForwardTiles<T>::bytes),
                  stream, arguments);
  } else {
    const auto kernel = problem.group_size() > 1 ? forward_kernel<T, S, true> : forward_kernel<T, S, false>;
    return LAUNCH(kernel, grid, block, 0, stream, arguments);
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
