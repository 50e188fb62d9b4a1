#include "cuda/general/launch.cuh"

namespace rebased::REBASED_BACKEND {
template const char* launch_general<double>(const BackwardProblem&, const Plan&, void*);
}
