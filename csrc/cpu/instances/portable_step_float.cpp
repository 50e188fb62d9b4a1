#define REBASED_ISA portable
#define REBASED_VECTOR_BYTES 16
#include "cpu/drive_step.h"
#include "cpu/instruction_set.h"

int64_t rebased::cpu::portable::step_float(const StepProblem& problem, int threads,
                                           const Parallel* parallel) {
  return run_step<float>(problem, threads, parallel);
}
