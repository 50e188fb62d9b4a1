// Queues the float32 path's forward kernels for one feature map. Host code; what all paths share (clamped
// bounds, statistics of "token" LayerNorm, rows of no sequence) is the caller's.
#pragma once

#include "cuda/float32/forward.cuh"
#include "cuda/shared/scan.cuh"

namespace rebased::REBASED_BACKEND {

namespace float32_path {

template <class AnyProblem>
dim3 sweep_grid(const Call<AnyProblem>& call) {
  const Problem& problem = call.problem;
  return dim3(static_cast<unsigned>(problem.num_sequences * problem.kv_heads * call.segments),
              static_cast<unsigned>(column_groups(problem)));
}

// Fills the slots with the state before each segment.
template <FeatureMap map, class Shape, class AnyProblem>
void add_states(const Call<AnyProblem>& call, Launches* launches) {
  if (call.segments == 1) return;
  launches->add(segment_states<map, Shape, AnyProblem>, sweep_grid(call), threads,
                StateTiles<Shape>(map, call.problem.group_size()).size * int64_t{4}, call);
  const int64_t states = call.problem.num_sequences * call.problem.kv_heads;
  launches->add(scan_states<float, false, AnyProblem>,
                divide_up(states * call.tiles.slot_size(), scan_threads), scan_threads, 0, call,
                call.problem.initial_state);
}

}  // namespace float32_path

template <FeatureMap map>
const char* launch_float32(const ForwardProblem& problem, const Plan& plan, void* stream) {
  using namespace float32_path;
  const auto call = make_call(problem, plan);
  Launches launches(stream);
  add_states<map, ForwardShape>(call, &launches);
  launches.add(forward_kernel<map>, sweep_grid(call), threads, plan.shared_memory_bytes, call);
  return launches.error();
}

}  // namespace rebased::REBASED_BACKEND
