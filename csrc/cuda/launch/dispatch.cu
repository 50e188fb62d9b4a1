// Which kernels a call runs: the plan's path, then the element type.
#include <type_traits>

#include "cuda/launch/dispatch.h"
#include "cuda/tensor_core/interface.h"
#include "op/backend.h"

namespace rebased::REBASED_BACKEND {
namespace {

// visit(E()) with the element type of `dtype`.
template <class Visitor>
const char* visit_element(Dtype dtype, const Visitor& visit) {
  switch (dtype) {
    case Dtype::float32:
      return visit(float());
    case Dtype::float64:
      return visit(double());
    case Dtype::float16:
      return visit(half_t());
    case Dtype::bfloat16:
      return visit(bfloat16_t());
  }
  return "unknown dtype";
}

// visit(std::integral_constant<FeatureMap, map>()) with the problem's map.
template <class Visitor>
const char* visit_map(FeatureMap map, const Visitor& visit) {
  switch (map) {
    case FeatureMap::outer:
      return visit(std::integral_constant<FeatureMap, FeatureMap::outer>());
    case FeatureMap::square:
      return visit(std::integral_constant<FeatureMap, FeatureMap::square>());
    case FeatureMap::taylor:
      return visit(std::integral_constant<FeatureMap, FeatureMap::taylor>());
    case FeatureMap::elu:
      return visit(std::integral_constant<FeatureMap, FeatureMap::elu>());
    case FeatureMap::identity:
      break;  // left to the general kernels
  }
  return "unknown feature map";
}

Plan plan(const ForwardProblem& problem, const Device& device) { return plan_forward(problem, device); }
Plan plan(const BackwardProblem& problem, const Device& device) { return plan_backward(problem, device); }

// bfloat16: the tensor-core kernels between what they share with the general path.
template <class AnyProblem>
const char* launch_tensor_core(const AnyProblem& problem, const Plan& plan, void* stream) {
  const char* error = launch_preparation<bfloat16_t>(problem, plan, stream);
  if (*error) return error;
  char* const workspace = static_cast<char*>(problem.workspace);
  const auto region = [&](const Region& where) { return where.bytes ? workspace + where.offset : nullptr; };
  tensor_core::Launch launch;
  launch.segments = plan.segments;
  launch.bounds = reinterpret_cast<const int64_t*>(region(plan.workspace.bounds));
  launch.query_statistics = reinterpret_cast<const float*>(region(plan.workspace.query_statistics));
  launch.key_statistics = reinterpret_cast<const float*>(region(plan.workspace.key_statistics));
  launch.workspace = workspace + plan.workspace.bytes;
  bool only_state;  // then there are no rows to fill
  if constexpr (std::is_same_v<AnyProblem, ForwardProblem>) {
    only_state = problem.state_only;
    error = tensor_core::forward(problem, launch, stream);
  } else {
    only_state = problem.part == BackwardPart::reverse_state;
    error = tensor_core::backward(problem, launch, stream);
  }
  return *error || only_state ? error : launch_fill<bfloat16_t>(problem, plan, stream);
}

template <class AnyProblem>
const char* launch_float32_path(const AnyProblem& problem, const Plan& plan, void* stream) {
  const char* error = launch_preparation<float>(problem, plan, stream);
  if (*error) return error;
  error =
      visit_map(problem.feature_map, [&](auto map) { return launch_float32<map>(problem, plan, stream); });
  return *error ? error : launch_fill<float>(problem, plan, stream);
}

template <class AnyProblem>
int64_t planned_bytes(const AnyProblem& problem, const Device& device) {
  const Plan chosen = plan(problem, device);
  const bool has_more = chosen.path == Path::tensor_core && !*chosen.error;
  return chosen.workspace.bytes + (has_more ? tensor_core::workspace_bytes(problem, chosen.segments) : 0);
}

template <class AnyProblem>
const char* run_plan(const AnyProblem& problem, const Device& device, void* stream) {
  const Plan chosen = plan(problem, device);
  if (*chosen.error) return chosen.error;
  const char* const error = set_device(device.index);
  if (*error) return error;
  if (chosen.path == Path::tensor_core) return launch_tensor_core(problem, chosen, stream);
  if (chosen.path == Path::float32) return launch_float32_path(problem, chosen, stream);
  return visit_element(problem.dtype, [&](auto element) {
    return launch_general<decltype(element)>(problem, chosen, stream);
  });
}

}  // namespace

const char* query_device(int index, Device* device) {
  DeviceAttributes attributes;
  const char* const error = device_attributes(index, &attributes);
  if (*error) return error;
  *device = {index, attributes.multiprocessors, attributes.compute_capability,
             attributes.shared_memory_per_block};
  return "";
}

int64_t workspace_bytes(const ForwardProblem& problem, const Device& device) {
  return planned_bytes(problem, device);
}
int64_t workspace_bytes(const BackwardProblem& problem, const Device& device) {
  return planned_bytes(problem, device);
}
int64_t workspace_bytes(const StepProblem& problem, const Device& device) {
  return plan_step(problem, device).workspace.bytes;
}

const char* forward(const ForwardProblem& problem, const Device& device, void* stream) {
  return run_plan(problem, device, stream);
}
const char* backward(const BackwardProblem& problem, const Device& device, void* stream) {
  return run_plan(problem, device, stream);
}
const char* step(const StepProblem& problem, const Device& device, void* stream) {
  const char* const error = set_device(device.index);
  if (*error) return error;
  return visit_element(problem.dtype, [&](auto element) {
    return launch_step<decltype(element)>(problem, plan_step(problem, device), stream);
  });
}

}  // namespace rebased::REBASED_BACKEND
