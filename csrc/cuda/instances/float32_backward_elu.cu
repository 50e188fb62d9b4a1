#include "cuda/float32/backward_launch.cuh"

namespace rebased::REBASED_BACKEND {
template const char* launch_float32<FeatureMap::elu>(const BackwardProblem&, const Plan&, void*);
}  // namespace rebased::REBASED_BACKEND
