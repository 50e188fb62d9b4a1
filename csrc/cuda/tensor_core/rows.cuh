// The way between global memory and the tiles of the tensor-core path: which rows a block walks, how a row of
// q or k goes through LayerNorm, affine and map into a feature tile, copies of value rows, and stores of
// finished tiles.
#pragma once

#include "cuda/shared/affine.cuh"
#include "cuda/shared/column_groups.cuh"
#include "cuda/shared/row_norm.cuh"
#include "cuda/tensor_core/fragments.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

// What a sweep needs to know of its call beyond the problem.
struct Launch {
  int segments;                   // runs of chunks of a sequence that different blocks walk
  const int64_t* bounds;          // clamped cu_seqlens on the device, or null
  const float* query_statistics;  // "token" LayerNorm: (batch, seqlen, 2), mean and 1 / deviation; or null
  const float* key_statistics;
  void* workspace;    // of the call
  bool all_segments;  // whether the last segment's own state is wanted too (in reverse the first's)
};

// What a kernel is given. The problem's constants are doubles; here they are floats, since converting them
// would cost instructions in every chunk.
template <class AnyProblem>
struct Arguments {
  AnyProblem problem;
  Launch launch;
  float scale, eps, layer_norm_eps;
  int group_size;  // query heads per kv head
  float* slots;    // the slots of segments' states in the workspace, or null
  bool scanned;    // whether the slots hold the states to start from, or each segment's own sums

  template <class GivenProblem>
  Arguments(const Call<GivenProblem>& call, float* slots, bool scanned, bool all_segments = false)
      : problem(call.problem),
        launch{call.segments,
               call.template region<const int64_t>(call.workspace.bounds),
               call.template region<const float>(call.workspace.query_statistics),
               call.template region<const float>(call.workspace.key_statistics),
               call.problem.workspace,
               all_segments},
        scale(static_cast<float>(problem.scale)),
        eps(static_cast<float>(problem.eps)),
        layer_norm_eps(static_cast<float>(problem.layer_norm_eps)),
        group_size(static_cast<int>(problem.group_size())),
        slots(slots),
        scanned(scanned) {}
};

// The row stride, in elements, as an int: its products cost fewer instructions than 64-bit ones. supports()
// has checked that it fits.
template <class Rows>
DEVICE int row_stride(const Rows& rows) {
  return static_cast<int>(rows.row_stride);
}

// ---- the rows of a block ----

// blockIdx.x counts (sequence, kv head, segment), blockIdx.y the groups of 64 value columns.
struct Span {
  int64_t sequence, batch, kv_head;
  int64_t begin;  // the block's first row
  int64_t slot;   // the number of this block's slot in the workspace
  int rows, segment, first_column;
};

DEVICE Span find_span(const Problem& problem, const Launch& launch, int chunk_length = chunk) {
  Span span;
  const int64_t head = blockIdx.x / launch.segments;
  span.segment = static_cast<int>(blockIdx.x % launch.segments);
  span.kv_head = head % problem.kv_heads;
  span.sequence = head / problem.kv_heads;
  span.batch = launch.bounds ? 0 : span.sequence;
  const int64_t first = launch.bounds ? launch.bounds[span.sequence] : 0;
  const int64_t last = launch.bounds ? launch.bounds[span.sequence + 1] : problem.seqlen;
  const int64_t chunk_rows = static_cast<int64_t>(chunk_length) * launch.segments;
  const int64_t segment_rows = (last - first + chunk_rows - 1) / chunk_rows * chunk_length;
  span.begin = minimum(first + span.segment * segment_rows, last);
  span.rows = static_cast<int>(minimum(segment_rows, last - span.begin));
  span.slot = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
  span.first_column = first_column();
  return span;
}

// The block's first row of a head.
template <class T>
DEVICE const T* first_row(const ConstRows& rows, const Span& span, int64_t head) {
  return static_cast<const T*>(rows.data) + span.batch * rows.batch_stride + head * rows.head_stride +
         span.begin * rows.row_stride;
}
template <class T>
DEVICE T* first_row(const MutableRows& rows, const Span& span, int64_t head) {
  return static_cast<T*>(rows.data) + span.batch * rows.batch_stride + head * rows.head_stride +
         span.begin * rows.row_stride;
}

// Which rows a block walks, and where the rows of its first heads begin; value rows begin at the block's
// first column. One thread works this out and leaves it in shared memory, since in registers it would push
// out a part of the state.
template <class T>
struct Origins {
  Span span;
  const T *q, *k, *v;
  const float *query_statistics, *key_statistics;

  template <class AnyProblem>
  DEVICE void set(const Arguments<AnyProblem>& arguments, int chunk_length = chunk) {
    const Problem& problem = arguments.problem;
    const Launch& launch = arguments.launch;
    span = find_span(problem, launch, chunk_length);
    q = first_row<T>(problem.q, span, span.kv_head * arguments.group_size);
    k = first_row<T>(problem.k, span, span.kv_head);
    v = first_row<T>(problem.v, span, span.kv_head) + span.first_column;
    const int64_t row = span.batch * problem.seqlen + span.begin;
    query_statistics = launch.query_statistics ? launch.query_statistics + 2 * row : nullptr;
    key_statistics = launch.key_statistics ? launch.key_statistics + 2 * row : nullptr;
  }
};

// ---- q and k ----

// Loads gamma and beta of each query head of the block, then of its kv head, into shared memory (group_size +
// 1, 2 d). For the polynomial maps the parameters of the query heads are multiplied by the scale.
template <class S, class AnyProblem>
DEVICE void load_affine(float* affine, const Arguments<AnyProblem>& arguments, int64_t kv_head) {
  rebased::REBASED_BACKEND::load_affine<S::feature_dim, S::threads>(
      affine, arguments.problem, kv_head, arguments.group_size, [&](float value, bool is_key) {
        const bool scaled = !is_key && is_polynomial(arguments.problem.feature_map);
        return scaled ? value * arguments.scale : value;
      });
}

// Rows of q and k on their way into feature tiles. Each of the first four warps copies the rows that its own
// threads then read, one row each, so that sync_warp is all the synchronisation needed.
template <class T>
struct RowTile {
  T* elements;         // (threads, d), with the 16-byte units of a row permuted by unit_offset
  float2* statistics;  // (threads): mean and 1 / deviation of "token" LayerNorm
};

// Starts the copy of the warp's rows into the same rows of the tile, with zeros past the row `end`. `index`
// is the row of this thread. As many lanes share a row as it has 16-byte units, so that each access of the
// warp covers whole sectors of 32 bytes.
template <class T, class S>
DEVICE void copy_rows(const RowTile<T>& tile, const T* rows, int stride, const float* statistics, int index,
                      int end) {
  constexpr int units = S::units, rows_at_once = 32 / units;
  const int thread = thread_index_anew(), lane = thread % 32;
  // lanes write side by side, and unit_offset says which unit of a row belongs to the place of a lane
  const int row = index - lane + lane / units, unit = lane % units ^ lane / 8 % units;
  const T* source = rows + static_cast<int64_t>(row) * stride + 8 * unit;
  T* const target = tile.elements + (thread - lane) * S::feature_dim + 8 * lane;
  UNROLL for (int i = 0; i < units; ++i) {
    const bool present = row + rows_at_once * i < end;
    copy_async<16>(target + rows_at_once * i * S::feature_dim, present ? source : rows, present ? 16 : 0);
    source += rows_at_once * static_cast<int64_t>(stride);
  }
  if (!statistics) return;
  const bool present = index < end;
  copy_async<8>(tile.statistics + thread, statistics + (present ? 2 * index : 0), present ? 8 : 0);
}

// Unpacks the elements 8 which .. 8 which + 7 of a row from the 16 bytes that hold them.
template <class T, int dim>
DEVICE void unpack_unit(float (&x)[dim], int which, const uint4& unit) {
  const uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
  UNROLL for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(words[i]);
    x[8 * which + 2 * i] = pair.x;
    x[8 * which + 2 * i + 1] = pair.y;
  }
}

// What a feature tile holds in the place of x: the maps with one slab are applied here, in float.
template <class S>
DEVICE float stored_feature(float x) {
  return S::map == FeatureMap::square ? x * x : S::map == FeatureMap::elu ? elu_feature(x) : x;
}

// Writes this thread's row, or zeros where none is present, into column `token` of a feature tile. Returns
// the row's mean and 1 / deviation.
template <class T, class S>
DEVICE float2 store_row(T* features, int token, const RowTile<T>& tile, bool present, const float* affine,
                        LayerNorm layer_norm, float layer_norm_eps) {
  const int thread = thread_index_anew();
  float x[S::feature_dim];
  UNROLL for (int i = 0; i < S::units; ++i) {
    unpack_unit<T>(x, i, load_shared<uint4>(tile.elements + unit_offset<S::units>(thread, i)));
  }
  const float2 given = layer_norm == LayerNorm::token ? tile.statistics[thread] : float2{};
  const float2 statistics = row_statistics(x, layer_norm, given, layer_norm_eps);
  UNROLL for (int i = 0; i < S::feature_dim; i += 4) {
    const float4 gamma = load_shared<float4>(affine + i),
                 beta = load_shared<float4>(affine + S::feature_dim + i);
    const float gammas[4] = {gamma.x, gamma.y, gamma.z, gamma.w}, betas[4] = {beta.x, beta.y, beta.z, beta.w};
    UNROLL for (int j = 0; j < 4; ++j) {
      const float value = (x[i + j] - statistics.x) * (statistics.y * gammas[j]) + betas[j];
      // a padded row is zeroed last: beta would bring it to life
      const T stored = from_float<T>(present ? stored_feature<S>(value) : 0.0f);
      features[(i + j) * feature_stride + token] = stored;
      if (i + j + S::feature_dim < S::feature_rows) {
        features[(i + j + S::feature_dim) * feature_stride + token] = stored;
      }
    }
  }
  return statistics;
}

// ---- value rows ----

// Starts the copy of 64 rows into a value tile, with zeros past the last row and past the last column.
template <int block_threads = threads, class T>
DEVICE void copy_values(T* values, const T* rows, int stride, int first, int end, int columns_left) {
  constexpr int units = columns / 8, step = block_threads / units;  // 16-byte units of a row, rows at once
  const int token = static_cast<int>(threadIdx.x / units), column = static_cast<int>(threadIdx.x % units) * 8;
  T* const target = values + value_offset(token, column);
  const T* source = rows + static_cast<int64_t>(first + token) * stride + column;
  UNROLL for (int i = 0; i < chunk / step; ++i) {
    const bool present = first + token + step * i < end && column < columns_left;
    static_assert(step % 8 == 0, "the permutation of units has period 8");
    copy_async<16>(target + step * i * columns, present ? source : rows, present ? 16 : 0);
    source += step * static_cast<int64_t>(stride);
  }
}

// Stores a tile (16, 8 n) of n = 1 or 2 C fragments, rounded to T. Its way leads through `staging`, 256
// elements of shared memory that belong to the warp.
template <class T, int n>
DEVICE void store_tile(T* staging, const float (&values)[n][4], T* rows, int stride, int rows_left,
                       int columns_left, const Lane& lane) {
  const auto place = [&](int row, int i) { return staging + unit_offset<n>(row, i); };
  UNROLL for (int half = 0; half < 2; ++half) {
    UNROLL for (int i = 0; i < n; ++i) {
      store_shared(place(lane.group + 8 * half, i) + 2 * lane.pair,
                   pack<T>(values[i][2 * half], values[i][2 * half + 1]));
    }
  }
  sync_warp();
  const int row = lane.lane / n, i = lane.lane % n;
  if (row < tile) {
    const uint4 unit = load_shared<uint4>(place(row, i));
    if (row < rows_left && 8 * i < columns_left)
      store_global(rows + static_cast<int64_t>(row) * stride + 8 * i, unit);
  }
  sync_warp();
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
