#define REBASED_ISA avx2
#define REBASED_VECTOR_BYTES 32
#include "cpu/drive_backward.h"
#include "cpu/instruction_set.h"

int64_t rebased::cpu::avx2::backward_double(const BackwardProblem& problem, int threads,
                                            const Parallel* parallel) {
  return run_backward<double>(problem, threads, parallel);
}
