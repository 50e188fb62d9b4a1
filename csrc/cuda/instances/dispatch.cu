// Which kernels a call runs: the plan's path, then the element type.
#include "cuda/dispatch.h"
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

template <class AnyProblem>
const char* run_plan(const AnyProblem& problem, const Plan& plan, const Device& device, void* stream) {
  if (*plan.error) return plan.error;
  const char* const error = set_device(device.index);
  if (*error) return error;
  return visit_element(
      problem.dtype, [&](auto element) { return launch_general<decltype(element)>(problem, plan, stream); });
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
  return plan_forward(problem, device).workspace.bytes;
}
int64_t workspace_bytes(const BackwardProblem& problem, const Device& device) {
  return plan_backward(problem, device).workspace.bytes;
}
int64_t workspace_bytes(const StepProblem& problem, const Device& device) {
  return plan_step(problem, device).workspace.bytes;
}

const char* forward(const ForwardProblem& problem, const Device& device, void* stream) {
  return run_plan(problem, plan_forward(problem, device), device, stream);
}
const char* backward(const BackwardProblem& problem, const Device& device, void* stream) {
  return run_plan(problem, plan_backward(problem, device), device, stream);
}
const char* step(const StepProblem& problem, const Device& device, void* stream) {
  const char* const error = set_device(device.index);
  if (*error) return error;
  return visit_element(problem.dtype, [&](auto element) {
    return launch_step<decltype(element)>(problem, plan_step(problem, device), stream);
  });
}

}  // namespace rebased::REBASED_BACKEND
