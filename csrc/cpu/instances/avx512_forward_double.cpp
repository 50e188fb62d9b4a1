#define REBASED_ISA avx512
#define REBASED_VECTOR_BYTES 64
#include "cpu/drive_forward.h"
#include "cpu/instruction_set.h"

int64_t rebased::cpu::avx512::forward_double(const ForwardProblem& problem, int threads,
                                             const Parallel* parallel) {
  return run_forward<double>(problem, threads, parallel);
}
