#include "cuda/general/launch.cuh"

namespace rebased::REBASED_BACKEND {
template const char* launch_general<double>(const ForwardProblem&, const Plan&, void*);
template const char* launch_preparation<double>(const ForwardProblem&, const Plan&, void*);
template const char* launch_fill<double>(const ForwardProblem&, const Plan&, void*);
}  // namespace rebased::REBASED_BACKEND
