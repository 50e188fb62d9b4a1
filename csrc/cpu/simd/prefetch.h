// Prefetching the rows that a sweep packs next, a few cache lines at a time between the tiles of the current
// chunk: rows are short and sweeps also run backwards, which the hardware does not follow, and all lines of a
// chunk at once would fill the miss queue and stall. Addresses past a tensor's end are harmless. It includes
// simd.h alone.
#pragma once

#include "cpu/simd/simd.h"

namespace rebased::cpu::REBASED_ISA {

class PrefetchQueue {
 public:
  void clear() { next_ = count_ = 0; }
  void add(uintptr_t rows, int64_t stride_bytes, int64_t count, int64_t row_bytes) {
    if (count_ < kRanges) ranges_[count_++] = {rows, stride_bytes, count, row_bytes};
  }
  // To be called between two tiles.
  REBASED_INLINE void advance() {
    if (next_ < count_) issue();
  }

 private:
  static constexpr int kRanges = 8;
  // Cache lines of one advance, rounded up to whole rows. They are as few as a chunk's tiles allow; AMX has
  // few tiles.
#if defined(__AMX_BF16__)
  static constexpr int kLines = 32;
#else
  static constexpr int kLines = 12;
#endif
  struct Range {
    uintptr_t row;
    int64_t stride_bytes, rows, row_bytes;
  };

  void issue() {
    for (int64_t lines = 0; lines < kLines && next_ < count_;) {
      Range& range = ranges_[next_];
      for (int64_t byte = 0; byte < range.row_bytes; byte += 64, lines++)
        __builtin_prefetch(reinterpret_cast<const char*>(range.row + byte), 0, 2);
      range.row += range.stride_bytes;
      if (--range.rows <= 0) next_++;
    }
  }

  int next_, count_;
  Range ranges_[kRanges];
};

// How many rows on the next ones lie, and the queue that fetches them; without a queue nobody does.
struct Ahead {
  PrefetchQueue* queue = nullptr;
  int64_t rows = 0;
};

}  // namespace rebased::cpu::REBASED_ISA
