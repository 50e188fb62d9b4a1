// How the polynomial maps' kernels of tensor_core/polynomial/ are queued. Host code.
#pragma once

#include "cuda/shared/family.cuh"
#include "cuda/tensor_core/polynomial/forward.cuh"
#include "cuda/tensor_core/polynomial/segment.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

// The grid of a sweep: one block per (sequence, kv head, segment) and column group.
inline Grid sweep_grid(const Problem& problem, int segments) {
  return Grid(problem.num_sequences * problem.kv_heads * segments, column_groups(problem));
}

// Whether a scan makes the states that segments start from out of the sums of each segment. Where there are
// no slots there is one segment, which starts from an empty state.
inline bool needs_scan(int segments, const ConstState& start) {
  return start.kv || segments > summed_segments;
}

namespace polynomial {

// Calls visit(Shape, whether heads are grouped) for the chunk length that the plan has chosen, with those
// types alone that a plan can choose.
template <FeatureMap map, int feature_dim, class AnyProblem, class Visit>
void visit_shape(const Call<AnyProblem>& call, const Visit& visit) {
  const auto visit_grouped = [&](auto grouped) {
    if constexpr (takes_longer_chunks(map, feature_dim, decltype(grouped)::value)) {
      if (call.tiles.chunk == 2 * chunk) return visit(Shape<map, feature_dim, 2 * chunk>(), grouped);
    }
    visit(Shape<map, feature_dim, chunk>(), grouped);
  };
  if (call.problem.group_size() > 1) {
    visit_grouped(std::true_type());
  } else {
    visit_grouped(std::false_type());
  }
}

// The grid of the kernels with one thread per float of a slot.
template <class Slot>
Grid slot_grid(const Problem& problem) {
  return Grid(problem.num_sequences * problem.kv_heads, divide_up(Slot::used, scan_threads),
              column_groups(problem));
}

// Queues what makes the states that segments start from; `start` is the given state.
template <class Slot, class AnyProblem>
void add_scan(const Call<AnyProblem>& call, const Region& region, const ConstState& start, bool reverse,
              Launches* launches) {
  float* const slots = call.template region<float>(region);
  if (!slots || !needs_scan(call.segments, start)) return;
  launches->add(scan_kernel<Slot>, slot_grid<Slot>(call.problem), scan_threads, 0, slots, call.segments,
                start, call.problem.head_dim, reverse);
}

// Queues what writes the public state that the slots of all segments add up to. All of them must have been
// filled.
template <class Slot, class AnyProblem>
void add_slot_sums(const Call<AnyProblem>& call, const Region& slots, const MutableState& target,
                   bool gradient, Launches* launches) {
  launches->add(sum_slots_kernel<Slot>, slot_grid<Slot>(call.problem), scan_threads, 0,
                call.template region<const float>(slots), call.segments, static_cast<float*>(target.kv),
                static_cast<float*>(target.k), call.problem.head_dim, gradient);
}

// Queues what leaves each segment's own sums of k and v in the workspace.
template <class T, FeatureMap map, int feature_dim, class AnyProblem>
void add_segment_sums(const Call<AnyProblem>& call, bool all_segments, Launches* launches) {
  visit_shape<map, feature_dim>(call, [&](auto shape, auto) {
    using S = decltype(shape);
    float* const slots = call.template region<float>(call.workspace.states);
    launches->add(segment_state_kernel<T, S>, sweep_grid(call.problem, call.segments), threads,
                  SegmentTiles<S>::bytes, Arguments<Problem>(call, slots, false, all_segments));
  });
}

// Queues what fills the slots that a sweep from the first row to the last starts from.
template <class T, FeatureMap map, int feature_dim, class AnyProblem>
void add_states(const Call<AnyProblem>& call, Launches* launches) {
  if (call.segments > 1) add_segment_sums<T, map, feature_dim>(call, false, launches);
  add_scan<Slot<map, feature_dim>>(call, call.workspace.states, call.problem.initial_state, false, launches);
}

template <class T, FeatureMap map, int feature_dim>
Family<ForwardProblem> forward_family() {
  using AnyCall = const Call<ForwardProblem>&;
  return {[](AnyCall call, Launches* launches) { add_states<T, map, feature_dim>(call, launches); },
          [](AnyCall call, Launches* launches) {
            visit_shape<map, feature_dim>(call, [&](auto shape, auto grouped) {
              using S = decltype(shape);
              const Arguments<ForwardProblem> arguments(
                  call, call.region<float>(call.workspace.states),
                  needs_scan(call.segments, call.problem.initial_state));
              launches->add(forward_kernel<T, S, decltype(grouped)::value>,
                            sweep_grid(call.problem, call.segments), threads,
                            ForwardTiles<S>::bytes(call.problem.group_size()), arguments);
            });
          },
          [](AnyCall call, Launches* launches) {
            add_segment_sums<T, map, feature_dim>(call, true, launches);
            add_slot_sums<Slot<map, feature_dim>>(call, call.workspace.states, call.problem.final_state,
                                                  false, launches);
          }};
}

}  // namespace polynomial
}  // namespace rebased::REBASED_BACKEND::tensor_core
