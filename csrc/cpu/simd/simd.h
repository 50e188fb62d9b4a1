// The vector type of one instruction set: GCC vector extensions of REBASED_VECTOR_BYTES, and the few
// operations on whole vectors that operators do not give. It includes the compiler's intrinsics and nothing
// of the backend.
//
// Everything in the headers of csrc/cpu that becomes code lives in namespace rebased::cpu::REBASED_ISA, and
// no std:: template is used: an inline function compiled for AVX-512 under a shared name could be the copy
// that the linker keeps for every other translation unit.
#pragma once

#include <cstdint>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if !defined(REBASED_ISA) || !defined(REBASED_VECTOR_BYTES)
#error "define REBASED_ISA and REBASED_VECTOR_BYTES before including the kernels"
#endif

#define REBASED_INLINE inline __attribute__((always_inline))
#define REBASED_INLINE_LAMBDA __attribute__((always_inline))  // after a lambda's parameters

namespace rebased::cpu::REBASED_ISA {

typedef float FloatVector __attribute__((vector_size(REBASED_VECTOR_BYTES)));
typedef double DoubleVector __attribute__((vector_size(REBASED_VECTOR_BYTES)));
typedef int32_t Int32Vector __attribute__((vector_size(REBASED_VECTOR_BYTES)));
typedef int64_t Int64Vector __attribute__((vector_size(REBASED_VECTOR_BYTES)));
typedef uint32_t Uint32Vector __attribute__((vector_size(REBASED_VECTOR_BYTES)));

template <class T>
struct Simd;
template <>
struct Simd<float> {
  using Vector = FloatVector;
  using IntVector = Int32Vector;
  using Int = int32_t;
};
template <>
struct Simd<double> {
  using Vector = DoubleVector;
  using IntVector = Int64Vector;
  using Int = int64_t;
};
template <class T>
using Vector = typename Simd<T>::Vector;
template <class T>
using IntVector = typename Simd<T>::IntVector;

template <class T>
constexpr int kWidth = REBASED_VECTOR_BYTES / int(sizeof(T));  // elements of a vector
constexpr int kVectors = 2;                                    // side by side in a tile
template <class T>
constexpr int kLanes = kVectors * kWidth<T>;  // tokens of a block, and columns of a panel of values
// Rows of a tile: half of the registers hold its kRows * kVectors sums, so that operands find room in the
// others.
constexpr int kRows = REBASED_VECTOR_BYTES == 64 ? 8 : 4;
// Rows of one product with a state, to which features are padded: one tile, or with AMX two by two registers.
#if defined(__AMX_BF16__)
constexpr int kProductRows = 32;
#else
constexpr int kProductRows = kRows;
#endif

template <class T>
REBASED_INLINE T smaller(T a, T b) {
  return b < a ? b : a;
}
template <class T>
REBASED_INLINE T larger(T a, T b) {
  return a < b ? b : a;
}
REBASED_INLINE int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

template <class T>
REBASED_INLINE Vector<T> load(const T* source) {
  Vector<T> v;
  __builtin_memcpy(&v, source, sizeof v);
  return v;
}
template <class T>
REBASED_INLINE void store(T* target, Vector<T> v) {
  __builtin_memcpy(target, &v, sizeof v);
}
template <class T>
REBASED_INLINE Vector<T> broadcast(T s) {
  return s - Vector<T>{};
}

template <class T, int... L>
REBASED_INLINE IntVector<T> lane_numbers(std::integer_sequence<int, L...>) {
  return IntVector<T>{L...};
}
// 0, 1, 2, ... in the integer type as wide as T.
template <class T>
REBASED_INLINE IntVector<T> lane_numbers() {
  return lane_numbers<T>(std::make_integer_sequence<int, kWidth<T>>{});
}

// The compiler does not vectorise a square root that may set errno, so this one is by intrinsics.
#if REBASED_VECTOR_BYTES == 64 && defined(__AVX512F__)
REBASED_INLINE FloatVector square_root(FloatVector v) {
  return (FloatVector)_mm512_maskz_sqrt_ps(0xffff, (__m512)v);
}
REBASED_INLINE DoubleVector square_root(DoubleVector v) {
  return (DoubleVector)_mm512_maskz_sqrt_pd(0xff, (__m512d)v);
}
#elif REBASED_VECTOR_BYTES == 32 && defined(__AVX__)
REBASED_INLINE FloatVector square_root(FloatVector v) { return (FloatVector)_mm256_sqrt_ps((__m256)v); }
REBASED_INLINE DoubleVector square_root(DoubleVector v) { return (DoubleVector)_mm256_sqrt_pd((__m256d)v); }
#elif REBASED_VECTOR_BYTES == 16 && defined(__aarch64__)
REBASED_INLINE FloatVector square_root(FloatVector v) { return (FloatVector)vsqrtq_f32((float32x4_t)v); }
REBASED_INLINE DoubleVector square_root(DoubleVector v) { return (DoubleVector)vsqrtq_f64((float64x2_t)v); }
#else
REBASED_INLINE FloatVector square_root(FloatVector v) {
  for (int l = 0; l < kWidth<float>; l++) v[l] = __builtin_sqrtf(v[l]);
  return v;
}
REBASED_INLINE DoubleVector square_root(DoubleVector v) {
  for (int l = 0; l < kWidth<double>; l++) v[l] = __builtin_sqrt(v[l]);
  return v;
}
#endif

template <class T, int Distance, int... L>
REBASED_INLINE void exchange(Vector<T>& a, Vector<T>& b, std::integer_sequence<int, L...>) {
  const Vector<T> low = __builtin_shufflevector(a, b, ((L & Distance) ? kWidth<T> + L - Distance : L)...);
  const Vector<T> high = __builtin_shufflevector(a, b, ((L & Distance) ? kWidth<T> + L : L + Distance)...);
  a = low, b = high;
}
template <class T, int Distance>
REBASED_INLINE void exchange_blocks(Vector<T> (&rows)[kWidth<T>]) {
#pragma GCC unroll 16
  for (int i = 0; i < kWidth<T>; i++)
    if (!(i & Distance))
      exchange<T, Distance>(rows[i], rows[i + Distance], std::make_integer_sequence<int, kWidth<T>>{});
}
// Transposes a square of kWidth vectors: swaps the off-diagonal blocks, halving the block size each time.
template <class T>
REBASED_INLINE void transpose(Vector<T> (&rows)[kWidth<T>]) {
  if constexpr (kWidth<T> > 8) exchange_blocks<T, 8>(rows);
  if constexpr (kWidth<T> > 4) exchange_blocks<T, 4>(rows);
  if constexpr (kWidth<T> > 2) exchange_blocks<T, 2>(rows);
  exchange_blocks<T, 1>(rows);
}

template <class T, int Distance, int... L>
REBASED_INLINE Vector<T> fold(Vector<T> v, std::integer_sequence<int, L...>) {
  return v + __builtin_shufflevector(v, v, (L ^ Distance)...);
}
template <class T, int Distance = kWidth<T> / 2>
REBASED_INLINE T horizontal_sum(Vector<T> v) {
  if constexpr (Distance == 0)
    return v[0];
  else
    return horizontal_sum<T, Distance / 2>(
        fold<T, Distance>(v, std::make_integer_sequence<int, kWidth<T>>{}));
}

// Lane l of the result: the sum of lanes l, l + Distance, l + 2 Distance, ...
template <class T, int Distance>
REBASED_INLINE Vector<T> fold_lanes(Vector<T> v) {
  if constexpr (Distance == kWidth<T>)
    return v;
  else
    return fold_lanes<T, Distance * 2>(fold<T, Distance>(v, std::make_integer_sequence<int, kWidth<T>>{}));
}
// Lane l of the result: the sum of row l. Halves of two rows are added crosswise until one vector is left.
template <class T, int Distance, int... L>
REBASED_INLINE Vector<T> add_crosswise(Vector<T> a, Vector<T> b, std::integer_sequence<int, L...>) {
  return __builtin_shufflevector(a, b, ((L & Distance) ? kWidth<T> + L - Distance : L)...) +
         __builtin_shufflevector(a, b, ((L & Distance) ? kWidth<T> + L : L + Distance)...);
}
template <class T, int Distance = kWidth<T> / 2>
REBASED_INLINE Vector<T> sum_rows(Vector<T>* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < Distance; i++)
    rows[i] =
        add_crosswise<T, Distance>(rows[i], rows[i + Distance], std::make_integer_sequence<int, kWidth<T>>{});
  if constexpr (Distance > 1)
    return sum_rows<T, Distance / 2>(rows);
  else
    return rows[0];
}
// sums[i] = the sum over the lanes of vector(i), which is asked for in order; writes whole vectors.
template <class T, class Body>
REBASED_INLINE void sum_tokens(int tokens, T* sums, const Body& vector) {
  for (int first = 0; first < tokens; first += kWidth<T>) {
    Vector<T> rows[kWidth<T>];
    if (first + kWidth<T> <= tokens) {
#pragma GCC unroll 16
      for (int i = 0; i < kWidth<T>; i++) rows[i] = vector(first + i);
    } else {
      for (int i = 0; i < kWidth<T>; i++) rows[i] = first + i < tokens ? vector(first + i) : Vector<T>{};
    }
    store(sums + first, sum_rows<T>(rows));
  }
}
// target[r] += the sum over the lanes of rows[r], r < Count.
template <class T, int Count>
REBASED_INLINE void add_row_sums(Vector<T>* rows, T* target) {
  if constexpr (Count >= kWidth<T>) {
    for (int r = 0; r < Count; r += kWidth<T>) store(target + r, load(target + r) + sum_rows<T>(rows + r));
  } else {
    // lane l of the crosswise sum belongs to row l mod Count
    typedef T Part __attribute__((vector_size(Count * sizeof(T))));
    const Vector<T> sums = fold_lanes<T, Count>(sum_rows<T, Count / 2>(rows));
    Part part, total;
    __builtin_memcpy(&part, &sums, sizeof part);
    __builtin_memcpy(&total, target, sizeof total);
    total += part;
    __builtin_memcpy(target, &total, sizeof total);
  }
}

// exp(x) for x <= 0, to about 1 unit in the last place, and never below the smallest normal number: it is
// 2^n exp(r) with |r| <= ln(2) / 2, where exp(r) is a Taylor polynomial.
template <class T>
REBASED_INLINE Vector<T> exp_nonpositive(Vector<T> x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr T lowest = single ? T(-87.3) : T(-708.3), log2_e = T(1.4426950408889634074);
  constexpr T ln2_high = single ? T(0.693359375) : T(6.93147180369123816490e-01);
  constexpr T ln2_low = single ? T(-2.12194440e-4) : T(1.90821492927058770002e-10);
  constexpr T magic = single ? T(12582912) : T(6755399441055744);  // 1.5 * 2^mantissa bits: rounds to integer
  constexpr int mantissa_bits = single ? 23 : 52, degree = single ? 7 : 13;
  x = x < lowest ? broadcast<T>(lowest) : x;
  const Vector<T> shifted = x * log2_e + magic;
  const Vector<T> n = shifted - magic;
  const Vector<T> r = (x - n * ln2_high) - n * ln2_low;
  T factorial = 1;
  for (int i = 2; i <= degree; i++) factorial *= T(i);
  Vector<T> sum = broadcast<T>(1 / factorial);
#pragma GCC unroll 16
  for (int i = degree; i > 0; i--) {
    factorial /= T(i);
    sum = sum * r + 1 / factorial;
  }
  const IntVector<T> exponent = (IntVector<T>)shifted - (IntVector<T>)broadcast<T>(magic);
  return (Vector<T>)((IntVector<T>)sum + (exponent << mantissa_bits));
}

}  // namespace rebased::cpu::REBASED_ISA
