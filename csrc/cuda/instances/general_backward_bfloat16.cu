#include "cuda/general_launch.cuh"

namespace rebased::REBASED_BACKEND {
template const char* launch_general<bfloat16_t>(const BackwardProblem&, const Plan&, void*);
}
