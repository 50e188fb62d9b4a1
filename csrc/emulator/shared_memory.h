// The shared memory of one block: an arena whose arrays start as NaN and have guarded gaps between them.
// block.cpp owns one arena per block.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace rebased::emulator {

class SharedMemory {
 public:
  SharedMemory();
  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // Begins a new block, which has no array yet but the dynamic one.
  void reset(size_t dynamic_bytes, size_t limit);
  // The array that a SHARED_MEMORY declaration stands for, the same for every thread that comes to it.
  void* array(const void* declaration, size_t bytes);
  void* dynamic() const { return arrays_[0].begin; }
  bool contains(const void* address) const { return address >= arena_ && address < arena_ + arena_bytes; }
  // Fails if anything was written into a gap, which means past the end of an array or before its beginning.
  void check_gaps() const;

 private:
  struct Array {
    const void* declaration;
    char* begin;
    size_t bytes;
  };
  static constexpr size_t arena_bytes = 512 << 10;  // 227 KB, and gaps for up to 2,000 arrays
  static constexpr size_t gap = 128;

  void* allocate(const void* declaration, size_t bytes);

  char* arena_;
  std::vector<Array> arrays_;
  size_t used_ = 0, total_ = 0, limit_ = 0;
};

}  // namespace rebased::emulator
