#include "cuda/float32/launch.cuh"

namespace rebased::REBASED_BACKEND {
template Family<ForwardProblem> float32_family<FeatureMap::outer>(const ForwardProblem&);
}  // namespace rebased::REBASED_BACKEND
