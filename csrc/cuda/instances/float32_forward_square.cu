#include "cuda/float32/launch.cuh"

namespace rebased::REBASED_BACKEND {
template const char* launch_float32<FeatureMap::square>(const ForwardProblem&, const Plan&, void*);
}  // namespace rebased::REBASED_BACKEND
