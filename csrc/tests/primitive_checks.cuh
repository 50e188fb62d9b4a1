// What emulator_primitives.cu checks with: memory that host and kernel share, a launch, random numbers, and a
// second definition of the 16-bit floats, in double. It may include cuda/device/device.cuh alone.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>

#include "cuda/device/device.cuh"

namespace rebased::REBASED_BACKEND {

inline int failures = 0;

inline void expect(bool condition, const char* what, double got = 0, double wanted = 0) {
  if (condition) return;
  if (++failures <= 20) printf("%s: got %.9g, wanted %.9g\n", what, got, wanted);
}

// An array in memory that both the host and the kernel can reach.
template <class T>
class Array {
 public:
  explicit Array(size_t count, T value = T{}) : count_(count) {
#if defined(REBASED_EMULATED)
    values_ = new T[count];
#else
    const cudaError_t error = cudaMallocManaged(&values_, count * sizeof(T));
    if (error) {
      printf("%s\n", error_text(error));
      exit(1);
    }
#endif
    for (size_t i = 0; i < count; ++i) values_[i] = value;
  }
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() {
#if defined(REBASED_EMULATED)
    delete[] values_;
#else
    cudaFree(values_);
#endif
  }
  T* data() { return values_; }
  T& operator[](size_t i) { return values_[i]; }
  size_t size() const { return count_; }

 private:
  T* values_;
  size_t count_;
};

// Runs a kernel and waits for it.
template <class... Parameters, class... Arguments>
void run(void (*kernel)(Parameters...), dim3 grid, dim3 block, const Arguments&... arguments) {
  const char* error = LAUNCH(kernel, grid, block, 0, nullptr, arguments...);
#if !defined(REBASED_EMULATED)
  if (!*error) error = error_text(cudaDeviceSynchronize());
#endif
  if (*error) {
    ++failures;
    printf("%s\n", error);
  }
}

inline int random_number(int count) {  // 0 <= result < count
  static uint64_t state = 1;
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return static_cast<int>((state >> 33) % count);
}

// ---- 16-bit floats ----

struct Format {
  int mantissa_bits, min_exponent, max_exponent;
};
template <class T>
constexpr Format format_of = is_bfloat16<T> ? Format{7, -126, 127} : Format{10, -14, 15};

// `value` rounded to the nearest number of the format, ties to even.
inline double rounded(double value, Format format) {
  if (value == 0 || !std::isfinite(value)) return value;
  const int exponent = std::max(std::ilogb(value), format.min_exponent);
  const double unit = std::ldexp(1.0, exponent - format.mantissa_bits);
  const double result = std::nearbyint(value / unit) * unit;
  const double limit = std::ldexp(1.0, format.max_exponent + 1);
  return std::fabs(result) < limit ? result : std::copysign(INFINITY, value);
}

inline double decoded(uint32_t bits, Format format) {
  const int exponent_bits = 15 - format.mantissa_bits;
  const uint32_t mantissa = bits & ((1u << format.mantissa_bits) - 1);
  const int exponent = bits >> format.mantissa_bits & ((1u << exponent_bits) - 1);
  const double sign = bits & 0x8000u ? -1 : 1;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * INFINITY;
  const double unit = std::ldexp(1.0, std::max(exponent, 1) + format.min_exponent - 1 - format.mantissa_bits);
  return sign * unit * (mantissa + (exponent ? 1u << format.mantissa_bits : 0u));
}

inline bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

}  // namespace rebased::REBASED_BACKEND
