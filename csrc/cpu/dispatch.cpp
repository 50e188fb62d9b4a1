// The backend's entry points: they choose the instruction set of this process and the accumulation type of
// the problem. It is compiled without an instruction set's flags and includes no kernel.
#include <cstdlib>
#include <cstring>
#if defined(__linux__) && defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/instruction_set.h"
#include "op/feature_map.h"

namespace rebased::cpu {
namespace {

enum class InstructionSet { portable, avx2, avx512, avx512_bf16, avx512_amx };

const char* name(InstructionSet set) {
  static const char* const names[] = {"portable", "avx2", "avx512", "avx512_bf16", "avx512_amx"};
  return names[static_cast<int>(set)];
}

#if defined(__x86_64__)
// Whether this process may use the AMX tiles. Linux hands out their large state on request only, and signal
// stacks must then have room for it, so it is the first call with AMX that asks, not the import.
bool amx_is_granted() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  return granted;
#else
  return false;
#endif
}

InstructionSet avx512_products() {
  if (!__builtin_cpu_supports("avx512bf16")) return InstructionSet::avx512;
#if defined(__linux__)
  unsigned a, b, c, d = 0;  // compilers learned the names of these features late
  constexpr unsigned amx_bf16 = 1u << 22, amx_tile = 1u << 24;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & amx_bf16) && (d & amx_tile))
    return InstructionSet::avx512_amx;
#endif
  return InstructionSet::avx512_bf16;
}
#endif

// The best instruction set of this processor, or the one that the environment variable REBASED_CPU_ISA names,
// if the processor has it.
InstructionSet detect() {
  InstructionSet best = InstructionSet::portable;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = InstructionSet::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
      best = avx512_products();
  }
#endif
  if (const char* wanted = std::getenv("REBASED_CPU_ISA")) {
    for (int i = 0; i <= static_cast<int>(best); i++)
      if (!std::strcmp(wanted, name(static_cast<InstructionSet>(i)))) return static_cast<InstructionSet>(i);
  }
#if defined(__x86_64__)
  // Intel's vdpbf16ps takes a pair at half the rate of two multiply-adds, so float32 is faster there without
  // AMX.
  if (best == InstructionSet::avx512_bf16 && __builtin_cpu_is("intel")) return InstructionSet::avx512;
#endif
  return best;
}

InstructionSet chosen() {
  static const InstructionSet set = detect();
  return set;
}

#if defined(__x86_64__)
// The instruction set of a problem's products. Those of bfloat16 operands are made for bfloat16 inputs of the
// polynomial maps: the elementwise maps run a recurrence in float32. AMX takes values that fill whole panels
// of 32 columns.
InstructionSet products(const Problem& problem) {
  if (problem.dtype != Dtype::bfloat16 || !is_polynomial(problem.feature_map)) return InstructionSet::avx512;
  if (chosen() != InstructionSet::avx512_amx) return chosen();
  const bool whole_panels = (problem.head_dim + 15) / 16 % 2 == 0;
  return whole_panels && amx_is_granted() ? InstructionSet::avx512_amx : InstructionSet::avx512;
}

#define REBASED_DISPATCH(kernel)                                                                        \
  const bool wide = problem.dtype == Dtype::float64;                                                    \
  const InstructionSet set = chosen();                                                                  \
  auto* run = set >= InstructionSet::avx512 ? (wide ? avx512::kernel##_double : avx512::kernel##_float) \
              : set == InstructionSet::avx2 ? (wide ? avx2::kernel##_double : avx2::kernel##_float)     \
                                            : (wide ? portable::kernel##_double : portable::kernel##_float);
#define REBASED_DISPATCH_BF16(kernel)                                                      \
  if (products(problem) == InstructionSet::avx512_bf16) run = avx512_bf16::kernel##_float; \
  if (products(problem) == InstructionSet::avx512_amx) run = avx512_amx::kernel##_float;
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
