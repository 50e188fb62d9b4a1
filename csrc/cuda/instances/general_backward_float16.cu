#include "cuda/general/launch.cuh"

namespace rebased::REBASED_BACKEND {
template Family<BackwardProblem> general_family<half_t>(const BackwardProblem&);
}  // namespace rebased::REBASED_BACKEND
