// The one inner loop: a tile of kRows rows of NV vectors, held in registers, that takes in products
//   tile[r][:] += sum_k a(r, k) * b[k][:]
// where a is read one scalar at a time from either layout and b by whole vectors. Every float32 and float64
// product of chunked/ is made of these calls: scores, values, states and all gradients. Strides are known to
// the compiler, so that every address is a displacement. It includes simd.h alone.
#pragma once

#include "cpu/simd/simd.h"

namespace rebased::cpu::REBASED_ISA {

template <class T, int NV>
struct Tile {
  static constexpr int kColumns = NV * kWidth<T>;
  Vector<T> sum[kRows][NV];

  REBASED_INLINE void zero() {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) sum[r][n] = Vector<T>{};
  }
  REBASED_INLINE void load_rows(const T* source, int64_t stride) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) sum[r][n] = load(source + r * stride + n * kWidth<T>);
  }
  // From rows that hold earlier sums, or from zero.
  REBASED_INLINE void start(bool from_rows, const T* source, int64_t stride) {
    if (from_rows)
      load_rows(source, stride);
    else
      zero();
  }
  REBASED_INLINE void add_rows(const T* source, int64_t stride) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) sum[r][n] += load(source + r * stride + n * kWidth<T>);
  }
  REBASED_INLINE void store_rows(T* target, int64_t stride) const {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) store(target + r * stride + n * kWidth<T>, sum[r][n]);
  }

  // sum[r][n] = or += rows[r] columns[n]
  REBASED_INLINE void set_outer(const T* rows, const Vector<T>* columns) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) sum[r][n] = rows[r] * columns[n];
  }
  REBASED_INLINE void add_outer(const T* rows, const Vector<T>* columns) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) sum[r][n] += rows[r] * columns[n];
  }
  REBASED_INLINE void scale_rows(const T* factors) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) sum[r][n] *= factors[r];
  }

  // a(r, k) = a[r * RowStride + k * DepthStride], b[k][:] = b + k * ColumnStride
  template <int RowStride, int DepthStride, int ColumnStride>
  REBASED_INLINE void multiply(int depth, const T* a, const T* b) {
    // in a local array: a member whose address is known elsewhere would be stored in every round of the loop
    Vector<T> tile[kRows][NV];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) tile[r][n] = sum[r][n];
#pragma GCC unroll 4
    for (int k = 0; k < depth; k++) {
      Vector<T> column[NV];
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) column[n] = load(b + k * ColumnStride + n * kWidth<T>);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; r++) {
        const T scalar = a[r * RowStride + k * DepthStride];
#pragma GCC unroll 2
        for (int n = 0; n < NV; n++) tile[r][n] += scalar * column[n];
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 2
      for (int n = 0; n < NV; n++) sum[r][n] = tile[r][n];
  }
  // a lies as [k][Stride]: the rows r are side by side.
  template <int Stride, int ColumnStride = kColumns>
  REBASED_INLINE void multiply_transposed(int depth, const T* a, const T* b) {
    multiply<1, Stride, ColumnStride>(depth, a, b);
  }
  // a lies as [r][Stride]: the summed index is side by side.
  template <int Stride, int ColumnStride = kColumns>
  REBASED_INLINE void multiply_rows(int depth, const T* a, const T* b) {
    multiply<Stride, 1, ColumnStride>(depth, a, b);
  }
};

}  // namespace rebased::cpu::REBASED_ISA
