// The tensor-core forward's way from a problem to the instance of its type and map.
#include "cuda/tensor_core_launch.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

#define DECLARE(map)                                                                                        \
  extern template const char* launch_forward<bfloat16_t, map>(const ForwardProblem&, const Launch&, void*); \
  extern template const char* launch_forward<half_t, map>(const ForwardProblem&, const Launch&, void*);
DECLARE(FeatureMap::outer)
DECLARE(FeatureMap::square)
DECLARE(FeatureMap::taylor)
DECLARE(FeatureMap::elu)
#undef DECLARE

const char* forward(const ForwardProblem& problem, const Launch& launch, void* stream) {
  return with_map(problem.feature_map, [&](auto map) {
    return problem.dtype == Dtype::bfloat16 ? launch_forward<bfloat16_t, map>(problem, launch, stream)
                                            : launch_forward<half_t, map>(problem, launch, stream);
  });
}

int64_t workspace_bytes(const ForwardProblem& problem, int segments) {
  if (segments == 1 && !problem.initial_state.kv) return 0;
  return slot_count(problem, segments) * slot_bytes(problem.feature_map);
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
