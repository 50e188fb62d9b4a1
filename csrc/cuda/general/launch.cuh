// Queues the general path's kernels: which ones a call needs, in which order, on which grids. Host code.
#pragma once

#include "cuda/general/backward.cuh"
#include "cuda/general/forward.cuh"
#include "cuda/general/states.cuh"
#include "cuda/shared/affine.cuh"
#include "cuda/shared/bounds.cuh"
#include "cuda/shared/delta.cuh"
#include "cuda/shared/scan.cuh"
#include "cuda/shared/token_norm.cuh"

namespace rebased::REBASED_BACKEND {

template <class E, class AnyProblem>
void add_preparation(const Call<AnyProblem>& call, Launches* launches) {
  using A = Accumulator<E>;
  const AnyProblem& problem = call.problem;
  const int64_t tokens = problem.batch * problem.seqlen;
  Parts<TokenRows<E>> parts;
  if (A* const statistics = call.template region<A>(call.workspace.query_statistics)) {
    parts.add({problem.q, static_cast<int>(problem.heads), statistics});
  }
  if (A* const statistics = call.template region<A>(call.workspace.key_statistics)) {
    parts.add({problem.k, static_cast<int>(problem.kv_heads), statistics});
  }
  add_token_statistics(parts, tokens, problem.seqlen, static_cast<int>(problem.feature_dim),
                       problem.layer_norm_eps, launches);
  if (int64_t* const bounds = call.template region<int64_t>(call.workspace.bounds)) {
    launches->add(clamp_bounds<bounds_threads>, 1, bounds_threads, 0, problem.cu_seqlens,
                  problem.num_sequences + 1, problem.seqlen, bounds);
  }
}

// States before each segment (or after each, in reverse) from the segments' own sums.
template <class E, bool reverse, class AnyProblem>
void add_segment_states(const Call<AnyProblem>& call, const ConstState& initial, int64_t shared_bytes,
                        Launches* launches) {
  if (call.quadratic || call.segments == 1) return;
  const int64_t states = call.problem.num_sequences * call.problem.kv_heads;
  launches->add(general_local_states<E, reverse, AnyProblem>, states * call.segments, call.tiles.threads,
                shared_bytes, call);
  launches->add(scan_states<Accumulator<E>, reverse, AnyProblem>,
                divide_up(states * call.tiles.slot_size(), scan_threads), scan_threads, 0, call, initial);
}

template <class T, class AnyProblem>
void add_fill(const Call<AnyProblem>& call, const MutableRows& rows, int64_t heads, int64_t width, T value,
              Launches* launches) {
  if (!rows.data) return;
  if (const int64_t* const bounds = call.template region<int64_t>(call.workspace.bounds)) {
    launches->add(fill_rows_of_no_sequence<T>, heads * fill_blocks, bounds_threads, 0, rows, width, value,
                  bounds, call.problem.num_sequences, call.problem.seqlen);
  }
}

template <class E>
const char* launch_preparation(const ForwardProblem& problem, const Plan& plan, void* stream) {
  Launches launches(stream);
  add_preparation<E>(make_call(problem, plan), &launches);
  return launches.error();
}

template <class E>
const char* launch_preparation(const BackwardProblem& problem, const Plan& plan, void* stream) {
  Launches launches(stream);
  add_preparation<E>(make_call(problem, plan), &launches);
  return launches.error();
}

template <class E>
const char* launch_fill(const ForwardProblem& problem, const Plan& plan, void* stream) {
  using A = Accumulator<E>;
  Launches launches(stream);
  const auto call = make_call(problem, plan);
  add_fill(call, problem.y, problem.heads, problem.head_dim, E{}, &launches);
  add_fill(call, MutableRows{problem.r, 0, problem.seqlen, 1}, problem.heads, 1, A(1), &launches);
  return launches.error();
}

template <class E>
const char* launch_fill(const BackwardProblem& problem, const Plan& plan, void* stream) {
  Launches launches(stream);
  const auto call = make_call(problem, plan);
  add_fill(call, problem.grad_q, problem.heads, problem.feature_dim, E{}, &launches);
  add_fill(call, problem.grad_k, problem.kv_heads, problem.feature_dim, E{}, &launches);
  add_fill(call, problem.grad_v, problem.kv_heads, problem.head_dim, E{}, &launches);
  return launches.error();
}

template <class E>
const char* launch_general(const ForwardProblem& problem, const Plan& plan, void* stream) {
  const auto call = make_call(problem, plan);
  const int64_t blocks = problem.num_sequences * problem.kv_heads * plan.segments;
  Launches launches(stream);
  add_preparation<E>(call, &launches);
  add_segment_states<E, false>(call, problem.initial_state, plan.shared_memory_bytes, &launches);
  if (problem.state_only) {
    launches.add(general_whole_state<E, false, ForwardProblem>, blocks, plan.tiles.threads,
                 plan.shared_memory_bytes, call);
    return launches.error();
  }
  launches.add(general_forward<E>, blocks, plan.tiles.threads, plan.shared_memory_bytes, call);
  return *launches.error() ? launches.error() : launch_fill<E>(problem, plan, stream);
}

template <class E>
const char* launch_general(const BackwardProblem& problem, const Plan& plan, void* stream) {
  using A = Accumulator<E>;
  const auto call = make_call(problem, plan);
  const Workspace& workspace = plan.workspace;
  const int64_t blocks = problem.num_sequences * problem.kv_heads * plan.segments;
  const int64_t tokens = problem.batch * problem.seqlen, shared_bytes = plan.shared_memory_bytes;
  Launches launches(stream);
  add_preparation<E>(call, &launches);
  if (A* const delta = call.template region<A>(workspace.delta)) {
    launches.add(row_deltas<E>, divide_up(tokens * problem.heads, rows_per_block), row_threads, 0, problem.y,
                 problem.grad_y, static_cast<const A*>(problem.r), delta, tokens * problem.heads,
                 problem.heads, problem.seqlen, static_cast<int>(problem.head_dim),
                 static_cast<int>(problem.head_dim));
  }
  if (problem.part == BackwardPart::reverse_state) {
    add_segment_states<E, true>(call, ConstState{}, shared_bytes, &launches);
    launches.add(general_whole_state<E, true, BackwardProblem>, blocks, plan.tiles.threads, shared_bytes,
                 call);
    return launches.error();
  }
  if (problem.wants_keys()) {
    add_segment_states<E, true>(call, problem.grad_final_state, shared_bytes, &launches);
    launches.add(general_grad_kv<E>, blocks, plan.tiles.threads, shared_bytes, call);
  }
  if (problem.wants_queries()) {
    add_segment_states<E, false>(call, problem.initial_state, shared_bytes, &launches);
    launches.add(general_grad_q<E>, blocks, plan.tiles.threads, shared_bytes, call);
  }

  add_token_norm_backward<E>(call, &launches);
  add_affine_sums<A>(call, call.segments, &launches);
  return *launches.error() ? launches.error() : launch_fill<E>(problem, plan, stream);
}

}  // namespace rebased::REBASED_BACKEND
