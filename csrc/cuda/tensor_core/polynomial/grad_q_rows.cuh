// Tiles of the sweep that makes grad q, where the rows of a block lie, and how those of grad y and y come in.
#pragma once

#include "cuda/tensor_core/polynomial/gradient.cuh"
#include "cuda/tensor_core/sweep.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::polynomial {

// Dynamic shared memory, as offsets in bytes. q, grad y, r and statistics have two stages, or one where a
// warp reads its own before it copies the next; v has two.
template <class S>
struct GradQTiles {
  static constexpr int values = 0;                                  // (2, chunk, 64)
  static constexpr int gradients = values + 2 * S::value_tile * 2;  // (chunk, 64)
  static constexpr int keys = gradients + S::value_tile * 2;        // feature tile
  // k' transposed with features in their order (gradient.cuh), which with d = 8 is `keys`
  static constexpr int scored_keys = S::feature_dim == 8 ? keys : keys + S::feature_tile * 2;
  static constexpr int key_rows =
      keys + S::feature_tile * 2 + (S::feature_dim == 8 ? 0 : S::feature_dim * S::feature_stride * 2);
  static constexpr int query_tile = S::chunk * S::feature_dim;
  static constexpr int query_rows = key_rows + S::raw_tile * 2;       // (2, chunk, d)
  static constexpr int statistics = query_rows + 2 * query_tile * 2;  // (2, chunk / 16, {k, q}, 16)
  static constexpr int r = statistics + 2 * 2 * S::chunk * 8;         // (2, chunk)
  static constexpr int deltas = r + 2 * S::chunk * 4;                 // (chunk), where they come from y
  static constexpr int gram = deltas + S::chunk * 4;
  static constexpr int gram_terms = gram + StateShape<S>::gram_bytes;
  static constexpr int state = gram_terms + StateShape<S>::gram_term_bytes;  // published
  static constexpr int affine =
      state + (published_row<published_shift<S>>(StateShape<S>::rows - 1) + value_stride) * 2;
  // (group size + 1, d), and behind it the sums of the gradients of gamma and beta (group size, warps, 2, d)
  static constexpr int sums_bytes = 2 * S::feature_dim * 4;
  HOST_DEVICE static constexpr int affine_sums(int group_size) {
    return affine + (group_size + 1) * S::feature_dim * 8;
  }
  static constexpr int64_t bytes(int64_t group_size) {
    return affine_sums(static_cast<int>(group_size)) + group_size * warps * sums_bytes;
  }
};

template <class T>
struct GradQOrigins : BackwardOrigins<T> {
  T* grad_q;
  float* partial;  // (rows, d): the gradient of gamma LayerNorm(q) + beta, which another kernel goes on with
  float* delta;
  float factor;        // of r (H - delta / r G)
  float* affine_sums;  // of the gradients of gamma and beta in shared memory (group size, warps, 2, d)

  template <class S>
  DEVICE void set_all(const Arguments<BackwardProblem>& arguments, const BackwardBuffers& buffers,
                      char* memory) {
    this->set(arguments, S::chunk);
    affine_sums = reinterpret_cast<float*>(memory + GradQTiles<S>::affine_sums(arguments.group_size));
    const BackwardProblem& problem = arguments.problem;
    const int64_t row = blockIdx.y * problem.batch * problem.heads * problem.seqlen + this->row;
    grad_q = first_row<T>(problem.grad_q, this->span, this->span.kv_head * arguments.group_size);
    partial = buffers.query_gradient + row * S::feature_dim;
    delta = buffers.delta + row;
    // gamma, with which a row goes on to q in this kernel, is multiplied by the scale already
    factor = (S::taylor ? 1.0f : 2.0f) * (buffers.query_gradient ? arguments.scale : 1.0f);
  }
};

// Starts the copies of the warp's own rows of grad y and r; `gradients` begins at the block's first column.
template <class S, bool whole, class T>
DEVICE void copy_own_gradients(T* tile_rows, float* r_tile, const T* gradients, int stride, int piece,
                               const float* r, int first, int end, int columns_left, int thread) {
  const int lane = thread % 32, warp = thread / 32, apart = tiles_apart(warp);
  const int token = tile * warp + lane / 8, column = 8 * (lane % 8), r_token = tile * warp + lane;
  T* const target = tile_rows + token * value_stride + column;
  const T* const source = gradients + static_cast<int64_t>(first + token) * stride + column;
  UNROLL for (int o = 0; o < S::own_tiles; ++o) {
    UNROLL for (int i = 0; i < tile && (whole || piece == 16); i += 4) {
      const int further = o * apart + i;
      const bool present = whole || (first + token + further < end && column < columns_left);
      copy_async<16>(target + further * value_stride,
                     present ? source + static_cast<int64_t>(stride) * further : gradients, present ? 16 : 0);
    }
    const bool present = whole || first + r_token + o * apart < end;
    if (lane < tile)
      copy_async<4>(r_tile + r_token + o * apart, present ? r + first + r_token + o * apart : r,
                    present ? 4 : 0);
  }
  if (!whole) {
    bring_narrow_tiles<S, false>(tile_rows, value_stride, gradients, stride, piece,
                                 minimum(columns_left, columns), first, end, thread);
  }
}

// deltas (chunk) = delta / r of the warp's own rows of the block's first chunk, from y.
template <class S, class T>
DEVICE void deltas_from_y(float* deltas, const T* gradients, const T* y, int stride, int piece, int end,
                          int columns_left, bool normalize, int warp) {
  const Lane lane = lane_anew(warp);
  const int column = 2 * lane.lane;
  NO_UNROLL for (int i = 0; i < S::own_tiles * tile; ++i) {
    const int token = tile * warp + i / tile * tiles_apart(warp) + i % tile;
    float dot = 0;
    if (token < end && column < columns_left && normalize) {
      const T* const pair = y + static_cast<int64_t>(token) * stride + column;
      const float2 a = unpack<T>(load_shared<uint32_t>(gradients + token * value_stride + column)),
                   b = piece > 2
                           ? unpack<T>(load_global<uint32_t>(pair))
                           : float2{to_float(pair[0]), column + 1 < columns_left ? to_float(pair[1]) : 0.0f};
      dot = a.x * b.x + a.y * b.y;
    }
    // neighbours first, as in row_deltas
    UNROLL for (int distance = 1; distance < 32; distance *= 2) dot += shuffle_xor(dot, distance);
    if (lane.lane == 0) store_shared(deltas + token, dot);
  }
  sync_warp();
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::polynomial
