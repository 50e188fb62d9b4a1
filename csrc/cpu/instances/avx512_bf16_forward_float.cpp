// dispatch.cpp calls it with bfloat16 inputs and a polynomial map, no other problem.
#define REBASED_ISA avx512_bf16
#define REBASED_VECTOR_BYTES 64
#include "cpu/chunked/bf16.h"
#include "cpu/drive_forward.h"
#include "cpu/instruction_set.h"

int64_t rebased::cpu::avx512_bf16::forward_float(const ForwardProblem& problem, int threads,
                                                 const Parallel* parallel) {
  return run_forward_as<float, ForwardSweep<float, Bf16ForwardProducts>>(problem, threads, parallel);
}
