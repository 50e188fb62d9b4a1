// The tensor-core backward's way from a problem to the instance of its type and map.
#include "cuda/tensor_core_backward.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

#define DECLARE(map)                                                                                  \
  extern template const char* launch_backward<bfloat16_t, map>(const BackwardProblem&, const Launch&, \
                                                               void*);                                \
  extern template const char* launch_backward<half_t, map>(const BackwardProblem&, const Launch&, void*);
DECLARE(FeatureMap::outer)
DECLARE(FeatureMap::square)
DECLARE(FeatureMap::taylor)
DECLARE(FeatureMap::elu)
#undef DECLARE

const char* backward(const BackwardProblem& problem, const Launch& launch, void* stream) {
  return with_map(problem.feature_map, [&](auto map) {
    return problem.dtype == Dtype::bfloat16 ? launch_backward<bfloat16_t, map>(problem, launch, stream)
                                            : launch_backward<half_t, map>(problem, launch, stream);
  });
}

int64_t workspace_bytes(const BackwardProblem& problem, int segments) {
  return backward_workspace(problem, segments, nullptr).bytes;
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
