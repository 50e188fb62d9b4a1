// The launchers that dispatch.cu chooses from: one explicit instantiation per element type in instances/.
// Each queues all kernels of a call on the stream and returns an error text, empty when all went well.
#pragma once

#include "cuda/device/device.cuh"
#include "cuda/plan/plan.h"
#include "op/problem.h"

namespace rebased::REBASED_BACKEND {

template <class E>
const char* launch_general(const ForwardProblem&, const Plan&, void* stream);
template <class E>
const char* launch_general(const BackwardProblem&, const Plan&, void* stream);
template <class E>
const char* launch_step(const StepProblem&, const Plan&, void* stream);

// The float32 path's own kernels; launch_preparation goes before them and launch_fill after.
template <FeatureMap map>
const char* launch_float32(const ForwardProblem&, const Plan&, void* stream);
template <FeatureMap map>
const char* launch_float32(const BackwardProblem&, const Plan&, void* stream);

// What other paths share with the general one, both from the plan's workspace: clamped bounds and the
// statistics of "token" LayerNorm before the main kernels, and rows of no sequence after them.
template <class E>
const char* launch_preparation(const ForwardProblem&, const Plan&, void* stream);
template <class E>
const char* launch_preparation(const BackwardProblem&, const Plan&, void* stream);
template <class E>
const char* launch_fill(const ForwardProblem&, const Plan&, void* stream);
template <class E>
const char* launch_fill(const BackwardProblem&, const Plan&, void* stream);

}  // namespace rebased::REBASED_BACKEND
