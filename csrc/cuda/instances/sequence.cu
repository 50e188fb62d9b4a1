#include "cuda/launch/sequence.cuh"

namespace rebased::REBASED_BACKEND {

#define INSTANCE(E, AnyProblem) \
  template const char* run_sequence<E>(const AnyProblem&, const Plan&, const Family<AnyProblem>&, void*);
INSTANCE(float, ForwardProblem)
INSTANCE(float, BackwardProblem)
INSTANCE(double, ForwardProblem)
INSTANCE(double, BackwardProblem)
INSTANCE(half_t, ForwardProblem)
INSTANCE(half_t, BackwardProblem)
INSTANCE(bfloat16_t, ForwardProblem)
INSTANCE(bfloat16_t, BackwardProblem)

}  // namespace rebased::REBASED_BACKEND
