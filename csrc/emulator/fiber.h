// Fibers: threads of execution that take turns on one OS thread by an explicit switch of stacks. block.cpp
// runs one fiber per CUDA thread. Knows nothing of CUDA; it tells the sanitizers of every switch.
#pragma once

#include <cstddef>

#include "emulator/sanitizer.h"

// Saves the callee-saved registers on the stack and the stack pointer in *save, then goes on with the stack
// `to`.
extern "C" void rebased_emulator_switch_stack(void** save, void* to);

namespace rebased::emulator {

class Fiber {
 public:
  Fiber() = default;
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Makes the next switch to this fiber call entry() on a fresh stack; entry() never returns. `colour` varies
  // the offset of the stack's hot end, so that the stacks of a warp do not fight for the same cache sets.
  void start(void (*entry)(), unsigned colour);
  // Makes this fiber stand for the OS thread that calls.
  void adopt_os_thread();
  bool started() const { return stack_pointer_ != nullptr; }
  // Gives up what the fiber was doing; start() makes it usable again.
  void abandon();

  // The first thing that entry() does.
  static void entered();
  static void switch_between(Fiber& from, Fiber& to) {
#if defined(REBASED_EMULATOR_ADDRESS)
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.stack_, to.stack_size_);
#endif
#if defined(REBASED_EMULATOR_THREAD)
    __tsan_switch_to_fiber(to.thread_, 1);  // 1: the switch itself orders nothing
#endif
    rebased_emulator_switch_stack(&from.stack_pointer_, to.stack_pointer_);
#if defined(REBASED_EMULATOR_ADDRESS)
    __sanitizer_finish_switch_fiber(from.fake_stack_, nullptr, nullptr);
#endif
  }

 private:
  void* stack_pointer_ = nullptr;  // where a suspended fiber goes on
  char* stack_ = nullptr;
  size_t stack_size_ = 0;
  bool owns_stack_ = false;
  void* fake_stack_ = nullptr;  // AddressSanitizer's
  void* thread_ = nullptr;      // ThreadSanitizer's
};

}  // namespace rebased::emulator
