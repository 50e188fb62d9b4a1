// The tensor-core backward's way from a problem to the instance of its map.
#include "cuda/tensor_core/backward.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

#define DECLARE(map, dim)                                                                          \
  extern template const char* launch_backward<bfloat16_t, Slabs<map, dim>>(const BackwardProblem&, \
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
    return launch_backward<bfloat16_t, decltype(slabs)>(problem, launch, stream);
  });
}

int64_t workspace_bytes(const BackwardProblem& problem, int segments) {
  return backward_workspace(problem, segments, nullptr).bytes;
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
