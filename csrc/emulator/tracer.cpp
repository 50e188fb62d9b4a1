// Collects the accesses that the hooks of -fsanitize=thread report, and counts them warp by warp (tracer.h
// says how).
#include "emulator/tracer.h"

#include <algorithm>
#include <cstring>
#include <set>

#include "emulator/block.h"
#include "emulator/runtime.h"
#include "emulator/sanitizer.h"
#include "emulator/tracer_counts.h"

namespace rebased::emulator {
namespace {

constexpr int not_a_buffer = -1;
constexpr uintptr_t sector_bytes = 32, bank_bytes = 4, banks = 32;

struct Access {
  AccessKind kind;
  uintptr_t address;
  unsigned size;
  int buffer;  // index into Trace::buffers where the access is to global memory
};
struct LaneAccess {
  unsigned lane;
  Access access;
};
struct Range {
  uintptr_t begin, end;
  int buffer;
};

Trace counts;
KernelTrace* launched = nullptr;
std::vector<Range> ranges;
std::vector<Access> logs[1024];  // the accesses of each thread of the block since its warp was last counted

int buffer_at(uintptr_t address) {
  for (const Range& range : ranges) {
    if (address >= range.begin && address < range.end) return range.buffer;
  }
  return not_a_buffer;
}

AccessCounts count_shared(const std::vector<LaneAccess>& lanes) {
  const unsigned size = lanes[0].access.size;
  const unsigned lanes_at_once = size <= 4 ? 32 : size == 8 ? 16 : 8;
  AccessCounts result;
  result.warp_accesses = 1;
  for (unsigned first = 0; first < 32; first += lanes_at_once) {
    std::set<uintptr_t> words[banks];
    size_t most = 0;
    for (const LaneAccess& lane : lanes) {
      if (lane.lane < first || lane.lane >= first + lanes_at_once) continue;
      const uintptr_t begin = lane.access.address / bank_bytes,
                      end = (lane.access.address + size - 1) / bank_bytes;
      for (uintptr_t word = begin; word <= end; ++word) {
        words[word % banks].insert(word);
        most = std::max(most, words[word % banks].size());
      }
    }
    result.wavefronts += most;
    result.ideal_wavefronts += most > 0;
  }
  return result;
}

AccessCounts count_global(const std::vector<LaneAccess>& lanes) {
  AccessCounts result;
  result.warp_accesses = 1;
  std::set<uintptr_t> sectors, bytes;
  for (const LaneAccess& lane : lanes) {
    const uintptr_t begin = lane.access.address, end = begin + lane.access.size;
    result.bytes += lane.access.size;
    for (uintptr_t sector = begin / sector_bytes; sector <= (end - 1) / sector_bytes; ++sector) {
      sectors.insert(sector);
    }
    for (uintptr_t byte = begin; byte < end; ++byte) bytes.insert(byte);
  }
  result.sectors = sectors.size();
  result.ideal_sectors = (bytes.size() + sector_bytes - 1) / sector_bytes;
  return result;
}

void count_warp_access(const std::vector<LaneAccess>& lanes) {
  const Access& first = lanes[0].access;
  const AccessCounts added = first.kind.shared ? count_shared(lanes) : count_global(lanes);
  launched->accesses[first.kind].add(added);
  if (first.kind.shared) return;
  BufferTrace& buffer = counts.buffers[first.buffer];
  (first.kind.write ? buffer.written : buffer.read).add(added);
}

void count_warp(unsigned first_thread) {
  // (instruction, buffer, how many times the lane had come to it) -> the lanes that came to it so often
  std::map<std::tuple<AccessKind, int, unsigned>, std::vector<LaneAccess>> warp_accesses;
  for (unsigned lane = 0; lane < 32; ++lane) {
    std::map<std::pair<AccessKind, int>, unsigned> times;
    for (const Access& access : logs[first_thread + lane]) {
      const unsigned time = times[{access.kind, access.buffer}]++;
      warp_accesses[{access.kind, access.buffer, time}].push_back({lane, access});
    }
    logs[first_thread + lane].clear();
  }
  for (const auto& entry : warp_accesses) count_warp_access(entry.second);
}

}  // namespace

void AccessCounts::add(const AccessCounts& other) {
  warp_accesses += other.warp_accesses;
  wavefronts += other.wavefronts;
  ideal_wavefronts += other.ideal_wavefronts;
  bytes += other.bytes;
  sectors += other.sectors;
  ideal_sectors += other.ideal_sectors;
}

const Trace& trace() { return counts; }

void trace_launch(const void* kernel) {
  for (KernelTrace& known : counts.kernels) {
    if (known.kernel == kernel) launched = &known;
  }
  if (!launched || launched->kernel != kernel) {
    counts.kernels.push_back({kernel, 0, {}});
    launched = &counts.kernels.back();
  }
  ++launched->launches;
}

void trace_access(const void* address, size_t size, bool write, const void* pc) {
  if (!current_block || !size) return;
  const auto at = reinterpret_cast<uintptr_t>(address);
  const bool shared = current_block->shared().contains(address);
  const int buffer = shared ? not_a_buffer : buffer_at(at);
  if (!shared && buffer == not_a_buffer) return;  // a local variable or a parameter of the kernel
  logs[linear_thread_index].push_back({{pc, shared, write}, at, static_cast<unsigned>(size), buffer});
}

void trace_flush(unsigned warp) { count_warp(32 * warp); }

void trace_buffer(const char* name, const void* begin, size_t bytes) {
  int index = 0;
  while (index < static_cast<int>(counts.buffers.size()) && counts.buffers[index].name != name) ++index;
  if (index == static_cast<int>(counts.buffers.size())) counts.buffers.push_back({name, 0, {}, {}});
  counts.buffers[index].size += bytes;
  const auto at = reinterpret_cast<uintptr_t>(begin);
  ranges.push_back({at, at + bytes, index});
}

void trace_reset() {
  counts = Trace{};
  launched = nullptr;
  ranges.clear();
}

}  // namespace rebased::emulator

// ---- the hooks of -fsanitize=thread ----

using rebased::emulator::trace_access;

#define REBASED_HOOKS(bytes)                                          \
  void __tsan_read##bytes(void* address) {                            \
    trace_access(address, bytes, false, __builtin_return_address(0)); \
  }                                                                   \
  void __tsan_write##bytes(void* address) {                           \
    trace_access(address, bytes, true, __builtin_return_address(0));  \
  }                                                                   \
  void __tsan_unaligned_read##bytes(void* address) {                  \
    trace_access(address, bytes, false, __builtin_return_address(0)); \
  }                                                                   \
  void __tsan_unaligned_write##bytes(void* address) {                 \
    trace_access(address, bytes, true, __builtin_return_address(0));  \
  }

extern "C" {
REBASED_HOOKS(1)
REBASED_HOOKS(2)
REBASED_HOOKS(4)
REBASED_HOOKS(8)
REBASED_HOOKS(16)
void __tsan_read_range(void* address, size_t size) {
  trace_access(address, size, false, __builtin_return_address(0));
}
void __tsan_write_range(void* address, size_t size) {
  trace_access(address, size, true, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_update(void**, void*) {}
char __tsan_atomic8_load(const volatile char* address, int) {
  return __atomic_load_n(address, __ATOMIC_SEQ_CST);
}
}
#undef REBASED_HOOKS
