// What the runtime tells the checker that the kernels are compiled for. The runtime itself is compiled
// without -fsanitize. One of these macros says which checker the kernels have:
//   REBASED_EMULATOR_ADDRESS  AddressSanitizer
//   REBASED_EMULATOR_THREAD   ThreadSanitizer
//   REBASED_EMULATOR_TRACE    the access tracer (tracer.cpp), which takes ThreadSanitizer's place
// The sanitizers' functions are declared here because their own headers demand -fsanitize.
#pragma once

#include <cstddef>

extern "C" {
void __asan_poison_memory_region(const volatile void* begin, size_t size);
void __asan_unpoison_memory_region(const volatile void* begin, size_t size);
void __asan_loadN(const void* address, size_t size);
void __asan_storeN(const void* address, size_t size);
void __sanitizer_start_switch_fiber(void** fake_stack, const void* stack, size_t size);
void __sanitizer_finish_switch_fiber(void* fake_stack, const void** old_stack, size_t* old_size);
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void* __tsan_get_current_fiber();
void __tsan_acquire(void* address);
void __tsan_release(void* address);
void AnnotateIgnoreReadsBegin(const char* file, int line);
void AnnotateIgnoreReadsEnd(const char* file, int line);
void AnnotateIgnoreWritesBegin(const char* file, int line);
void AnnotateIgnoreWritesEnd(const char* file, int line);
void __tsan_read_range_pc(const void* address, unsigned long size, const void* pc);
void __tsan_write_range_pc(void* address, unsigned long size, const void* pc);
}

namespace rebased::emulator {

#if defined(REBASED_EMULATOR_THREAD)
constexpr bool thread_sanitized = true;
#else
constexpr bool thread_sanitized = false;
#endif

#if defined(REBASED_EMULATOR_TRACE)
void trace_launch(const void* kernel);
void trace_access(const void* address, size_t size, bool write, const void* pc);
void trace_flush(unsigned warp);
#endif

inline void poison([[maybe_unused]] const void* begin, [[maybe_unused]] size_t size) {
#if defined(REBASED_EMULATOR_ADDRESS)
  __asan_poison_memory_region(begin, size);
#endif
}
inline void unpoison([[maybe_unused]] const void* begin, [[maybe_unused]] size_t size) {
#if defined(REBASED_EMULATOR_ADDRESS)
  __asan_unpoison_memory_region(begin, size);
#endif
}

// Tells ThreadSanitizer that every earlier release of the same variable happened before this acquire.
inline void acquire([[maybe_unused]] char& variable) {
#if defined(REBASED_EMULATOR_THREAD)
  __tsan_acquire(&variable);
#endif
}
inline void release([[maybe_unused]] char& variable) {
#if defined(REBASED_EMULATOR_THREAD)
  __tsan_release(&variable);
#endif
}

// Tells the tracer that all lanes of a warp have come to the same place.
inline void note_convergence([[maybe_unused]] unsigned warp) {
#if defined(REBASED_EMULATOR_TRACE)
  trace_flush(warp);
#endif
}

// While an object of this class lives, ThreadSanitizer reports nothing that this OS thread or fiber does: it
// sees the runtime's calls into the C library, but not the atomics and switches that order them.
class Unchecked {
 public:
#if defined(REBASED_EMULATOR_THREAD)
  Unchecked() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unchecked() {
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
#else
  Unchecked() {}
  ~Unchecked() {}
#endif
  Unchecked(const Unchecked&) = delete;
  Unchecked& operator=(const Unchecked&) = delete;
};

// Report accesses that the runtime makes on a kernel's behalf, at the kernel's instruction `pc`.
inline void note_read([[maybe_unused]] const void* address, [[maybe_unused]] size_t size,
                      [[maybe_unused]] const void* pc) {
#if defined(REBASED_EMULATOR_ADDRESS)
  __asan_loadN(address, size);
#elif defined(REBASED_EMULATOR_THREAD)
  __tsan_read_range_pc(address, size, pc);
#elif defined(REBASED_EMULATOR_TRACE)
  trace_access(address, size, false, pc);
#endif
}
inline void note_write([[maybe_unused]] void* address, [[maybe_unused]] size_t size,
                       [[maybe_unused]] const void* pc) {
#if defined(REBASED_EMULATOR_ADDRESS)
  __asan_storeN(address, size);
#elif defined(REBASED_EMULATOR_THREAD)
  __tsan_write_range_pc(address, size, pc);
#elif defined(REBASED_EMULATOR_TRACE)
  trace_access(address, size, true, pc);
#endif
}

}  // namespace rebased::emulator
