// Called with bfloat16 inputs and values in whole panels only; of the elementwise maps `square`, with
// features that fit in a vector.
#define REBASED_ISA avx512_amx
#define REBASED_VECTOR_BYTES 64
#include "cpu/chunked/amx_forward.h"
#include "cpu/drive_forward.h"
#include "cpu/instruction_set.h"
#include "cpu/recurrent/amx_forward.h"

int64_t rebased::cpu::avx512_amx::forward_float(const ForwardProblem& problem, int threads,
                                                const Parallel* parallel) {
  return is_elementwise(problem) ? run_forward_as<float, AmxElementwiseForward>(problem, threads, parallel)
                                 : run_forward_as<float, AmxForwardSweep>(problem, threads, parallel);
}
