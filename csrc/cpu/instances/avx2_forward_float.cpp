#define REBASED_ISA avx2
#define REBASED_VECTOR_BYTES 32
#include "cpu/drive_forward.h"
#include "cpu/instruction_set.h"

int64_t rebased::cpu::avx2::forward_float(const ForwardProblem& problem, int threads,
                                          const Parallel* parallel) {
  return run_forward<float>(problem, threads, parallel);
}
