#define REBASED_ISA avx512
#define REBASED_VECTOR_BYTES 64
#include "cpu/drive_step.h"
#include "cpu/instruction_set.h"

int64_t rebased::cpu::avx512::step_double(const StepProblem& problem, int threads, const Parallel* parallel) {
  return run_step<double>(problem, threads, parallel);
}
