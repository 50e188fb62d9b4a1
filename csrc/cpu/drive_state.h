// The states that rows leave behind, by themselves: S, z of keys and values for a ForwardProblem that is
// state_only, T, m of queries and their gradients for BackwardPart::reverse_state. One pass over the rows, no
// output but the state: sequences are cut into segments as elsewhere, and the segments' sums added in order.
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
  const int64_t shared = arena.used;
  {
    call.scratch(arena);
  }
  const int64_t scratch_bytes = arena.used - shared;
  if (!parallel) return shared + threads * scratch_bytes;

  call.compute_statistics(*parallel, reversed, !reversed);
  for_items(*parallel, schedule.items(), [&](int64_t number, int worker) {
    Arena own{arena.base, shared + worker * scratch_bytes};
    add_segment(schedule.item(number), call.scratch(own), states + number * s.state_size);
  });
  for_items(*parallel, p.num_sequences * p.kv_heads, [&](int64_t item, int) {
    const Sequence& sequence = schedule.sequences[item / p.kv_heads];
    const auto segment_state = [&](int64_t n) {
      const int64_t segment = reversed ? sequence.segments - 1 - n : n;
      return states + ((sequence.first_segment + segment) * p.kv_heads + item % p.kv_heads) * s.state_size;
    };
    T* sum = segment_state(0);
    for (int64_t n = 1; n < sequence.segments; n++) {
      const T* state = segment_state(n);
      for (int64_t i = 0; i < s.state_size; i++) sum[i] += state[i];
    }
    export_state(s, sum, target, item);
  });
  return 0;
}

template <class T, class ForwardCall>
inline int64_t run_forward_state(const ForwardProblem& p, int threads, const Parallel* parallel) {
  Arena arena{parallel ? static_cast<char*>(p.workspace) : nullptr};
  const ForwardCall call(p, threads, arena, true, 1);
  const auto add_segment = [&](const Item& item, const auto& scratch, T* state) {
    call.local_state(item, scratch, state);
  };
  return run_states<T>(call, threads, parallel, arena, add_segment, false, p.final_state);
}

template <class T, class BackwardCall>
inline int64_t run_reverse_state(const BackwardProblem& p, int threads, const Parallel* parallel) {
  Arena arena{parallel ? static_cast<char*>(p.workspace) : nullptr};
  const BackwardCall call(p, threads, arena, true, 1);
  const auto add_segment = [&](const Item& item, const auto& scratch, T* state) {
    call.local_query_state(item, scratch, state);
  };
  return run_states<T>(call, threads, parallel, arena, add_segment, true, p.grad_initial_state);
}

}  // namespace rebased::cpu::REBASED_ISA
