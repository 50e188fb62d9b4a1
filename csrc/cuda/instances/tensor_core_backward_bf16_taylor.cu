#include "cuda/tensor_core/backward.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {
template const char* launch_backward<bfloat16_t, Slabs<FeatureMap::taylor, 16>>(const BackwardProblem&,
                                                                                const Launch&, void*);
}  // namespace rebased::REBASED_BACKEND::tensor_core
