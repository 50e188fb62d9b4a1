// Tensors for the drivers of the CUDA kernels. On the host they are doubles, in the memory of the backend
// they have their dtype and strides. The macro BACKEND is the namespace of the kernels under test: emulated
// with -DREBASED_EMULATED, otherwise cuda. Includes no torch, and of the op only problem.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "op/problem.h"
#include "tests/scalar_reference.h"

#if defined(REBASED_EMULATED)
#define BACKEND emulated
#else
#include <cuda_runtime.h>
#define BACKEND cuda
#endif

namespace rebased::tests {

[[noreturn]] inline void fail(const std::string& what, const char* error) {
  std::printf("FAILED %s: %s\n", what.c_str(), error);
  std::exit(2);
}

// ---- memory that kernels see: exactly as large as asked for, so that checkers notice an access outside ----
#if defined(REBASED_EMULATED)
inline void* device_allocate(size_t bytes) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 64, bytes)) fail("posix_memalign", "no memory");
  return memory;
}
inline void device_free(void* memory) { std::free(memory); }
inline void device_copy(void* to, const void* from, size_t bytes) {
  if (bytes > 0) std::memcpy(to, from, bytes);  // of an empty tensor the pointers may be null
}
#else
inline void check(cudaError_t error) {
  if (error != cudaSuccess) fail("CUDA", cudaGetErrorString(error));
}
inline void* device_allocate(size_t bytes) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, bytes > 0 ? bytes : 1));
  return memory;
}
inline void device_free(void* memory) { check(cudaFree(memory)); }
inline void device_copy(void* to, const void* from, size_t bytes) {
  check(cudaMemcpy(to, from, bytes, cudaMemcpyDefault));
}
#endif

class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes), memory_(device_allocate(bytes)) {
    // all ones are a NaN in every type, so that a result which no kernel writes is seen
    const std::vector<char> unwritten(bytes, static_cast<char>(0xff));
    device_copy(memory_, unwritten.data(), bytes);
  }
  ~Buffer() { device_free(memory_); }
  Buffer(const Buffer&) = delete;
  void* data() const { return memory_; }
  void upload(const void* from) { device_copy(memory_, from, bytes_); }
  void download(void* to) const { device_copy(to, memory_, bytes_); }

 private:
  size_t bytes_;
  void* memory_;
};

// ---- 16-bit floats on the host, with `fraction` bits and exponents from `least` up ----
struct SmallFloat {
  int fraction, least;
};
constexpr SmallFloat half_format{10, -14}, bfloat16_format{7, -126};

inline uint16_t encode(double value, SmallFloat format) {
  if (std::isnan(value)) return 0x7fff;
  const double magnitude = std::fabs(value);
  int exponent = magnitude > 0 ? std::ilogb(magnitude) : format.least;
  exponent = exponent < format.least ? format.least : exponent;
  const int bias = 1 - format.least;
  // a mantissa that rounds up to 2 carries into the exponent; the exponent field of a subnormal is 0
  const double mantissa = std::nearbyint(std::ldexp(magnitude, format.fraction - exponent));
  const int bits = ((exponent + bias - 1) << format.fraction) + static_cast<int>(mantissa);
  return static_cast<uint16_t>(bits | (std::signbit(value) ? 0x8000 : 0));
}
inline double decode(uint16_t bits, SmallFloat format) {
  const int field = (bits & 0x7fff) >> format.fraction, bias = 1 - format.least;
  if (field == (1 << (15 - format.fraction)) - 1) return NAN;  // infinity too: no result should be infinite
  const double mantissa = (bits & ((1 << format.fraction) - 1)) + (field ? 1 << format.fraction : 0);
  const double magnitude = std::ldexp(mantissa, (field ? field - bias : format.least) - format.fraction);
  return bits & 0x8000 ? -magnitude : magnitude;
}

// A tensor (batch, heads, rows, width): doubles in that order on the host, elements with strides in device
// memory.
class Tensor {
 public:
  // With packed_heads the tensor lies in memory as (batch, rows, heads, width), with `padding` elements after
  // the heads of each row. `gap`: elements after each batch entry.
  Tensor(Dtype dtype, int64_t batch, int64_t heads, int64_t rows, int64_t width, bool packed_heads = false,
         int64_t padding = 0, int64_t gap = 0)
      : dtype_(dtype), sizes_{batch, heads, rows, width} {
    const int64_t token = packed_heads ? heads * width + padding : width;
    row_stride_ = token;
    head_stride_ = packed_heads ? width : rows * width;
    batch_stride_ = (packed_heads ? rows * token : heads * rows * width) + gap;
    elements_ = batch * batch_stride_;
    values.assign(batch * heads * rows * width, 0);
    buffer_ = new Buffer(elements_ * element_size(dtype));
  }
  ~Tensor() { delete buffer_; }
  Tensor(const Tensor&) = delete;

  template <class Rows>
  Rows rows() const {
    return Rows{buffer_->data(), batch_stride_, head_stride_, row_stride_};
  }
  void* data() const { return buffer_->data(); }

  // Fills the tensor with random values, rounded to its dtype.
  void randomize(std::mt19937& random, double mean, double deviation) {
    std::normal_distribution<double> normal(mean, deviation);
    for (double& value : values) value = normal(random);
    upload();
  }
  void upload() {
    std::vector<char> bytes(elements_ * element_size(dtype_));
    for_each([&](double& value, int64_t offset) {
      write(bytes.data(), offset, value);
      value = read(bytes.data(), offset);
    });
    buffer_->upload(bytes.data());
  }
  void download() {
    std::vector<char> bytes(elements_ * element_size(dtype_));
    buffer_->download(bytes.data());
    for_each([&](double& value, int64_t offset) { value = read(bytes.data(), offset); });
  }
  double& at(int64_t batch, int64_t head, int64_t row, int64_t column) {
    return values[((batch * sizes_[1] + head) * sizes_[2] + row) * sizes_[3] + column];
  }
  // The rows [first, first + count) of one batch entry, as (heads, count, width).
  Values slice(int64_t batch, int64_t first, int64_t count) {
    Values result;
    for (int64_t head = 0; head < sizes_[1]; ++head) {
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t column = 0; column < sizes_[3]; ++column) {
          result.push_back(at(batch, head, first + row, column));
        }
      }
    }
    return result;
  }
  void put(int64_t batch, int64_t first, int64_t count, const Values& from) {
    auto next = from.begin();
    for (int64_t head = 0; head < sizes_[1]; ++head) {
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t column = 0; column < sizes_[3]; ++column) at(batch, head, first + row, column) = *next++;
      }
    }
  }

  Values values;

 private:
  template <class Body>
  void for_each(const Body& body) {
    auto value = values.begin();
    for (int64_t batch = 0; batch < sizes_[0]; ++batch) {
      for (int64_t head = 0; head < sizes_[1]; ++head) {
        for (int64_t row = 0; row < sizes_[2]; ++row) {
          for (int64_t column = 0; column < sizes_[3]; ++column) {
            body(*value++, batch * batch_stride_ + head * head_stride_ + row * row_stride_ + column);
          }
        }
      }
    }
  }
  void write(char* bytes, int64_t offset, double value) const {
    const float single = static_cast<float>(value);
    const uint16_t small = encode(single, dtype_ == Dtype::float16 ? half_format : bfloat16_format);
    const void* const from = dtype_ == Dtype::float64   ? static_cast<const void*>(&value)
                             : dtype_ == Dtype::float32 ? static_cast<const void*>(&single)
                                                        : &small;
    std::memcpy(bytes + offset * element_size(dtype_), from, element_size(dtype_));
  }
  double read(const char* bytes, int64_t offset) const {
    const char* const from = bytes + offset * element_size(dtype_);
    if (dtype_ == Dtype::float64) {
      double value;
      std::memcpy(&value, from, sizeof(value));
      return value;
    }
    if (dtype_ == Dtype::float32) {
      float value;
      std::memcpy(&value, from, sizeof(value));
      return value;
    }
    uint16_t bits;
    std::memcpy(&bits, from, sizeof(bits));
    return decode(bits, dtype_ == Dtype::float16 ? half_format : bfloat16_format);
  }

  Dtype dtype_;
  int64_t sizes_[4];
  int64_t batch_stride_, head_stride_, row_stride_, elements_;
  Buffer* buffer_;
};

}  // namespace rebased::tests
