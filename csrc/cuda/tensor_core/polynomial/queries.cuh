// Queries of the reverse sweep in shared memory. With q" = sqrt(r) q' every product of two q" has its r, so
// that grad y, here called g, is used as it lies in memory, and delta is g . y, without r.
//
// Warp w owns the row tiles w and, with two tiles a warp, 7 - w of a chunk: it copies their rows, so that it
// need not wait for other warps before it takes them through LayerNorm and affine into the feature tile.
#pragma once

#include "cuda/tensor_core/polynomial/state.cuh"
#include "cuda/tensor_core/sweep.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::polynomial {

// The tiles of queries, as offsets in bytes from the beginning of the dynamic shared memory.
template <class S>
struct QueryTiles {
  static constexpr int gradients = 0;                                // (2, chunk, 64) of g
  static constexpr int queries = gradients + 2 * S::value_tile * 2;  // feature tile of q"
  static constexpr int raw = queries + S::feature_tile * 2;          // raw tile of q
  static constexpr int statistics = raw + S::raw_tile * 2;           // (chunk) mean, 1 / deviation
  static constexpr int r = statistics + S::chunk * 8;                // (chunk)
  static constexpr int delta = r + S::chunk * 4;                     // (chunk)
  // (chunk / 2) {a, b, a, b} of two tokens: the start of a C fragment whose columns are tokens. sqrt(r) is
  // there for taylor alone.
  static constexpr int minus_delta = delta + S::chunk * 4;
  static constexpr int roots = minus_delta + S::chunk * 8;
  static constexpr int gram = roots + (S::taylor ? S::chunk * 8 : 0);  // M, as State has Z
  static constexpr int count =
      gram + StateShape<S>::gram_bytes;  // of taylor, (32): -(sum of delta r) by lanes
  static constexpr int end = count + (S::taylor ? 32 * 4 : 0);
};

// Where the queries of a block begin, for its first query head. One thread works it out and leaves it in
// shared memory.
struct QueryOrigins {
  const void *q, *g;
  const float *r, *delta, *statistics;

  template <class T>
  DEVICE void set(const Arguments<BackwardProblem>& arguments, const float* deltas, const Span& span) {
    const BackwardProblem& problem = arguments.problem;
    const int64_t head = span.kv_head * arguments.group_size;
    const int64_t row = (span.batch * problem.heads + head) * problem.seqlen + span.begin;
    q = first_row<T>(problem.q, span, head);
    g = first_row<T>(problem.grad_y, span, head) + span.first_column;
    r = static_cast<const float*>(problem.r) + row;
    delta = deltas + blockIdx.y * problem.batch * problem.heads * problem.seqlen + row;
    statistics = arguments.launch.query_statistics;
    if (statistics) statistics += 2 * (span.batch * problem.seqlen + span.begin);
  }
};

// What bring_narrow_tiles does, with this warp's rows of q and g in a chunk of query head `head`.
template <class T, class S, bool settle>
DEVICE void bring_narrow_queries(char* memory, const QueryOrigins& origins,
                                 const Arguments<BackwardProblem>& arguments, int head, int stage, int first,
                                 int end) {
  using Tiles = QueryTiles<S>;
  const BackwardProblem& problem = arguments.problem;
  const int thread = thread_index_anew();
  bring_narrow_tiles<S, settle>(reinterpret_cast<T*>(memory + Tiles::raw), S::raw_stride,
                                static_cast<const T*>(origins.q) + head * problem.q.head_stride,
                                row_stride(problem.q), arguments.pieces.q, S::feature_dim, first, end,
                                thread);
  bring_narrow_tiles<S, settle>(
      reinterpret_cast<T*>(memory + Tiles::gradients) + stage * S::value_tile, value_stride,
      static_cast<const T*>(origins.g) + head * problem.grad_y.head_stride, row_stride(problem.grad_y),
      arguments.pieces.grad_y, minimum(static_cast<int>(problem.head_dim) - first_column(), columns), first,
      end, thread);
}

// Starts the copies of this warp's rows of a chunk of query head `head`, with zeros past the row `end` and
// past the last column. What depends on the lane is worked out anew in each step, so that it need not live in
// registers beside the state.
template <class T, class S>
DEVICE void copy_queries(char* memory, const QueryOrigins& origins,
                         const Arguments<BackwardProblem>& arguments, int head, int stage, int first,
                         int end) {
  using Tiles = QueryTiles<S>;
  const BackwardProblem& problem = arguments.problem;
  constexpr int units = S::units;
  const int thread = thread_index_anew(), lane = thread & 31, warp = thread >> 5;
  const int begin = tile * warp, apart = tiles_apart(warp), left = end - first - begin;
  const bool whole =
      first + S::chunk <= end && problem.head_dim >= first_column() + columns && arguments.pieces.read == 16;
  const int64_t q_stride = row_stride(problem.q) * static_cast<int64_t>(sizeof(T)),
                g_stride = row_stride(problem.grad_y) * static_cast<int64_t>(sizeof(T));
  {  // a token a lane
    const int token = begin + lane % tile + lane / tile * apart;
    const int64_t index = head * problem.seqlen + first + token;
    const bool present = whole || first + token < end;
    if (lane < tile * S::own_tiles) {
      copy_async<4>(memory + Tiles::r + 4 * token, present ? origins.r + index : problem.r, present ? 4 : 0);
      copy_async<4>(memory + Tiles::delta + 4 * token, present ? origins.delta + index : problem.r,
                    present ? 4 : 0);
      if (origins.statistics) {
        copy_async<8>(memory + Tiles::statistics + 8 * token,
                      present ? origins.statistics + 2 * (first + token) : problem.r, present ? 8 : 0);
      }
    }
  }
  const int row = lane / units % tile, unit = 16 * (lane % units), gradient_row = lane / 8,
            column = 8 * (lane % 8);
  const char* q = static_cast<const char*>(origins.q) + head * problem.q.head_stride * sizeof(T) +
                  (first + begin + row) * q_stride + unit;
  const char* g = static_cast<const char*>(origins.g) + head * problem.grad_y.head_stride * sizeof(T) +
                  (first + begin + gradient_row) * g_stride + sizeof(T) * column;
  char* q_place = memory + Tiles::raw + (begin + row) * S::raw_stride * sizeof(T) + unit;
  char* g_place = memory + Tiles::gradients + stage * S::value_tile * 2 +
                  ((begin + gradient_row) * value_stride + column) * sizeof(T);
  const bool has_column = column < static_cast<int>(problem.head_dim) - first_column();
  const auto copy_tile = [&](bool all, int rows_left) {
    if (lane < tile * units && (all || arguments.pieces.q == 16)) {
      const bool present = all || row < rows_left;
      copy_async<16>(q_place, present ? q : problem.q.data, present ? 16 : 0);
    }
    UNROLL for (int i = 0; i < 4 && (all || arguments.pieces.grad_y == 16); ++i) {
      const bool present = all || (gradient_row + 4 * i < rows_left && has_column);
      copy_async<16>(g_place + 4 * i * value_stride * sizeof(T), present ? g : problem.grad_y.data,
                     present ? 16 : 0);
      g += 4 * g_stride;
    }
    q += apart * q_stride, g += (apart - tile) * g_stride;
    q_place += apart * S::raw_stride * sizeof(T), g_place += apart * value_stride * sizeof(T);
  };
  if (whole) {
    UNROLL for (int own = 0; own < S::own_tiles; ++own) copy_tile(true, 0);
  } else {  // counted 0: rows or columns are missing
    NO_UNROLL for (int own = 0; own < S::own_tiles; ++own) copy_tile(false, left - own * apart);
    bring_narrow_queries<T, S, false>(memory, origins, arguments, head, stage, first, end);
  }
}

// Statistics that leave rows as they are.
template <class S>
DEVICE void clear_query_statistics(char* memory) {
  static_assert(S::chunk <= threads);
  if (threadIdx.x < S::chunk)
    store_shared(memory + QueryTiles<S>::statistics + 8 * threadIdx.x, float2{0, 1});
}

// The statistics of "head" LayerNorm of the warp's own rows of a raw tile, a row a lane.
template <class S, int stride, class T>
DEVICE void own_statistics(float2* statistics, const T* raw, float epsilon, const Lane& lane) {
  if (lane.lane >= tile * S::own_tiles) return;
  const int row = own_tile(lane.warp, lane.lane / tile) + lane.lane % tile;
  float x[S::feature_dim];
  UNROLL for (int i = 0; i < S::units; ++i)
      unpack_unit<T>(x, i, load_shared<uint4>(raw + row * stride + 8 * i));
  statistics[row] = row_statistics(x, LayerNorm::head, {}, epsilon);
}

// Leaves -delta of the queries that this warp has copied. r may be negative, where a given state's
// denominator is; such rows turn g and delta round, so that the root of -r serves.
template <class T, class S>
DEVICE void store_deltas(char* memory, int stage, const Lane& lane) {
  using Tiles = QueryTiles<S>;
  const bool has_token = S::own_tiles == 2 || lane.lane < tile;
  const int token = own_tile(lane.warp, has_token ? lane.lane / tile : 0) + lane.lane % tile;
  const float r = load_shared<float>(memory + Tiles::r + 4 * token);
  const float delta = load_shared<float>(memory + Tiles::delta + 4 * token);
  char* const place = memory + Tiles::minus_delta + 8 * (token & ~1) + 4 * (token & 1);
  if (has_token) {
    store_shared(place, r < 0 ? delta : -delta);
    store_shared(place + 8, r < 0 ? delta : -delta);
  }
  const unsigned negative = ballot(has_token && r < 0);
  if (negative == 0) return;
  NO_UNROLL for (int i = 0; i < 32; ++i) {  // counted 0: r is negative
    if (!(negative >> i & 1)) continue;
    const int row = own_tile(lane.warp, i / tile) + i % tile;
    char* const pair =
        memory + Tiles::gradients + stage * S::value_tile * 2 + 2 * row * value_stride + 4 * lane.lane;
    store_shared(pair, load_shared<uint32_t>(pair) ^ 0x80008000u);
  }
}

// Takes the warp's own queries of a step, which have arrived, into the feature tile: q" = sqrt(|r|) (gamma
// LayerNorm(q) + beta), 0 past the last row, where r is 0. scored(own, terms) may store them elsewhere too.
template <class T, class S, class Scored>
DEVICE void store_queries(char* memory, const Arguments<BackwardProblem>& arguments, const float2* affine,
                          int stage, const Lane& lane, const Scored& scored) {
  using Tiles = QueryTiles<S>;
  constexpr int units = S::units;
  const T* const raw = reinterpret_cast<const T*>(memory + Tiles::raw);
  float2* const statistics = reinterpret_cast<float2*>(memory + Tiles::statistics);
  if (arguments.problem.layer_norm == LayerNorm::head) {  // counted 0: "head" LayerNorm
    own_statistics<S, S::raw_stride>(statistics, raw, arguments.layer_norm_eps, lane);
    sync_warp();
  }
  store_deltas<T, S>(memory, stage, lane);
  float2 parameters[units];  // gamma and beta of feature g + 8 i
  UNROLL for (int i = 0; i < units; ++i) parameters[i] = load_shared<float2>(affine + lane.group + 8 * i);
  UNROLL for (int own = 0; own < S::own_tiles; ++own) {
    const int begin = own_tile(lane.warp, own);
    uint32_t terms[2 * units];  // features g + 8 (i / 2), tokens 8 (i % 2) + 2 t and the next
    ldmatrix_transposed(
        terms, raw + (begin + (lane.lane & 15)) * S::raw_stride + 8 * (lane.lane >> 4) % (8 * units));
    float root[4], scale[4], shift[4];
    UNROLL for (int half = 0; half < 2; ++half) {
      const int token = begin + 8 * half + 2 * lane.pair;
      const float4 own_statistics = load_shared<float4>(statistics + token);
      const float2 own_r = load_shared<float2>(memory + Tiles::r + 4 * token);
      root[2 * half] = fast_square_root(fabsf(own_r.x));
      root[2 * half + 1] = fast_square_root(fabsf(own_r.y));
      scale[2 * half] = own_statistics.y, scale[2 * half + 1] = own_statistics.w;
      shift[2 * half] = -own_statistics.x * own_statistics.y;
      shift[2 * half + 1] = -own_statistics.z * own_statistics.w;
      if (S::taylor && lane.group == 0) {
        store_shared(memory + Tiles::roots + 8 * token,
                     float4{root[2 * half], root[2 * half + 1], root[2 * half], root[2 * half + 1]});
      }
    }
    UNROLL for (int i = 0; i < 2 * units; ++i) {
      const float2 x = unpack<T>(terms[i]), affine_of = parameters[i >> 1];
      const int s = 2 * (i & 1);
      terms[i] = pack<T>(((x.x * scale[s] + shift[s]) * affine_of.x + affine_of.y) * root[s],
                         ((x.y * scale[s + 1] + shift[s + 1]) * affine_of.x + affine_of.y) * root[s + 1]);
    }
    store_terms<S>(reinterpret_cast<T*>(memory + Tiles::queries), terms, begin, lane);
    scored(begin, terms);
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::polynomial
