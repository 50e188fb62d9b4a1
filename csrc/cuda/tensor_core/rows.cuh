// The way between global memory and the tiles of the tensor-core path: which rows a block walks, how a row of
// q or k goes through LayerNorm, affine and map into a feature tile, copies of value rows, and stores of
// finished tiles.
#pragma once

#include "cuda/shared/affine.cuh"
#include "cuda/shared/column_groups.cuh"
#include "cuda/shared/row_norm.cuh"
#include "cuda/tensor_core/fragments.cuh"
#include "cuda/tensor_core/ragged.cuh"

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
  Pieces pieces;   // of the accesses to rows
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
        pieces(problem),
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
// 1, 2 d). For `outer` the parameters of the query heads are multiplied by the scale.
template <class S, class AnyProblem>
DEVICE void load_affine(float* affine, const Arguments<AnyProblem>& arguments, int64_t kv_head) {
  rebased::REBASED_BACKEND::load_affine<S::feature_dim, S::threads>(
      affine, arguments.problem, kv_head, arguments.group_size,
      [&](float value, bool is_key) { return S::wide && !is_key ? value * arguments.scale : value; });
}

// Rows of q and k on their way into feature tiles. Each of the first four warps copies the rows that its own
// threads then read, one row each, so that sync_warp is all the synchronisation needed.
template <class T>
struct RowTile {
  T* elements;         // (threads, d), with the 16-byte units of a row permuted by unit_offset
  float2* statistics;  // (threads): mean and 1 / deviation of "token" LayerNorm
};

// A warp's part in bringing its own rows into the same rows of a row tile. As many lanes share a row as it
// has units, so that each access of the warp covers whole sectors of 32 bytes.
template <class S>
struct RowUnits {
  static constexpr int rows_at_once = 32 / S::units;
  int row;            // of the first unit of this lane; the others follow rows_at_once rows apart
  int unit;           // which of a row's
  int offset;         // of the first unit in the elements of the tile
  int previous_lane;  // has the unit before this lane's

  // `index` is the row of this thread.
  DEVICE explicit RowUnits(int index) {
    const int thread = thread_index_anew(), lane = thread % 32, turn = lane / 8 % S::units;
    // lanes write side by side, and unit_offset says which unit of a row belongs to the place of a lane
    row = index - lane + lane / S::units;
    unit = (lane % S::units) ^ turn;
    offset = (thread - lane) * S::feature_dim + 8 * lane;
    previous_lane = lane / S::units * S::units + (((unit - 1) & (S::units - 1)) ^ turn);
  }
};

// Starts the copy of the warp's rows into the tile, with zeros past the row `end`.
template <class T, class S>
DEVICE void copy_rows(const RowTile<T>& tile, const T* rows, int stride, int piece, const float* statistics,
                      int index, int end) {
  if (piece == 16) {
    const RowUnits<S> own(index);
    T* const target = tile.elements + own.offset;
    const T* source = rows + static_cast<int64_t>(own.row) * stride + 8 * own.unit;
    UNROLL for (int i = 0; i < S::units; ++i) {
      const bool present = own.row + own.rows_at_once * i < end;
      copy_async<16>(target + own.rows_at_once * i * S::feature_dim, present ? source : rows,
                     present ? 16 : 0);
      source += own.rows_at_once * static_cast<int64_t>(stride);
    }
  } else {
    const RowUnits<S> own(index);
    T* target = tile.elements + own.offset;
    const T* source = rows + static_cast<int64_t>(own.row) * stride + 8 * own.unit;
    NO_UNROLL for (int row = own.row; row < own.row + 32; row += own.rows_at_once) {
      copy_narrow_unit(target, source, row < end ? S::feature_dim - 8 * own.unit : 0, piece);
      target += own.rows_at_once * S::feature_dim;
      source += own.rows_at_once * static_cast<int64_t>(stride);
    }
  }
  if (!statistics) return;
  const bool present = index < end;
  copy_async<8>(tile.statistics + thread_index_anew(), statistics + (present ? 2 * index : 0),
                present ? 8 : 0);
}

// What the copies of narrow pieces have left to do once they have arrived.
template <class T, class S>
DEVICE void settle_rows(const RowTile<T>& tile, const T* rows, int stride, int piece, int index, int end) {
  if (piece != 2) return;
  const RowUnits<S> own(index);
  T* place = tile.elements + own.offset;
  NO_UNROLL for (int row = own.row; row < own.row + 32; row += own.rows_at_once) {
    settle_unit(place, rows + static_cast<int64_t>(row) * stride, row < end, own.unit == 0,
                own.previous_lane);
    place += own.rows_at_once * S::feature_dim;
  }
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

// Which units of a value tile a thread of a block brings in: one of every `step` rows.
template <int block_threads>
struct ValueUnits {
  static constexpr int units = columns / 8, step = block_threads / units;  // of a row; rows at once
  static_assert(step % 8 == 0, "the permutation of units has period 8");
  int token, column;

  DEVICE explicit ValueUnits(unsigned thread)
      : token(static_cast<int>(thread / units)), column(static_cast<int>(thread % units) * 8) {}
};

// Starts the copy of 64 rows into a value tile, with zeros past the last row and past the last column.
template <int block_threads = threads, class T>
DEVICE void copy_values(T* values, const T* rows, int stride, int piece, int first, int end,
                        int columns_left) {
  using Units = ValueUnits<block_threads>;
  if (piece == 16) {
    const Units own(threadIdx.x);
    T* const target = values + value_offset(own.token, own.column);
    const T* source = rows + static_cast<int64_t>(first + own.token) * stride + own.column;
    UNROLL for (int i = 0; i < chunk / Units::step; ++i) {
      const bool present = first + own.token + Units::step * i < end && own.column < columns_left;
      copy_async<16>(target + Units::step * i * columns, present ? source : rows, present ? 16 : 0);
      source += Units::step * static_cast<int64_t>(stride);
    }
  } else {
    const Units own(thread_index_anew());
    T* target = values + value_offset(own.token, own.column);
    const T* source = rows + static_cast<int64_t>(first + own.token) * stride + own.column;
    NO_UNROLL for (int i = 0; i < chunk / Units::step; ++i) {
      const bool present = first + own.token + Units::step * i < end;
      copy_narrow_unit(target, source, present ? columns_left - own.column : 0, piece);
      target += Units::step * columns;
      source += Units::step * static_cast<int64_t>(stride);
    }
  }
}

// What the copies of narrow pieces have left to do once they have arrived.
template <int block_threads = threads, class T>
DEVICE void settle_values(T* values, const T* rows, int stride, int piece, int first, int end) {
  using Units = ValueUnits<block_threads>;
  if (piece != 2) return;
  const int thread = thread_index_anew();
  const Units own(thread);
  T* target = values + value_offset(own.token, own.column);
  NO_UNROLL for (int row = first + own.token; row < first + chunk; row += Units::step) {
    settle_unit(target, rows + static_cast<int64_t>(row) * stride, row < end, own.column == 0,
                thread % 32 - 1);
    target += Units::step * columns;
  }
}

// The two steps in which rows come into tiles. A kernel lists what it brings in once, and visits the list
// with either: to start the copies, and when they have arrived. Settle is needed where pieces have 2 bytes;
// what it writes, the warp that has copied a row sees after a sync_warp, and others after a barrier.
struct Start {
  template <class T, class S>
  DEVICE void rows(const RowTile<T>& tile, const T* rows, int stride, int piece, const float* statistics,
                   int index, int end) const {
    copy_rows<T, S>(tile, rows, stride, piece, statistics, index, end);
  }
  template <int block_threads = threads, class T>
  DEVICE void values(T* values, const T* rows, int stride, int piece, int first, int end,
                     int columns_left) const {
    copy_values<block_threads>(values, rows, stride, piece, first, end, columns_left);
  }
  // Copies 64 floats, with zeros past `end`.
  DEVICE void floats(float* target, const float* source, int first, int end) const {
    const int i = static_cast<int>(threadIdx.x);
    if (i >= chunk) return;
    const bool present = first + i < end;
    copy_async<4>(target + i, present ? source + first + i : source, present ? 4 : 0);
  }
  DEVICE void commit() const { copy_async_commit(); }
};
struct Settle {
  template <class T, class S>
  DEVICE void rows(const RowTile<T>& tile, const T* rows, int stride, int piece, const float*, int index,
                   int end) const {
    settle_rows<T, S>(tile, rows, stride, piece, index, end);
  }
  template <int block_threads = threads, class T>
  DEVICE void values(T* values, const T* rows, int stride, int piece, int first, int end, int) const {
    settle_values<block_threads>(values, rows, stride, piece, first, end);
  }
  DEVICE void floats(float*, const float*, int, int) const {}
  DEVICE void commit() const {}
};

// Stores a tile (16, 8 n) of n = 1 or 2 C fragments, rounded to T. Its way leads through `staging`, 256
// elements of shared memory that belong to the warp.
template <class T, int n>
DEVICE void store_tile(T* staging, const float (&values)[n][4], T* rows, int stride, int piece, int rows_left,
                       int columns_left, const Lane& lane) {
  const auto place = [&](int row, int i) { return staging + unit_offset<n>(row, i); };
  UNROLL for (int half = 0; half < 2; ++half) {
    UNROLL for (int i = 0; i < n; ++i) {
      store_shared(place(lane.group + 8 * half, i) + 2 * lane.pair,
                   pack<T>(values[i][2 * half], values[i][2 * half + 1]));
    }
  }
  sync_warp();
  if (piece == 16) {
    const int row = lane.lane / n, i = lane.lane % n;
    if (row < tile) {
      const uint4 unit = load_shared<uint4>(place(row, i));
      if (row < rows_left && 8 * i < columns_left)
        store_global(rows + static_cast<int64_t>(row) * stride + 8 * i, unit);
    }
  } else {
    store_narrow_tile<n>(place, rows, stride, piece, rows_left, columns_left);
  }
  sync_warp();
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
