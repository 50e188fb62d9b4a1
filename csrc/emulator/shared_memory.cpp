// Where the arrays of a block lie in its arena, and the check of the gaps between them at the end of the
// block.
#include "emulator/shared_memory.h"

#include <sys/mman.h>

#include <new>

#include "emulator/runtime.h"
#include "emulator/sanitizer.h"

namespace rebased::emulator {
namespace {

constexpr size_t static_limit = 48 << 10;  // CUDA's limit for static arrays, on every device

using Fill = uint64_t __attribute__((vector_size(16), may_alias));

// Fills [begin, end), which is 16-byte aligned, with ones: NaN as float, half and bfloat16.
void fill_nan(char* begin, char* end) {
  for (; begin < end; begin += 16) *reinterpret_cast<Fill*>(begin) = Fill{~0ull, ~0ull};
}

bool is_filled(const char* begin, const char* end) {
  for (; begin < end; ++begin) {
    if (*begin != char(0xff)) return false;
  }
  return true;
}

size_t round_up(size_t value, size_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

SharedMemory::SharedMemory() {
  void* const memory = mmap(nullptr, arena_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  arena_ = static_cast<char*>(memory);
  poison(arena_, arena_bytes);
}

SharedMemory::~SharedMemory() {
  unpoison(arena_, arena_bytes);
  munmap(arena_, arena_bytes);
}

void SharedMemory::reset(size_t dynamic_bytes, size_t limit) {
  for (const Array& array : arrays_) poison(array.begin, array.bytes);
  arrays_.clear();
  used_ = total_ = 0;
  limit_ = limit;
  fill_nan(arena_, arena_ + gap);
  allocate(nullptr, dynamic_bytes);
}

// The arena holds a gap, an array, padding to 128 bytes, a gap, an array and so on. Padding and gaps are NaN
// too.
void* SharedMemory::allocate(const void* declaration, size_t bytes) {
  total_ += bytes;
  if (declaration && total_ - arrays_[0].bytes > static_limit) {
    fail("%zu bytes of static shared memory: more than 48 KB", total_ - arrays_[0].bytes);
  }
  const size_t begin = used_ + gap, end = begin + round_up(bytes, 128);
  if (total_ > limit_ || end + gap > arena_bytes) {
    fail("%zu bytes of shared memory: more than the %zu of this device", total_, limit_);
  }
  fill_nan(arena_ + begin, arena_ + end + gap);
  unpoison(arena_ + begin, bytes);
  const Unchecked unchecked;
  arrays_.push_back({declaration, arena_ + begin, bytes});
  used_ = end;
  return arena_ + begin;
}

void* SharedMemory::array(const void* declaration, size_t bytes) {
  for (size_t i = 1; i < arrays_.size(); ++i) {
    if (arrays_[i].declaration == declaration) return arrays_[i].begin;
  }
  return allocate(declaration, bytes);
}

void SharedMemory::check_gaps() const {
  const char* gap_begin = arena_;
  for (const Array& array : arrays_) {
    if (!is_filled(gap_begin, array.begin))
      fail("a write before the begin or past the end of a shared array");
    gap_begin = array.begin + array.bytes;
  }
  if (!is_filled(gap_begin, arena_ + used_ + gap)) fail("a write past the end of a shared array");
}

}  // namespace rebased::emulator
