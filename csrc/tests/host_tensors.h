// Tensors for the CPU backend's driver, in the dtype and with the strides that a problem asks for. Their
// memory ends with their last element, so that AddressSanitizer sees every access past it. device_tensors.h
// is the same for the CUDA kernels' drivers. Includes no torch, and of the op only problem.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "op/problem.h"
#include "tests/scalar_reference.h"

namespace rebased::cpu_tests {

using rebased::tests::Values;

inline std::mt19937 random_bits;

// ---- elements: inputs are multiples of 1/32 below 4, and every dtype holds such a number exactly ----
inline uint16_t encode_small(double value, int fraction, int bias) {
  if (value == 0) return 0;
  const int exponent = std::ilogb(value);
  const int mantissa = static_cast<int>(std::ldexp(std::fabs(value), fraction - exponent));
  const int bits = ((exponent + bias - 1) << fraction) + mantissa;  // the mantissa's leading 1 carries
  return static_cast<uint16_t>(bits | (std::signbit(value) ? 0x8000 : 0));
}
inline double decode_small(uint16_t bits, int fraction, int bias) {
  const int field = (bits & 0x7fff) >> fraction, mantissa = bits & ((1 << fraction) - 1);
  if (field == (1 << (15 - fraction)) - 1) return NAN;  // infinity too: no result should be infinite
  const double magnitude = field ? std::ldexp(mantissa + (1 << fraction), field - bias - fraction)
                                 : std::ldexp(mantissa, 1 - bias - fraction);
  return bits & 0x8000 ? -magnitude : magnitude;
}
inline void write_element(char* to, Dtype dtype, double value) {
  const float single = static_cast<float>(value);
  const uint16_t small = dtype == Dtype::float16 ? encode_small(value, 10, 15) : encode_small(value, 7, 127);
  if (dtype == Dtype::float64)
    std::memcpy(to, &value, 8);
  else if (dtype == Dtype::float32)
    std::memcpy(to, &single, 4);
  else
    std::memcpy(to, &small, 2);
}
inline double read_element(const char* from, Dtype dtype) {
  double value;
  float single;
  uint16_t small;
  if (dtype == Dtype::float64) return std::memcpy(&value, from, 8), value;
  if (dtype == Dtype::float32) return std::memcpy(&single, from, 4), single;
  std::memcpy(&small, from, 2);
  return dtype == Dtype::float16 ? decode_small(small, 10, 15) : decode_small(small, 7, 127);
}

// A tensor (batch, heads, rows, width). In memory it lies in that order or, token_major, as (batch, rows,
// heads, width), with `padding` elements after each row. Elements that nobody has written are NaN.
struct Tensor {
  Dtype dtype;
  int64_t batch, heads, rows, width, batch_stride, head_stride, row_stride;
  std::vector<char> bytes;

  Tensor(Dtype dtype, int64_t batch, int64_t heads, int64_t rows, int64_t width, bool token_major = false,
         int64_t padding = 0)
      : dtype(dtype), batch(batch), heads(heads), rows(rows), width(width) {
    row_stride = token_major ? heads * width + padding : width + padding;
    head_stride = token_major ? width : rows * row_stride;
    batch_stride = token_major ? rows * row_stride : heads * head_stride;
    const int64_t elements =
        batch * heads * rows * width == 0
            ? 0
            : (batch - 1) * batch_stride + (heads - 1) * head_stride + (rows - 1) * row_stride + width;
    bytes.assign(elements * element_size(dtype), static_cast<char>(0xff));
  }
  char* at(int64_t b, int64_t head, int64_t row, int64_t column) {
    return bytes.data() +
           (b * batch_stride + head * head_stride + row * row_stride + column) * element_size(dtype);
  }
  void randomize(double mean) {
    std::uniform_int_distribution<int> steps(-48, 48);
    for_each([&](char* element) { write_element(element, dtype, mean + steps(random_bits) / 32.0); });
  }
  template <class Body>
  void for_each(const Body& body) {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t row = 0; row < rows; ++row)
          for (int64_t column = 0; column < width; ++column) body(at(b, head, row, column));
  }
  // The rows [first, first + count) of one batch entry, as (heads, count, width).
  Values slice(int64_t b, int64_t first, int64_t count) {
    Values values;
    for (int64_t head = 0; head < heads; ++head)
      for (int64_t row = first; row < first + count; ++row)
        for (int64_t column = 0; column < width; ++column)
          values.push_back(read_element(at(b, head, row, column), dtype));
    return values;
  }
  Values all() {
    Values values;
    for_each([&](char* element) { values.push_back(read_element(element, dtype)); });
    return values;
  }
  ConstRows input() { return {bytes.data(), batch_stride, head_stride, row_stride}; }
  MutableRows output() { return {bytes.data(), batch_stride, head_stride, row_stride}; }
  void* data() { return bytes.data(); }
};

struct Workspace {
  explicit Workspace(int64_t bytes) : memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64 + 64)) {
    std::memset(memory, 0xff, bytes);
  }
  ~Workspace() { std::free(memory); }
  Workspace(const Workspace&) = delete;
  void* memory;
};

}  // namespace rebased::cpu_tests
