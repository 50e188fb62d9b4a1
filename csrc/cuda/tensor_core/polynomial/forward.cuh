// Forward of the maps whose score is a polynomial of u = q'.k'.
//
// A block walks one segment of one sequence for one kv head, all its query heads, and 64 value columns:
//   y_i = (sum_{j in chunk, j <= i} sim(i, j) v_j + phi(q'_i) S) / (the same with v = 1, + eps)
// and then adds the chunk to S. Queries are split over tokens: a warp computes all 64 columns of its own
// tiles of rows, so that features, scores and denominators are made once. The state is split over features
// (state.cuh).
//
// A step is a chunk of one query head. Asynchronous copies bring the rows of the next step into shared memory
// while a step computes. Value tiles are double buffered; what a warp reads alone is not. Of the two barriers
// of a chunk, the first is behind k' and the second before the state is published anew.
#pragma once

#include "cuda/tensor_core/polynomial/products.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::polynomial {

// Dynamic shared memory, as offsets in bytes.
template <class S>
struct ForwardTiles {
  using Spread = StateShape<S>;
  static constexpr int row_bytes = S::raw_tile * 2, feature_bytes = S::feature_tile * 2;
  static constexpr int values = 0;                             // (2, chunk, 64)
  static constexpr int keys = values + 2 * S::value_tile * 2;  // feature tiles
  static constexpr int queries = keys + feature_bytes;
  static constexpr int key_rows = queries + feature_bytes;  // raw tiles
  static constexpr int query_rows = key_rows + row_bytes;
  static constexpr int statistics = query_rows + row_bytes;
  static constexpr int gram = statistics + 2 * S::chunk * 8;
  static constexpr int gram_terms = gram + Spread::gram_bytes;
  static constexpr int published = gram_terms + Spread::gram_term_bytes;
  static constexpr int staging =
      published + Spread::rows * value_stride * 2;  // a tile (16, 64) for each warp
  static constexpr int affine = staging + warps * tile * value_stride * 2;
  static constexpr int bytes(int64_t group_size) {
    return affine + static_cast<int>(group_size + 1) * S::feature_dim * 8;
  }
  static_assert(bytes(1) == polynomial_forward_bytes(S::map, S::feature_dim, S::chunk, 1),
                "the plan reckons with this");
  static_assert(S::chunk == 64 || bytes(max_group_size) <= longer_chunk_bytes);
};

// Stores a tile of 16 rows, by way of the warp's tile `staging`, with eight lanes a row.
template <class T>
DEVICE void store_rows(T* staging, const float (&out)[8][4], T* rows, int stride, int piece, int rows_left,
                       int columns_left, const Lane& lane) {
  UNROLL for (int n = 0; n < 8; n += 2) publish_tile(staging + 8 * n, out[n], out[n + 1], true, lane);
  sync_warp();
  const int row = lane.lane / 8, column = 8 * (lane.lane % 8);
  const T* const unit = staging + row * value_stride + column;
  T* const target = rows + static_cast<int64_t>(row) * stride + column;
  if (piece < 16) {  // counted 0: narrow rows
    store_narrow_rows(staging, value_stride, rows, stride, piece, minimum(columns_left, columns), rows_left);
  } else if (rows_left >= tile && columns_left >= columns) {
    UNROLL for (int i = 0; i < tile; i += 4) {
      store_global(target + static_cast<int64_t>(i * stride), load_shared<uint4>(unit + i * value_stride));
    }
  } else {  // counted 0: rows or columns are missing
    NO_UNROLL for (int i = 0; i < tile; i += 4) {
      if (row + i < rows_left && column < columns_left) {
        store_global(target + static_cast<int64_t>(i * stride), load_shared<uint4>(unit + i * value_stride));
      }
    }
  }
  sync_warp();
}

template <class T>
struct ForwardOrigins : Origins<T> {
  T* y;
  float* r;
};

// How many blocks per multiprocessor the registers must suffice for.
template <class S>
constexpr int forward_blocks = S::own_tiles == 2 && S::feature_dim == 16 ? 2 : 3;

template <class T, class S, bool grouped>
KERNEL void LAUNCH_BOUNDS(threads, forward_blocks<S>) forward_kernel(Arguments<ForwardProblem> arguments) {
  using L = ForwardTiles<S>;
  const ForwardProblem& problem = arguments.problem;
  DYNAMIC_SHARED_MEMORY(char, memory);
  SHARED_MEMORY(ForwardOrigins<T>, origins, 1);
  T* const keys = reinterpret_cast<T*>(memory + L::keys);
  T* const queries = reinterpret_cast<T*>(memory + L::queries);
  float2* const affine = reinterpret_cast<float2*>(memory + L::affine);
  float2* const statistics = reinterpret_cast<float2*>(memory + L::statistics);
  T* const published = reinterpret_cast<T*>(memory + L::published);
  uint32_t* const gram_terms = reinterpret_cast<uint32_t*>(memory + L::gram_terms);
  Lane lane;
  lane.warp = shuffle(lane.warp, 0);  // the same in all lanes, and the compiler knows
  const int group_size = grouped ? arguments.group_size : 1;
  if (threadIdx.x == 0) {
    origins->set(arguments, S::chunk);
    const Span& span = origins->span;
    const int64_t first_head = span.kv_head * group_size;
    origins->y = first_row<T>(problem.y, span, first_head) + span.first_column;
    origins->r = static_cast<float*>(problem.r) + (span.batch * problem.heads + first_head) * problem.seqlen +
                 span.begin;
  }
  if (problem.layer_norm == LayerNorm::none) clear_statistics<S>(statistics);
  clear_narrow_tiles(reinterpret_cast<T*>(memory + L::values), 2 * S::value_tile, arguments.pieces.v);
  sync_threads();
  const int rows_end = origins->span.rows;
  const int columns_left = static_cast<int>(problem.head_dim) - first_column();
  load_affine<S>(affine, arguments, origins->span.kv_head, group_size);

  State<T, S> state;
  state.gram = reinterpret_cast<float*>(memory + L::gram);
  const float count = state.start(arguments, origins->span, false, lane);

  // The rows of a query head's chunk, and with its first head those of the keys.
  const auto copy_step = [&](int first, int head, auto whole) {
    constexpr bool all = decltype(whole)::value;
    const int thread = thread_index_anew();
    copy_rows<S, all>(reinterpret_cast<T*>(memory + L::query_rows), origins->q + head * problem.q.head_stride,
                      row_stride(problem.q), arguments.pieces.q, first, rows_end, thread);
    if (head > 0) return;
    copy_rows<S, all>(reinterpret_cast<T*>(memory + L::key_rows), origins->k, row_stride(problem.k),
                      arguments.pieces.k, first, rows_end, thread);
    if (problem.layer_norm == LayerNorm::token) {
      copy_statistics<S, all>(statistics, origins->key_statistics, origins->query_statistics, first, rows_end,
                              thread);
    }
    copy_values<S, all>(reinterpret_cast<T*>(memory + L::values) + first / S::chunk % 2 * S::value_tile,
                        origins->v, row_stride(problem.v), arguments.pieces.v, first, rows_end, columns_left,
                        thread);
  };
  const auto settle = [&](int first, int head) {
    const int thread = thread_index_anew();
    bring_narrow_tiles<S, true>(reinterpret_cast<T*>(memory + L::query_rows), S::raw_stride,
                                origins->q + head * problem.q.head_stride, row_stride(problem.q),
                                arguments.pieces.q, S::feature_dim, first, rows_end, thread);
    if (head > 0) return;
    bring_narrow_tiles<S, true>(reinterpret_cast<T*>(memory + L::key_rows), S::raw_stride, origins->k,
                                row_stride(problem.k), arguments.pieces.k, S::feature_dim, first, rows_end,
                                thread);
    bring_narrow_tiles<S, true>(
        reinterpret_cast<T*>(memory + L::values) + first / S::chunk % 2 * S::value_tile, value_stride,
        origins->v, row_stride(problem.v), arguments.pieces.v, minimum(columns_left, columns), first,
        rows_end, thread);
  };
  const auto copy = [&](int first, int head) {
    if (first + S::chunk <= rows_end && columns_left >= columns && arguments.pieces.read == 16) {
      copy_step(first, head, std::true_type());
    } else {
      copy_step(first, head, std::false_type());  // counted 0: rows or columns are missing
    }
    copy_async_commit();
  };

  sync_warp();  // Z
  if (rows_end > 0) copy(0, 0);
  publish_state(state, published, gram_terms, lane);
  sync_threads();  // affine, statistics

  int head = 0;
  NO_UNROLL for (int first = 0; first < rows_end;) {
    copy_async_wait<0>();
    if (arguments.pieces.read == 2) settle(first, head);  // counted 0: narrow rows
    sync_warp();
    UNROLL for (int i = 0; i < S::own_tiles; ++i) {
      const int token = tile * lane.warp + i * tiles_apart(lane.warp), left = rows_end - first - token;
      const T* const key_rows = reinterpret_cast<const T*>(memory + L::key_rows) + token * S::raw_stride;
      const T* const query_rows = reinterpret_cast<const T*>(memory + L::query_rows) + token * S::raw_stride;
      float2* const of_tile = statistics + 2 * token;
      if (problem.layer_norm == LayerNorm::head) {  // counted 0: "head" LayerNorm
        head_statistics<S>(of_tile, key_rows, query_rows, arguments.layer_norm_eps, lane);
        sync_warp();
      }
      uint32_t terms[2 * S::units];
      if (head == 0) {
        normalize<S>(terms, key_rows, of_tile, affine + group_size * S::feature_dim, left, lane);
        store_terms<S>(keys, terms, token, lane);
      }
      normalize<S>(terms, query_rows, of_tile + tile, affine + head * S::feature_dim, left, lane);
      store_terms<S>(queries, terms, token, lane);
    }
    if (head == 0) {
      sync_threads();  // k', v and S are there, and the value tile of the chunk before is free
    } else {
      sync_warp();
    }
    const bool last_head = !grouped || head + 1 == group_size;
    const int next_head = last_head ? 0 : head + 1, next = last_head ? first + S::chunk : first;
    if (next < rows_end) copy(next, next_head);

    float out[S::own_tiles][8][4] = {}, sum[S::own_tiles][4];
    uint32_t rows[S::own_tiles][2 * S::units];
    const T* tiles[S::own_tiles];
    UNROLL for (int o = 0; o < S::own_tiles; ++o) {
      tiles[o] = queries + tile * lane.warp + o * tiles_apart(lane.warp) + lane.column_of_halves();
      ldmatrix_transposed(rows[o], tiles[o] + halves_row(lane, S::half_rows) * S::feature_stride);
      denominator<T, S>(sum[o], rows[o], gram_terms, count + static_cast<float>(first), lane);
    }
    multiply_state<T, S>(out, rows, tiles, published, lane);
    walk_tokens<T, S>(out, sum, rows, state, keys,
                      reinterpret_cast<const T*>(memory + L::values) + first / S::chunk % 2 * S::value_tile,
                      last_head, lane);

    T* const staging = reinterpret_cast<T*>(memory + L::staging) + lane.warp * tile * value_stride;
    UNROLL for (int o = 0; o < S::own_tiles; ++o) {
      const int row = first + tile * lane.warp + o * tiles_apart(lane.warp);
      UNROLL for (int half = 0; half < 2; ++half) {
        const float inverse = problem.normalize ? fast_reciprocal(sum[o][2 * half] + arguments.eps) : 1.0f;
        const int index = row + lane.group + 8 * half;
        if (lane.pair == 0 && blockIdx.y == 0 && index < rows_end)
          origins->r[head * problem.seqlen + index] = inverse;
        UNROLL for (int n = 0; n < 8; ++n) out[o][n][2 * half] *= inverse, out[o][n][2 * half + 1] *= inverse;
      }
      store_rows(
          staging, out[o],
          origins->y + head * problem.y.head_stride + static_cast<int64_t>(row) * row_stride(problem.y),
          row_stride(problem.y), arguments.pieces.y, rows_end - row, columns_left, lane);
    }
    if (last_head) {
      if (lane.warp == 0) add_gram(state, keys, lane);  // counted 1/4: one warp
      if (next < rows_end) {
        sync_threads();  // all have read S and k'
        publish_state(state, published, gram_terms, lane);
      }
    }
    head = next_head;
    first = next;
  }
  const Span& span = origins->span;
  if (problem.final_state.kv && span.segment + 1 == arguments.launch.segments) {
    const int64_t index = span.sequence * problem.kv_heads + span.kv_head, features = S::Slot::rows;
    float* const kv =
        static_cast<float*>(problem.final_state.kv) + index * features * problem.head_dim + span.first_column;
    float* const k = static_cast<float*>(problem.final_state.k) + index * features;
    sync_warp();
    state.store_public(kv, blockIdx.y == 0 ? k : nullptr, count + static_cast<float>(rows_end), false,
                       problem.head_dim, columns_left, lane);
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::polynomial
