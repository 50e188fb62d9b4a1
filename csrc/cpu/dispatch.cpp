// The backend's entry points: the instruction set of this process and the accumulation type of the problem.
#include <cstdlib>
#include <cstring>

#include "cpu/instruction_set.h"

namespace rebased::cpu {
namespace {

enum class InstructionSet { portable, avx2, avx512 };

// What the processor has, lowered (never raised) by the environment variable REBASED_CPU_ISA.
InstructionSet detect() {
  InstructionSet best = InstructionSet::portable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = InstructionSet::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      best = InstructionSet::avx512;
  }
#endif
  if (const char* wanted = std::getenv("REBASED_CPU_ISA")) {
    if (!std::strcmp(wanted, "portable")) return InstructionSet::portable;
    if (!std::strcmp(wanted, "avx2") && best == InstructionSet::avx512) return InstructionSet::avx2;
  }
  return best;
}

InstructionSet chosen() {
  static const InstructionSet set = detect();
  return set;
}

#if defined(__x86_64__)
#define REBASED_DISPATCH(kernel)                                                                             \
  const bool wide = problem.dtype == Dtype::float64;                                                         \
  const InstructionSet set = chosen();                                                                       \
  const auto run = set == InstructionSet::avx512 ? (wide ? avx512::kernel##_double : avx512::kernel##_float) \
                   : set == InstructionSet::avx2                                                             \
                       ? (wide ? avx2::kernel##_double : avx2::kernel##_float)                               \
                       : (wide ? portable::kernel##_double : portable::kernel##_float);
#else
#define REBASED_DISPATCH(kernel) \
  const auto run = problem.dtype == Dtype::float64 ? portable::kernel##_double : portable::kernel##_float;
#endif

}  // namespace

const char* instruction_set() {
  const InstructionSet set = chosen();
  return set == InstructionSet::avx512 ? "avx512" : set == InstructionSet::avx2 ? "avx2" : "portable";
}

int64_t workspace_bytes(const ForwardProblem& problem, int threads) {
  REBASED_DISPATCH(forward)
  return run(problem, threads, nullptr);
}
int64_t workspace_bytes(const BackwardProblem& problem, int threads) {
  REBASED_DISPATCH(backward)
  return run(problem, threads, nullptr);
}
int64_t workspace_bytes(const StepProblem& problem, int threads) {
  REBASED_DISPATCH(step)
  return run(problem, threads, nullptr);
}

void forward(const ForwardProblem& problem, const Parallel& parallel) {
  REBASED_DISPATCH(forward)
  run(problem, parallel.threads, &parallel);
}
void backward(const BackwardProblem& problem, const Parallel& parallel) {
  REBASED_DISPATCH(backward)
  run(problem, parallel.threads, &parallel);
}
void step(const StepProblem& problem, const Parallel& parallel) {
  REBASED_DISPATCH(step)
  run(problem, parallel.threads, &parallel);
}

}  // namespace rebased::cpu
