// The entry points that the translation units of each instruction set define, which dispatch.cpp chooses
// from. It includes op/ alone and has declarations only, since it is compiled with every set of flags.
#pragma once

#include "op/backend.h"

#define REBASED_DECLARE_ENTRIES(isa)                                                 \
  namespace rebased::cpu::isa {                                                      \
  /* parallel null: the workspace's bytes for `threads`; else runs, and returns 0 */ \
  int64_t forward_float(const ForwardProblem&, int threads, const Parallel*);        \
  int64_t forward_double(const ForwardProblem&, int threads, const Parallel*);       \
  int64_t backward_float(const BackwardProblem&, int threads, const Parallel*);      \
  int64_t backward_double(const BackwardProblem&, int threads, const Parallel*);     \
  int64_t step_float(const StepProblem&, int threads, const Parallel*);              \
  int64_t step_double(const StepProblem&, int threads, const Parallel*);             \
  }

REBASED_DECLARE_ENTRIES(portable)
#if defined(__x86_64__)
REBASED_DECLARE_ENTRIES(avx2)
REBASED_DECLARE_ENTRIES(avx512)
REBASED_DECLARE_ENTRIES(avx512_bf16)  // this one and the next define forward_float and backward_float
REBASED_DECLARE_ENTRIES(avx512_amx)
#endif
#undef REBASED_DECLARE_ENTRIES
