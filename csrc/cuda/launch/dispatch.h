// What dispatch.cu chooses from: each is instantiated in a file of its own in instances/. Launchers queue all
// kernels of a call on the stream and return an error text, empty when all went well.
#pragma once

#include "cuda/shared/family.cuh"

namespace rebased::REBASED_BACKEND {

// All launches of a call with data in E, by the kernels of a family.
template <class E>
const char* run_sequence(const ForwardProblem&, const Plan&, const Family<ForwardProblem>&, void* stream);
template <class E>
const char* run_sequence(const BackwardProblem&, const Plan&, const Family<BackwardProblem>&, void* stream);

template <class E>
const char* launch_step(const StepProblem&, const Plan&, void* stream);

// The families; the argument only tells the direction.
template <class E>
Family<ForwardProblem> general_family(const ForwardProblem&);
template <class E>
Family<BackwardProblem> general_family(const BackwardProblem&);
template <FeatureMap map>
Family<ForwardProblem> float32_family(const ForwardProblem&);
template <FeatureMap map>
Family<BackwardProblem> float32_family(const BackwardProblem&);
template <FeatureMap map, int feature_dim>
Family<ForwardProblem> tensor_core_family(const ForwardProblem&);
template <FeatureMap map, int feature_dim>
Family<BackwardProblem> tensor_core_family(const BackwardProblem&);

}  // namespace rebased::REBASED_BACKEND
