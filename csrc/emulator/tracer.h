// The access tracer: what every line of a kernel costs in shared-memory wavefronts and in global memory,
// counted while the kernel runs. Only in trace builds (REBASED_EMULATOR_TRACE); in others these functions do
// nothing.
//
// The kernels are compiled with -fsanitize=thread, which calls a hook for every access; the tracer supplies
// the hooks. The k-th access of each lane of a warp by one instruction, since the warp's lanes last met at a
// barrier or collective, counts as one access of the warp:
//   shared  wavefronts: lanes are served 32, 16 or 8 at a time (accesses of up to 4, 8 or 16 bytes; one
//   matrix of
//           ldmatrix is 8 rows of 16 bytes), each time as often as the most wanted of the 32 banks has
//           different words to give; ideally once
//   global  bytes that the lanes ask for, and 32-byte sectors; ideally no more than the bytes need. Caches
//   are
//           not modelled: what two warps read is counted twice. Only named buffers are counted.
// copy_async counts as a global read (of source_bytes) and a shared write, where it is started.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>

namespace rebased::emulator {

#if defined(REBASED_EMULATOR_TRACE)

// Names global memory that later launches access; names may repeat, and then share their counts.
void trace_buffer(const char* name, const void* begin, size_t bytes);
// Forgets all buffers and counts.
void trace_reset();
// One JSON object {"kernels": [{"name", "launches", "lines": [...]}], "buffers": [...]}, or the same as
// tables.
void trace_write_json(FILE* file);
void trace_write_text(FILE* file);

#else

inline void trace_buffer(const char*, const void*, size_t) {}
inline void trace_reset() {}
inline void trace_write_json(FILE*) {}
inline void trace_write_text(FILE*) {}

#endif

}  // namespace rebased::emulator
