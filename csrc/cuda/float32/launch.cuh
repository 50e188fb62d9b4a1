// The float32 path's family of kernels: one block per (sequence, kv head, segment) and column group. Host
// code.
#pragma once

#include "cuda/float32/backward.cuh"
#include "cuda/float32/forward.cuh"
#include "cuda/shared/family.cuh"
#include "cuda/shared/scan.cuh"

namespace rebased::REBASED_BACKEND {

namespace float32_path {

template <class AnyProblem>
Grid sweep_grid(const Call<AnyProblem>& call) {
  const Problem& problem = call.problem;
  return Grid(problem.num_sequences * problem.kv_heads * call.segments, column_groups(problem));
}

template <class AnyProblem>
void add_sweep(void (*kernel)(Call<AnyProblem>), int64_t shared_floats, const Call<AnyProblem>& call,
               Launches* launches) {
  launches->add(kernel, sweep_grid(call), threads, shared_floats * 4, call);
}

// The states before each segment; `reverse`: after each, of T and M.
template <FeatureMap map, class Shape, bool reverse, class AnyProblem>
void add_states(void (*kernel)(Call<AnyProblem>), const ConstState& initial, const Call<AnyProblem>& call,
                Launches* launches) {
  const int64_t shared_bytes = StateTiles<Shape>(map, call.problem.group_size()).size * int64_t{4};
  add_segment_states<float, reverse>(kernel, sweep_grid(call), threads, shared_bytes, initial, call,
                                     launches);
}

}  // namespace float32_path

template <FeatureMap map>
Family<ForwardProblem> float32_family(const ForwardProblem&) {
  using namespace float32_path;
  using AnyCall = const Call<ForwardProblem>&;
  return {[](AnyCall call, Launches* launches) {
            add_states<map, ForwardShape, false>(segment_states<map, ForwardShape, ForwardProblem>,
                                                 call.problem.initial_state, call, launches);
          },
          [](AnyCall call, Launches* launches) {
            add_sweep(forward_kernel<map>, ForwardTiles(map, call.problem.group_size()).size, call, launches);
          },
          nullptr};
}

template <FeatureMap map>
Family<BackwardProblem> float32_family(const BackwardProblem&) {
  using namespace float32_path;
  using AnyCall = const Call<BackwardProblem>&;
  return {[](AnyCall call, Launches* launches) {
            add_states<map, BackwardShape, false>(segment_states<map, BackwardShape, BackwardProblem>,
                                                  call.problem.initial_state, call, launches);
          },
          [](AnyCall call, Launches* launches) {
            add_states<map, BackwardShape, true>(reverse_segment_states<map>, call.problem.grad_final_state,
                                                 call, launches);
          },
          [](AnyCall call, Launches* launches) {
            add_sweep(grad_q_kernel<map>, BackwardTiles(map, false, call.problem.group_size()).size, call,
                      launches);
          },
          [](AnyCall call, Launches* launches) {
            add_sweep(grad_kv_kernel<map>, BackwardTiles(map, true, call.problem.group_size()).size, call,
                      launches);
          },
          nullptr,
          Deltas::of_rows};
}

}  // namespace rebased::REBASED_BACKEND
