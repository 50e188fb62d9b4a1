// The primitives of cuda/device/device.cuh for which a thread needs its block or the other lanes of its warp:
// barriers, shared memory, shuffles, votes and asynchronous copies. tensor_cores.cpp has the matrix products.
#include "emulator/block.h"
#include "emulator/runtime.h"
#include "emulator/sanitizer.h"

namespace rebased::emulator {

void block_barrier(Site site) { current_block->barrier(site); }

void warp_barrier(unsigned mask, Site site) {
  current_block->collective(nullptr, "sync_warp", mask, nullptr, site);
}

void warp_collective(Operation operation, const char* name, unsigned mask, void* operand, Site site) {
  current_block->collective(operation, name, mask, operand, site);
}

void* static_shared_memory(const void* declaration, size_t bytes) {
  return current_block->shared().array(declaration, bytes);
}

void* dynamic_shared_memory() { return current_block->shared().dynamic(); }

void check_address(const void* address, size_t bytes, Memory memory, const char* what, Site site) {
  if (reinterpret_cast<uintptr_t>(address) % bytes) {
    fail("%s:%d: misaligned %s of %zu bytes", site.file, site.line, what, bytes);
  }
  if (current_block->shared().contains(address) != (memory == Memory::shared)) {
    fail("%s:%d: %s of %zu bytes: the address is %sin shared memory", site.file, site.line, what, bytes,
         memory == Memory::shared ? "not " : "");
  }
}

// ---- exchanges ----

void exchange_lanes(void* const (&operands)[32], unsigned mask) {
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (!(mask >> lane & 1)) continue;
    Exchange& exchange = *static_cast<Exchange*>(operands[lane]);
    if (!(mask >> exchange.source_lane & 1)) {
      fail("shuffle: lane %u reads lane %d, which is not in mask %08x", lane, exchange.source_lane, mask);
    }
    exchange.result = static_cast<const Exchange*>(operands[exchange.source_lane])->value;
  }
}

namespace {

struct Vote {
  bool predicate;
  unsigned result;
};

void collect_votes(void* const (&operands)[32], unsigned mask) {
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1 && static_cast<const Vote*>(operands[lane])->predicate) votes |= 1u << lane;
  }
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) static_cast<Vote*>(operands[lane])->result = votes;
  }
}

}  // namespace

unsigned ballot(bool predicate, unsigned mask, Site site) {
  Vote vote{predicate, 0};
  warp_collective(collect_votes, "ballot", mask, &vote, site);
  return vote.result;
}

// ---- asynchronous copies ----

void copy_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes, Site site) {
  check_address(shared, bytes, Memory::shared, "copy_async to shared memory", site);
  check_address(global, bytes, Memory::global, "copy_async from global memory", site);
  if (source_bytes > bytes)
    fail("%s:%d: copy_async reads %u of %u bytes", site.file, site.line, source_bytes, bytes);
  const void* const pc = __builtin_return_address(0);
  CudaThread& thread = current_block->current();
  {
    const Unchecked unchecked;
    thread.copies.push_back({shared, global, bytes, source_bytes, thread.copy_groups, pc});
  }
  note_write(shared, bytes, pc);
  if (source_bytes) note_read(global, source_bytes, pc);
  for (unsigned i = 0; i < bytes; ++i) static_cast<char*>(shared)[i] = char(0xff);  // NaN
}

void copy_async_commit() { ++current_block->current().copy_groups; }

void copy_async_wait(unsigned groups_left) {
  CudaThread& thread = current_block->current();
  while (thread.copies_done < thread.copies.size()) {
    const Copy& copy = thread.copies[thread.copies_done];
    if (copy.group + groups_left >= thread.copy_groups) return;
    ++thread.copies_done;
    if (thread_sanitized) {  // the hardware may have written at any time since the copy was started
      note_write(copy.shared, copy.bytes, copy.pc);
      if (copy.source_bytes) note_read(copy.global, copy.source_bytes, copy.pc);
    }
    const auto to = static_cast<char*>(copy.shared);
    const auto from = static_cast<const char*>(copy.global);
    for (unsigned i = 0; i < copy.bytes; ++i) to[i] = i < copy.source_bytes ? from[i] : 0;
  }
  thread.copies.clear();
  thread.copies_done = 0;
}

}  // namespace rebased::emulator
