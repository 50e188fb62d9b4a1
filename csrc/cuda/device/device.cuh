// Everything that a kernel needs beyond plain C++: attributes, shared memory, 16-bit floats, warp
// collectives, tensor cores, asynchronous copies, and the launch (launch.cuh, which this file includes). This
// is the only file with inline PTX, and the only one where the two ways to compile a kernel differ:
//   nvcc                    REBASED_BACKEND is cuda
//   g++ -DREBASED_EMULATED  REBASED_BACKEND is emulated; each primitive is a call into csrc/emulator
// Kernels live in namespace rebased::REBASED_BACKEND, so that both can be linked into one library.
// threadIdx, blockIdx, blockDim, gridDim, dim3 and the vector types (float2, float4, uint2, uint4) have
// CUDA's names in both.
//
// Comments describe fragments for lane l of a warp, with g = l / 4 and t = l % 4. A 32-bit register of a
// 16-bit type holds two neighbours, the one with the lower index in its low half.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(REBASED_EMULATED)
#include "emulator/runtime.h"
#define REBASED_BACKEND emulated
#define HOST_DEVICE inline
#define DEVICE inline
#define PRIMITIVE inline __attribute__((always_inline))  // so that a report names the kernel's line
#define KERNEL
#define LAUNCH_BOUNDS(max_threads, min_blocks)
#define UNROLL
#define NO_UNROLL
#define REBASED_SITE , emulator::Site site = emulator::Site::here()
#else
#include <cuda_runtime.h>
#define REBASED_BACKEND cuda
#define HOST_DEVICE __host__ __device__ __forceinline__
#define DEVICE __device__ __forceinline__
#define PRIMITIVE __device__ __forceinline__
#define KERNEL __global__
#define LAUNCH_BOUNDS(max_threads, min_blocks) __launch_bounds__(max_threads, min_blocks)
#define UNROLL _Pragma("unroll")
#define NO_UNROLL _Pragma("unroll 1")
#define REBASED_SITE
#endif

// SHARED_MEMORY(type, name, count) is a static array, 16-byte aligned. DYNAMIC_SHARED_MEMORY(type, name) is
// the dynamic array, 128-byte aligned, of as many bytes as the launch gives; it is the same array wherever a
// kernel declares it. The content of both is undefined at first, and NaN under emulation.
#if defined(REBASED_EMULATED)
#define SHARED_MEMORY(type, name, count)                  \
  static char name##_declaration;                         \
  type(&name)[count] = *reinterpret_cast<type(*)[count]>( \
      ::rebased::emulator::static_shared_memory(&name##_declaration, sizeof(type) * (count)))
#define DYNAMIC_SHARED_MEMORY(type, name) \
  type* const name = static_cast<type*>(::rebased::emulator::dynamic_shared_memory())
#else
#define SHARED_MEMORY(type, name, count) __shared__ __align__(16) type name[count]
#define DYNAMIC_SHARED_MEMORY(type, name)                          \
  extern __shared__ __align__(128) unsigned char dynamic_shared[]; \
  type* const name = reinterpret_cast<type*>(dynamic_shared)
#endif

// DEVICE_ASSERT(condition) ends the launch with an error where the condition is false; under nvcc it is
// assert.
#if defined(REBASED_EMULATED)
#define DEVICE_ASSERT(condition) \
  ((condition) ? void() : ::rebased::emulator::fail_at(::rebased::emulator::Site::here(), #condition))
#else
#include <cassert>
#define DEVICE_ASSERT(condition) assert(condition)
#endif

namespace rebased::REBASED_BACKEND {

constexpr unsigned full_warp = 0xffffffffu;

// threadIdx.x, read from the hardware again. What is computed from it is then not kept in registers from one
// call to the next, as the compiler would keep a value that is the same in every round of a loop.
PRIMITIVE int thread_index_anew() {
#if defined(REBASED_EMULATED)
  return static_cast<int>(threadIdx.x);
#else
  int index;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(index));
  return index;
#endif
}

struct half_t {
  uint16_t bits;
};
struct bfloat16_t {
  uint16_t bits;
};
template <class T>
constexpr bool is_bfloat16 = false;
template <>
constexpr bool is_bfloat16<bfloat16_t> = true;

template <class To, class From>
HOST_DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
HOST_DEVICE constexpr T minimum(T a, T b) {
  return b < a ? b : a;
}
template <class T>
HOST_DEVICE constexpr T maximum(T a, T b) {
  return a < b ? b : a;
}

// ---- numbers ----

PRIMITIVE float to_float(float value) { return value; }
PRIMITIVE float to_float(bfloat16_t value) {
  return bit_cast<float>(static_cast<uint32_t>(value.bits) << 16);
}
PRIMITIVE float to_float(half_t value) {
#if defined(REBASED_EMULATED)
  return emulator::half_to_float(value.bits);
#else
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
  return result;
#endif
}

// from_float<T>(value) rounds to the nearest T, ties to even.
template <class T>
PRIMITIVE T from_float(float value);
template <>
PRIMITIVE float from_float<float>(float value) {
  return value;
}
template <>
PRIMITIVE bfloat16_t from_float<bfloat16_t>(float value) {
#if defined(REBASED_EMULATED)
  return {emulator::float_to_bfloat16(value)};
#else
  bfloat16_t result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#endif
}
template <>
PRIMITIVE half_t from_float<half_t>(float value) {
#if defined(REBASED_EMULATED)
  return {emulator::float_to_half(value)};
#else
  half_t result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(value));
  return result;
#endif
}

// convert<To>(value) converts between any two of half_t, bfloat16_t, float and double; 16-bit types go
// through float.
template <class To>
struct Converter {
  template <class From>
  static PRIMITIVE To from(From value) {
    return from_float<To>(to_float(value));
  }
  static PRIMITIVE To from(double value) { return from_float<To>(static_cast<float>(value)); }
};
template <>
struct Converter<double> {
  template <class From>
  static PRIMITIVE double from(From value) {
    return to_float(value);
  }
  static PRIMITIVE double from(double value) { return value; }
};
template <class To, class From>
PRIMITIVE To convert(From value) {
  return Converter<To>::from(value);
}

// 1 / value. fast_reciprocal is off by at most 1 unit in the last place and takes subnormals for 0.
PRIMITIVE float reciprocal(float value) { return 1.0f / value; }
PRIMITIVE double reciprocal(double value) { return 1.0 / value; }
PRIMITIVE float fast_reciprocal(float value) {
#if defined(REBASED_EMULATED)
  return 1.0f / value;
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#endif
}

// 1 / sqrt(value), off by at most 2 units in the last place in float and 1 in double.
PRIMITIVE float reciprocal_sqrt(float value) {
#if defined(REBASED_EMULATED)
  return 1.0f / std::sqrt(value);
#else
  return rsqrtf(value);
#endif
}
PRIMITIVE double reciprocal_sqrt(double value) {
#if defined(REBASED_EMULATED)
  return 1.0 / std::sqrt(value);
#else
  return ::rsqrt(value);
#endif
}

// The square root of value >= 0, off by at most 1 unit in the last place; takes subnormals for 0.
PRIMITIVE float fast_square_root(float value) {
#if defined(REBASED_EMULATED)
  return std::sqrt(value);
#else
  float result;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#endif
}

// ---- pairs of 16-bit floats in one register; T is bfloat16_t or half_t ----

template <class T>
PRIMITIVE uint32_t pack(float low, float high) {  // rounds to nearest even
#if defined(REBASED_EMULATED)
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
#else
  uint32_t result;
  if constexpr (is_bfloat16<T>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  }
  return result;
#endif
}

template <class T>
PRIMITIVE float2 unpack(uint32_t pair) {
  return {to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})};
}

// The product and the sum of two pairs, each rounded once, to nearest even. Infinities are not saturated,
// subnormals are not flushed.
template <class T>
PRIMITIVE uint32_t multiply_pairs(uint32_t a, uint32_t b) {
#if defined(REBASED_EMULATED)
  const float2 x = unpack<T>(a), y = unpack<T>(b);
  return pack<T>(x.x * y.x, x.y * y.y);  // float holds the products exactly
#else
  uint32_t result;
  if constexpr (!is_bfloat16<T>) {
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  } else {
#if __CUDA_ARCH__ >= 900
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(0x80008000u));  // + -0
#endif
  }
  return result;
#endif
}

template <class T>
PRIMITIVE uint32_t add_pairs(uint32_t a, uint32_t b) {
#if defined(REBASED_EMULATED)
  const float2 x = unpack<T>(a), y = unpack<T>(b);
  return pack<T>(x.x + y.x, x.y + y.y);  // float has enough digits for the second rounding to be harmless
#else
  uint32_t result;
  if constexpr (!is_bfloat16<T>) {
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  } else {
#if __CUDA_ARCH__ >= 900
    asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
#else
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(0x3f803f80u), "r"(b));  // a * 1 + b
#endif
  }
  return result;
#endif
}

// A float in the form that tensor cores want for tf32: rounded to 10 bits of mantissa, ties away from zero.
PRIMITIVE uint32_t to_tf32(float value) {
#if defined(REBASED_EMULATED)
  return emulator::float_to_tf32(value);
#else
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
#endif
}

// ---- order and exchange between threads ----

// Barriers. All threads of the block, or all lanes of the warp in `mask`, must come to the same line.
#if defined(REBASED_EMULATED)
PRIMITIVE void sync_threads(emulator::Site site = emulator::Site::here()) { emulator::block_barrier(site); }
#else
PRIMITIVE void sync_threads() { __syncthreads(); }
#endif

PRIMITIVE void sync_warp(unsigned mask = full_warp REBASED_SITE) {
#if defined(REBASED_EMULATED)
  emulator::warp_barrier(mask, site);
#else
  __syncwarp(mask);
#endif
}

#if !defined(REBASED_EMULATED)
template <class T, class Shuffle>
PRIMITIVE T shuffle_bits(T value, Shuffle shuffle) {
  if constexpr (sizeof(T) == 4) {
    return bit_cast<T>(shuffle(bit_cast<int>(value)));
  } else {
    return bit_cast<T>(shuffle(bit_cast<long long>(value)));
  }
}
#endif

// The value of lane `source_lane`. T is any type of 4 or 8 bytes. Every lane in `mask` must call.
template <class T>
PRIMITIVE T shuffle(T value, int source_lane, unsigned mask = full_warp REBASED_SITE) {
#if defined(REBASED_EMULATED)
  return emulator::shuffle(value, source_lane & 31, mask, site);
#else
  return shuffle_bits(value, [=](auto bits) { return __shfl_sync(mask, bits, source_lane); });
#endif
}

// The value of lane l ^ lane_mask.
template <class T>
PRIMITIVE T shuffle_xor(T value, int lane_mask, unsigned mask = full_warp REBASED_SITE) {
#if defined(REBASED_EMULATED)
  return emulator::shuffle(value, emulator::lane_index() ^ lane_mask, mask, site);
#else
  return shuffle_bits(value, [=](auto bits) { return __shfl_xor_sync(mask, bits, lane_mask); });
#endif
}

// The value of lane l - delta; the first delta lanes keep their own.
template <class T>
PRIMITIVE T shuffle_up(T value, int delta, unsigned mask = full_warp REBASED_SITE) {
#if defined(REBASED_EMULATED)
  const int lane = emulator::lane_index();
  return emulator::shuffle(value, lane < delta ? lane : lane - delta, mask, site);
#else
  return shuffle_bits(value, [=](auto bits) { return __shfl_up_sync(mask, bits, delta); });
#endif
}

// The value of lane l + delta; the last delta lanes keep their own.
template <class T>
PRIMITIVE T shuffle_down(T value, int delta, unsigned mask = full_warp REBASED_SITE) {
#if defined(REBASED_EMULATED)
  const int lane = emulator::lane_index();
  return emulator::shuffle(value, lane + delta > 31 ? lane : lane + delta, mask, site);
#else
  return shuffle_bits(value, [=](auto bits) { return __shfl_down_sync(mask, bits, delta); });
#endif
}

// A word whose bit l is the predicate of lane l, or 0 where the lane is not in `mask`.
PRIMITIVE unsigned ballot(bool predicate, unsigned mask = full_warp REBASED_SITE) {
#if defined(REBASED_EMULATED)
  return emulator::ballot(predicate, mask, site);
#else
  return __ballot_sync(mask, predicate);
#endif
}

// ---- tensor cores ----

// Loads N = 1, 2 or 4 matrices of 8x8 16-bit elements from shared memory. Lane 8 m + r addresses row r of
// matrix m, which is 16 aligned bytes; the addresses of lanes from 8 N on are ignored. Lane l gets, in
// registers[m], row g and columns 2t and 2t + 1 of matrix m, or by the transposed load rows 2t and 2t + 1 of
// column g.
template <int N>
PRIMITIVE void ldmatrix(uint32_t (&registers)[N], const void* row REBASED_SITE) {
  static_assert(N == 1 || N == 2 || N == 4);
#if defined(REBASED_EMULATED)
  emulator::ldmatrix(registers, N, row, false, site);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (N == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0])
                 : "r"(address)
                 : "memory");
  }
#endif
}

template <int N>
PRIMITIVE void ldmatrix_transposed(uint32_t (&registers)[N], const void* row REBASED_SITE) {
  static_assert(N == 1 || N == 2 || N == 4);
#if defined(REBASED_EMULATED)
  emulator::ldmatrix(registers, N, row, true, site);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (N == 4) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
                 : "r"(address)
                 : "memory");
  } else if constexpr (N == 2) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(registers[0]), "=r"(registers[1])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(registers[0])
                 : "r"(address)
                 : "memory");
  }
#endif
}

// Transposes one 8x8 matrix of 16-bit elements that the lanes hold as ldmatrix leaves it.
PRIMITIVE uint32_t transpose_matrix(uint32_t matrix REBASED_SITE) {
#if defined(REBASED_EMULATED)
  return emulator::transpose_matrix(matrix, site);
#else
  uint32_t result;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(result) : "r"(matrix));
  return result;
#endif
}

// Stores a tile (16, 16) of 16-bit elements to shared memory, at 16 aligned bytes. Its rows lie row_bytes
// apart, and row 8 begins lower_bytes behind row 0. Lane l brings two C fragments of mma, packed:
//   registers[0]  row g, columns 2t, 2t + 1        registers[1]  row g + 8, the same columns
//   registers[2]  row g, columns 2t + 8, 2t + 9    registers[3]  row g + 8, the same columns
template <int row_bytes, int lower_bytes = 8 * row_bytes>
PRIMITIVE void stmatrix(void* tile, const uint32_t (&registers)[4] REBASED_SITE) {
  static_assert(row_bytes % 16 == 0 && lower_bytes % 16 == 0);
  const int lane = static_cast<int>(threadIdx.x % 32);
#if defined(REBASED_EMULATED) || __CUDA_ARCH__ >= 900
  const int place = (lane & 7) * row_bytes + (lane & 8 ? lower_bytes : 0) + (lane & 16);
#endif
#if defined(REBASED_EMULATED)
  emulator::stmatrix(registers, static_cast<char*>(tile) + place, site);
#elif __CUDA_ARCH__ >= 900
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(static_cast<char*>(tile) + place));
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
               "r"(registers[0]), "r"(registers[1]), "r"(registers[2]), "r"(registers[3])
               : "memory");
#else
  char* const own = static_cast<char*>(tile) + lane / 4 * row_bytes + lane % 4 * 4;
  UNROLL for (int i = 0; i < 4; ++i) {
    *reinterpret_cast<uint32_t*>(own + (i & 1 ? lower_bytes : 0) + (i & 2 ? 16 : 0)) = registers[i];
  }
#endif
}

// d += a b with a (16 x 16) and b (16 x 8) of T (bfloat16_t or half_t), d (16 x 8) in float32.
//   a[0]  row g,     columns 2t, 2t + 1        a[1]  row g + 8, the same columns
//   a[2]  row g,     columns 2t + 8, 2t + 9    a[3]  row g + 8, the same columns
//   b0    rows 2t, 2t + 1 of column g          b1    rows 2t + 8, 2t + 9 of column g
//   d[0], d[1]  row g, columns 2t, 2t + 1      d[2], d[3]  row g + 8, the same columns
template <class T>
PRIMITIVE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1 REBASED_SITE) {
#if defined(REBASED_EMULATED)
  emulator::mma(is_bfloat16<T> ? emulator::mma_bfloat16 : emulator::mma_half, d, a, b0, b1, site);
#else
  if constexpr (is_bfloat16<T>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#endif
}

// The same with a (16 x 8) and b (8 x 8): a[0], a[1] and b0 alone.
template <class T>
PRIMITIVE void mma_m16n8k8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0 REBASED_SITE) {
#if defined(REBASED_EMULATED)
  const uint32_t a[2] = {a0, a1};
  emulator::mma(is_bfloat16<T> ? emulator::mma_bfloat16_k8 : emulator::mma_half_k8, d, a, b0, 0, site);
#else
  if constexpr (is_bfloat16<T>) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a0), "r"(a1), "r"(b0));
  }
#endif
}

// d += a b with a (16 x 8) and b (8 x 8) in tf32 (see to_tf32), d (16 x 8) in float32.
//   a[0]  (row g, column t)        a[1]  (row g + 8, column t)
//   a[2]  (row g, column t + 4)    a[3]  (row g + 8, column t + 4)
//   b0    (row t, column g)        b1    (row t + 4, column g)         d as above
PRIMITIVE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                uint32_t b1 REBASED_SITE) {
#if defined(REBASED_EMULATED)
  emulator::mma(emulator::mma_tf32, d, a, b0, b1, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

// ---- memory ----

// Starts a copy of `bytes` = 16, 8 or 4 bytes from global to shared memory, both aligned to as many bytes.
// Only the first source_bytes are read, which may be 0; the rest of the destination is filled with zeros. The
// destination is undefined until copy_async_wait. Then this thread sees it, and other threads after a
// barrier.
template <int bytes>
PRIMITIVE void copy_async(void* shared, const void* global, int source_bytes = bytes REBASED_SITE) {
  static_assert(bytes == 16 || bytes == 8 || bytes == 4);
#if defined(REBASED_EMULATED)
  emulator::copy_async(shared, global, bytes, source_bytes, site);
#else
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (bytes == 16) {  // does not go through the L1 cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(global),
                 "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(address), "l"(global), "n"(bytes),
                 "r"(source_bytes)
                 : "memory");
  }
#endif
}

// Makes a group of the copies that this thread has started since the last commit.
PRIMITIVE void copy_async_commit() {
#if defined(REBASED_EMULATED)
  emulator::copy_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most the last `groups_left` groups of this thread are still under way.
template <int groups_left>
PRIMITIVE void copy_async_wait() {
#if defined(REBASED_EMULATED)
  emulator::copy_async_wait(groups_left);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
#endif
}

// One access to global memory, of 4, 8 or 16 aligned bytes: Vector is uint32_t, float, uint2, float2, uint4
// or float4.
template <class Vector>
PRIMITIVE Vector load_global(const void* address REBASED_SITE) {
#if defined(REBASED_EMULATED)
  return emulator::load<Vector>(address, emulator::Memory::global, site);
#else
  if constexpr (sizeof(Vector) == 16) {
    uint4 bits;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
                 : "l"(address)
                 : "memory");
    return bit_cast<Vector>(bits);
  } else if constexpr (sizeof(Vector) == 8) {
    uint2 bits;
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(bits.x), "=r"(bits.y) : "l"(address) : "memory");
    return bit_cast<Vector>(bits);
  } else {
    return *static_cast<const Vector*>(address);
  }
#endif
}

// The same load for data that nobody writes while the kernel runs.
template <class Vector>
PRIMITIVE Vector load_constant(const void* address REBASED_SITE) {
#if defined(REBASED_EMULATED)
  return emulator::load<Vector>(address, emulator::Memory::global, site);
#else
  return __ldg(static_cast<const Vector*>(address));
#endif
}

template <class Vector>
PRIMITIVE void store_global(void* address, Vector value REBASED_SITE) {
#if defined(REBASED_EMULATED)
  emulator::store(address, value, emulator::Memory::global, site);
#else
  if constexpr (sizeof(Vector) == 16) {
    const uint4 bits = bit_cast<uint4>(value);
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(bits.x), "r"(bits.y),
                 "r"(bits.z), "r"(bits.w)
                 : "memory");
  } else if constexpr (sizeof(Vector) == 8) {
    const uint2 bits = bit_cast<uint2>(value);
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(address), "r"(bits.x), "r"(bits.y) : "memory");
  } else {
    *static_cast<Vector*>(address) = value;
  }
#endif
}

// The same accesses to shared memory.
template <class Vector>
PRIMITIVE Vector load_shared(const void* address REBASED_SITE) {
#if defined(REBASED_EMULATED)
  return emulator::load<Vector>(address, emulator::Memory::shared, site);
#else
  return *static_cast<const Vector*>(address);
#endif
}

template <class Vector>
PRIMITIVE void store_shared(void* address, Vector value REBASED_SITE) {
#if defined(REBASED_EMULATED)
  emulator::store(address, value, emulator::Memory::shared, site);
#else
  *static_cast<Vector*>(address) = value;
#endif
}

}  // namespace rebased::REBASED_BACKEND

#include "cuda/device/launch.cuh"  // LAUNCH, Launches, device_attributes
