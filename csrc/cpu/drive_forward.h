// Forward of a whole problem: workspace, passes, items. It includes both kinds of items, chunked/ and
// recurrent/, and instances/ alone includes it.
#pragma once

#include "cpu/chunked/forward_sweep.h"
#include "cpu/drive_state.h"
#include "cpu/recurrent/forward.h"

namespace rebased::cpu::REBASED_ISA {

// Parts that the value columns are split into: whole panels, no more of them than the threads need, and only
// where items of one sequence and head would leave threads idle for a whole sweep with a state.
template <class T>
inline int64_t column_parts(const ForwardProblem& p, int threads, bool needs_state) {
  const Sizes<T> s(p, chunk_length<T>(p));
  const int64_t items = larger<int64_t>(1, p.num_sequences * p.kv_heads);
  const int64_t panels = (s.head_dim + kLanes<T> - 1) / kLanes<T>;
  const int64_t missing = (threads + items - 1) / items;
  const bool quadratic = !needs_state && s.quadratic_is_cheaper(p.seqlen);
  return quadratic || missing > panels ? 1 : missing;
}

// Returns the workspace's bytes where `parallel` is null, else 0.
template <class T, class ForwardCall>
inline int64_t run_forward_as(const ForwardProblem& p, int threads, const Parallel* parallel) {
  if (p.state_only) return run_forward_state<T, ForwardCall>(p, threads, parallel);
  Arena arena = workspace_of(p, parallel);
  const bool needs_state = p.initial_state.kv || p.final_state.kv;
  const int64_t parts = column_parts<T>(p, threads, needs_state);
  const ForwardCall call(p, threads, arena, needs_state, parts);
  const Sizes<T>& s = call.sizes;
  const Schedule<T>& schedule = call.schedule;
  T* states = call.take_states(arena, Schedule<T>::bound(p, s, threads, parts) * p.kv_heads);
  const Scratches scratches(arena, [&](Arena& own) { return call.scratch(own); });
  if (!parallel) return scratches.workspace_bytes(threads);

  call.zero_unowned_rows(p.y, p.heads, p.head_dim);
  if (schedule.packed)
    for (int64_t i = 0; i < p.heads; i++)
      for (int64_t row = 0; row < p.seqlen; row++)
        static_cast<T*>(p.r)[i * p.seqlen + row] = 1;  // owned rows are overwritten
  call.compute_statistics(*parallel);
  if (schedule.cut()) {
    for_items(*parallel, schedule.items(), [&](int64_t number, int worker) {
      const Item item = schedule.item(number);
      if (!item.quadratic && !item.last)
        call.local_state(item, scratches(worker), states + item.number * s.state_size);
    });
    call.sum_states(*parallel, states, p.initial_state, false);
  }
  const int64_t panels = (p.head_dim + kLanes<T> - 1) / kLanes<T>;
  const auto part_begin = [&](int64_t part) {
    return int(smaller(panels * part / parts * kLanes<T>, p.head_dim));
  };
  const int64_t together = call.heads_together(threads);
  for_items(*parallel, schedule.items() / together, [&](int64_t number, int worker) {
    const Item first = schedule.run_of_heads(number, together);
    ForwardCall own = call;
    own.sizes.set_columns(part_begin(first.part), part_begin(first.part + 1));
    own.run(first, together, scratches(worker), [&](const Item& item, T* state) {
      return own.take_start_state(item, item.first, p.initial_state, states, state);
    });
  });
  return 0;
}

template <class T>
inline int64_t run_forward(const ForwardProblem& p, int threads, const Parallel* parallel) {
  return is_elementwise(p) ? run_forward_as<T, ElementwiseForward<T>>(p, threads, parallel)
                           : run_forward_as<T, ForwardSweep<T>>(p, threads, parallel);
}

}  // namespace rebased::cpu::REBASED_ISA
