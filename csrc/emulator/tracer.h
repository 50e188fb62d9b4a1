// The access tracer counts, while a kernel runs, what each of its lines costs in wavefronts of shared memory
// and in bytes and sectors of global memory. The drivers in csrc/tests call these functions. Only trace
// builds (REBASED_EMULATOR_TRACE) count; in other builds the functions do nothing.
//
// The kernels are compiled with -fsanitize=thread, which calls a hook for every access, and the tracer
// supplies the hooks. All lanes' k-th accesses by one instruction, counted since the warp's lanes last met at
// a barrier or a collective, are one access of the warp:
//   shared  Wavefronts. Lanes are served 32, 16 or 8 at a time, for accesses of up to 4, 8 or 16 bytes. One
//           matrix of ldmatrix is 8 rows of 16 bytes. Each time takes as many wavefronts as the most wanted
//           of the 32 banks has different words to give, ideally one.
//   global  Bytes that the lanes ask for, and sectors of 32 bytes, ideally no more sectors than the bytes
//           need. Caches are not modelled: what two warps read counts twice. Only named buffers are counted.
// copy_async counts as a global read of source_bytes and as a shared write, at the line that starts it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>

namespace rebased::emulator {

#if defined(REBASED_EMULATOR_TRACE)

// Gives global memory that later launches access a name. Buffers of the same name share their counts.
void trace_buffer(const char* name, const void* begin, size_t bytes);
// Forgets all buffers and counts.
void trace_reset();
// Write the counts, as one JSON object {"kernels": [{"name", "launches", "lines": [...]}], "buffers": [...]}
// or as tables.
void trace_write_json(FILE* file);
void trace_write_text(FILE* file);

#else

inline void trace_buffer(const char*, const void*, size_t) {}
inline void trace_reset() {}
inline void trace_write_json(FILE*) {}
inline void trace_write_text(FILE*) {}

#endif

}  // namespace rebased::emulator
