// The schedule of a block: which CUDA thread runs next, what happens at barriers and collectives, and errors
// that name the threads that wait.
#include "emulator/block.h"

#include <cstdarg>
#include <cstdio>
#include <iterator>
#include <stdexcept>

#include "emulator/sanitizer.h"

namespace rebased::emulator {

char launch_variable, end_variable;

namespace {

unsigned rotate_right(unsigned bits, unsigned by) { return bits >> by | bits << (-by & 31); }

bool same(Site a, Site b) { return a.line == b.line && a.file == b.file; }

const char* file_name(const char* path) {
  const char* name = path;
  for (; *path; ++path) {
    if (*path == '/') name = path + 1;
  }
  return name;
}

std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));
std::string text(const char* format, ...) {
  char buffer[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

}  // namespace

// ---- which thread runs ----

inline uint64_t Block::random() {  // xorshift
  random_state_ ^= random_state_ << 13;
  random_state_ ^= random_state_ >> 7;
  random_state_ ^= random_state_ << 17;
  return random_state_ >> 8;
}

// One of the set bits of `bits`, which is not 0: the first behind the bit `after`, cyclically, in the
// schedule's order.
inline unsigned Block::pick_bit(unsigned bits, unsigned after) {
  switch (order_.kind) {
    case Order::Kind::forward: {
      const unsigned later = bits & (~1u << after);
      return __builtin_ctz(later ? later : bits);
    }
    case Order::Kind::reverse: {
      const unsigned later = bits & ((1u << after) - 1);
      return 31 - __builtin_clz(later ? later : bits);
    }
    case Order::Kind::seeded:
      break;
  }
  const unsigned turn = random() & 31;
  return (__builtin_ctz(rotate_right(bits, turn)) + turn) & 31;
}

inline CudaThread& Block::pick() {
  // A warp goes on until all its lanes wait. A random schedule leaves the warp earlier now and then.
  const bool stay = ready_warps_ >> warp_ & 1 && (order_.kind != Order::Kind::seeded || random() % 4);
  if (!stay) {
    warp_ = pick_bit(ready_warps_, warp_);
    lane_ = order_.kind == Order::Kind::forward ? 31 : 0;
  }
  lane_ = pick_bit(warps_[warp_].ready, lane_);
  return *threads_[warp_ * 32 + lane_];
}

inline void Block::switch_to(CudaThread& thread) {
  CudaThread* const from = current_;
  if (from == &thread) return;
  current_ = &thread;
  threadIdx = thread.index;
  linear_thread_index = thread.linear;
  Fiber::switch_between(from ? from->fiber : os_thread_, thread.fiber);
}

void Block::leave() {
  CudaThread* const from = current_;
  current_ = nullptr;
  Fiber::switch_between(from->fiber, os_thread_);
}

void Block::yield() {
  if (failed()) return leave();
  if (!ready_warps_) {
    if (!live_) return leave();
    if (at_barrier_ != count_ || barrier_diverged_) {  // even where the others have returned
      report_deadlock();
      return leave();
    }
    open_barrier();
  }
  switch_to(pick());
}

inline void Block::make_ready(unsigned warp, unsigned lanes) {
  warps_[warp].ready |= lanes;
  ready_warps_ |= 1u << warp;
}

inline void Block::make_waiting(CudaThread& thread, const char* what, Site site) {
  const unsigned warp = thread.linear / 32;
  thread.site = site;
  thread.what = what;
  warps_[warp].ready &= ~(1u << (thread.linear & 31));
  if (!warps_[warp].ready) ready_warps_ &= ~(1u << warp);
}

// Makes the next pick take the schedule's first thread.
void Block::start_turn() { warp_ = lane_ = order_.kind == Order::Kind::forward ? 31 : 0; }

// ---- barriers and collectives ----

void Block::open_barrier() {
  at_barrier_ = 0;
  for (unsigned warp = 0; warp < warps_.size(); ++warp) {
    make_ready(warp, warps_[warp].lanes);
    note_convergence(warp);
  }
  start_turn();
}

void Block::barrier(Site site) {
  CudaThread& thread = current();
  char& variable = barrier_variables_[thread.barriers++ & 1];
  if (!at_barrier_++) {
    barrier_site_ = site;
    barrier_diverged_ = false;
  } else if (!same(site, barrier_site_)) {
    barrier_diverged_ = true;
  }
  make_waiting(thread, "sync_threads", site);
  release(variable);
  yield();
  acquire(variable);
}

void Block::collective(Operation operation, const char* name, unsigned mask, void* operand, Site site) {
  CudaThread& thread = current();
  Warp& warp = warps_[thread.linear / 32];
  const unsigned lane = thread.linear & 31;
  if (!(mask >> lane & 1)) {
    fail_at(site, text("%s: mask %08x lacks the calling lane %u", name, mask, lane).c_str());
  }
  Collective* pending = &warp.pending[0];
  while (pending->arrived && pending->mask != mask) {
    if (++pending == std::end(warp.pending)) fail_at(site, "too many different masks at once in one warp");
  }
  if (!pending->arrived) {
    char* const variable = &warp.order_variables[warp.next_order_variable++ % sizeof warp.order_variables];
    *pending = {mask, 0, operation, site, name, variable};
  }
  if (!same(pending->site, site) || pending->operation != operation) {
    fail("divergent warp collective in warp %u: lane %u is at %s (%s:%d), lanes %08x are at %s (%s:%d)",
         thread.linear / 32, lane, name, file_name(site.file), site.line, pending->arrived, pending->name,
         file_name(pending->site.file), pending->site.line);
  }

  // Only a barrier orders memory; a shuffle or an mma does not.
  char& variable = *pending->order_variable;
  if (!operation) release(variable);
  warp.operands[lane] = operand;
  pending->arrived |= 1u << lane;
  if (pending->arrived == mask) {
    pending->arrived = 0;
    if (operation) operation(warp.operands, mask);
    if (mask == warp.lanes) note_convergence(thread.linear / 32);
    make_ready(thread.linear / 32, mask);
  } else {
    make_waiting(thread, name, site);
    yield();
  }
  if (!operation) acquire(variable);
}

// ---- errors ----

void Block::set_error(const char* message) {
  const Unchecked unchecked;
  if (failed()) return;
  snprintf(error_, sizeof error_, "block (%u, %u, %u): %s", blockIdx.x, blockIdx.y, blockIdx.z, message);
}

std::string Block::waiting_threads() const {
  std::string report;
  std::vector<bool> reported(count_, false);
  for (unsigned first = 0; first < count_; ++first) {
    if (reported[first]) continue;
    const CudaThread& a = *threads_[first];
    const auto alike = [&](unsigned other) {
      const CudaThread& b = *threads_[other];
      return a.finished == b.finished && (a.finished || same(a.site, b.site));
    };
    report += a.finished ? std::string("\n  returned: threads")
                         : text("\n  at %s (%s:%d): threads", a.what, file_name(a.site.file), a.site.line);
    for (unsigned i = first; i < count_;) {  // one line for each run of threads in the same place
      unsigned end = i;
      for (; end < count_ && alike(end); ++end) reported[end] = true;
      if (end > i) report += end > i + 1 ? text(" %u-%u", i, end - 1) : text(" %u", i);
      i = end + 1;
    }
  }
  return report;
}

void Block::report_deadlock() {
  set_error(("divergent synchronisation, nobody can go on:" + waiting_threads()).c_str());
}

// ---- a block from begin to end ----

void Block::run_thread() {
  std::string error;
  try {
    body_(context_);
    const CudaThread& thread = current();
    if (thread.copies_done < thread.copies.size()) fail("returned with asynchronous copies never waited for");
  } catch (const std::exception& exception) {
    error = exception.what();
  } catch (...) {
    error = "an exception that is no std::exception";
  }
  if (error.empty()) return;
  const uint3 i = current().index;
  set_error((text("thread (%u, %u, %u): ", i.x, i.y, i.z) + error).c_str());
}

void Block::thread_main() {
  Fiber::entered();
  for (;;) {  // once for every block
    Block& block = *current_block;
    acquire(launch_variable);
    acquire(block.block_variables_[(block.turn_ + 1) & 1]);
    block.run_thread();
    release(end_variable);
    release(block.block_variables_[block.turn_ & 1]);
    CudaThread& thread = block.current();
    thread.finished = true;
    block.make_waiting(thread, "", {});
    --block.live_;
    block.yield();
  }
}

void Block::prepare(const Launch& launch, uint64_t block_index) {
  const dim3 grid = launch.grid, block = launch.block;
  count_ = live_ = block.x * block.y * block.z;
  const uint64_t layer = uint64_t{grid.x} * grid.y;
  blockDim = block;
  gridDim = grid;
  blockIdx = {static_cast<unsigned>(block_index % grid.x),
              static_cast<unsigned>(block_index % layer / grid.x),
              static_cast<unsigned>(block_index / layer)};

  while (threads_.size() < count_) threads_.push_back(std::make_unique<CudaThread>());
  warps_.assign((count_ + 31) / 32, Warp{});
  ready_warps_ = at_barrier_ = 0;
  barrier_diverged_ = false;
  for (unsigned i = 0; i < count_; ++i) {
    CudaThread& thread = *threads_[i];
    if (!thread.fiber.started()) thread.fiber.start(thread_main, i);
    thread.index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
    thread.linear = i;
    thread.finished = false;
    thread.barriers = 0;
    thread.copies.clear();
    thread.copies_done = 0;
    thread.copy_groups = 0;
    warps_[i / 32].lanes |= 1u << (i & 31);
  }
  for (unsigned warp = 0; warp < warps_.size(); ++warp) make_ready(warp, warps_[warp].lanes);
  random_state_ = ((order_.seed + 1) * 0x9e3779b97f4a7c15ull ^ (block_index + 1) * 0xd1b54a32d192ed03ull) | 1;
  start_turn();
}

void Block::run(const Launch& launch, size_t shared_memory_limit, Order order, void (*body)(const void*),
                const void* context, uint64_t block_index) {
  order_ = order;
  body_ = body;
  context_ = context;
  error_[0] = 0;
  ++turn_;
  prepare(launch, block_index);
  try {
    shared_.reset(launch.dynamic_shared_bytes, shared_memory_limit);
    current_block = this;
    switch_to(pick());  // comes back when all threads have returned, or on an error
    current_block = nullptr;
    for (unsigned warp = 0; warp < warps_.size(); ++warp) note_convergence(warp);
    if (!failed()) shared_.check_gaps();
  } catch (const std::runtime_error& error) {
    set_error(error.what());
  }
  if (!failed()) return;
  for (const auto& thread : threads_) thread->fiber.abandon();
  throw std::runtime_error(error_);
}

}  // namespace rebased::emulator
