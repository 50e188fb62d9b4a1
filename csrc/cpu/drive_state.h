// The states that rows leave behind, by themselves: S, z of keys and values for a ForwardProblem that is
// state_only; T, M of queries and their gradients for BackwardPart::reverse_state. It makes one pass over the
// rows and writes no output but the state: sequences are cut into segments as elsewhere, and the sums of the
// segments are added in order. It includes call.h alone; the kind of items is the drivers' choice.
#pragma once

#include "cpu/call.h"

namespace rebased::cpu::REBASED_ISA {

// add_segment(item, scratch, state) fills a segment's state from zero, in a worker's scratch.
// The sums run over segments in the order of rows, or backwards when `reversed`.
template <class T, class AnyCall, class AddSegment>
inline int64_t run_states(const AnyCall& call, int threads, const Parallel* parallel, Arena& arena,
                          const AddSegment& add_segment, bool reversed, const MutableState& target) {
  const Problem& p = call.base;
  const Sizes<T>& s = call.sizes;
  const Schedule<T>& schedule = call.schedule;
  T* states = arena.take<T>(Schedule<T>::bound(p, s, threads, 1) * p.kv_heads * s.state_size);
  const Scratches scratches(arena, [&](Arena& own) { return call.scratch(own); });
  if (!parallel) return scratches.workspace_bytes(threads);

  call.compute_statistics(*parallel, reversed, !reversed);
  for_items(*parallel, schedule.items(), [&](int64_t number, int worker) {
    add_segment(schedule.item(number), scratches(worker), states + number * s.state_size);
  });
  for_items(*parallel, p.num_sequences * p.kv_heads, [&](int64_t item, int) {
    const Sequence& sequence = schedule.sequences[item / p.kv_heads];
    T* sum = call.segment_state(states, sequence, item % p.kv_heads, 0, reversed);
    for (int64_t n = 1; n < sequence.segments; n++) {
      const T* state = call.segment_state(states, sequence, item % p.kv_heads, n, reversed);
      for (int64_t i = 0; i < s.state_size; i++) sum[i] += state[i];
    }
    export_state(s, sum, target, item);
  });
  return 0;
}

template <class T, class ForwardCall>
inline int64_t run_forward_state(const ForwardProblem& p, int threads, const Parallel* parallel) {
  Arena arena = workspace_of(p, parallel);
  const ForwardCall call(p, threads, arena, true, 1);
  const auto add_segment = [&](const Item& item, const auto& scratch, T* state) {
    call.local_state(item, scratch, state);
  };
  return run_states<T>(call, threads, parallel, arena, add_segment, false, p.final_state);
}

template <class T, class BackwardCall>
inline int64_t run_reverse_state(const BackwardProblem& p, int threads, const Parallel* parallel) {
  Arena arena = workspace_of(p, parallel);
  const BackwardCall call(p, threads, arena, true, 1);
  const auto add_segment = [&](const Item& item, const auto& scratch, T* state) {
    call.local_query_state(item, scratch, state);
  };
  return run_states<T>(call, threads, parallel, arena, add_segment, true, p.grad_initial_state);
}

}  // namespace rebased::cpu::REBASED_ISA
