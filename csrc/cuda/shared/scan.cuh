// Split sequences: segments' local states turned into running ones, in a fixed order.
#pragma once

#include "cuda/device/load_ahead.cuh"
#include "cuda/shared/block.cuh"

namespace rebased::REBASED_BACKEND {

constexpr int scan_threads = 256;

// slots (sequences, kv_heads, segments, slot_size). Forward: slot s = initial + the sum of the local states
// in slots 1 .. s; reverse: slot s = initial + the sum of the local ones in slots s .. segments - 2. A thread
// owns one entry of all segments.
template <class A, bool reverse, class AnyProblem>
KERNEL void LAUNCH_BOUNDS(scan_threads, 1) scan_states(Call<AnyProblem> call, ConstState initial) {
  const AnyProblem& problem = call.problem;
  const int64_t size = call.tiles.slot_size();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * scan_threads + threadIdx.x;
  if (index >= problem.num_sequences * problem.kv_heads * size) return;
  const int64_t state = index / size;
  const int entry = static_cast<int>(index - state * size);
  const Features<A> features(problem.feature_map, problem.feature_dim, problem.scale);
  A* const slots = call.template region<A>(reverse ? call.workspace.reverse_states : call.workspace.states) +
                   state * call.segments * size + entry;
  A running =
      import_entry(initial, state, entry, call.tiles, static_cast<int>(problem.head_dim), features, reverse);
  A* const slot = slots + (reverse ? (call.segments - 1) * size : 0);
  const int64_t step = reverse ? -size : size;
  *slot = running;
  visit_ahead(slot + step, step, call.segments - 1, [&](A* next, A own) { *next = running += own; });
}

// Queues what every block's state starts from: by `kernel`, which has one block for each of the sweep's, the
// segments' own sums, and the scan over them, from `initial` on.
template <class A, bool reverse, class AnyProblem>
void add_segment_states(void (*kernel)(Call<AnyProblem>), const Grid& grid, int threads, int64_t shared_bytes,
                        const ConstState& initial, const Call<AnyProblem>& call, Launches* launches) {
  if (call.quadratic || call.segments == 1) return;
  const int64_t states = call.problem.num_sequences * call.problem.kv_heads;
  launches->add(kernel, grid, threads, shared_bytes, call);
  launches->add(scan_states<A, reverse, AnyProblem>, divide_up(states * call.tiles.slot_size(), scan_threads),
                scan_threads, 0, call, initial);
}

}  // namespace rebased::REBASED_BACKEND
