// Queues the general path's kernels: which ones a call needs, in which order, on which grids. Host code.
#pragma once

#include "cuda/dispatch.h"
#include "cuda/general_backward.cuh"
#include "cuda/general_forward.cuh"
#include "cuda/general_states.cuh"
#include "cuda/layer_norm.cuh"
#include "cuda/scan.cuh"

namespace rebased::REBASED_BACKEND {

// A chain of launches that stops at the first error.
class Launches {
 public:
  explicit Launches(void* stream) : stream_(stream) {}

  template <class... Parameters, class... Arguments>
  void add(void (*kernel)(Parameters...), int64_t blocks, int threads, int64_t shared_bytes,
           const Arguments&... arguments) {
    if (*error_ || blocks == 0) return;
    if (blocks > INT32_MAX) {
      error_ = "more blocks than a grid can have";
      return;
    }
    add(kernel, dim3(static_cast<unsigned>(blocks)), threads, shared_bytes, arguments...);
  }
  template <class... Parameters, class... Arguments>
  void add(void (*kernel)(Parameters...), dim3 grid, int threads, int64_t shared_bytes,
           const Arguments&... arguments) {
    if (*error_) return;
    error_ = LAUNCH(kernel, grid, dim3(static_cast<unsigned>(threads)), static_cast<size_t>(shared_bytes),
                    stream_, arguments...);
  }
  const char* error() const { return error_; }

 private:
  void* stream_;
  const char* error_ = "";
};

inline int64_t divide_up(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

template <class E, class AnyProblem>
void add_preparation(const Call<AnyProblem>& call, Launches* launches) {
  using A = Accumulator<E>;
  const AnyProblem& problem = call.problem;
  const int64_t tokens = problem.batch * problem.seqlen;
  if (A* const statistics = call.template region<A>(call.workspace.query_statistics)) {
    launches->add(token_statistics<E>, divide_up(tokens, rows_per_block), row_threads, 0, problem.q,
                  problem.heads, tokens, problem.seqlen, problem.feature_dim, problem.layer_norm_eps,
                  statistics);
  }
  if (A* const statistics = call.template region<A>(call.workspace.key_statistics)) {
    launches->add(token_statistics<E>, divide_up(tokens, rows_per_block), row_threads, 0, problem.k,
                  problem.kv_heads, tokens, problem.seqlen, problem.feature_dim, problem.layer_norm_eps,
                  statistics);
  }
  if (int64_t* const bounds = call.template region<int64_t>(call.workspace.bounds)) {
    launches->add(clamp_bounds<scan_threads>, 1, scan_threads, 0, problem.cu_seqlens,
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
    launches->add(fill_rows_of_no_sequence<T>, heads * fill_blocks, scan_threads, 0, rows, width, value,
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

template <class E, class A>
void add_affine_sums(const Call<BackwardProblem>& call, const Region& region, int64_t heads,
                     const Affine& affine, const AffineGradient& gradient, Launches* launches) {
  const BackwardProblem& problem = call.problem;
  const A* const partials = call.template region<const A>(region);
  const auto add = [&](int which, const void* parameter, int64_t head_stride, void* target) {
    if (!parameter || !target) return;
    launches->add(sum_affine_gradients<A>, head_stride ? heads : 1, affine_threads, 0, partials,
                  problem.num_sequences, heads, call.segments, problem.feature_dim, which, head_stride,
                  static_cast<A*>(target));
  };
  add(0, affine.gamma, affine.gamma_head_stride, gradient.gamma);
  add(1, affine.beta, affine.beta_head_stride, gradient.beta);
}

template <class E>
const char* launch_general(const BackwardProblem& problem, const Plan& plan, void* stream) {
  using A = Accumulator<E>;
  const auto call = make_call(problem, plan);
  const Workspace& workspace = plan.workspace;
  const int64_t blocks = problem.num_sequences * problem.kv_heads * plan.segments;
  const int64_t tokens = problem.batch * problem.seqlen, shared_bytes = plan.shared_memory_bytes;
  const int64_t* const bounds = call.template region<const int64_t>(workspace.bounds);
  Launches launches(stream);
  add_preparation<E>(call, &launches);
  if (A* const delta = call.template region<A>(workspace.delta)) {
    launches.add(row_deltas<E>, divide_up(tokens * problem.heads, rows_per_block), row_threads, 0, problem.y,
                 problem.grad_y, static_cast<const A*>(problem.r), delta, tokens * problem.heads,
                 problem.heads, problem.seqlen, problem.head_dim);
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

  const int64_t token_blocks = divide_up(tokens, rows_per_block);
  if (const A* const gradient = call.template region<const A>(workspace.query_gradient)) {
    launches.add(token_norm_backward<E>, token_blocks, row_threads, 0, problem.q, problem.query_affine,
                 call.template region<const A>(workspace.query_statistics), gradient, problem.grad_q,
                 problem.heads, tokens, problem.seqlen, problem.feature_dim, bounds, problem.num_sequences);
  }
  if (const A* const gradient = call.template region<const A>(workspace.key_gradient)) {
    launches.add(token_norm_backward<E>, token_blocks, row_threads, 0, problem.k, problem.key_affine,
                 call.template region<const A>(workspace.key_statistics), gradient, problem.grad_k,
                 problem.kv_heads, tokens, problem.seqlen, problem.feature_dim, bounds,
                 problem.num_sequences);
  }
  add_affine_sums<E, A>(call, workspace.query_affine, problem.heads, problem.query_affine,
                        problem.grad_query_affine, &launches);
  add_affine_sums<E, A>(call, workspace.key_affine, problem.kv_heads, problem.key_affine,
                        problem.grad_key_affine, &launches);
  return *launches.error() ? launches.error() : launch_fill<E>(problem, plan, stream);
}

}  // namespace rebased::REBASED_BACKEND
