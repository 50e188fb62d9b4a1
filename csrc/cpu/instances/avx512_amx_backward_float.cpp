// dispatch.cpp calls it with bfloat16 inputs, a polynomial map and values in whole panels, no other problem.
#define REBASED_ISA avx512_amx
#define REBASED_VECTOR_BYTES 64
#include "cpu/chunked/amx.h"
#include "cpu/drive_backward.h"
#include "cpu/instruction_set.h"

int64_t rebased::cpu::avx512_amx::backward_float(const BackwardProblem& problem, int threads,
                                                 const Parallel* parallel) {
  return run_backward_as<float, BackwardSweeps<float, AmxBackwardProducts>>(problem, threads, parallel);
}
