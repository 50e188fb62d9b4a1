// How the kernels of the elementwise maps, square, elu and identity, bring rows into shared memory, and q and
// k through LayerNorm, affine and map.
//
// A block is four warps and walks a sequence in chunks of 64 tokens. A warp owns a tile of 16 tokens of each
// chunk: it copies the tile's rows of q and k, and takes them to phi(q') and phi(k') in registers. phi(q')
// stays there, as a fragment A of all products with it; phi(k') goes back to where the rows of k were.
// Tiles in shared memory:
//   row tile      (tokens, 16): rows of q or k as they lie in memory, or phi(k')
//   value tile    (chunk, 64): rows of v
// The strides make eight lanes of an ldmatrix touch all 32 banks.
#pragma once

#include "cuda/tensor_core/polynomial/rows.cuh"
#include "cuda/tensor_core/state.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::elementwise {

using polynomial::value_stride;

// What a kernel is compiled for. Kernels call their Shape S.
template <FeatureMap feature_map, int dim>
struct Shape {
  static_assert(!is_polynomial(feature_map) && dim == tile);
  using Slot = tensor_core::Slot<Slabs<feature_map, dim>>;
  static constexpr FeatureMap map = feature_map;
  static constexpr int feature_dim = dim, chunk = tensor_core::chunk, units = dim / 8;
  static constexpr int raw_stride = feature_dim + 8;
  static constexpr int row_tile = chunk * raw_stride, value_tile = chunk * value_stride;
  static constexpr int affine_size = 8;  // float4 of a head's gamma and beta
};

// ---- copies ----

// Where a thread reads its parts of the next chunk. A row of q and of k is in the hands of two lanes of the
// warp that owns it, eight lanes apart, so that eight side by side write to all banks; one of v is in the
// hands of eight threads. Only forward has queries.
template <class T, class S>
struct NextRows {
  static constexpr int value_units = columns / 8, value_step = threads / value_units;
  const T *q = nullptr, *k, *v;
  // of "token" LayerNorm, in the segment's first chunk: of k and, in lanes from 16 on, of q if there is any
  const float* statistics = nullptr;
  int row, element, value_row, value_column;

  DEVICE NextRows(const Origins<T>& origins, const Problem& problem, const Lane& lane)
      : row(tile * lane.warp + lane.row_of_halves()),
        element(lane.column_of_halves()),
        value_row((32 * lane.warp + lane.lane) / value_units),
        value_column(8 * (lane.lane % value_units)) {
    k = origins.k + static_cast<int64_t>(row) * row_stride(problem.k) + element;
    v = origins.v + static_cast<int64_t>(value_row) * row_stride(problem.v) + value_column;
    if (problem.layer_norm == LayerNorm::token) statistics = own_statistics(origins.key_statistics, lane);
  }
  DEVICE void start_queries(const Origins<T>& origins, const Problem& problem, const Lane& lane) {
    q = origins.q + static_cast<int64_t>(row) * row_stride(problem.q) + element;
    if (problem.layer_norm == LayerNorm::token && lane.lane >= tile) {
      statistics = own_statistics(origins.query_statistics, lane);
    }
  }
  static DEVICE const float* own_statistics(const float* of_rows, const Lane& lane) {
    return of_rows + 2 * (tile * lane.warp + lane.lane % tile);
  }

  // Start the copies of the rows of q, or of k and v, and the statistics of both; rows_left are there from
  // the chunk's first on. With `whole` all rows and columns are there; else what is not there becomes 0.
  // `key_tile` and `value_tile` are the chunk's.
  template <bool whole>
  DEVICE void copy_queries(T* query_tile, int64_t head_offset, int rows_left) const {
    const bool present = whole || row < rows_left;
    copy_async<16>(query_tile + row * S::raw_stride + element, q + head_offset, present ? 16 : 0);
  }
  template <bool whole>
  DEVICE void copy_keys(T* key_tile, T* value_tile, const Problem& problem, int rows_left,
                        int columns_left) const {
    const bool present = whole || row < rows_left;
    copy_async<16>(key_tile + row * S::raw_stride + element, k, present ? 16 : 0);
    T* const target = value_tile + value_row * value_stride + value_column;
    const T* source = v;
    UNROLL for (int i = 0; i < S::chunk; i += value_step) {
      const bool value_present = whole || (value_row + i < rows_left && value_column < columns_left);
      copy_async<16>(target + i * value_stride, source, value_present ? 16 : 0);
      source += static_cast<int64_t>(value_step) * row_stride(problem.v);
    }
  }
  template <bool whole>
  DEVICE void copy_statistics(float2* target, int first, int rows_left, const Lane& lane) const {
    const bool present = whole || tile * lane.warp + lane.lane % tile < rows_left;
    copy_async<8>(target + lane.lane, statistics + 2 * first, present ? 8 : 0);
  }

  // Go on to the next chunk.
  DEVICE void advance_queries(const Problem& problem) {
    q += static_cast<int64_t>(S::chunk) * row_stride(problem.q);
  }
  DEVICE void advance_keys(const Problem& problem) {
    k += static_cast<int64_t>(S::chunk) * row_stride(problem.k);
    v += static_cast<int64_t>(S::chunk) * row_stride(problem.v);
  }
};

// ---- LayerNorm, affine and map ----

// Loads gamma and beta of the block's `group` query heads, then of its kv head, in the order in which the
// lanes of a quad read them: affine (group + 1, 4 lanes, {gamma, beta}) of the features 2t, 2t + 1, 2t + 8
// and 2t + 9.
template <class S, class AnyProblem>
DEVICE void load_affine(float4* affine, const Arguments<AnyProblem>& arguments, int64_t kv_head, int group) {
  constexpr int dim = S::feature_dim, floats = 4 * S::affine_size;
  for (int n = static_cast<int>(threadIdx.x); n < (group + 1) * floats; n += threads) {
    const int member = n / floats, i = n % dim;
    const bool is_key = member == group, is_beta = n / dim % 2;
    const Affine& source = is_key ? arguments.problem.key_affine : arguments.problem.query_affine;
    const int64_t head = is_key ? kv_head : kv_head * arguments.group_size + member;
    const float* const values = static_cast<const float*>(is_beta ? source.beta : source.gamma);
    const int64_t stride = is_beta ? source.beta_head_stride : source.gamma_head_stride;
    const int place = floats * member + i % 8 / 2 * 8 + is_beta * 4 + i / 8 * 2 + i % 2;
    reinterpret_cast<float*>(affine)[place] = values ? values[head * stride + i] : is_beta ? 0.0f : 1.0f;
  }
}

// phi(gamma LayerNorm(x) + beta) of a tile of 16 tokens, as a fragment A (16 tokens, 16 features). Tokens
// from tokens_left on become 0.
template <class S, class T>
DEVICE void row_features(uint32_t (&phi)[4], const T* rows, const float2* statistics, const float4* affine,
                         int tokens_left, const Lane& lane) {
  ldmatrix(phi, rows + lane.row_of_parity() * S::raw_stride + lane.column_of_parity());
  const float4 gammas = load_shared<float4>(affine + 2 * lane.pair),
               betas = load_shared<float4>(affine + 2 * lane.pair + 1);
  const float gamma[4] = {gammas.x, gammas.y, gammas.z, gammas.w},
              beta[4] = {betas.x, betas.y, betas.z, betas.w};
  UNROLL for (int half = 0; half < 2; ++half) {
    const float2 of_row = load_shared<float2>(statistics + lane.group + 8 * half);
    const float shift = -of_row.x * of_row.y;
    UNROLL for (int unit = 0; unit < S::units; ++unit) {
      uint32_t& pair = phi[2 * unit + half];
      const float2 x = unpack<T>(pair);
      pair = pack<T>(stored_feature<S>((x.x * of_row.y + shift) * gamma[2 * unit] + beta[2 * unit]),
                     stored_feature<S>((x.y * of_row.y + shift) * gamma[2 * unit + 1] + beta[2 * unit + 1]));
    }
  }
  if (tokens_left >= tile) return;
  UNROLL for (int i = 0; i < 4; ++i) {  // last, since beta would bring a padded row to life
    if (lane.group + 8 * (i & 1) >= tokens_left) phi[i] = 0;
  }
}

// Takes a tile of rows of k to phi(k') in its place.
template <class S, class T>
DEVICE void finish_keys(T* rows, const float2* statistics, const float4* affine, int tokens_left,
                        const Lane& lane) {
  uint32_t phi[4];
  row_features<S>(phi, rows, statistics, affine, tokens_left, lane);
  sync_warp();  // all lanes have read
  stmatrix<S::raw_stride * 2>(rows, phi);
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::elementwise
