// The order in which a call's kernels are launched, for every family of kernels: what all families share,
// which is launched here, and between it the family's own kernels. Host code; the plan has decided what there
// is to do, and a launch whose region of the workspace the plan left out is left out too.
#pragma once

#include "cuda/launch/dispatch.h"
#include "cuda/shared/affine.cuh"
#include "cuda/shared/bounds.cuh"
#include "cuda/shared/column_groups.cuh"
#include "cuda/shared/delta.cuh"
#include "cuda/shared/token_norm.cuh"

namespace rebased::REBASED_BACKEND {

// A warp per token, of queries and keys or of one of them.
inline Grid token_grid(const Problem& problem, int parts) {
  return Grid(divide_up(problem.batch * problem.seqlen, rows_per_block), parts);
}

// Clamped bounds of packed sequences, and the statistics of "token" LayerNorm, which backward may be given as
// forward has kept them.
template <class E, class AnyProblem>
void add_preparation(const Call<AnyProblem>& call, Launches* launches) {
  constexpr bool given = std::is_same_v<AnyProblem, BackwardProblem>;
  const AnyProblem& problem = call.problem;
  const int64_t tokens = problem.batch * problem.seqlen;
  const int dim = static_cast<int>(problem.feature_dim);
  Parts<TokenRows<E>> parts;
  int64_t blocks = 0;
  const auto add = [&](const Region& statistics, const ConstRows& x, int64_t heads) {
    if (statistics.bytes == 0 || (given && statistics.kept)) return;
    const TokenRows<E> rows(x, static_cast<int>(heads), dim,
                            call.template region<Accumulator<E>>(statistics));
    parts.add(rows);
    blocks = maximum(blocks, rows.blocks(tokens));
  };
  add(call.workspace.query_statistics, problem.q, problem.heads);
  add(call.workspace.key_statistics, problem.k, problem.kv_heads);
  launches->add(token_statistics<E>, Grid(blocks, parts.count), row_threads, 0, parts, tokens, problem.seqlen,
                dim, problem.layer_norm_eps);
  if (int64_t* const bounds = call.template region<int64_t>(call.workspace.bounds)) {
    launches->add(clamp_bounds<bounds_threads>, 1, bounds_threads, 0, problem.cu_seqlens,
                  problem.num_sequences + 1, problem.seqlen, bounds);
  }
}

// delta of all rows; Family<BackwardProblem> says which delta.
template <class E>
void add_deltas(const Call<BackwardProblem>& call, bool of_groups, int64_t groups, Launches* launches) {
  using A = Accumulator<E>;
  const BackwardProblem& problem = call.problem;
  A* const delta = call.template region<A>(call.workspace.delta);
  if (!delta) return;
  const int64_t rows = problem.batch * problem.heads * problem.seqlen;
  const int head_dim = static_cast<int>(problem.head_dim);
  launches->add(row_deltas<E>, Grid(divide_up(rows, rows_per_block), of_groups ? groups : 1), row_threads, 0,
                problem.y, problem.grad_y, of_groups ? nullptr : static_cast<const A*>(problem.r), delta,
                rows, problem.heads, problem.seqlen, of_groups ? fixed_shape::columns : head_dim,
                problem.normalize ? head_dim : 0);  // without the division delta is a sum of nothing
}

// What the column groups have of the gradient of q or of k, summed.
template <class E>
void add_finish(const Call<BackwardProblem>& call, int64_t groups, const Region& gradient, const ConstRows& x,
                const Affine& affine, const MutableRows& grad_x, int64_t heads, Launches* launches) {
  if (gradient.bytes == 0 || groups == 1) return;
  const BackwardProblem& problem = call.problem;
  const int dim = static_cast<int>(problem.feature_dim);
  const int64_t head_blocks = divide_up(problem.seqlen, finish_threads / dim);
  launches->add(finish_gradients<E>, problem.batch * heads * head_blocks, finish_threads, 0,
                call.template region<Accumulator<E>>(gradient), static_cast<int>(groups), x, affine, grad_x,
                static_cast<unsigned>(head_blocks), static_cast<unsigned>(heads), problem.seqlen, dim,
                problem.layer_norm, problem.layer_norm_eps,
                call.template region<const int64_t>(call.workspace.bounds), problem.num_sequences);
}

// From the gradients of q' and k' before "token" LayerNorm to grad q and grad k.
template <class E>
void add_token_norm_backward(const Call<BackwardProblem>& call, Launches* launches) {
  using A = Accumulator<E>;
  const BackwardProblem& problem = call.problem;
  const Workspace& workspace = call.workspace;
  if (problem.layer_norm != LayerNorm::token) return;
  Parts<TokenGradient<E>> parts;
  const auto add = [&](const Region& gradient, const Region& statistics, const ConstRows& x,
                       const Affine& affine, const MutableRows& grad_x, int64_t heads) {
    if (gradient.bytes == 0) return;
    parts.add({x, affine, call.template region<const A>(statistics), call.template region<const A>(gradient),
               grad_x, static_cast<int>(heads)});
  };
  add(workspace.query_gradient, workspace.query_statistics, problem.q, problem.query_affine, problem.grad_q,
      problem.heads);
  add(workspace.key_gradient, workspace.key_statistics, problem.k, problem.key_affine, problem.grad_k,
      problem.kv_heads);
  launches->add(token_norm_backward<E>, token_grid(problem, parts.count), row_threads, 0, parts,
                problem.batch * problem.seqlen, problem.seqlen, static_cast<int>(problem.feature_dim),
                call.template region<const int64_t>(workspace.bounds), problem.num_sequences);
}

// grad gamma and grad beta, where wanted, from the sums of the `blocks` blocks of each sequence and head.
template <class A>
void add_affine_sums(const Call<BackwardProblem>& call, int64_t blocks, Launches* launches) {
  const BackwardProblem& problem = call.problem;
  Parts<AffineSums<A>> parts;
  int64_t target_heads = 1;
  const auto add = [&](const Region& partials, int64_t heads, const Affine& affine,
                       const AffineGradient& gradient) {
    if (!gradient.gamma && !gradient.beta) return;
    parts.add({call.template region<const A>(partials),
               heads,
               blocks,
               {static_cast<A*>(gradient.gamma), static_cast<A*>(gradient.beta)},
               {affine.gamma_head_stride, affine.beta_head_stride}});
    if (affine.gamma_head_stride || affine.beta_head_stride) target_heads = maximum(target_heads, heads);
  };
  add(call.workspace.query_affine, problem.heads, problem.query_affine, problem.grad_query_affine);
  add(call.workspace.key_affine, problem.kv_heads, problem.key_affine, problem.grad_key_affine);
  launches->add(sum_affine_gradients<A>, Grid(target_heads, parts.count, 2), affine_threads, 0, parts,
                problem.num_sequences, static_cast<int>(problem.feature_dim));
}

// What the column groups have of the gradient of the initial state's sums.
template <class A>
void add_initial_sums(const Call<BackwardProblem>& call, int64_t groups, Launches* launches) {
  const BackwardProblem& problem = call.problem;
  const A* const partial = call.template region<const A>(call.workspace.initial_sums);
  if (!partial) return;
  const int64_t count =
      problem.num_sequences * problem.kv_heads * num_features(problem.feature_map, problem.feature_dim);
  launches->add(sum_groups<A>, divide_up(count, finish_threads), finish_threads, 0, partial,
                static_cast<int>(groups), count, static_cast<A*>(problem.grad_initial_state.k));
}

// Rows of no sequence = value.
template <class T, class AnyProblem>
void add_fill(const Call<AnyProblem>& call, const MutableRows& rows, int64_t heads, int64_t width, T value,
              Launches* launches) {
  const int64_t* const bounds = call.template region<int64_t>(call.workspace.bounds);
  if (!rows.data || !bounds) return;
  launches->add(fill_rows_of_no_sequence<T>, heads * fill_blocks, bounds_threads, 0, rows,
                static_cast<int>(width), value, bounds, call.problem.num_sequences, call.problem.seqlen);
}

template <class E>
const char* run_sequence(const ForwardProblem& problem, const Plan& plan,
                         const Family<ForwardProblem>& family, void* stream) {
  const auto call = make_call(problem, plan);
  Launches launches(stream);
  add_preparation<E>(call, &launches);
  if (problem.state_only) {
    family.whole_state(call, &launches);
    return launches.error();
  }
  family.states(call, &launches);
  family.sweep(call, &launches);
  add_fill(call, problem.y, problem.heads, problem.head_dim, E{}, &launches);
  add_fill(call, MutableRows{problem.r, 0, problem.seqlen, 1}, problem.heads, 1, Accumulator<E>(1),
           &launches);
  return launches.error();
}

template <class E>
const char* run_sequence(const BackwardProblem& problem, const Plan& plan,
                         const Family<BackwardProblem>& family, void* stream) {
  using A = Accumulator<E>;
  const auto call = make_call(problem, plan);
  const Workspace& workspace = plan.workspace;
  const int64_t groups = plan.column_groups;
  Launches launches(stream);
  add_preparation<E>(call, &launches);
  const bool keys_leave = family.deltas == Deltas::from_grad_kv,
             queries_leave = family.deltas == Deltas::from_grad_q;
  if (!(keys_leave && problem.wants_keys()) && !(queries_leave && problem.wants_queries())) {
    add_deltas<E>(call, keys_leave || queries_leave, groups, &launches);
  }
  if (problem.part == BackwardPart::reverse_state) {
    family.whole_state(call, &launches);
    return launches.error();
  }
  const auto add_queries = [&] {
    if (!problem.wants_queries()) return;
    if (!workspace.states.kept) family.states(call, &launches);
    family.grad_q(call, &launches);
  };
  if (queries_leave) add_queries();
  if (problem.wants_keys()) {
    family.reverse_states(call, &launches);
    family.grad_kv(call, &launches);
  }
  if (!queries_leave) add_queries();
  add_finish<E>(call, groups, workspace.query_gradient, problem.q, problem.query_affine, problem.grad_q,
                problem.heads, &launches);
  add_finish<E>(call, groups, workspace.key_gradient, problem.k, problem.key_affine, problem.grad_k,
                problem.kv_heads, &launches);
  add_token_norm_backward<E>(call, &launches);
  add_affine_sums<A>(call, plan.segments * groups, &launches);
  add_initial_sums<A>(call, groups, &launches);
  add_fill(call, problem.grad_q, problem.heads, problem.feature_dim, E{}, &launches);
  add_fill(call, problem.grad_k, problem.kv_heads, problem.feature_dim, E{}, &launches);
  add_fill(call, problem.grad_v, problem.kv_heads, problem.head_dim, E{}, &launches);
  return launches.error();
}

}  // namespace rebased::REBASED_BACKEND
