// Vectors of numbers that one access moves, and whether memory is aligned for them.
#pragma once

#include "cuda/device/device.cuh"

namespace rebased::REBASED_BACKEND {

// 16 bytes of floats, or twice that of doubles: one or two vector accesses.
template <class A>
struct alignas(16) Quad {
  A x[4];
};
template <class A>
DEVICE Quad<A> load_quad(const A* address) {
  return *reinterpret_cast<const Quad<A>*>(address);
}
template <class A>
DEVICE void store_quad(A* address, const Quad<A>& quad) {
  *reinterpret_cast<Quad<A>*>(address) = quad;
}

template <class T, int count>
struct alignas(sizeof(T) * count) Vector {
  T x[count];
};
template <class T>
constexpr int vector_elements = 16 / sizeof(T);

// Whether rows of `width` elements from `data` on, `row_stride` apart, can be accessed in pieces of `bytes`.
template <class T>
DEVICE bool rows_aligned(const T* data, int64_t row_stride, int width, int bytes) {
  return (reinterpret_cast<uintptr_t>(data) | row_stride * sizeof(T) | width * sizeof(T)) % bytes == 0;
}

}  // namespace rebased::REBASED_BACKEND
