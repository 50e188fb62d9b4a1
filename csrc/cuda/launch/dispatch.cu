// Which kernels a call runs: those of the plan's family for the call's map and feature dim, in the sequence
// of its element type.
#include "cuda/launch/dispatch.h"
#include "op/backend.h"

namespace rebased::REBASED_BACKEND {
namespace {

// visit(E()) with the element type of `dtype`.
template <class Visitor>
auto visit_element(Dtype dtype, const Visitor& visit) {
  switch (dtype) {
    case Dtype::float32:
      return visit(float());
    case Dtype::float64:
      return visit(double());
    case Dtype::float16:
      return visit(half_t());
    default:
      return visit(bfloat16_t());
  }
}

// What the plan's path takes has seen to it that there are kernels for the problem.
template <class AnyProblem>
Family<AnyProblem> family_of(const AnyProblem& problem, Path path) {
  const bool tensor_cores = path == Path::tensor_core;
  if (!tensor_cores && path != Path::float32) {
    return visit_element(problem.dtype,
                         [&](auto element) { return general_family<decltype(element)>(problem); });
  }
  if (tensor_cores && problem.feature_dim == 8) return tensor_core_family<FeatureMap::outer, 8>(problem);
  if (tensor_cores && problem.feature_dim == 32) return tensor_core_family<FeatureMap::outer, 32>(problem);
  switch (problem.feature_map) {
    case FeatureMap::outer:
      return tensor_cores ? tensor_core_family<FeatureMap::outer, 16>(problem)
                          : float32_family<FeatureMap::outer>(problem);
    case FeatureMap::square:
      return tensor_cores ? tensor_core_family<FeatureMap::square, 16>(problem)
                          : float32_family<FeatureMap::square>(problem);
    case FeatureMap::taylor:
      return tensor_cores ? tensor_core_family<FeatureMap::taylor, 16>(problem)
                          : float32_family<FeatureMap::taylor>(problem);
    case FeatureMap::identity:  // of the two on tensor cores alone
      return tensor_core_family<FeatureMap::identity, 16>(problem);
    default:
      return tensor_cores ? tensor_core_family<FeatureMap::elu, 16>(problem)
                          : float32_family<FeatureMap::elu>(problem);
  }
}

template <class AnyProblem>
const char* run_sweep(const AnyProblem& problem, const Plan& plan, void* stream) {
  if (*plan.error) return plan.error;
  const Family<AnyProblem> family = family_of(problem, plan.path);
  return visit_element(problem.dtype, [&](auto element) {
    return run_sequence<decltype(element)>(problem, plan, family, stream);
  });
}

}  // namespace

const char* query_device(int index, Device* device) {
  DeviceAttributes attributes{};
  const char* const error = device_attributes(index, &attributes);
  *device = {attributes.multiprocessors, attributes.compute_capability, attributes.shared_memory_per_block};
  return error;
}

const char* run(const ForwardProblem& problem, const Plan& plan, void* stream) {
  return run_sweep(problem, plan, stream);
}
const char* run(const BackwardProblem& problem, const Plan& plan, void* stream) {
  return run_sweep(problem, plan, stream);
}
const char* run(const StepProblem& problem, const Plan& plan, void* stream) {
  return visit_element(problem.dtype,
                       [&](auto element) { return launch_step<decltype(element)>(problem, plan, stream); });
}

}  // namespace rebased::REBASED_BACKEND
