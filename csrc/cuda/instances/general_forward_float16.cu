#include "cuda/general/launch.cuh"

namespace rebased::REBASED_BACKEND {
template Family<ForwardProblem> general_family<half_t>(const ForwardProblem&);
}  // namespace rebased::REBASED_BACKEND
