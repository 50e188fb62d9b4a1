// The backend's entry points: the instruction set of this process and the accumulation type of the problem.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "cpu/instruction_set.h"

namespace rebased::cpu {
namespace {

enum class InstructionSet { portable, avx2, avx512, avx512_bf16 };

const char* name(InstructionSet set) {
  static const char* const names[] = {"portable", "avx2", "avx512", "avx512_bf16"};
  return names[static_cast<int>(set)];
}

// What the processor has, lowered (never raised) by the environment variable REBASED_CPU_ISA.
InstructionSet detect() {
  InstructionSet best = InstructionSet::portable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = InstructionSet::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      best = __builtin_cpu_supports("avx512bf16") ? InstructionSet::avx512_bf16 : InstructionSet::avx512;
  }
#endif
  if (const char* wanted = std::getenv("REBASED_CPU_ISA")) {
    for (InstructionSet set : {InstructionSet::portable, InstructionSet::avx2, InstructionSet::avx512})
      if (!std::strcmp(wanted, name(set)) && set < best) return set;
  }
  return best;
}

InstructionSet chosen() {
  static const InstructionSet set = detect();
  return set;
}

// bfloat16 products: where phi is elementwise no product is large enough for them, a step is one token.
[[maybe_unused]] bool takes_bf16_products(const Problem& problem) {
  return chosen() == InstructionSet::avx512_bf16 && problem.dtype == Dtype::bfloat16 &&
         (problem.feature_map == FeatureMap::outer || problem.feature_map == FeatureMap::taylor);
}

#if defined(__x86_64__)
#define REBASED_DISPATCH(kernel)                                                                        \
  const bool wide = problem.dtype == Dtype::float64;                                                    \
  const InstructionSet set = chosen();                                                                  \
  auto* run = set >= InstructionSet::avx512 ? (wide ? avx512::kernel##_double : avx512::kernel##_float) \
              : set == InstructionSet::avx2 ? (wide ? avx2::kernel##_double : avx2::kernel##_float)     \
                                            : (wide ? portable::kernel##_double : portable::kernel##_float);
#define REBASED_DISPATCH_BF16(kernel) \
  if (takes_bf16_products(problem)) run = avx512_bf16::kernel##_float;
#else
#define REBASED_DISPATCH(kernel) \
  auto* run = problem.dtype == Dtype::float64 ? portable::kernel##_double : portable::kernel##_float;
#define REBASED_DISPATCH_BF16(kernel)
#endif

}  // namespace

const char* instruction_set() { return name(chosen()); }

int64_t workspace_bytes(const ForwardProblem& problem, int threads) {
  REBASED_DISPATCH(forward)
  REBASED_DISPATCH_BF16(forward)
  return run(problem, threads, nullptr);
}
int64_t workspace_bytes(const BackwardProblem& problem, int threads) {
  REBASED_DISPATCH(backward)
  REBASED_DISPATCH_BF16(backward)
  return run(problem, threads, nullptr);
}
int64_t workspace_bytes(const StepProblem& problem, int threads) {
  REBASED_DISPATCH(step)
  return run(problem, threads, nullptr);
}

void forward(const ForwardProblem& problem, const Parallel& parallel) {
  REBASED_DISPATCH(forward)
  REBASED_DISPATCH_BF16(forward)
  run(problem, parallel.threads, &parallel);
}
void backward(const BackwardProblem& problem, const Parallel& parallel) {
  REBASED_DISPATCH(backward)
  REBASED_DISPATCH_BF16(backward)
  run(problem, parallel.threads, &parallel);
}
void step(const StepProblem& problem, const Parallel& parallel) {
  REBASED_DISPATCH(step)
  run(problem, parallel.threads, &parallel);
}

}  // namespace rebased::cpu
