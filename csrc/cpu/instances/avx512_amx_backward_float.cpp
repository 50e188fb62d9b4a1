// Called with bfloat16 inputs, a polynomial map and values in whole panels only.
#define REBASED_ISA avx512_amx
#define REBASED_VECTOR_BYTES 64
#include "cpu/chunked/amx_backward.h"
#include "cpu/drive_backward.h"
#include "cpu/instruction_set.h"

int64_t rebased::cpu::avx512_amx::backward_float(const BackwardProblem& problem, int threads,
                                                 const Parallel* parallel) {
  return run_backward_as<float, AmxBackwardSweeps>(problem, threads, parallel);
}
