// The counts of the access tracer (tracer.h): tracer.cpp fills these structs, tracer_report.cpp prints them.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <tuple>
#include <vector>

namespace rebased::emulator {

// The accesses of one instruction to one memory in one direction. copy_async counts as two instructions.
struct AccessKind {
  const void* pc;
  bool shared, write;
  bool operator<(const AccessKind& other) const {
    return std::tie(pc, shared, write) < std::tie(other.pc, other.shared, other.write);
  }
};

struct AccessCounts {
  uint64_t warp_accesses = 0;
  uint64_t wavefronts = 0, ideal_wavefronts = 0;       // of shared memory
  uint64_t bytes = 0, sectors = 0, ideal_sectors = 0;  // of global memory
  void add(const AccessCounts& other);
};

struct KernelTrace {
  const void* kernel;
  uint64_t launches = 0;
  std::map<AccessKind, AccessCounts> accesses;
};

struct BufferTrace {
  std::string name;
  uint64_t size = 0;  // of all buffers of this name
  AccessCounts read, written;
};

struct Trace {
  std::vector<KernelTrace> kernels;  // in order of first launch
  std::vector<BufferTrace> buffers;
};

const Trace& trace();

}  // namespace rebased::emulator
