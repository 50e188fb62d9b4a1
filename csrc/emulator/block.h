// One block of CUDA threads on one OS thread: each CUDA thread is a fiber, and the block decides which of
// them runs next, whenever one waits.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/runtime.h"
#include "emulator/shared_memory.h"

namespace rebased::emulator {

// Which of the ready CUDA threads runs next: forward by index, in reverse, or at random from a seed.
struct Order {
  enum class Kind { forward, reverse, seeded } kind = Kind::forward;
  uint64_t seed = 0;
};

// A copy from global to shared memory that has been started.
struct Copy {
  void* shared;
  const void* global;
  unsigned bytes, source_bytes, group;
  const void* pc;
};

struct CudaThread {
  Fiber fiber;
  uint3 index{0, 0, 0};
  unsigned linear = 0;
  bool finished = true;
  Site site{};               // where it waits or waited last,
  const char* what = "";     // and for what
  unsigned barriers = 0;     // block barriers passed
  std::vector<Copy> copies;  // in order; those before copies_done have happened
  size_t copies_done = 0;
  unsigned copy_groups = 0;  // committed
};

// A collective that some lanes have come to.
struct Collective {
  unsigned mask, arrived;
  Operation operation;
  Site site;
  const char* name;
  char* order_variable;
};

struct Warp {
  unsigned lanes;  // that exist
  unsigned ready;  // may run
  Collective pending[4];
  void* operands[32];
  char order_variables[8];  // successive barriers take turns, see Block::barrier_variables_
  unsigned next_order_variable;
};

class Block {
 public:
  // Runs one block to its end; throws what went wrong.
  void run(const Launch& launch, size_t shared_memory_limit, Order order, void (*body)(const void*),
           const void* context, uint64_t block_index);

  // What the running CUDA thread asks for:
  void barrier(Site site);
  void collective(Operation operation, const char* name, unsigned mask, void* operand, Site site);
  CudaThread& current() { return *current_; }
  SharedMemory& shared() { return shared_; }

  void adopt_os_thread() { os_thread_.adopt_os_thread(); }

 private:
  static void thread_main();
  void run_thread();
  void prepare(const Launch& launch, uint64_t block_index);
  void set_error(const char* message);
  bool failed() const { return error_[0]; }
  void report_deadlock();
  std::string waiting_threads() const;

  // Goes on with the next CUDA thread that is ready; at the block's end, or on an error, with run().
  void yield();
  CudaThread& pick();
  void switch_to(CudaThread& thread);
  void leave();
  void make_ready(unsigned warp, unsigned lanes);
  void make_waiting(CudaThread& thread, const char* what, Site site);
  void open_barrier();
  void start_turn();
  unsigned pick_bit(unsigned bits, unsigned after);
  uint64_t random();

  std::vector<std::unique_ptr<CudaThread>> threads_;  // of the largest block so far
  std::vector<Warp> warps_;
  SharedMemory shared_;
  Fiber os_thread_;
  CudaThread* current_ = nullptr;

  unsigned count_ = 0, live_ = 0, warp_ = 0, lane_ = 0;
  unsigned ready_warps_ = 0;
  unsigned at_barrier_ = 0;
  Site barrier_site_{};
  bool barrier_diverged_ = false;
  Order order_;
  uint64_t random_state_ = 1;
  void (*body_)(const void*) = nullptr;
  const void* context_ = nullptr;
  char error_[2048] = {};

  // ThreadSanitizer's: a thread may already release for the next barrier while another has yet to acquire for
  // this one, hence two variables that take turns. The same between successive blocks in this arena.
  char barrier_variables_[2] = {};
  char block_variables_[2] = {};
  unsigned turn_ = 0;
};

inline thread_local Block* current_block = nullptr;

// Released by the host before a launch, acquired by its threads; and the other way round at the end.
extern char launch_variable, end_variable;

}  // namespace rebased::emulator
