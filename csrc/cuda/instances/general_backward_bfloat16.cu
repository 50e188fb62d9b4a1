#include "cuda/general/launch.cuh"

namespace rebased::REBASED_BACKEND {
template const char* launch_general<bfloat16_t>(const BackwardProblem&, const Plan&, void*);
template const char* launch_preparation<bfloat16_t>(const BackwardProblem&, const Plan&, void*);
template const char* launch_fill<bfloat16_t>(const BackwardProblem&, const Plan&, void*);
}  // namespace rebased::REBASED_BACKEND
