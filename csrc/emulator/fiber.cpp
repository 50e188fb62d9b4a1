// The switch of stacks in x86-64 assembly, the memory of the stacks, and what the sanitizers are told of a
// switch.
#include "emulator/fiber.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <new>

#if !defined(__x86_64__)
#error \
    "The emulator switches stacks in x86-64 assembly; on other machines build without it (REBASED_EMULATOR=0)."
#endif

__asm__(
    ".text\n"
    ".globl rebased_emulator_switch_stack\n"
    ".hidden rebased_emulator_switch_stack\n"
    ".type rebased_emulator_switch_stack, @function\n"
    "rebased_emulator_switch_stack:\n"
    "  push %rbp\n"
    "  push %rbx\n"
    "  push %r12\n"
    "  push %r13\n"
    "  push %r14\n"
    "  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  pop %r15\n"
    "  pop %r14\n"
    "  pop %r13\n"
    "  pop %r12\n"
    "  pop %rbx\n"
    "  pop %rbp\n"
    "  ret\n"
    ".size rebased_emulator_switch_stack, . - rebased_emulator_switch_stack\n");

namespace rebased::emulator {
namespace {

constexpr size_t page = 4096;
#if defined(REBASED_EMULATOR_ADDRESS) || defined(REBASED_EMULATOR_THREAD)
constexpr size_t fiber_stack_size = 512 << 10;  // sanitizers blow up frames
#else
constexpr size_t fiber_stack_size = 128 << 10;
#endif

}  // namespace

Fiber::~Fiber() {
  abandon();
  if (owns_stack_) munmap(stack_ - page, stack_size_ + page);
}

void Fiber::start(void (*entry)(), unsigned colour) {
  if (!owns_stack_) {
    void* const memory = mmap(nullptr, fiber_stack_size + page, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);  // so that an overflow of the stack faults
    stack_ = static_cast<char*>(memory) + page;
    stack_size_ = fiber_stack_size;
    owns_stack_ = true;
  }
  unpoison(stack_, stack_size_);
#if defined(REBASED_EMULATOR_THREAD)
  if (!thread_) thread_ = __tsan_create_fiber(0);
#endif
  // The stack looks as if the fiber had been switched away from at the first instruction of entry(): six
  // registers, the return address, and a null for a caller. The stack pointer is then 8 modulo 16, as the ABI
  // has it.
  const auto top = reinterpret_cast<void**>(stack_ + stack_size_ - 128 * (colour % 32));
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  for (int i = 3; i <= 8; ++i) top[-i] = nullptr;
  stack_pointer_ = top - 8;
}

void Fiber::adopt_os_thread() {
#if defined(REBASED_EMULATOR_ADDRESS)  // AddressSanitizer alone asks for the bounds, which are slow to find
  pthread_attr_t attributes;
  void* stack = nullptr;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &stack, &stack_size_);
  pthread_attr_destroy(&attributes);
  stack_ = static_cast<char*>(stack);
#endif
#if defined(REBASED_EMULATOR_THREAD)
  thread_ = __tsan_get_current_fiber();
#endif
}

void Fiber::abandon() {
  stack_pointer_ = nullptr;
  fake_stack_ = nullptr;
#if defined(REBASED_EMULATOR_THREAD)
  if (owns_stack_ && thread_) {
    void* const current = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(thread_, 1);
    __tsan_switch_to_fiber(current, 0);  // 0: what the fiber did happened before what follows
    __tsan_destroy_fiber(thread_);
  }
  thread_ = nullptr;
#endif
}

void Fiber::entered() {
#if defined(REBASED_EMULATOR_ADDRESS)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
}

}  // namespace rebased::emulator
