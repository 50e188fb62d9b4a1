// Launches: hands the grid's blocks to OS threads, enforces the device's limits and turns errors into text.
//
// Every launch reads these variables of the environment:
//   REBASED_EMULATOR_THREADS        number of OS threads (default: one per core)
//   REBASED_EMULATOR_ORDER          forward (default), reverse, or a number that seeds a random schedule
//   REBASED_EMULATOR_SHARED_MEMORY  KB of shared memory a block may have: 227 (default, sm_90), 163 (sm_80),
//                                   99 (sm_86, sm_89, sm_120)
#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "emulator/block.h"
#include "emulator/runtime.h"
#include "emulator/sanitizer.h"

namespace rebased::emulator {
namespace {

Order order_from_environment() {
  const char* const order = getenv("REBASED_EMULATOR_ORDER");
  if (!order || !*order || !strcmp(order, "forward")) return {Order::Kind::forward, 0};
  if (!strcmp(order, "reverse")) return {Order::Kind::reverse, 0};
  char* end;
  const uint64_t seed = strtoull(order, &end, 10);
  if (*end) fail("REBASED_EMULATOR_ORDER=%s: neither forward, reverse nor a number", order);
  return {Order::Kind::seeded, seed};
}

unsigned number_from_environment(const char* name, unsigned otherwise) {
  const char* const value = getenv(name);
  if (!value || !*value) return otherwise;
  char* end;
  const unsigned long number = strtoul(value, &end, 10);
  if (*end || !number || number > 4096) fail("%s=%s: not a number from 1 to 4096", name, value);
  return static_cast<unsigned>(number);
}

unsigned threads_from_environment() {
#if defined(REBASED_EMULATOR_TRACE)
  return 1;
#else
  const unsigned cores = std::thread::hardware_concurrency();
  return number_from_environment("REBASED_EMULATOR_THREADS", cores ? cores : 1);
#endif
}

Limits limits_from_environment() {
  const unsigned kilobytes = number_from_environment("REBASED_EMULATOR_SHARED_MEMORY", 227);
  return {132, kilobytes >= 227 ? 90 : kilobytes >= 163 ? 80 : 86, size_t{kilobytes} << 10};
}

void check_size(const Launch& launch) {
  const dim3 g = launch.grid, b = launch.block;
  if (!g.x || !g.y || !g.z || !b.x || !b.y || !b.z) fail("a grid or block of size 0");
  if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) {
    fail("grid (%u, %u, %u): more than (2147483647, 65535, 65535) blocks", g.x, g.y, g.z);
  }
  if (b.x > 1024 || b.y > 1024 || b.z > 64 || uint64_t{b.x} * b.y * b.z > 1024) {
    fail("block (%u, %u, %u): more than 1024 threads, or more than (1024, 1024, 64)", b.x, b.y, b.z);
  }
}

// Keeps blocks, with the stacks of their threads, for the next launch.
class BlockPool {
 public:
  std::unique_ptr<Block> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return std::make_unique<Block>();
    std::unique_ptr<Block> block = std::move(free_.back());
    free_.pop_back();
    return block;
  }
  void give_back(std::unique_ptr<Block> block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(block));
  }

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Block>> free_;
};

BlockPool& pool() {
  // Never destroyed, since the destructor of another static object may launch a kernel.
  static BlockPool* const pool = new BlockPool;
  return *pool;
}

class Grid {
 public:
  Grid(const Launch& launch, void (*body)(const void*), const void* context)
      : launch_(launch),
        body_(body),
        context_(context),
        order_(order_from_environment()),
        shared_memory_limit_(limits_from_environment().shared_memory_per_block),
        blocks_(uint64_t{launch.grid.x} * launch.grid.y * launch.grid.z) {}

  void run() {
    const char* const truncates = getenv("REBASED_EMULATOR_TRUNCATES");
    tensor_cores_truncate = truncates && *truncates;
    const uint64_t threads = std::min<uint64_t>(threads_from_environment(), blocks_);
    std::vector<std::thread> others;
    for (uint64_t i = 1; i < threads; ++i) others.emplace_back([this] { work(); });
    work();
    for (std::thread& thread : others) thread.join();
    if (!error_.empty()) throw std::runtime_error(error_);
  }

 private:
  // Under ThreadSanitizer successive blocks of one OS thread run on two sets of fibers by turns. On the same
  // fibers it would take the blocks for ordered, and miss their races.
  static constexpr size_t sets = thread_sanitized ? 2 : 1;

  void work() {
    const Unchecked unchecked;
    release(launch_variable);  // the data of this OS thread is ready for the CUDA threads that run on it
    std::unique_ptr<Block> set[sets];
    try {
      for (auto& block : set) {
        block = pool().take();
        block->adopt_os_thread();
      }
      for (uint64_t index, turn = 0; (index = next_++) < blocks_; ++turn) {
        set[turn % sets]->run(launch_, shared_memory_limit_, order_, body_, context_, index);
      }
    } catch (const std::exception& error) {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (error_.empty()) error_ = error.what();
      next_ = blocks_;
    }
    for (auto& block : set) {
      if (block) pool().give_back(std::move(block));
    }
  }

  const Launch& launch_;
  void (*const body_)(const void*);
  const void* const context_;
  const Order order_;
  const size_t shared_memory_limit_;
  const uint64_t blocks_;
  std::atomic<uint64_t> next_{0};
  std::mutex mutex_;
  std::string error_;
};

// How many launches of this OS thread a LaunchCounter has counted, or -1 where launches run.
thread_local int counted_launches = -1;

// Runs a call of the host and returns the text of what the call throws, empty when it throws nothing.
template <class Call>
const char* error_text(Call call) {
  thread_local std::string error;
  error.clear();
  try {
    call();
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  return error.c_str();
}

}  // namespace

const char* limits(Limits* limits) {
  return error_text([&] { *limits = limits_from_environment(); });
}

const char* launch(const Launch& launch, void (*body)(const void* context), const void* context) {
  const Unchecked unchecked;
  const char* const error = error_text([&] {
    check_size(launch);
    if (counted_launches >= 0) {
      ++counted_launches;
      return;
    }
#if defined(REBASED_EMULATOR_TRACE)
    trace_launch(launch.kernel);
#endif
    release(launch_variable);
    Grid(launch, body, context).run();
  });
  acquire(end_variable);
  return error;
}

LaunchCounter::LaunchCounter() { counted_launches = 0; }
LaunchCounter::~LaunchCounter() { counted_launches = -1; }
int LaunchCounter::count() const { return counted_launches; }

void fail(const char* format, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  throw std::runtime_error(buffer);
}

void fail_at(Site site, const char* condition) { fail("%s:%d: %s", site.file, site.line, condition); }

}  // namespace rebased::emulator
