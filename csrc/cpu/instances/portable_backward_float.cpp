#define REBASED_ISA portable
#define REBASED_VECTOR_BYTES 16
#include "cpu/drive_backward.h"
#include "cpu/instruction_set.h"

int64_t rebased::cpu::portable::backward_float(const BackwardProblem& problem, int threads,
                                               const Parallel* parallel) {
  return run_backward<float>(problem, threads, parallel);
}
