#include "cuda/tensor_core/family/backward.cuh"

namespace rebased::REBASED_BACKEND {
template Family<BackwardProblem> tensor_core_family<FeatureMap::identity, 16>(const BackwardProblem&);
}  // namespace rebased::REBASED_BACKEND
