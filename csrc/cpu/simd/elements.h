// Tensors of every dtype as vectors of the accumulation type, read and written: a partial vector at the end
// of a row, rows as transposed blocks, rows as panels. It includes simd.h and the dtypes of op/ alone.
#pragma once

#include "cpu/simd/simd.h"
#include "op/problem.h"

namespace rebased::cpu::REBASED_ISA {

struct Float16 {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};
typedef uint16_t Uint16Vector __attribute__((vector_size(REBASED_VECTOR_BYTES / 2)));

template <class T>
REBASED_INLINE Vector<T> widen(const T* source) {
  return load(source);
}
template <class T>
REBASED_INLINE void narrow(T* target, Vector<T> v) {
  store(target, v);
}

template <class T>
REBASED_INLINE Vector<T> widen(const Bfloat16* source) {
  Uint16Vector bits;
  __builtin_memcpy(&bits, source, sizeof bits);
#if REBASED_VECTOR_BYTES == 64 && defined(__AVX512F__)  // GCC 12 widens halves and puts them together
  return (FloatVector)((Uint32Vector)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)bits) << 16);
#else
  return (FloatVector)(__builtin_convertvector(bits, Uint32Vector) << 16);
#endif
}
template <class T>
REBASED_INLINE void narrow(Bfloat16* target, FloatVector v) {
  Uint32Vector bits = (Uint32Vector)v;
  const Uint32Vector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  bits = (bits & 0x7fffffff) > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;  // a NaN stays one
  const Uint16Vector half = __builtin_convertvector(bits, Uint16Vector);
  __builtin_memcpy(target, &half, sizeof half);
}

#if defined(__F16C__) && REBASED_VECTOR_BYTES == 64
template <class T>
REBASED_INLINE Vector<T> widen(const Float16* source) {
  __m256i bits;
  __builtin_memcpy(&bits, source, sizeof bits);
  return (FloatVector)_mm512_maskz_cvtph_ps(0xffff, bits);
}
template <class T>
REBASED_INLINE void narrow(Float16* target, FloatVector v) {
  const __m256i bits =
      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(target, &bits, sizeof bits);
}
#elif defined(__F16C__) && REBASED_VECTOR_BYTES == 32
template <class T>
REBASED_INLINE Vector<T> widen(const Float16* source) {
  __m128i bits;
  __builtin_memcpy(&bits, source, sizeof bits);
  return (FloatVector)_mm256_cvtph_ps(bits);
}
template <class T>
REBASED_INLINE void narrow(Float16* target, FloatVector v) {
  const __m128i bits = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __builtin_memcpy(target, &bits, sizeof bits);
}
#else
// The exponent is moved by a multiplication, which also makes the subnormal numbers right.
template <class T>
REBASED_INLINE Vector<T> widen(const Float16* source) {
  Uint16Vector half;
  __builtin_memcpy(&half, source, sizeof half);
  const Uint32Vector bits = __builtin_convertvector(half, Uint32Vector);
  const Uint32Vector magnitude = bits & 0x7fff, sign = (bits & 0x8000) << 16;
  const FloatVector finite = (FloatVector)(magnitude << 13) * 0x1p112f;
  const Uint32Vector special = (magnitude << 13) | 0x7f800000;
  return (FloatVector)((magnitude >= 0x7c00 ? special : (Uint32Vector)finite) | sign);
}
template <class T>
REBASED_INLINE void narrow(Float16* target, FloatVector v) {
  const Uint32Vector bits = (Uint32Vector)v;
  const Uint32Vector magnitude = bits & 0x7fffffff, sign = (bits >> 16) & 0x8000;
  // adding 0.5 leaves a subnormal number's rounded mantissa in the low bits
  const Uint32Vector subnormal = (Uint32Vector)((FloatVector)magnitude + 0.5f) - 0x3f000000;
  const Uint32Vector normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Uint32Vector special = magnitude > 0x7f800000 ? Uint32Vector{} + 0x7e00 : Uint32Vector{} + 0x7c00;
  const Uint32Vector result =
      magnitude >= 0x47800000 ? special : (magnitude < 0x38800000 ? subnormal : normal);
  const Uint16Vector half = __builtin_convertvector(result | sign, Uint16Vector);
  __builtin_memcpy(target, &half, sizeof half);
}
#endif

// The first `count` elements, zero after them; count >= kWidth reads a whole vector.
template <class T, class E>
REBASED_INLINE Vector<T> read(const E* source, int64_t count) {
  if (count >= kWidth<T>) return widen<T>(source);
  if (count <= 0) return Vector<T>{};
#if REBASED_VECTOR_BYTES == 64 && defined(__AVX512F__)
  if constexpr (sizeof(E) == 4)
    return (Vector<T>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), source);
  else if constexpr (sizeof(E) == 8)
    return (Vector<T>)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), source);
#endif
  E part[kWidth<T>] = {};
  for (int64_t l = 0; l < count; l++) part[l] = source[l];
  return widen<T>(part);
}
template <class T, class E>
REBASED_INLINE void write(E* target, Vector<T> v, int64_t count) {
  if (count >= kWidth<T>) return narrow<T>(target, v);
  if (count <= 0) return;
#if REBASED_VECTOR_BYTES == 64 && defined(__AVX512F__)
  if constexpr (sizeof(E) == 4)
    return _mm512_mask_storeu_ps(target, __mmask16((1u << count) - 1), (__m512)v);
  else if constexpr (sizeof(E) == 8)
    return _mm512_mask_storeu_pd(target, __mmask8((1u << count) - 1), (__m512d)v);
#endif
  E part[kWidth<T>];
  narrow<T>(part, v);
  for (int64_t l = 0; l < count; l++) target[l] = part[l];
}

template <class E>
struct ElementType {
  using type = E;
};
// Calls body(ElementType<E>) for the element type of a dtype that T accumulates.
template <class T, class Body>
REBASED_INLINE void with_element(Dtype dtype, const Body& body) {
  if constexpr (sizeof(T) == 8) {
    body(ElementType<double>{});
  } else {
    if (dtype == Dtype::float16) return body(ElementType<Float16>{});
    if (dtype == Dtype::bfloat16) return body(ElementType<Bfloat16>{});
    body(ElementType<float>{});
  }
}

template <class T>
REBASED_INLINE bool is_accumulator(Dtype dtype) {
  return dtype == (sizeof(T) == 8 ? Dtype::float64 : Dtype::float32);
}
template <class T>
REBASED_INLINE int64_t bytes_of(Dtype dtype) {
  return sizeof(T) == 8 ? 8 : dtype == Dtype::float32 ? 4 : 2;
}

// source: `rows` rows of `width` elements; target: [width][kLanes], lane = row, lanes past `rows` zero.
template <class T, class E>
inline void read_transposed(const E* source, int64_t stride, int rows, int width, T* target) {
  for (int n = 0; n < kLanes<T>; n += kWidth<T>)
    for (int column = 0; column < width; column += kWidth<T>) {
      const int count = smaller(width - column, kWidth<T>);
      const E* first = source + n * stride + column;
      Vector<T> square[kWidth<T>];
      if (count == kWidth<T> && n + kWidth<T> <= rows) {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth<T>; i++) square[i] = widen<T>(first + i * stride);
      } else {
#pragma GCC unroll 16
        for (int i = 0; i < kWidth<T>; i++)
          square[i] = n + i < rows ? read<T>(first + i * stride, count) : Vector<T>{};
      }
      transpose<T>(square);
      T* block = target + column * kLanes<T> + n;
#pragma GCC unroll 16
      for (int e = 0; e < kWidth<T>; e++)
        if (e < count) store(block + e * kLanes<T>, square[e]);
    }
}
// read_transposed the other way round: rows of `target` from a transposed block.
template <class T, class E>
inline void write_transposed(const T* source, int rows, int width, E* target, int64_t stride) {
  for (int n = 0; n < kLanes<T> && n < rows; n += kWidth<T>)
    for (int column = 0; column < width; column += kWidth<T>) {
      const int count = smaller(width - column, kWidth<T>);
      Vector<T> square[kWidth<T>];
#pragma GCC unroll 16
      for (int e = 0; e < kWidth<T>; e++)
        square[e] = e < count ? load(source + (column + e) * kLanes<T> + n) : Vector<T>{};
      transpose<T>(square);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth<T>; i++)
        if (n + i < rows) write<T>(target + (n + i) * stride + column, square[i], count);
    }
}

// Rows as panels of values: [panel][panel_rows][kLanes], where the last panel is [panel_rows][kWidth] if that
// is enough. Columns past `width` are zero.
template <class T, class E>
inline void read_panels(const E* source, int64_t stride, int rows, int width, int panel_rows, T* target) {
  const int whole = width - width % kLanes<T>;
  for (int row = 0; row < rows; row++)
    for (int column = 0; column < whole; column += kLanes<T>)
#pragma GCC unroll 2
      for (int n = 0; n < kLanes<T>; n += kWidth<T>)
        store(target + int64_t(column) * panel_rows + row * kLanes<T> + n,
              widen<T>(source + row * stride + column + n));
  const int column = whole;
  if (column == width) return;
  const int columns = width - column > kWidth<T> ? kLanes<T> : kWidth<T>;
  T* panel = target + int64_t(column) * panel_rows;
  for (int row = 0; row < rows; row++)
    for (int n = 0; n < columns; n += kWidth<T>)
      store(panel + row * columns + n, read<T>(source + row * stride + column + n, width - column - n));
}
template <class T, class E>
inline void write_panels(const T* source, int rows, int width, int panel_rows, E* target, int64_t stride) {
  const int whole = width - width % kLanes<T>;
  for (int row = 0; row < rows; row++)
    for (int column = 0; column < whole; column += kLanes<T>)
#pragma GCC unroll 2
      for (int n = 0; n < kLanes<T>; n += kWidth<T>)
        narrow<T>(target + row * stride + column + n,
                  load(source + int64_t(column) * panel_rows + row * kLanes<T> + n));
  const int column = whole;
  if (column == width) return;
  const int columns = width - column > kWidth<T> ? kLanes<T> : kWidth<T>;
  const T* panel = source + int64_t(column) * panel_rows;
  for (int row = 0; row < rows; row++)
    for (int n = 0; n < columns; n += kWidth<T>)
      write<T>(target + row * stride + column + n, load(panel + row * columns + n), width - column - n);
}

}  // namespace rebased::cpu::REBASED_ISA
