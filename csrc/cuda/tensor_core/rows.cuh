// Between global memory and the tiles of the tensor-core path: which rows a block walks, LayerNorm + affine +
// map of a row of q or k on its way into a feature tile, copies of value rows, stores of finished tiles.
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

// What a kernel is given: the problem's double constants as floats, and int strides of rows, as Problem's
// conversions and 64-bit products would cost instructions in every chunk.
template <class AnyProblem>
struct Arguments {
  AnyProblem problem;
  Launch launch;
  float scale, eps, layer_norm_eps;
  int group_size;  // query heads per kv head
  float* slots;    // of segments' states in the workspace, or null
  bool scanned;    // they hold the states to start from, else each segment's own sums

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

// In elements; supports() has seen to it that it fits.
template <class Rows>
DEVICE int row_stride(const Rows& rows) {
  return static_cast<int>(rows.row_stride);
}

// ---- the rows of a block ----

// blockIdx.x counts (sequence, kv head, segment), blockIdx.y the groups of 64 value columns.
struct Span {
  int64_t sequence, batch, kv_head;
  int64_t begin;  // first row
  int64_t slot;   // of this block's state in the workspace
  int rows, segment, first_column;
};

DEVICE Span find_span(const Problem& problem, const Launch& launch) {
  Span span;
  const int64_t head = blockIdx.x / launch.segments;
  span.segment = static_cast<int>(blockIdx.x % launch.segments);
  span.kv_head = head % problem.kv_heads;
  span.sequence = head / problem.kv_heads;
  span.batch = launch.bounds ? 0 : span.sequence;
  const int64_t first = launch.bounds ? launch.bounds[span.sequence] : 0;
  const int64_t last = launch.bounds ? launch.bounds[span.sequence + 1] : problem.seqlen;
  const int64_t segment_chunks = (last - first + chunk * launch.segments - 1) / (chunk * launch.segments);
  span.begin = minimum(first + span.segment * segment_chunks * chunk, last);
  span.rows = static_cast<int>(minimum(segment_chunks * chunk, last - span.begin));
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

// Which rows a block walks and where those of its first heads begin, value rows at its first column. One
// thread works this out and leaves it in shared memory: in registers it would push out a part of the state.
template <class T>
struct Origins {
  Span span;
  const T *q, *k, *v;
  const float *query_statistics, *key_statistics;

  template <class AnyProblem>
  DEVICE void set(const Arguments<AnyProblem>& arguments) {
    const Problem& problem = arguments.problem;
    const Launch& launch = arguments.launch;
    span = find_span(problem, launch);
    q = first_row<T>(problem.q, span, span.kv_head * arguments.group_size);
    k = first_row<T>(problem.k, span, span.kv_head);
    v = first_row<T>(problem.v, span, span.kv_head) + span.first_column;
    const int64_t row = span.batch * problem.seqlen + span.begin;
    query_statistics = launch.query_statistics ? launch.query_statistics + 2 * row : nullptr;
    key_statistics = launch.key_statistics ? launch.key_statistics + 2 * row : nullptr;
  }
};

// ---- q and k ----

// (group_size + 1, 2 d) in shared memory: gamma and beta of each query head of the block, then of its kv
// head. The polynomial maps' scale is folded into the query heads'.
template <class S, class AnyProblem>
DEVICE void load_affine(float* affine, const Arguments<AnyProblem>& arguments, int64_t kv_head) {
  rebased::REBASED_BACKEND::load_affine<S::feature_dim, S::threads>(
      affine, arguments.problem, kv_head, arguments.group_size, [&](float value, bool is_key) {
        const bool scaled = !is_key && is_polynomial(arguments.problem.feature_map);
        return scaled ? value * arguments.scale : value;
      });
}

// Rows of q and k on their way. Each of the first four warps copies the rows that its threads then read, one
// each: no barrier is needed but sync_warp.
template <class T>
struct RowTile {
  T* elements;         // (threads, d), the 16-byte units of a row permuted by unit_offset
  float2* statistics;  // (threads), of "token" LayerNorm
};

// Starts the copy of a warp's rows, `index` that of this thread, zeros past `end`, into the same rows of the
// tile. As many lanes share a row as it has 16-byte units, so that each access of the warp covers whole
// sectors of 32 bytes.
template <class T, class S>
DEVICE void copy_rows(const RowTile<T>& tile, const T* rows, int stride, const float* statistics, int index,
                      int end) {
  constexpr int units = S::units, rows_at_once = 32 / units;
  const int thread = thread_index_anew(), lane = thread % 32;
  // lanes write side by side; unit_offset tells which unit of a row belongs there
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

// Elements 8 `which` .. of a row, from 16 bytes of it.
template <class T, int dim>
DEVICE void unpack_unit(float (&x)[dim], int which, const uint4& unit) {
  const uint32_t words[4] = {unit.x, unit.y, unit.z, unit.w};
  UNROLL for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack<T>(words[i]);
    x[8 * which + 2 * i] = pair.x;
    x[8 * which + 2 * i + 1] = pair.y;
  }
}

// What a feature tile holds of x: the maps with one slab are applied here, in float.
template <class S>
DEVICE float stored_feature(float x) {
  return S::map == FeatureMap::square ? x * x : S::map == FeatureMap::elu ? elu_feature(x) : x;
}

// Brings this thread's row, if present, into column `token` of a feature tile and gives its statistics.
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

// Starts the copy of 64 rows into a value tile, zeros past the last row and past the last column.
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

// Stores a (16, 8 n) tile of n = 1 or 2 C fragments, rounded to T, by way of `staging`: 256 elements of
// shared memory that belong to the warp.
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
