// One block of CUDA threads on one OS thread. Each CUDA thread is a fiber, and whenever a fiber waits the
// block decides which one runs next. The runtime's own files include this header; kernels see runtime.h
// alone.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/runtime.h"
#include "emulator/shared_memory.h"

namespace rebased::emulator {

// Which of the ready CUDA threads runs next: the next by index, the one before, or one at random from a seed.
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
  Site site{};               // where the thread waits, or waited last
  const char* what = "";     // what it waits for, or waited for last
  unsigned barriers = 0;     // how many barriers of the block it has passed
  std::vector<Copy> copies;  // in the order of their start; the first copies_done of them have happened
  size_t copies_done = 0;
  unsigned copy_groups = 0;  // committed
};

// A collective of a warp that some of its lanes have come to.
struct Collective {
  unsigned mask, arrived;
  Operation operation;
  Site site;
  const char* name;
  char* order_variable;
};

struct Warp {
  unsigned lanes;  // mask of the lanes that exist
  unsigned ready;  // mask of the lanes that may run
  Collective pending[4];
  void* operands[32];
  char order_variables[8];  // successive barriers take turns, see Block::barrier_variables_
  unsigned next_order_variable;
};

class Block {
 public:
  // Runs one block to its end. Throws what went wrong.
  void run(const Launch& launch, size_t shared_memory_limit, Order order, void (*body)(const void*),
           const void* context, uint64_t block_index);

  // What the running CUDA thread asks the block for:
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

  // Goes on with the next CUDA thread that is ready. At the block's end, and on an error, goes back to run().
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

  std::vector<std::unique_ptr<CudaThread>> threads_;  // as many as the largest block so far had
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

  // What ThreadSanitizer takes for the barriers. A thread may release for the next barrier while another
  // thread has yet to acquire for this one, hence two variables that take turns. Successive blocks in this
  // arena, too.
  char barrier_variables_[2] = {};
  char block_variables_[2] = {};
  unsigned turn_ = 0;
};

inline thread_local Block* current_block = nullptr;

// The host releases this variable before a launch and the launch's threads acquire it. At the end of the
// launch the threads release it and the host acquires it.
extern char launch_variable, end_variable;

// Whether sums of tensor cores are cut off to float32; else they are rounded. Set at every launch.
extern std::atomic<bool> tensor_cores_truncate;

}  // namespace rebased::emulator
