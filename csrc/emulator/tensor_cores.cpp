// Twins of the tensor-core instructions; cuda/device/device.cuh has the layouts of the fragments. Products
// are exact, as on the device. Sums are float32, rounded to nearest in the order of k. The device truncates;
// with REBASED_EMULATOR_TRUNCATES these do too, by a model of it.
#include <atomic>
#include <cmath>

#include "emulator/block.h"
#include "emulator/runtime.h"
#include "emulator/sanitizer.h"

namespace rebased::emulator {
namespace {

using Float4 = float __attribute__((vector_size(16)));
using Row = Float4[2];  // 8 columns

inline float bfloat16_to_float(uint32_t bits) { return bits_float(bits << 16); }
inline float half_bits_to_float(uint32_t bits) { return half_to_float(static_cast<uint16_t>(bits)); }
inline float tf32_to_float(uint32_t bits) {
  return bits_float(bits & 0xffffe000u);
}  // the tensor core ignores the last 13 bits

const MatrixOperands& operand_of(void* const (&operands)[32], int lane) {
  return *static_cast<const MatrixOperands*>(operands[lane]);
}

// What keeps the first `bits` bits of a number whose exponent is `exponent` (2^exponent > |number|) or less.
double truncated(double value, int bits, int exponent) {
  const double scale = std::ldexp(1.0, bits - exponent);
  return std::trunc(value * scale) / scale;
}

// sum + the products of a row of a and a column of b, as measurements of tensor cores describe it: the terms
// are aligned to the largest of them and cut off one bit below float32's last; their sum is cut off to a
// float32.
template <int depth>
float truncated_sum(float sum, const float (&a)[depth], const Row (&b)[depth], int column) {
  double terms[depth + 1] = {sum}, largest = std::fabs(sum), total = 0;
  for (int k = 0; k < depth; ++k) {
    terms[k + 1] = static_cast<double>(a[k]) * reinterpret_cast<const float*>(b[k])[column];
    largest = std::fmax(largest, std::fabs(terms[k + 1]));
  }
  if (!std::isfinite(largest) || largest == 0) {
    for (const double term : terms) total += term;
    return static_cast<float>(total);
  }
  for (const double term : terms) total += truncated(term, 25, std::ilogb(largest) + 1);
  return total == 0 ? 0.0f : static_cast<float>(truncated(total, 24, std::ilogb(total) + 1));
}

// d += a b for a (16, depth) and b (depth, 8); d lies in the registers of the lanes.
template <int depth>
void multiply(const float (&a)[16][depth], const Row (&b)[depth], void* const (&operands)[32]) {
  Row d[16];
  for (int lane = 0; lane < 32; ++lane) {
    const float* const from = operand_of(operands, lane).d;
    const int g = lane / 4, t = lane % 4;
    __builtin_memcpy(reinterpret_cast<char*>(d[g]) + 8 * t, from, 8);
    __builtin_memcpy(reinterpret_cast<char*>(d[g + 8]) + 8 * t, from + 2, 8);
  }
  const bool truncates = tensor_cores_truncate.load(std::memory_order_relaxed);
  for (int row = 0; row < 16 && truncates; ++row) {
    float* const sums = reinterpret_cast<float*>(d[row]);
    for (int column = 0; column < 8; ++column) {
      sums[column] = truncated_sum(sums[column], a[row], b, column);
    }
  }
  for (int row = 0; row < 16 && !truncates; row += 4) {  // four rows at a time fit in 16 vector registers
    Float4 sum[4][2];
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) sum[i][half] = d[row + i][half];
    }
    for (int k = 0; k < depth; ++k) {
      const Float4 low = b[k][0], high = b[k][1];
      for (int i = 0; i < 4; ++i) {
        sum[i][0] += a[row + i][k] * low;
        sum[i][1] += a[row + i][k] * high;
      }
    }
    for (int i = 0; i < 4; ++i) {
      for (int half = 0; half < 2; ++half) d[row + i][half] = sum[i][half];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* const to = operand_of(operands, lane).d;
    const int g = lane / 4, t = lane % 4;
    __builtin_memcpy(to, reinterpret_cast<const char*>(d[g]) + 8 * t, 8);
    __builtin_memcpy(to + 2, reinterpret_cast<const char*>(d[g + 8]) + 8 * t, 8);
  }
}

// Of 16-bit elements, two in a register: depth is 16 or 8.
template <float (*to_float)(uint32_t), int depth>
void mma_m16n8(void* const (&operands)[32]) {
  float a[16][depth];
  Row b[depth];
  for (int lane = 0; lane < 32; ++lane) {
    const MatrixOperands& operand = operand_of(operands, lane);
    const int g = lane / 4, t = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const int k = 2 * t + half;
      const auto value = [half](uint32_t pair) { return to_float(half ? pair >> 16 : pair & 0xffffu); };
      a[g][k] = value(operand.a[0]);
      a[g + 8][k] = value(operand.a[1]);
      reinterpret_cast<float*>(b[k])[g] = value(operand.b[0]);
      if constexpr (depth == 16) {
        a[g][k + 8] = value(operand.a[2]);
        a[g + 8][k + 8] = value(operand.a[3]);
        reinterpret_cast<float*>(b[k + 8])[g] = value(operand.b[1]);
      }
    }
  }
  multiply(a, b, operands);
}

struct MatrixRow {
  const void* address;
  uint32_t* registers;
  int count;
  bool transposed;
};

void load_matrices(void* const (&operands)[32], unsigned) {
  const auto& first = *static_cast<const MatrixRow*>(operands[0]);
  for (int m = 0; m < first.count; ++m) {
    uint16_t matrix[8][8];
    for (int row = 0; row < 8; ++row) {
      __builtin_memcpy(matrix[row], static_cast<const MatrixRow*>(operands[8 * m + row])->address, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane / 4, t = lane % 4;
      const uint16_t low = first.transposed ? matrix[2 * t][g] : matrix[g][2 * t];
      const uint16_t high = first.transposed ? matrix[2 * t + 1][g] : matrix[g][2 * t + 1];
      static_cast<MatrixRow*>(operands[lane])->registers[m] = low | static_cast<uint32_t>(high) << 16;
    }
  }
}

struct StoredRow {
  const uint32_t* registers;
  void* address;
};

void store_matrices(void* const (&operands)[32], unsigned) {
  for (int m = 0; m < 4; ++m) {
    uint32_t matrix[8][4];
    for (int lane = 0; lane < 32; ++lane) {
      matrix[lane / 4][lane % 4] = static_cast<const StoredRow*>(operands[lane])->registers[m];
    }
    for (int row = 0; row < 8; ++row) {
      __builtin_memcpy(static_cast<const StoredRow*>(operands[8 * m + row])->address, matrix[row], 16);
    }
  }
}

struct MatrixElements {
  uint32_t from, to;
};

void transpose_elements(void* const (&operands)[32], unsigned) {
  const auto element = [&](int row, int column) -> uint32_t {
    return static_cast<const MatrixElements*>(operands[row * 4 + column / 2])->from >> column % 2 * 16 &
           0xffffu;
  };
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    static_cast<MatrixElements*>(operands[lane])->to = element(2 * t, g) | element(2 * t + 1, g) << 16;
  }
}

}  // namespace

std::atomic<bool> tensor_cores_truncate{false};

void mma_bfloat16(void* const (&operands)[32], unsigned) { mma_m16n8<bfloat16_to_float, 16>(operands); }
void mma_half(void* const (&operands)[32], unsigned) { mma_m16n8<half_bits_to_float, 16>(operands); }
void mma_bfloat16_k8(void* const (&operands)[32], unsigned) { mma_m16n8<bfloat16_to_float, 8>(operands); }
void mma_half_k8(void* const (&operands)[32], unsigned) { mma_m16n8<half_bits_to_float, 8>(operands); }

void mma_tf32(void* const (&operands)[32], unsigned) {
  float a[16][8];
  Row b[8];
  for (int lane = 0; lane < 32; ++lane) {
    const MatrixOperands& operand = operand_of(operands, lane);
    const int g = lane / 4, t = lane % 4;
    a[g][t] = tf32_to_float(operand.a[0]);
    a[g + 8][t] = tf32_to_float(operand.a[1]);
    a[g][t + 4] = tf32_to_float(operand.a[2]);
    a[g + 8][t + 4] = tf32_to_float(operand.a[3]);
    reinterpret_cast<float*>(b[t])[g] = tf32_to_float(operand.b[0]);
    reinterpret_cast<float*>(b[t + 4])[g] = tf32_to_float(operand.b[1]);
  }
  multiply(a, b, operands);
}

void ldmatrix(uint32_t* registers, int count, const void* row, bool transposed, Site site) {
  if (lane_index() < 8 * count) {
    check_address(row, 16, Memory::shared, "ldmatrix", site);
    note_read(row, 16, __builtin_return_address(0));
  }
  MatrixRow operand{row, registers, count, transposed};
  warp_collective(load_matrices, "ldmatrix", 0xffffffffu, &operand, site);
}

void stmatrix(const uint32_t (&registers)[4], void* row, Site site) {
  check_address(row, 16, Memory::shared, "stmatrix", site);
  note_write(row, 16, __builtin_return_address(0));
  StoredRow operand{registers, row};
  warp_collective(store_matrices, "stmatrix", 0xffffffffu, &operand, site);
}

uint32_t transpose_matrix(uint32_t matrix, Site site) {
  MatrixElements elements{matrix, 0};
  warp_collective(transpose_elements, "transpose_matrix", 0xffffffffu, &elements, site);
  return elements.to;
}

}  // namespace rebased::emulator
