#include "cuda/tensor_core/launch.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {
template const char* launch_forward<bfloat16_t, Slabs<FeatureMap::outer, 16>>(const ForwardProblem&,
                                                                              const Launch&, void*);
}  // namespace rebased::REBASED_BACKEND::tensor_core
