// What a plan's workspace holds, and where.
#include <algorithm>

#include "cuda/plan/parts.h"
#include "cuda/plan/tensor_core_shape.h"

namespace rebased {
namespace {

void add_region(bool needed, Region* region, int64_t bytes, Plan* plan, bool kept = false) {
  if (!needed) return;
  int64_t& end = kept ? plan->kept_bytes : plan->workspace.bytes;
  *region = {end, bytes, kept};
  end += round_up(bytes, 64);
}

}  // namespace

void add_preparation_regions(const Problem& problem, Sweep sweep, Plan* plan) {
  Workspace& workspace = plan->workspace;
  const bool token_norm = problem.layer_norm == LayerNorm::token, kept = sweep.keeps_statistics();
  const int64_t statistics = problem.batch * problem.seqlen * 2 * accumulator_size(problem.dtype);
  add_region(problem.cu_seqlens != nullptr, &workspace.bounds, (problem.num_sequences + 1) * 8, plan);
  add_region(token_norm, &workspace.query_statistics, statistics, plan, kept);
  add_region(token_norm, &workspace.key_statistics, statistics, plan, kept);
}

void add_state_regions(const Problem& problem, Sweep sweep, int64_t slot_bytes, bool states,
                       bool reverse_states, bool keepable, Plan* plan) {
  const int64_t bytes = problem.num_sequences * problem.kv_heads * plan->segments * slot_bytes;
  const bool kept = sweep.backward ? plan->kept_bytes + round_up(bytes, 64) == sweep.kept_bytes
                                   : sweep.keep == Keep::states;
  add_region(states && sweep.has_states(), &plan->workspace.states, bytes, plan, keepable && kept);
  add_region(reverse_states && sweep.has_reverse_states(), &plan->workspace.reverse_states, bytes, plan);
}

void add_gradient_regions(const Problem& problem, Sweep sweep, bool delta_of_groups, Plan* plan) {
  Workspace& workspace = plan->workspace;
  const int64_t accumulator = accumulator_size(problem.dtype), tokens = problem.batch * problem.seqlen;
  const int64_t groups = plan->column_groups;
  // kernels with a delta of their own group read one even where rows are not normalised, and those of
  // polynomial/ for the gradient of a state too
  const bool for_state = tensor_core::polynomial_kernels(problem.feature_map, problem.feature_dim);
  add_region(delta_of_groups ? sweep.queries || sweep.keys || for_state : problem.normalize, &workspace.delta,
             (delta_of_groups ? groups : 1) * tokens * problem.heads * accumulator, plan);

  const bool unfinished = groups > 1 || problem.layer_norm == LayerNorm::token;
  const int64_t gradient = groups * tokens * problem.feature_dim * accumulator;
  add_region(unfinished && sweep.queries, &workspace.query_gradient, gradient * problem.heads, plan);
  add_region(unfinished && sweep.keys, &workspace.key_gradient, gradient * problem.kv_heads, plan);

  const auto has_affine = [](const Affine& parameters) { return parameters.gamma || parameters.beta; };
  const int64_t affine =
      problem.num_sequences * plan->segments * groups * 2 * problem.feature_dim * accumulator;
  add_region(sweep.queries && has_affine(problem.query_affine), &workspace.query_affine,
             affine * problem.heads, plan);
  add_region(sweep.keys && has_affine(problem.key_affine), &workspace.key_affine, affine * problem.kv_heads,
             plan);
}

void add_initial_sums_region(const BackwardProblem& problem, Plan* plan) {
  add_region(problem.grad_initial_state.kv && plan->column_groups > 1, &plan->workspace.initial_sums,
             plan->column_groups * problem.num_sequences * problem.kv_heads * features_of(problem) *
                 accumulator_size(problem.dtype),
             plan);
}

void add_carries(const Problem& problem, int64_t size, Plan* plan) {
  const int64_t forced = plan_override().compensated_rows;
  const int64_t least = std::max<int64_t>(forced ? forced : compensated_rows, plan->tiles.chunk);
  while (int64_t{1} << plan->carry_rows_log2 < least) ++plan->carry_rows_log2;
  const int64_t chunks = divide_up(problem.seqlen, plan->tiles.chunk);
  const int64_t longest = divide_up(chunks, plan->segments) * plan->tiles.chunk;
  const bool needed = accumulator_size(problem.dtype) == 4 && problem.num_sequences > 0 &&
                      longest > int64_t{1} << plan->carry_rows_log2;
  const bool packed = problem.cu_seqlens != nullptr;
  const int64_t sequences =
      carry_slot(packed, problem.seqlen, problem.num_sequences - 1, plan->carry_rows_log2) + 1;
  plan->carry_size = needed ? round_up(size, 4) : 0;
  add_region(needed, &plan->workspace.carries,
             sequences * problem.kv_heads * plan->segments * plan->column_groups * plan->carry_size * 4,
             plan);
}

}  // namespace rebased
