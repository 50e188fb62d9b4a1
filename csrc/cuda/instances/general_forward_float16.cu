#include "cuda/general/launch.cuh"

namespace rebased::REBASED_BACKEND {
template const char* launch_general<half_t>(const ForwardProblem&, const Plan&, void*);
template const char* launch_preparation<half_t>(const ForwardProblem&, const Plan&, void*);
template const char* launch_fill<half_t>(const ForwardProblem&, const Plan&, void*);
}  // namespace rebased::REBASED_BACKEND
