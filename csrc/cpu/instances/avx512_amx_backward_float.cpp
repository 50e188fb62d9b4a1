// Called with bfloat16 inputs and values in whole panels only; of the elementwise maps `square`, with
// features that fit in a vector.
#define REBASED_ISA avx512_amx
#define REBASED_VECTOR_BYTES 64
#include "cpu/chunked/amx_backward.h"
#include "cpu/drive_backward.h"
#include "cpu/instruction_set.h"
#include "cpu/recurrent/amx_backward.h"

int64_t rebased::cpu::avx512_amx::backward_float(const BackwardProblem& problem, int threads,
                                                 const Parallel* parallel) {
  return is_elementwise(problem) ? run_backward_as<float, AmxElementwiseBackward>(problem, threads, parallel)
                                 : run_backward_as<float, AmxBackwardSweeps>(problem, threads, parallel);
}
