#include "cuda/decode/step.cuh"

namespace rebased::REBASED_BACKEND {
template const char* launch_step<float>(const StepProblem&, const Plan&, void*);
}
