// Host side of the tensor-core forward for one element type and map.
#pragma once

#include <type_traits>

#include "cuda/tensor_core_forward.cuh"
#include "cuda/tensor_core_scan.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

// Calls function(std::integral_constant<FeatureMap, map>).
template <class Function>
auto with_map(FeatureMap map, Function&& function) {
  switch (map) {
    case FeatureMap::outer:
      return function(std::integral_constant<FeatureMap, FeatureMap::outer>());
    case FeatureMap::square:
      return function(std::integral_constant<FeatureMap, FeatureMap::square>());
    case FeatureMap::taylor:
      return function(std::integral_constant<FeatureMap, FeatureMap::taylor>());
    default:
      return function(std::integral_constant<FeatureMap, FeatureMap::elu>());
  }
}

inline int64_t slot_bytes(FeatureMap map) {
  return with_map(map,
                  [](auto constant) { return static_cast<int64_t>(sizeof(float)) * Slot<constant>::size; });
}

// Blocks of a sweep: (sequence, kv head, segment) by column group.
inline dim3 sweep_grid(const Problem& problem, int segments) {
  return dim3(static_cast<unsigned>(problem.num_sequences * problem.kv_heads * segments),
              static_cast<unsigned>(column_groups(problem)));
}

inline int64_t slot_count(const Problem& problem, int segments) {
  return problem.num_sequences * problem.kv_heads * segments * column_groups(problem);
}

// Segments up to which each block sums the states of those before it by itself: that saves a launch, and up
// to six memory traffic.
constexpr int summed_segments = 8;

// Whether scan_kernel makes states to start from out of the segments' own.
inline bool needs_scan(const Launch& launch, const ConstState& start) {
  return start.kv || launch.segments > summed_segments;
}

template <FeatureMap map>
const char* launch_scan(const Problem& problem, float* slots, int segments, ConstState start, bool reverse,
                        void* stream) {
  const dim3 grid(static_cast<unsigned>(problem.num_sequences * problem.kv_heads),
                  (Slot<map>::size + scan_threads - 1) / scan_threads,
                  static_cast<unsigned>(column_groups(problem)));
  return LAUNCH(scan_kernel<map>, grid, dim3(scan_threads), 0, stream, slots, segments, start,
                problem.head_dim, reverse);
}

// Fills the slots for start_state. Null slots: there is one segment, from an empty state.
template <class T, FeatureMap map>
const char* launch_segment_states(const Problem& problem, const Launch& launch, ConstState initial_state,
                                  float* slots, void* stream) {
  if (!slots) return "";
  if (launch.segments > 1) {
    const char* error = LAUNCH((segment_state_kernel<T, map>), sweep_grid(problem, launch.segments),
                               dim3(threads), 0, stream, Arguments<Problem>(problem, launch, slots, false));
    if (*error) return error;
  }
  if (!needs_scan(launch, initial_state)) return "";
  return launch_scan<map>(problem, slots, launch.segments, initial_state, false, stream);
}

template <class T, FeatureMap map>
const char* launch_forward(const ForwardProblem& problem, const Launch& launch, void* stream) {
  const bool has_slots = launch.segments > 1 || problem.initial_state.kv;
  float* const slots = has_slots ? static_cast<float*>(launch.workspace) : nullptr;
  const char* error = launch_segment_states<T, map>(problem, launch, problem.initial_state, slots, stream);
  if (*error) return error;
  const auto kernel = problem.group_size() > 1 ? forward_kernel<T, map, true> : forward_kernel<T, map, false>;
  return LAUNCH(kernel, sweep_grid(problem, launch.segments), dim3(threads), 0, stream,
                Arguments<ForwardProblem>(problem, launch, slots, needs_scan(launch, problem.initial_state)));
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
