#define REBASED_ISA portable
#define REBASED_VECTOR_BYTES 16
#include "cpu/drive_forward.h"
#include "cpu/instruction_set.h"

int64_t rebased::cpu::portable::forward_double(const ForwardProblem& problem, int threads,
                                               const Parallel* parallel) {
  return run_forward<double>(problem, threads, parallel);
}
