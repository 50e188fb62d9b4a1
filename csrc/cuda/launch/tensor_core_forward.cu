// The tensor-core forward's way from a problem to the instance of its map.
#include "cuda/tensor_core/launch.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

#define DECLARE(map, dim)                                                                        \
  extern template const char* launch_forward<bfloat16_t, Slabs<map, dim>>(const ForwardProblem&, \
                                                                          const Launch&, void*);
DECLARE(FeatureMap::outer, 8)
DECLARE(FeatureMap::outer, 16)
DECLARE(FeatureMap::outer, 32)
DECLARE(FeatureMap::square, 16)
DECLARE(FeatureMap::taylor, 16)
DECLARE(FeatureMap::elu, 16)
#undef DECLARE

const char* forward(const ForwardProblem& problem, const Launch& launch, void* stream) {
  return with_slabs(problem, [&](auto slabs) {
    return launch_forward<bfloat16_t, decltype(slabs)>(problem, launch, stream);
  });
}

int64_t workspace_bytes(const ForwardProblem& problem, int segments) {
  if (segments == 1 && !problem.initial_state.kv && !problem.state_only) return 0;
  return slot_count(problem, segments) * slot_floats(problem) * static_cast<int64_t>(sizeof(float));
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
