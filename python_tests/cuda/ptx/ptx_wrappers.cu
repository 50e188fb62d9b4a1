// Kernels of one warp that call device.cuh's primitives once each, for test_ptx.py to run and to compare.
#include "cuda/device/device.cuh"

namespace rebased::cuda {

// x, y (32); halves (32): any bits of a 16-bit float; out (13, 32)
KERNEL void numbers(const float* x, const float* y, const half_t* halves, uint32_t* out) {
  const unsigned lane = threadIdx.x;
  const float a = x[lane], b = y[lane];
  const auto put = [&](int row, uint32_t value) { out[32 * row + lane] = value; };
  put(0, from_float<bfloat16_t>(a).bits);
  put(1, from_float<half_t>(a).bits);
  put(2, bit_cast<uint32_t>(to_float(halves[lane])));
  put(3, pack<bfloat16_t>(a, b));
  put(4, pack<half_t>(a, b));
  put(5, multiply_pairs<bfloat16_t>(pack<bfloat16_t>(a, b), pack<bfloat16_t>(b, b)));
  put(6, multiply_pairs<half_t>(pack<half_t>(a, b), pack<half_t>(b, b)));
  put(7, add_pairs<bfloat16_t>(pack<bfloat16_t>(a, b), pack<bfloat16_t>(b, b)));
  put(8, add_pairs<half_t>(pack<half_t>(a, b), pack<half_t>(b, b)));
  put(9, to_tf32(a));
  put(10, bit_cast<uint32_t>(fast_reciprocal(a)));
  put(11, ballot(a > b));
  put(12, bit_cast<uint32_t>(fast_square_root(a * a)));
}

// x (32); out (5, 32)
KERNEL void exchanges(const uint32_t* x, uint32_t* out) {
  const int lane = static_cast<int>(threadIdx.x);
  const uint32_t value = x[lane];
  out[lane] = shuffle(value, 31 - lane);
  out[32 + lane] = shuffle_xor(value, 5);
  out[64 + lane] = shuffle_up(value, 3);
  out[96 + lane] = shuffle_down(value, 3);
  out[128 + lane] = static_cast<uint32_t>(thread_index_anew());
}

// matrices (4, 8, 8) of 16-bit elements; out (15, 32): the registers of the six loads, then the transposed
// matrix
KERNEL void matrices(const uint16_t* matrices, uint32_t* out) {
  SHARED_MEMORY(uint16_t, rows, 4 * 64);
  const unsigned lane = threadIdx.x;
  copy_async<16>(rows + 8 * lane, matrices + 8 * lane);
  copy_async_commit();
  copy_async_wait<0>();
  sync_threads();
  uint32_t r1[1], r2[2], r4[4];
  int row = 0;
  const auto put = [&](uint32_t value) { out[32 * row++ + lane] = value; };
  ldmatrix(r1, rows + 8 * lane);
  put(r1[0]);
  ldmatrix(r2, rows + 8 * lane);
  UNROLL for (int i = 0; i < 2; ++i) put(r2[i]);
  ldmatrix(r4, rows + 8 * lane);
  UNROLL for (int i = 0; i < 4; ++i) put(r4[i]);
  ldmatrix_transposed(r1, rows + 8 * lane);
  put(r1[0]);
  ldmatrix_transposed(r2, rows + 8 * lane);
  UNROLL for (int i = 0; i < 2; ++i) put(r2[i]);
  ldmatrix_transposed(r4, rows + 8 * lane);
  UNROLL for (int i = 0; i < 4; ++i) put(r4[i]);
  put(transpose_matrix(r1[0]));
}

// registers (4, 32) of a tile (16, 16); out (2, 16, 72) of 16-bit elements: the tile stored with rows of 72
// elements that follow each other, and with the rows from 8 on 16 elements further down
KERNEL void stored_matrices(const uint32_t* registers, uint32_t* out) {
  SHARED_MEMORY(uint16_t, tiles, 2 * 16 * 72);
  const unsigned lane = threadIdx.x;
  uint32_t* const words = reinterpret_cast<uint32_t*>(tiles);
  NO_UNROLL for (int i = 0; i < 36; ++i) words[32 * i + lane] = 0xffffffffu;
  sync_threads();
  uint32_t own[4];
  UNROLL for (int i = 0; i < 4; ++i) own[i] = registers[32 * i + lane];
  stmatrix<144>(tiles, own);
  stmatrix<144, 8 * 144 + 32>(tiles + 16 * 72, own);
  sync_threads();
  NO_UNROLL for (int i = 0; i < 36; ++i) out[32 * i + lane] = words[32 * i + lane];
}

// fragments (10, 32): a (4), b (2), d (4, float); out (5, 32)
template <class Multiply>
DEVICE void multiply(const uint32_t* fragments, float* out, const Multiply& product) {
  const unsigned lane = threadIdx.x;
  uint32_t a[4];
  float d[4];
  UNROLL for (int i = 0; i < 4; ++i) a[i] = fragments[32 * i + lane];
  UNROLL for (int i = 0; i < 4; ++i) d[i] = bit_cast<float>(fragments[32 * (6 + i) + lane]);
  product(d, a, fragments[128 + lane], fragments[160 + lane]);
  UNROLL for (int i = 0; i < 4; ++i) out[32 * i + lane] = d[i];
}
KERNEL void product_bfloat16(const uint32_t* fragments, float* out) {
  multiply(fragments, out,
           [](auto& d, const auto& a, uint32_t b0, uint32_t b1) { mma_m16n8k16<bfloat16_t>(d, a, b0, b1); });
}
KERNEL void product_half(const uint32_t* fragments, float* out) {
  multiply(fragments, out,
           [](auto& d, const auto& a, uint32_t b0, uint32_t b1) { mma_m16n8k16<half_t>(d, a, b0, b1); });
}
KERNEL void product_bfloat16_k8(const uint32_t* fragments, float* out) {
  multiply(fragments, out,
           [](auto& d, const auto& a, uint32_t b0, uint32_t) { mma_m16n8k8<bfloat16_t>(d, a[0], a[1], b0); });
}
KERNEL void product_half_k8(const uint32_t* fragments, float* out) {
  multiply(fragments, out,
           [](auto& d, const auto& a, uint32_t b0, uint32_t) { mma_m16n8k8<half_t>(d, a[0], a[1], b0); });
}
KERNEL void product_tf32(const uint32_t* fragments, float* out) {
  multiply(fragments, out,
           [](auto& d, const auto& a, uint32_t b0, uint32_t b1) { mma_m16n8k8_tf32(d, a, b0, b1); });
}

// source (32, 4); out (4, 32, 4): by asynchronous copies of 16, 8 and 4 bytes, in this order in three groups
// of which the last two may still be under way at the first read; then by load_global and store_global
KERNEL void copies(const uint32_t* source, uint32_t* out) {
  SHARED_MEMORY(uint4, units, 3 * 32);
  const int lane = static_cast<int>(threadIdx.x);
  const uint32_t* const from = source + 4 * lane;
  uint32_t* const words = reinterpret_cast<uint32_t*>(units);
  uint32_t* const to = words + 4 * lane;
  copy_async<16>(to, from, lane % 2 ? 16 : 0);
  copy_async_commit();
  UNROLL for (int i = 0; i < 2; ++i) copy_async<8>(to + 128 + 2 * i, from + 2 * i, lane % 2 ? 8 : 4);
  copy_async_commit();
  UNROLL for (int i = 0; i < 4; ++i) copy_async<4>(to + 256 + i, from + i, lane % 3 ? 4 : 0);
  copy_async_commit();
  copy_async_wait<2>();
  store_global(out + 4 * lane, load_shared<uint4>(to));
  copy_async_wait<0>();
  store_global(out + 128 + 4 * lane, load_shared<uint2>(to + 128));
  store_global(out + 128 + 4 * lane + 2, load_shared<uint2>(to + 130));
  UNROLL for (int i = 0; i < 4; ++i)
      store_global(out + 256 + 4 * lane + i, load_shared<uint32_t>(to + 256 + i));
  const uint2 low = load_global<uint2>(from);
  const uint4 all = load_global<uint4>(from);
  store_global(out + 384 + 4 * lane, uint4{low.x, low.y, all.z, all.w});
}

}  // namespace rebased::cuda
