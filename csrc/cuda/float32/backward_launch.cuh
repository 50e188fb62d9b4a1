// Queues the float32 path's backward kernels for one feature map; see launch.cuh.
#pragma once

#include "cuda/float32/backward.cuh"
#include "cuda/float32/launch.cuh"
#include "cuda/shared/delta.cuh"
#include "cuda/shared/token_norm.cuh"

namespace rebased::REBASED_BACKEND {

namespace float32_path {

// Fills the slots with T and M after each segment.
template <FeatureMap map>
void add_reverse_states(const Call<BackwardProblem>& call, Launches* launches) {
  if (call.segments == 1) return;
  launches->add(reverse_segment_states<map>, sweep_grid(call), threads,
                StateTiles<BackwardShape>(map, call.problem.group_size()).size * int64_t{4}, call);
  const int64_t states = call.problem.num_sequences * call.problem.kv_heads;
  launches->add(scan_states<float, true, BackwardProblem>,
                divide_up(states * call.tiles.slot_size(), scan_threads), scan_threads, 0, call,
                call.problem.grad_final_state);
}

}  // namespace float32_path

template <FeatureMap map>
const char* launch_float32(const BackwardProblem& problem, const Plan& plan, void* stream) {
  using namespace float32_path;
  const auto call = make_call(problem, plan);
  const Workspace& workspace = plan.workspace;
  const auto bytes = [&](bool reverse) {
    return BackwardTiles(map, reverse, problem.group_size()).size * int64_t{4};
  };
  Launches launches(stream);
  if (float* const delta = call.template region<float>(workspace.delta)) {
    const int64_t rows = problem.batch * problem.seqlen * problem.heads;
    launches.add(row_deltas<float>, divide_up(rows, rows_per_block), row_threads, 0, problem.y,
                 problem.grad_y, static_cast<const float*>(problem.r), delta, rows, problem.heads,
                 problem.seqlen, static_cast<int>(problem.head_dim), static_cast<int>(problem.head_dim));
  }
  add_reverse_states<map>(call, &launches);
  launches.add(grad_kv_kernel<map>, sweep_grid(call), threads, bytes(true), call);
  add_states<map, BackwardShape>(call, &launches);
  launches.add(grad_q_kernel<map>, sweep_grid(call), threads, bytes(false), call);
  const auto* const bounds = call.template region<const int64_t>(workspace.bounds);
  add_finish<float>(problem, call.template region<float>(workspace.query_gradient), problem.q,
                    problem.query_affine, problem.grad_q, problem.heads, bounds, &launches);
  add_finish<float>(problem, call.template region<float>(workspace.key_gradient), problem.k,
                    problem.key_affine, problem.grad_k, problem.kv_heads, bounds, &launches);
  if (problem.layer_norm == LayerNorm::token) add_token_norm_backward<float>(call, &launches);
  // column groups have sums of their own, as segments have
  add_affine_sums<float>(call, call.segments * column_groups(problem), &launches);
  return launches.error();
}

}  // namespace rebased::REBASED_BACKEND
