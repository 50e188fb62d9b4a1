#include "cuda/tensor_core/family/launch.cuh"

namespace rebased::REBASED_BACKEND {
template Family<ForwardProblem> tensor_core_family<FeatureMap::identity, 16>(const ForwardProblem&);
}  // namespace rebased::REBASED_BACKEND
