// What cuda/device/device.cuh calls when a kernel is compiled for the CPU: CUDA's vocabulary (threadIdx,
// dim3, float4) and the functions behind the primitives of device.cuh. It is the only file of the emulator
// that kernels see.
//
// Only the kernel's reads and writes of global and shared memory are inline here, since they must be compiled
// with the kernel, under its sanitizer. Everything else is in the runtime's own files, which are compiled
// without sanitizers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace rebased::emulator {

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};

// The indices of the CUDA thread that runs on this OS thread. Thread-locals of the initial-exec model would
// be faster, but the static CUDA runtime in the same library has a page of them, and together they do not fit
// into the static block that a process has for libraries loaded later.
inline thread_local uint3 threadIdx{0, 0, 0};
inline thread_local uint3 blockIdx{0, 0, 0};
inline thread_local dim3 blockDim{};
inline thread_local dim3 gridDim{};
inline thread_local unsigned linear_thread_index = 0;

inline int lane_index() { return static_cast<int>(linear_thread_index & 31); }

// The line of a kernel that calls a primitive. Primitives take a Site as their last argument, by default
// their caller's line.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// Ends the launch with an error text, by an exception that unwinds the CUDA thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void fail_at(Site site, const char* condition);

// ---- launches ----

// What the emulated device says of itself. It is an H100, so that launch plans come out as they do there;
// with REBASED_EMULATOR_SHARED_MEMORY (in KB, 227 by default) a block may have less shared memory.
struct Limits {
  int multiprocessors, compute_capability;
  size_t shared_memory_per_block;
};
const char* limits(Limits* limits);  // returns an error text, empty when all is well

struct Launch {
  const void* kernel;  // the kernel's address, by which the tracer tells kernels apart
  dim3 grid, block;
  size_t dynamic_shared_bytes;
};
// Runs body(context) once for every CUDA thread. Returns an error text, which stays valid until the next
// launch from this OS thread.
const char* launch(const Launch& launch, void (*body)(const void* context), const void* context);

// While one lives, launches by its OS thread are checked and counted, and do not run. For tests.
class LaunchCounter {
 public:
  LaunchCounter();
  ~LaunchCounter();
  LaunchCounter(const LaunchCounter&) = delete;
  int count() const;
};

// ---- shared memory ----

void* static_shared_memory(const void* declaration, size_t bytes);
void* dynamic_shared_memory();

// ---- barriers and warp collectives ----

void block_barrier(Site site);
void warp_barrier(unsigned mask, Site site);

// A warp collective: every lane in `mask` brings its operand. The last lane to come runs the operation on the
// operands of all lanes, of which those outside the mask are stale, and wakes the others.
using Operation = void (*)(void* const (&operands)[32], unsigned mask);
void warp_collective(Operation operation, const char* name, unsigned mask, void* operand, Site site);

struct Exchange {
  uint64_t value, result;
  int source_lane;
};
void exchange_lanes(void* const (&operands)[32], unsigned mask);

template <class T>
inline T shuffle(T value, int source_lane, unsigned mask, Site site) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles 4 or 8 bytes");
  Exchange exchange{0, 0, source_lane};
  __builtin_memcpy(&exchange.value, &value, sizeof(T));
  warp_collective(exchange_lanes, "shuffle", mask, &exchange, site);
  T result;
  __builtin_memcpy(&result, &exchange.result, sizeof(T));
  return result;
}

unsigned ballot(bool predicate, unsigned mask, Site site);

// ---- tensor cores ----

struct MatrixOperands {
  float* d;           // [4]
  const uint32_t* a;  // [4], or [2] where the depth is 8
  uint32_t b[2];
};
void mma_bfloat16(void* const (&operands)[32], unsigned mask);
void mma_half(void* const (&operands)[32], unsigned mask);
void mma_bfloat16_k8(void* const (&operands)[32], unsigned mask);
void mma_half_k8(void* const (&operands)[32], unsigned mask);
void mma_tf32(void* const (&operands)[32], unsigned mask);

inline void mma(Operation operation, float (&d)[4], const uint32_t* a, uint32_t b0, uint32_t b1, Site site) {
  MatrixOperands operands{d, a, {b0, b1}};
  warp_collective(operation, "mma", 0xffffffffu, &operands, site);
}

// `row` is the row that this lane addresses, one of the 8 * count rows.
void ldmatrix(uint32_t* registers, int count, const void* row, bool transposed, Site site);
// `row` is the row that this lane addresses, of four matrices.
void stmatrix(const uint32_t (&registers)[4], void* row, Site site);
uint32_t transpose_matrix(uint32_t matrix, Site site);

// ---- memory ----

// A copy happens at the wait that covers it. Until then its destination holds NaN.
void copy_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes, Site site);
void copy_async_commit();
void copy_async_wait(unsigned groups_left);

enum class Memory { global, shared };
// Fails unless the address is aligned to the size of the access and lies in the memory that it is said to lie
// in.
void check_address(const void* address, size_t bytes, Memory memory, const char* what, Site site);

template <size_t bytes>
struct Word;
template <>
struct Word<4> {
  using Type = uint32_t __attribute__((may_alias));
};
template <>
struct Word<8> {
  using Type = uint64_t __attribute__((may_alias));
};
template <>
struct Word<16> {
  using Type = uint32_t __attribute__((vector_size(16), may_alias));
};

// One access by the kernel, of 4, 8 or 16 bytes.
template <class Vector>
inline Vector load(const void* address, Memory memory, Site site) {
  using Bits = typename Word<sizeof(Vector)>::Type;
  check_address(address, sizeof(Vector), memory, "load", site);
  const Bits bits = *static_cast<const Bits*>(address);
  Vector value;
  __builtin_memcpy(&value, &bits, sizeof(Vector));
  return value;
}

template <class Vector>
inline void store(void* address, Vector value, Memory memory, Site site) {
  using Bits = typename Word<sizeof(Vector)>::Type;
  check_address(address, sizeof(Vector), memory, "store", site);
  Bits bits;
  __builtin_memcpy(&bits, &value, sizeof(Vector));
  *static_cast<Bits*>(address) = bits;
}

// ---- numbers, as the device rounds them ----

inline uint32_t float_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}
inline float bits_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  if (value != value) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = (half & 0x8000u) << 16, magnitude = half & 0x7fffu;
  if (magnitude >= 0x7c00u) return bits_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // a half's exponent in a float's place is off by 112: multiplying puts it right, for subnormals too
  return bits_float(sign | float_bits(bits_float(magnitude << 13) * 0x1p112f));
}

inline uint16_t float_to_half(float value) {
  const uint32_t sign = float_bits(value) >> 16 & 0x8000u, magnitude = float_bits(value) & 0x7fffffffu;
  if (value != value) return 0x7fff;
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // 65520 and up: infinity
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 leaves the wanted bits lowest, rounded by the adder
    return static_cast<uint16_t>(sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13);
}

inline uint32_t float_to_tf32(float value) {  // the magnitude's half unit is added: ties away from zero
  return value != value ? 0x7fffffffu : (float_bits(value) + 0x1000u) & 0xffffe000u;
}

}  // namespace rebased::emulator

namespace rebased::emulated {
using emulator::blockDim;
using emulator::blockIdx;
using emulator::dim3;
using emulator::float2;
using emulator::float4;
using emulator::gridDim;
using emulator::threadIdx;
using emulator::uint2;
using emulator::uint3;
using emulator::uint4;
}  // namespace rebased::emulated
