// The tensor-core backward's way from a problem to the instance of its type and map.
#include "cuda/tensor_core_backward.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

#define DECLARE(map, dim)                                                                          \
  extern template const char* launch_backward<bfloat16_t, Slabs<map, dim>>(const BackwardProblem&, \
                                                                           const Launch&, void*);  \
  extern template const char* launch_backward<half_t, Slabs<map, dim>>(const BackwardProblem&,     \
                                                                       const Launch&, void*);
DECLARE(FeatureMap::outer, 8)
DECLARE(FeatureMap::outer, 16)
DECLARE(FeatureMap::outer, 32)
DECLARE(FeatureMap::square, 16)
DECLARE(FeatureMap::taylor, 16)
DECLARE(FeatureMap::elu, 16)
#undef DECLARE

const char* backward(const BackwardProblem& problem, const Launch& launch, void* stream) {
  return with_slabs(problem, [&](auto slabs) {
    using S = decltype(slabs);
    return problem.dtype == Dtype::bfloat16 ? launch_backward<bfloat16_t, S>(problem, launch, stream)
                                            : launch_backward<half_t, S>(problem, launch, stream);
  });
}

int64_t workspace_bytes(const BackwardProblem& problem, int segments) {
  return backward_workspace(problem, segments, nullptr).bytes;
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
