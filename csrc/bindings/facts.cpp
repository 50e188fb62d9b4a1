// The table of facts about the build, the limits of devices, and the count of a plan's launches.
#include "bindings/facts.h"

#if defined(REBASED_EMULATOR)
#include "emulator/runtime.h"
#endif

namespace rebased {
namespace {

#if defined(REBASED_EMULATOR)
template <class AnyProblem>
int count(AnyProblem problem, const Plan& plan) {
  alignas(64) static char present[64];
  problem.workspace = present;
  const emulator::LaunchCounter counter;
  return *emulated::run(problem, plan, nullptr) ? 0 : counter.count();
}
#else
template <class AnyProblem>
int count(const AnyProblem&, const Plan&) {
  return -1;
}
#endif

}  // namespace

std::vector<Fact> build_facts() {
#if defined(REBASED_CUDA)
  const char *const cuda = "yes", *const version = REBASED_CUDA_VERSION,
                    *const architectures = REBASED_CUDA_ARCHITECTURES;
#else
  const char *const cuda = "", *const version = "", *const architectures = "";
#endif
#if defined(REBASED_EMULATOR)
  const char* const emulator = "yes";
#else
  const char* const emulator = "";
#endif
  return {
      {"cuda", cuda, true},
      {"cuda_version", version, false},
      {"cuda_architectures", architectures, false},
      {"emulator", emulator, true},
      {"torch_version", REBASED_TORCH_VERSION, false},  // built against; any torch from 2.11 on will do
      {"compiler", REBASED_COMPILER, false},
      {"cpu_instruction_set", cpu::instruction_set(), false},
  };
}

int count_launches(ForwardProblem problem, const Plan& plan) { return count(problem, plan); }
int count_launches(BackwardProblem problem, const Plan& plan) { return count(problem, plan); }
int count_launches(StepProblem problem, const Plan& plan) { return count(problem, plan); }

const char* query_limits([[maybe_unused]] int index, [[maybe_unused]] Device* device) {
#if defined(REBASED_CUDA)
  if (index >= 0) return cuda::query_device(index, device);
#endif
#if defined(REBASED_EMULATOR)
  if (index < 0) return emulated::query_device(0, device);
#endif
  return "this build has no kernels for this device";
}

}  // namespace rebased
