// Checks every primitive of cuda/device/device.cuh against its definition, written down a second time:
// conversions and packed arithmetic against rounding in double, fragments against the formulas of the PTX
// manual. Runs on the emulator, and on a GPU, where it shows that the hardware reads the manual as the
// emulator does:
//   nvcc -std=c++17 -Icsrc -arch=native csrc/tests/emulator_primitives.cu -o primitives && ./primitives
// Prints what is wrong and exits with 1, or prints "right".
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "tests/primitive_checks.cuh"

namespace rebased::REBASED_BACKEND {
namespace {

// ---- numbers ----

template <class T>
KERNEL void widen(float* out) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[i] = to_float(T{static_cast<uint16_t>(i)});
}

template <class T>
KERNEL void narrow(const float* in, float* one, uint32_t* pair, int count) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i + 1 >= count) return;
  one[i] = convert<float>(convert<T>(in[i]));
  pair[i] = pack<T>(in[i], in[i + 1]);
}

template <class T>
KERNEL void arithmetic(const uint32_t* a, const uint32_t* b, float2* products, float2* sums) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  products[i] = unpack<T>(multiply_pairs<T>(a[i], b[i]));
  sums[i] = unpack<T>(add_pairs<T>(a[i], b[i]));
}

template <class T>
void check_numbers(const char* name) {
  const Format format = format_of<T>;
  Array<float> all(65536);
  run(widen<T>, 256, 256, all.data());
  for (int bits = 0; bits < 65536; ++bits) {
    expect(same(all[bits], decoded(bits, format)), name, all[bits], decoded(bits, format));
  }

  // every value, the middle between it and the next value, and the two neighbours of the middle in float
  std::vector<float> values = {INFINITY, -INFINITY, 3e38f, -3e38f, 1e-40f, 65519.9f, 65520.0f};
  for (int bits = 0; bits < 65535; ++bits) {
    const float value = all[bits], middle = (all[bits] + all[bits + 1]) / 2;
    if (!std::isfinite(value) || !std::isfinite(middle)) continue;
    for (const float each :
         {value, middle, std::nextafter(middle, INFINITY), std::nextafter(middle, -INFINITY)}) {
      values.push_back(each);
    }
  }
  const int count = static_cast<int>(values.size());
  Array<float> in(count), one(count);
  Array<uint32_t> pair(count);
  for (int i = 0; i < count; ++i) in[i] = values[i];
  run(narrow<T>, (count + 255) / 256, 256, in.data(), one.data(), pair.data(), count);
  for (int i = 0; i + 1 < count; ++i) {
    const double low = rounded(in[i], format), high = rounded(in[i + 1], format);
    expect(same(one[i], low), name, one[i], low);
    expect(same(decoded(pair[i] & 0xffffu, format), low), name, decoded(pair[i] & 0xffffu, format), low);
    expect(same(decoded(pair[i] >> 16, format), high), name, decoded(pair[i] >> 16, format), high);
  }

  constexpr int pairs = 1 << 16;
  Array<uint32_t> a(pairs), b(pairs);
  Array<float2> products(pairs), sums(pairs);
  for (int i = 0; i < pairs; ++i) {
    const auto half = [] { return static_cast<uint32_t>(random_number(65536)); };
    a[i] = half() | half() << 16;
    // every second pair is of numbers close to each other, since the last bits of such sums matter
    b[i] = i % 2 ? a[i] ^ (half() & 0x83ffu) ^ (half() & 0x83ffu) << 16 : half() | half() << 16;
  }
  run(arithmetic<T>, pairs / 256, 256, a.data(), b.data(), products.data(), sums.data());
  for (int i = 0; i < pairs; ++i) {
    for (int high = 0; high < 2; ++high) {
      const double x = decoded(a[i] >> 16 * high & 0xffffu, format),
                   y = decoded(b[i] >> 16 * high & 0xffffu, format);
      const float product = high ? products[i].y : products[i].x, sum = high ? sums[i].y : sums[i].x;
      expect(same(product, rounded(x * y, format)), "multiply_pairs", product, rounded(x * y, format));
      expect(same(sum, rounded(x + y, format)), "add_pairs", sum, rounded(x + y, format));
    }
  }
}

KERNEL void reciprocals(const float* in, float* fast, float* square_root, float* fast_root, double* in_double,
                        uint32_t* tf32) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  fast[i] = fast_reciprocal(in[i]) * (reciprocal(in[i]) * in[i]);
  square_root[i] = reciprocal_sqrt(in[i]);
  fast_root[i] = fast_square_root(in[i]);
  in_double[i] = reciprocal(static_cast<double>(in[i])) * reciprocal_sqrt(static_cast<double>(in[i]));
  tf32[i] = to_tf32(-in[i]);
}

void check_reciprocals() {
  constexpr int count = 1 << 12;
  Array<float> in(count), fast(count), square_root(count), fast_root(count);
  Array<double> in_double(count);
  Array<uint32_t> tf32(count);
  for (int i = 0; i < count; ++i)
    in[i] = std::ldexp(1.0f + random_number(1 << 23) * 0x1p-23f, random_number(80) - 40);
  run(reciprocals, count / 256, 256, in.data(), fast.data(), square_root.data(), fast_root.data(),
      in_double.data(), tf32.data());
  const auto near = [](double got, double wanted, double tolerance, const char* what) {
    expect(std::fabs(got / wanted - 1) <= tolerance, what, got, wanted);
  };
  for (int i = 0; i < count; ++i) {
    const double x = in[i];
    near(fast[i], 1 / x, 4 * 0x1p-23, "fast_reciprocal");
    near(square_root[i], 1 / std::sqrt(x), 2 * 0x1p-23, "reciprocal_sqrt");
    near(fast_root[i], std::sqrt(x), 0x1p-23, "fast_square_root");
    near(in_double[i], 1 / (x * std::sqrt(x)), 4 * 0x1p-52, "reciprocals of doubles");
    const double unit = std::ldexp(1.0, std::ilogb(x) - 10);
    const double wanted = -std::floor(x / unit + 0.5) * unit;
    expect(bit_cast<float>(tf32[i]) == wanted, "to_tf32", bit_cast<float>(tf32[i]), wanted);
  }
}

// ---- tensor cores ----

// a (16, depth) and b (depth, 8) lie row by row in global memory. Element i of a fragment is the one that the
// PTX manual numbers so.
template <class T, int depth>
KERNEL void multiply_16_bit(const T* a, const T* b, float* d) {
  const int group = threadIdx.x / 4, thread = threadIdx.x % 4;
  uint32_t a_registers[4] = {}, b_registers[2] = {};
  for (int i = 0; i < depth / 2; ++i) {
    const int row = (i < 2 || (i >= 4 && i < 6)) ? group : group + 8;
    const int column = thread * 2 + (i & 1) + (i < 4 ? 0 : 8);
    a_registers[i / 2] |= static_cast<uint32_t>(a[row * depth + column].bits) << 16 * (i % 2);
  }
  for (int i = 0; i < depth / 4; ++i) {
    const int row = thread * 2 + (i & 1) + (i < 2 ? 0 : 8);
    b_registers[i / 2] |= static_cast<uint32_t>(b[row * 8 + group].bits) << 16 * (i % 2);
  }
  float registers[4];
  const auto element = [&](int i) { return (i < 2 ? group : group + 8) * 8 + thread * 2 + (i & 1); };
  for (int i = 0; i < 4; ++i) registers[i] = d[element(i)];
  if constexpr (depth == 16) {
    mma_m16n8k16<T>(registers, a_registers, b_registers[0], b_registers[1]);
  } else {
    mma_m16n8k8<T>(registers, a_registers[0], a_registers[1], b_registers[0]);
  }
  for (int i = 0; i < 4; ++i) d[element(i)] = registers[i];
}

KERNEL void multiply_tf32(const float* a, const float* b, float* d) {
  const int group = threadIdx.x / 4, thread = threadIdx.x % 4;
  uint32_t a_registers[4];
  for (int i = 0; i < 4; ++i) {
    const int row = i % 2 == 0 ? group : group + 8, column = i < 2 ? thread : thread + 4;
    a_registers[i] = to_tf32(a[row * 8 + column]);
  }
  float registers[4];
  const auto element = [&](int i) { return (i < 2 ? group : group + 8) * 8 + thread * 2 + (i & 1); };
  for (int i = 0; i < 4; ++i) registers[i] = d[element(i)];
  mma_m16n8k8_tf32(registers, a_registers, to_tf32(b[thread * 8 + group]),
                   to_tf32(b[(thread + 4) * 8 + group]));
  for (int i = 0; i < 4; ++i) d[element(i)] = registers[i];
}

template <class T>
void check_product(const char* name, void (*kernel)(const T*, const T*, float*), int depth) {
  Array<T> a(16 * depth), b(depth * 8);
  Array<float> d(16 * 8);
  std::vector<double> wanted(16 * 8), a_values(a.size()), b_values(b.size());
  const auto number = [](T& to, double& value) {  // small integers: every sum is exact
    value = random_number(15) - 7;
    if constexpr (sizeof(T) == 4) {
      to = static_cast<float>(value);
    } else if constexpr (is_bfloat16<T>) {
      to.bits = static_cast<uint16_t>(bit_cast<uint32_t>(static_cast<float>(value)) >> 16);
    } else {
      const int magnitude = std::abs(static_cast<int>(value));
      const int exponent = magnitude ? std::ilogb(static_cast<double>(magnitude)) : 0;
      const int bits = magnitude ? (exponent + 15) << 10 | ((magnitude << 10 >> exponent) & 0x3ff) : 0;
      to.bits = static_cast<uint16_t>(bits | (value < 0 ? 0x8000 : 0));
    }
  };
  for (size_t i = 0; i < a.size(); ++i) number(a[i], a_values[i]);
  for (size_t i = 0; i < b.size(); ++i) number(b[i], b_values[i]);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double& sum = wanted[row * 8 + column];
      sum = d[row * 8 + column] = static_cast<float>(random_number(100));
      for (int k = 0; k < depth; ++k) sum += a_values[row * depth + k] * b_values[k * 8 + column];
    }
  }
  run(kernel, 1, 32, a.data(), b.data(), d.data());
  for (int i = 0; i < 16 * 8; ++i) expect(d[i] == wanted[i], name, d[i], wanted[i]);
}

// out (2, 4, 32): what each lane gets of four 8x8 matrices that hold their own indices, by a plain load and
// by a transposed one.
KERNEL void load_matrices(uint32_t* out) {
  SHARED_MEMORY(uint16_t, matrices, 4 * 64);
  const int lane = threadIdx.x;
  for (int i = lane; i < 4 * 64; i += 32) matrices[i] = static_cast<uint16_t>(i);
  sync_threads();
  const uint16_t* const row = &matrices[8 * lane];
  uint32_t four[2][4], two[2][2], one[2][1];
  ldmatrix(four[0], row);
  ldmatrix_transposed(four[1], row);
  ldmatrix(two[0], row);
  ldmatrix_transposed(two[1], row);
  ldmatrix(one[0], row);
  ldmatrix_transposed(one[1], row);
  for (int way = 0; way < 2; ++way) {
    const bool agree =
        two[way][0] == four[way][0] && two[way][1] == four[way][1] && one[way][0] == four[way][0];
    const bool turned = transpose_matrix(four[way][3]) == four[1 - way][3];
    for (int m = 0; m < 4; ++m) out[(way * 4 + m) * 32 + lane] = agree && turned ? four[way][m] : ~0u;
  }
}

void check_matrices() {
  Array<uint32_t> out(2 * 4 * 32);
  run(load_matrices, 1, 32, out.data());
  for (int way = 0; way < 2; ++way) {
    for (int m = 0; m < 4; ++m) {
      for (int lane = 0; lane < 32; ++lane) {
        const auto element = [&](int column) -> uint32_t {  // of row lane / 4
          return 64 * m + (way ? column * 8 + lane / 4 : lane / 4 * 8 + column);
        };
        const uint32_t wanted = element(lane % 4 * 2) | element(lane % 4 * 2 + 1) << 16;
        const uint32_t got = out[(way * 4 + m) * 32 + lane];
        expect(got == wanted, way ? "ldmatrix_transposed" : "ldmatrix", got, wanted);
      }
    }
  }
}

// out (2, 16, 72): a tile (16, 16) that holds its own indices, stored with rows of 72 elements that follow
// each other, and with the rows from 8 on 16 elements further down.
KERNEL void store_matrices(uint16_t* out) {
  SHARED_MEMORY(uint16_t, tiles, 2 * 16 * 72);
  const int lane = threadIdx.x, group = lane / 4, thread = lane % 4;
  for (int i = lane; i < 2 * 16 * 72; i += 32) tiles[i] = 0xffffu;
  sync_threads();
  uint32_t registers[4];
  for (int i = 0; i < 4; ++i) {
    const uint32_t index = 16 * (group + 8 * (i & 1)) + 8 * (i >> 1) + 2 * thread;
    registers[i] = index | (index + 1) << 16;
  }
  stmatrix<144>(tiles, registers);
  stmatrix<144, 8 * 144 + 32>(tiles + 16 * 72, registers);
  sync_threads();
  for (int i = lane; i < 2 * 16 * 72; i += 32) out[i] = tiles[i];
}

void check_stored_matrices() {
  Array<uint16_t> out(2 * 16 * 72);
  run(store_matrices, 1, 32, out.data());
  std::vector<int> wanted(2 * 16 * 72, 0xffff);
  for (int tile = 0; tile < 2; ++tile) {
    for (int i = 0; i < 256; ++i)
      wanted[(16 * tile + i / 16) * 72 + (i >= 128 && tile ? 16 : 0) + i % 16] = i;
  }
  for (size_t i = 0; i < out.size(); ++i) expect(out[i] == wanted[i], "stmatrix", out[i], wanted[i]);
}

// ---- exchanges, copies, indices ----

KERNEL void exchange(double* out) {
  const int lane = threadIdx.x;
  const float value = static_cast<float>(lane);
  out[lane] = shuffle(value, (lane + 3) % 32);
  out[32 + lane] = shuffle_xor(static_cast<double>(value), 5);
  out[64 + lane] = shuffle_up(value, 3);
  out[96 + lane] = shuffle_down(value, 3);
  out[128 + lane] = ballot(lane % 3 == 0);
  out[160 + lane] = 0;
  if (lane >= 16) {
    out[160 + lane] = ballot(lane % 2 == 0, 0xffff0000u);
    out[160 + lane] += shuffle_xor(value, 1, 0xffff0000u);
  }
}

void check_exchange() {
  Array<double> out(192);
  run(exchange, 1, 32, out.data());
  for (int lane = 0; lane < 32; ++lane) {
    const double wanted[6] = {static_cast<double>((lane + 3) % 32),
                              static_cast<double>(lane ^ 5),
                              static_cast<double>(lane < 3 ? lane : lane - 3),
                              static_cast<double>(lane + 3 > 31 ? lane : lane + 3),
                              static_cast<double>(0x49249249u),
                              lane < 16 ? 0.0 : (lane ^ 1) + static_cast<double>(0x55550000u)};
    for (int i = 0; i < 6; ++i) {
      expect(out[32 * i + lane] == wanted[i], "exchange between lanes", out[32 * i + lane], wanted[i]);
    }
  }
}

// Makes three groups of copies. Waits for the first two and reads them, then waits for all.
KERNEL void copy(const uint32_t* in, uint32_t* out) {
  SHARED_MEMORY(uint32_t, words, 32 * 12);
  const int lane = threadIdx.x;
  copy_async<16>(words + 4 * lane, in + 4 * lane, lane % 5 * 4);
  copy_async_commit();
  copy_async<8>(words + 128 + 2 * lane, in + 128 + 2 * lane, lane % 3 * 4);
  copy_async_commit();
  copy_async<4>(words + 192 + lane, in + 192 + lane);
  copy_async<4>(words + 224 + lane, in + 224 + lane, 0);
  copy_async_commit();
  copy_async_wait<1>();
  sync_warp();
  for (int i = lane; i < 192; i += 32) out[i] = words[i];
  copy_async_wait<0>();
  sync_warp();
  for (int i = 192 + lane; i < 256; i += 32) out[i] = words[i];
  store_shared(words + 256 + 4 * lane, load_global<uint4>(in + 4 * lane));
  const float2 two = load_constant<float2>(in + 128 + 2 * lane);
  store_global(out + 256 + 4 * lane, load_shared<float4>(words + 256 + 4 * lane));
  store_global(out + 384 + 2 * lane, two);
  store_global(out + 448 + lane, load_constant<uint32_t>(in + 192 + lane));
}

void check_copies() {
  Array<uint32_t> in(256), out(480);
  for (int i = 0; i < 256; ++i) in[i] = i + 1000;
  run(copy, 1, 32, in.data(), out.data());
  for (uint32_t i = 0; i < out.size(); ++i) {
    uint32_t wanted = i % 256 + 1000;
    if (i < 128 && i % 4 >= i / 4 % 5) wanted = 0;
    if (i >= 128 && i < 192 && i % 2 >= (i - 128) / 2 % 3) wanted = 0;
    if (i >= 224 && i < 256) wanted = 0;
    expect(out[i] == wanted, "copy", out[i], wanted);
  }
}

KERNEL void indices(int* seen) {
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int threads = blockDim.x * blockDim.y * blockDim.z;
  seen[block * threads + thread] =
      static_cast<int>(threadIdx.x + 10 * threadIdx.y + 100 * threadIdx.z + 1000 * blockIdx.x +
                       10000 * blockIdx.y + 100000 * blockIdx.z);
}

void check_indices() {
  const dim3 grid(3, 2, 4), block(5, 4, 3);
  Array<int> seen(24 * 60, -1);
  run(indices, grid, block, seen.data());
  for (int i = 0; i < 24 * 60; ++i) {
    const int t = i % 60, b = i / 60;
    const int wanted =
        t % 5 + 10 * (t / 5 % 4) + 100 * (t / 20) + 1000 * (b % 3) + 10000 * (b / 3 % 2) + 100000 * (b / 6);
    expect(seen[i] == wanted, "threadIdx and blockIdx", seen[i], wanted);
  }
}

}  // namespace
}  // namespace rebased::REBASED_BACKEND

int main() {
  using namespace rebased::REBASED_BACKEND;
  check_numbers<bfloat16_t>("bfloat16 conversion");
  check_numbers<half_t>("half conversion");
  check_reciprocals();
  check_product<bfloat16_t>("mma in bfloat16", multiply_16_bit<bfloat16_t, 16>, 16);
  check_product<half_t>("mma in half", multiply_16_bit<half_t, 16>, 16);
  check_product<bfloat16_t>("mma of depth 8 in bfloat16", multiply_16_bit<bfloat16_t, 8>, 8);
  check_product<half_t>("mma of depth 8 in half", multiply_16_bit<half_t, 8>, 8);
  check_product<float>("mma in tf32", multiply_tf32, 8);
  check_matrices();
  check_stored_matrices();
  check_exchange();
  check_copies();
  check_indices();
  if (failures) {
    printf("%d wrong\n", failures);
  } else {
    printf("right\n");
  }
  return failures != 0;
}
