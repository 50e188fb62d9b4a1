#define REBASED_ISA avx512
#define REBASED_VECTOR_BYTES 64
#include "cpu/drive_backward.h"
#include "cpu/instruction_set.h"

int64_t rebased::cpu::avx512::backward_float(const BackwardProblem& problem, int threads,
                                             const Parallel* parallel) {
  return run_backward<float>(problem, threads, parallel);
}
