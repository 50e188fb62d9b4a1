#include "cuda/float32/launch.cuh"

namespace rebased::REBASED_BACKEND {
template Family<BackwardProblem> float32_family<FeatureMap::elu>(const BackwardProblem&);
}  // namespace rebased::REBASED_BACKEND
