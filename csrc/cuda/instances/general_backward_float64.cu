#include "cuda/general_launch.cuh"

namespace rebased::REBASED_BACKEND {
template const char* launch_general<double>(const BackwardProblem&, const Plan&, void*);
}
