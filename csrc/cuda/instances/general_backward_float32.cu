#include "cuda/general/launch.cuh"

namespace rebased::REBASED_BACKEND {
template const char* launch_general<float>(const BackwardProblem&, const Plan&, void*);
template const char* launch_preparation<float>(const BackwardProblem&, const Plan&, void*);
template const char* launch_fill<float>(const BackwardProblem&, const Plan&, void*);
}  // namespace rebased::REBASED_BACKEND
