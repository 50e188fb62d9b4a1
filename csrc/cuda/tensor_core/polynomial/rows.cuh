// How the polynomial maps' kernels bring rows into shared memory, and q and k through LayerNorm and affine.
//
// A block is four warps and walks a sequence in chunks of 64 or 128 tokens. Warp w owns the chunk's tiles of
// 16 tokens w and, of 128, 7 - w: a causal product gives every warp as much work then. It copies the rows of
// q and k of these tiles, reads them as they are, transposed by ldmatrix, and normalises them in registers.
// Tiles in shared memory:
//   raw tile      (chunk, d): rows of q or k as they lie in memory
//   feature tile  (feature_rows, chunk): q' or k' transposed; rows from d on repeat rows 0, 1 and so on, so
//                 that features rotated by e are read e rows further down
//   value tile    (chunk, 64): rows of v or of grad y
// The strides make eight lanes of an ldmatrix touch all 32 banks.
#pragma once

#include "cuda/tensor_core/polynomial/slot.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::polynomial {

constexpr int value_stride = columns + 8;

// What a kernel is compiled for. Kernels call their Shape S.
template <FeatureMap feature_map, int dim, int chunk_tokens>
struct Shape {
  static_assert(chunk_tokens == 64 || chunk_tokens == 128);
  using Slot = polynomial::Slot<feature_map, dim>;
  static constexpr FeatureMap map = feature_map;
  static constexpr int feature_dim = dim, chunk = chunk_tokens;
  static constexpr bool taylor = Slot::taylor;
  static constexpr int own_tiles = chunk / (warps * tile);  // tiles of tokens of a warp
  static constexpr int units = dim / 8;                     // of 16 bytes in a row
  static constexpr int raw_stride = dim == 8 ? 8 : dim + 8;
  static constexpr int raw_tile = chunk * raw_stride;
  static constexpr int feature_stride = chunk + 8, feature_rows = dim + 8;
  static constexpr int feature_tile = feature_rows * feature_stride, value_tile = chunk * value_stride;
  // How many rows of a feature tile lie between the halves of a fragment of 16 features: with d = 8 a
  // fragment has the 8 features twice, rotated by e and by e + 1.
  static constexpr int half_rows = dim == 8 ? 0 : 8, rotated_half_rows = dim == 8 ? 1 : 8;
};

// Where the warp's tiles of tokens begin: the first at tile * warp, the second this many tokens behind it.
DEVICE int tiles_apart(int warp) { return tile * (2 * warps - 1 - 2 * warp); }
DEVICE int own_tile(int warp, int own) { return tile * warp + own * tiles_apart(warp); }

// Which row of 8 a lane addresses in an ldmatrix of four 8x8 matrices; the second and fourth matrix (parity),
// or the third and fourth (halves), begin half_rows further down.
DEVICE int parity_row(const Lane& lane, int half_rows) {
  return (lane.lane & 7) + (lane.lane & 8 ? half_rows : 0);
}
DEVICE int halves_row(const Lane& lane, int half_rows) {
  return (lane.lane & 7) + (lane.lane & 16 ? half_rows : 0);
}

// ---- copies ----

// With `whole` all rows and columns are there, and lie at multiples of 16 bytes. Else what is not there
// becomes 0, and rows may come in narrower pieces (tensor_core/ragged.cuh): a warp copies those of its own
// tiles of tokens, and settles them when they have arrived. Callers read `thread` anew in each chunk, so that
// what depends on it need not live in registers beside the state.

// Starts the copy of narrow rows of the warp's own tiles or, with `settle`, settles them where pieces have 2
// bytes. What that writes, the warp sees after a sync_warp, and others after a barrier.
template <class S, bool settle, class T>
DEVICE void bring_narrow_tiles(T* tiles, int tile_stride, const T* rows, int stride, int piece, int width,
                               int first, int end, int thread) {
  if (settle ? piece != 2 : piece == 16) return;
  NO_UNROLL for (int i = 0; i < S::own_tiles; ++i) {
    const int token = own_tile(thread / 32, i), rows_left = end - first - token;
    T* const place = tiles + token * tile_stride;
    const T* const source = rows + static_cast<int64_t>(first + token) * stride;
    if constexpr (settle) {
      settle_narrow_rows(place, tile_stride, source, stride, width, rows_left, thread % 32);
    } else {
      copy_narrow_rows(place, tile_stride, source, stride, piece, width, rows_left, thread % 32);
    }
  }
}

// Zeroes value tiles before their first copy: those of narrow rows leave the columns past the last one as
// they are. A barrier must follow.
template <class T>
DEVICE void clear_narrow_tiles(T* tiles, int elements, int piece) {
  if (piece == 16) return;
  NO_UNROLL for (int i = 8 * static_cast<int>(threadIdx.x); i < elements; i += 8 * threads) {
    store_shared(tiles + i, uint4{0, 0, 0, 0});
  }
}

// Starts the copy of the warp's own rows of q or k; `rows` is the first row of the segment.
template <class S, bool whole, int raw_stride = S::raw_stride, class T>
DEVICE void copy_rows(T* raw, const T* rows, int stride, int piece, int first, int end, int thread) {
  if (!whole && piece < 16) {
    bring_narrow_tiles<S, false>(raw, raw_stride, rows, stride, piece, S::feature_dim, first, end, thread);
    return;
  }
  const int lane = thread % 32, warp = thread / 32;
  if (lane >= tile * S::units) return;
  const int token = tile * warp + lane / S::units, element = 8 * (lane % S::units), apart = tiles_apart(warp);
  T* const target = raw + token * raw_stride + element;
  const T* const source = rows + static_cast<int64_t>(first + token) * stride + element;
  UNROLL for (int i = 0; i < S::own_tiles; ++i) {
    const bool present = whole || first + token + i * apart < end;
    copy_async<16>(target + i * apart * raw_stride,
                   present ? source + static_cast<int64_t>(stride) * (i * apart) : rows, present ? 16 : 0);
  }
}

// Starts the copy of the statistics of "token" LayerNorm, of the warp's own rows of k and, in lanes from 16
// on, of q. statistics (chunk / 16, {k, q}, 16)
template <class S, bool whole>
DEVICE void copy_statistics(float2* statistics, const float* of_keys, const float* of_queries, int first,
                            int end, int thread) {
  const int lane = thread % 32, warp = thread / 32;
  const float* const rows = lane < tile ? of_keys : of_queries;
  const int token = first + tile * warp + lane % tile, apart = tiles_apart(warp);
  UNROLL for (int i = 0; i < S::own_tiles; ++i) {
    const bool present = whole || token + i * apart < end;
    copy_async<8>(statistics + 2 * (tile * warp + i * apart) + lane,
                  rows + (present ? 2 * (token + i * apart) : 0), present ? 8 : 0);
  }
}

// Starts the copy of the block's value rows; `rows` begins at the block's first column.
template <class S, bool whole, class T>
DEVICE void copy_values(T* values, const T* rows, int stride, int piece, int first, int end, int columns_left,
                        int thread) {
  if (!whole && piece < 16) {
    bring_narrow_tiles<S, false>(values, value_stride, rows, stride, piece, minimum(columns_left, columns),
                                 first, end, thread);
    return;
  }
  constexpr int units = columns / 8, step = threads / units;
  const int token = thread / units, column = 8 * (thread % units);
  T* const target = values + token * value_stride + column;
  const T* const source = rows + static_cast<int64_t>(first + token) * stride + column;
  UNROLL for (int i = 0; i < S::chunk / step; ++i) {
    const bool present = whole || (first + token + i * step < end && column < columns_left);
    copy_async<16>(target + i * step * value_stride,
                   present ? source + static_cast<int64_t>(stride) * (i * step) : rows, present ? 16 : 0);
  }
}

// ---- LayerNorm and affine ----

// Loads gamma and beta of the block's `group` query heads, then of its kv head: affine (group + 1, d). The
// parameters of the query heads are multiplied by the scale.
template <class S, class AnyProblem>
DEVICE void load_affine(float2* affine, const Arguments<AnyProblem>& arguments, int64_t kv_head, int group) {
  constexpr int dim = S::feature_dim;
  for (int n = static_cast<int>(threadIdx.x); n < (group + 1) * dim; n += threads) {
    const int member = n / dim, i = n % dim;
    const bool is_key = member == group;
    const Affine& source = is_key ? arguments.problem.key_affine : arguments.problem.query_affine;
    const int64_t head = is_key ? kv_head : kv_head * arguments.group_size + member;
    const auto at = [&](const void* values, int64_t stride, float otherwise) {
      return values ? static_cast<const float*>(values)[head * stride + i] : otherwise;
    };
    const float scale = is_key ? 1.0f : arguments.scale;
    affine[n] = {at(source.gamma, source.gamma_head_stride, 1) * scale,
                 at(source.beta, source.beta_head_stride, 0) * scale};
  }
}

// Statistics that leave rows as they are.
template <class S>
DEVICE void clear_statistics(float2* statistics) {
  UNROLL for (int i = 0; i < 2 * S::chunk / threads; ++i) {
    statistics[threads * i + static_cast<int>(threadIdx.x)] = float2{0, 1};
  }
}

// Works out the statistics of "head" LayerNorm of one tile's rows of k and, in lanes from 16 on, of q.
template <class S, int query_stride = S::raw_stride, class T>
DEVICE void head_statistics(float2* statistics, const T* key_rows, const T* query_rows, float epsilon,
                            const Lane& lane) {
  const int token = lane.lane % tile;
  const T* const row =
      lane.lane < tile ? key_rows + token * S::raw_stride : query_rows + token * query_stride;
  float x[S::feature_dim];
  UNROLL for (int i = 0; i < S::units; ++i) unpack_unit<T>(x, i, load_shared<uint4>(row + 8 * i));
  statistics[lane.lane] = row_statistics(x, LayerNorm::head, {}, epsilon);
}

// gamma LayerNorm(x) + beta of a tile of 16 tokens, as fragment B of a sum over tokens: terms[i] has feature
// g + 8 (i / 2) of tokens 8 (i % 2) + 2t and the next. Tokens from tokens_left on become 0.
template <class S, class T>
DEVICE void normalize(uint32_t (&terms)[2 * S::units], const T* rows, const float2* statistics,
                      const float2* affine, int tokens_left, const Lane& lane) {
  ldmatrix_transposed(terms,
                      rows + lane.lane % tile * S::raw_stride + (S::units > 1 ? 8 * (lane.lane / tile) : 0));
  UNROLL for (int half = 0; half < 2; ++half) {
    const float4 pair = load_shared<float4>(statistics + 8 * half + 2 * lane.pair);
    const float shift[2] = {-pair.x * pair.y, -pair.z * pair.w};
    UNROLL for (int unit = 0; unit < S::units; ++unit) {
      const float2 of_feature = load_shared<float2>(affine + lane.group + 8 * unit);
      uint32_t& term = terms[2 * unit + half];
      const float2 x = unpack<T>(term);
      term = pack<T>((x.x * pair.y + shift[0]) * of_feature.x + of_feature.y,
                     (x.y * pair.w + shift[1]) * of_feature.x + of_feature.y);
    }
  }
  if (tokens_left >= tile) return;                 // counted 0 from here: rows are missing
  UNROLL for (int i = 0; i < 2 * S::units; ++i) {  // last, since beta would bring a padded row to life
    const int left = tokens_left - 8 * (i & 1) - 2 * lane.pair;
    terms[i] = left >= 2 ? terms[i] : left == 1 ? terms[i] & 0xffffu : 0u;
  }
}

// Stores them in a feature tile.
template <class S, class T>
DEVICE void store_terms(T* features, const uint32_t (&terms)[2 * S::units], int token, const Lane& lane) {
  T* const place = features + lane.group * S::feature_stride + token + 2 * lane.pair;
  UNROLL for (int half = 0; half < 2; ++half) {
    UNROLL for (int unit = 0; unit <= S::units; ++unit) {  // the first 8 features once more
      store_shared(place + 8 * half + 8 * unit * S::feature_stride, terms[2 * (unit % S::units) + half]);
    }
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::polynomial
