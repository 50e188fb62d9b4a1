// Which kernels a call takes.
#include "cuda/plan/plan.h"

#include <algorithm>

#include "cuda/plan/parts.h"

namespace rebased {
namespace {

PlanOverride active_override;

Device as_overridden(Device device) {
  if (active_override.multiprocessors) device.multiprocessors = active_override.multiprocessors;
  if (active_override.shared_memory_per_block) {
    device.shared_memory_per_block = active_override.shared_memory_per_block;
  }
  return device;
}

bool stateless(const ForwardProblem& problem) {
  return !problem.initial_state.kv && !problem.initial_state.k && !problem.final_state.kv &&
         !problem.final_state.k;
}
bool stateless(const BackwardProblem& problem) {
  return !problem.initial_state.kv && !problem.initial_state.k && !problem.grad_final_state.kv &&
         !problem.grad_final_state.k && !problem.grad_initial_state.kv && !problem.grad_initial_state.k;
}

// Whether scores of all pairs cost fewer operations than a state: per row and with n rows on average,
//   forward   n (d + dv)       against C (d + dv) + 4 F dv
//   backward  n (3 d + 2 dv)   against C (3 d + 2 dv) + 10 F dv
// `slowness`: the time of an operation without a state, in those of one with.
bool quadratic_is_cheaper(const Problem& problem, bool backward, int slowness) {
  constexpr int64_t chunk = 32;
  const int64_t d = problem.feature_dim, dv = problem.head_dim;
  const int64_t pair = backward ? 3 * d + 2 * dv : d + dv;
  return (mean_rows(problem) - chunk) * pair * slowness < (backward ? 10 : 4) * features_of(problem) * dv;
}

template <class AnyProblem>
Plan plan_sweep(const AnyProblem& problem, const Device& device) {
  const Sweep sweep = sweep_of(problem);
  const Plan tensor_core = plan_tensor_core(problem, device), float32 = plan_float32(problem, device);
  const bool has_tensor_core = !*tensor_core.error;
  const bool has_float32 = !*float32.error;
  const int slowness = has_float32 ? 2 : 1;  // by instructions and loads: 4 x 4 tiles against 8 x 8
  Path path = has_tensor_core ? Path::tensor_core
              : stateless(problem) && quadratic_is_cheaper(problem, sweep.backward, slowness)
                  ? Path::quadratic
              : has_float32 ? Path::float32
                            : Path::general;
  if (plan_override().force_path) path = plan_override().path;
  Plan plan = path == Path::tensor_core ? tensor_core
              : path == Path::float32   ? float32
                                        : plan_general(problem, device, sweep, path == Path::quadratic);
  if (path == Path::quadratic && !stateless(problem)) plan.error = not_taken;
  return plan;
}

}  // namespace

void set_plan_override(const PlanOverride& forced) { active_override = forced; }
const PlanOverride& plan_override() { return active_override; }

Plan make_plan(const ForwardProblem& problem, const Device& device) {
  return record(problem, plan_sweep(problem, as_overridden(device)));
}
Plan make_plan(const BackwardProblem& problem, const Device& device) {
  return record(problem, plan_sweep(problem, as_overridden(device)));
}

Plan make_plan(const StepProblem& problem, const Device&) {
  Plan plan;
  StepTiles& step = plan.step;
  const int64_t features = features_of(problem), quads = divide_up(problem.head_dim, 4);
  const int64_t bytes = accumulator_size(problem.dtype);
  step.group = problem.kv_heads ? static_cast<int>(problem.group_size()) : 1;
  step.heads_at_once = std::clamp(step.group, 1, 4);
  const int heads = step.heads_at_once;
  // What a thread does before it meets the state costs as much as several quads. Larger states fill a
  // multiprocessor's shared memory with five blocks: 153 features of 64 floats are held at once.
  step.threads = features * quads <= 8 * 64 ? 64 : 128;
  step.lanes = quads ? step.threads / static_cast<int>(quads) : 0;
  const int64_t most = (41 << 10) / ((4 * quads + 2 + heads) * bytes);
  step.features_at_once = static_cast<int>(std::min(round_up(features, 4), most / 4 * 4));
  step.state = 0;
  step.state_sums = step.state + step.features_at_once * static_cast<int>(4 * quads);
  step.features = step.state_sums + step.features_at_once;
  step.vectors = step.features + (1 + heads) * step.features_at_once;
  step.sums = step.vectors + static_cast<int>(round_up((1 + heads) * problem.feature_dim, 4));
  step.denominators = step.sums + heads * step.threads * 4;
  step.scores = step.denominators + heads * step.threads / 32;
  step.size = step.scores + heads;
  plan.shared_memory_bytes = step.size * bytes;
  return record(problem, plan);
}

}  // namespace rebased
