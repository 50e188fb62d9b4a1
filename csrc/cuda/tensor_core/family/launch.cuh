// The tensor-core path's family of forward kernels, and what it has in common with the backward's: one block
// per (sequence, kv head, segment) and column group. Host code.
#pragma once

#include "cuda/shared/family.cuh"
#include "cuda/tensor_core/elementwise/forward.cuh"
#include "cuda/tensor_core/elementwise/segment.cuh"
#include "cuda/tensor_core/family/polynomial.cuh"
#include "cuda/tensor_core/forward.cuh"
#include "cuda/tensor_core/scan.cuh"
#include "cuda/tensor_core/wide_forward.cuh"

namespace rebased::REBASED_BACKEND {

namespace tensor_core {

// The grid of the kernels with one thread per float of a slot.
template <class S>
Grid slot_grid(const Problem& problem) {
  return Grid(problem.num_sequences * problem.kv_heads, divide_up(Slot<S>::size, scan_threads),
              column_groups(problem));
}

template <class S>
bool needs_scan(int segments, const ConstState& start) {
  return S::wide || needs_scan(segments, start);
}

template <class S, class AnyProblem>
void add_scan(const Call<AnyProblem>& call, const Region& region, const ConstState& start, bool reverse,
              Launches* launches) {
  float* const slots = call.template region<float>(region);
  if (!slots || !needs_scan<S>(call.segments, start)) return;
  launches->add(scan_kernel<S>, slot_grid<S>(call.problem), scan_threads, 0, slots, call.segments, start,
                call.problem.head_dim, reverse);
}

// Queues what writes the public state that the slots of all segments add up to. All of them must have been
// filled.
template <class S, class AnyProblem>
void add_slot_sums(const Call<AnyProblem>& call, const Region& slots, const MutableState& target,
                   bool gradient, Launches* launches) {
  launches->add(sum_slots_kernel<S>, slot_grid<S>(call.problem), scan_threads, 0,
                call.template region<const float>(slots), call.segments, static_cast<float*>(target.kv),
                static_cast<float*>(target.k), call.problem.head_dim, gradient);
}

// The elementwise maps' kernels: those of elementwise/, where rows come in whole pieces.
template <class T, class S, bool grouped>
auto forward_of(const ForwardProblem& problem) {
  if (elementwise_kernels(problem, Pieces(problem).least())) {
    return &elementwise::forward_kernel<T, elementwise::Shape<S::map, S::feature_dim>, grouped>;
  }
  return &forward_kernel<T, S, grouped>;
}
template <class T, class S>
auto segment_states_of(const Problem& problem) {
  const Pieces pieces(problem);
  if (elementwise_kernels(problem, std::min(pieces.k, pieces.v))) {
    return &elementwise::segment_state_kernel<T, elementwise::Shape<S::map, S::feature_dim>>;
  }
  return &segment_state_kernel<T, S>;
}

// Queues what leaves each segment's own sums of k and v in the workspace.
template <class T, class S, class AnyProblem>
void add_segment_sums(const Call<AnyProblem>& call, bool all_segments, Launches* launches) {
  const auto add = [&](void (*kernel)(Arguments<Problem>)) {
    float* const slots = call.template region<float>(call.workspace.states);
    launches->add(kernel, sweep_grid(call.problem, call.segments), S::threads, 0,
                  Arguments<Problem>(call, slots, false, all_segments));
  };
  if constexpr (S::wide) {
    add(wide_segment_state_kernel<T>);
  } else {
    add(segment_states_of<T, S>(call.problem));
  }
}

// Queues what fills the slots that start_state reads.
template <class T, class S, class AnyProblem>
void add_states(const Call<AnyProblem>& call, Launches* launches) {
  if (call.segments > 1) add_segment_sums<T, S>(call, false, launches);
  add_scan<S>(call, call.workspace.states, call.problem.initial_state, false, launches);
}

// What the sweeps from the first row to the last are given.
template <class S, class AnyProblem>
Arguments<AnyProblem> sweep_arguments(const Call<AnyProblem>& call) {
  return {call, call.template region<float>(call.workspace.states),
          needs_scan<S>(call.segments, call.problem.initial_state)};
}

}  // namespace tensor_core

template <FeatureMap map, int feature_dim>
Family<ForwardProblem> tensor_core_family(const ForwardProblem&) {
  using namespace tensor_core;
  using T = bfloat16_t;
  using AnyCall = const Call<ForwardProblem>&;
  if constexpr (is_polynomial(map) && feature_dim <= 16) {
    return polynomial::forward_family<T, map, feature_dim>();
  } else {
    using S = Slabs<map, feature_dim>;
    return {[](AnyCall call, Launches* launches) { add_states<T, S>(call, launches); },
            [](AnyCall call, Launches* launches) {
              const auto add = [&](void (*kernel)(Arguments<ForwardProblem>), int64_t shared_bytes) {
                launches->add(kernel, sweep_grid(call.problem, call.segments), S::threads, shared_bytes,
                              sweep_arguments<S>(call));
              };
              if constexpr (S::wide) {
                add(wide_forward_kernel<T>, WideForwardTiles<T>::bytes);
              } else {
                add(call.problem.group_size() > 1 ? forward_of<T, S, true>(call.problem)
                                                  : forward_of<T, S, false>(call.problem),
                    0);
              }
            },
            [](AnyCall call, Launches* launches) {
              add_segment_sums<T, S>(call, true, launches);
              add_slot_sums<S>(call, call.workspace.states, call.problem.final_state, false, launches);
            }};
  }
}

}  // namespace rebased::REBASED_BACKEND
