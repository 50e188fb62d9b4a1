// Forward of the elementwise maps.
//
// A block walks one segment of one sequence for one kv head, all its query heads, and 64 value columns:
//   y_i = (sum_{j in chunk, j <= i} sim(i, j) v_j + phi(q'_i) S) / (the same with v = 1, + eps)
// and then adds the chunk to S. Queries are split over tokens: a warp computes all 64 columns of its own tile
// of rows, so that features, scores and denominators are made once.
//
// A step is a chunk of one query head. Asynchronous copies bring the rows of the next step into shared memory
// while a step computes. What all warps read is double buffered, so that one barrier a chunk is enough: the
// value tile, phi(k') and the published state.
#pragma once

#include "cuda/tensor_core/elementwise/state.cuh"
#include "cuda/tensor_core/polynomial/forward.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::elementwise {

// out += phi(q') S, and sum += phi(q') z.
template <class T, class S>
DEVICE void multiply_state(float (&out)[8][4], float (&sum)[4], const uint32_t (&rows)[4], const T* published,
                           const uint4* terms, const Lane& lane) {
  const T* const place = published + lane.row_of_halves() * S::raw_stride + lane.column_of_halves();
  UNROLL for (int i = 0; i < columns / tile; ++i) {
    uint32_t b[4];
    ldmatrix(b, place + tile * i * S::raw_stride);
    mma_m16n8k16<T>(out[2 * i], rows, b[0], b[1]);
    mma_m16n8k16<T>(out[2 * i + 1], rows, b[2], b[3]);
  }
  const uint4 z = load_shared<uint4>(terms + lane.pair);
  mma_m16n8k16<T>(sum, rows, z.x, z.y);
  mma_m16n8k16<T>(sum, rows, z.z, z.w);
}

// Adds what the chunk's tokens up to the warp's own tile, which begins at `own`, give its rows.
template <class T, class S>
DEVICE void multiply_tokens(float (&out)[8][4], float (&sum)[4], const uint32_t (&rows)[4], const T* keys,
                            const T* values, int own, const Lane& lane) {
  const T* of_keys = keys + lane.row_of_halves() * S::raw_stride + lane.column_of_halves();
  const T* of_values = polynomial::value_place(values, lane);
  NO_UNROLL for (int token = 0; token <= own; token += tile) {
    uint32_t tokens[4], p[4];
    float scores[2][4];
    ldmatrix(tokens, of_keys);  // fragment B (features, 16 tokens)
    dot_products<T>(scores, rows, tokens);
    if (token == own) {
      UNROLL for (int n = 0; n < 2; ++n) {
        UNROLL for (int j = 0; j < 4; ++j) {
          if (fragment_column(n, j, lane) > fragment_row(j, lane)) scores[n][j] = 0;
        }
      }
    }
    round_tile<T>(p, scores);
    UNROLL for (int i = 0; i < columns / tile; ++i) {
      uint32_t v[4];
      ldmatrix_transposed(v, of_values + tile * i);
      mma_m16n8k16<T>(out[2 * i], p, v[0], v[1]);
      mma_m16n8k16<T>(out[2 * i + 1], p, v[2], v[3]);
    }
    mma_m16n8k16<T>(sum, p, pack<T>(1.0f, 1.0f), pack<T>(1.0f, 1.0f));
    of_keys += tile * S::raw_stride;
    of_values += tile * value_stride;
  }
}

template <class T, class S, bool grouped>
KERNEL void LAUNCH_BOUNDS(threads, 4) forward_kernel(Arguments<ForwardProblem> arguments) {
  const ForwardProblem& problem = arguments.problem;
  SHARED_MEMORY(T, value_tiles, 2 * S::value_tile);
  SHARED_MEMORY(T, key_tiles, 2 * S::row_tile);
  SHARED_MEMORY(T, query_tile, S::row_tile);
  SHARED_MEMORY(T, published, 2 * Published<S>::elements);
  SHARED_MEMORY(uint4, terms, 2 * Published<S>::terms);
  SHARED_MEMORY(T, staging_tiles, warps * tile * value_stride);
  SHARED_MEMORY(float2, statistics, warps * 2 * tile);
  SHARED_MEMORY(float4, affine, (grouped ? max_group_size + 1 : 2) * S::affine_size);
  SHARED_MEMORY(float, sums, S::feature_dim);
  SHARED_MEMORY(polynomial::ForwardOrigins<T>, origins, 1);
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
  T* const query_rows = query_tile + lane.warp * tile * S::raw_stride;
  T* const staging = staging_tiles + lane.warp * tile * value_stride;
  float2* const own_statistics = statistics + lane.warp * 2 * tile;
  if (problem.layer_norm == LayerNorm::none) own_statistics[lane.lane] = float2{0, 1};
  sync_threads();
  const int rows_end = origins->span.rows;
  const int columns_left = static_cast<int>(problem.head_dim) - first_column();
  load_affine<S>(affine, arguments, origins->span.kv_head, group_size);

  State<S> state;
  state.z = sums;
  state.start(arguments, origins->span, lane);

  NextRows<T, S> next_rows(*origins, problem, lane);
  next_rows.start_queries(*origins, problem, lane);
  // The rows of a query head's chunk, and with its first head those of the keys.
  const auto copy_step = [&](int first, int head, auto whole) {
    constexpr bool all = decltype(whole)::value;
    const int stage = first / S::chunk % 2, rows_left = rows_end - first;
    next_rows.template copy_queries<all>(query_tile, head * problem.q.head_stride, rows_left);
    if (head > 0) return;
    next_rows.template copy_keys<all>(key_tiles + stage * S::row_tile, value_tiles + stage * S::value_tile,
                                      problem, rows_left, columns_left);
    if (problem.layer_norm == LayerNorm::token) {
      next_rows.template copy_statistics<all>(own_statistics, first, rows_left, lane);
    }
  };
  const auto copy = [&](int first, int head) {
    if (first + S::chunk <= rows_end && columns_left >= columns) {
      copy_step(first, head, std::true_type());
    } else {
      copy_step(first, head, std::false_type());  // counted 0: rows or columns are missing
    }
    copy_async_commit();
    if (head == 0) next_rows.advance_keys(problem);
    if (!grouped || head + 1 == group_size) next_rows.advance_queries(problem);
  };

  if (rows_end > 0) copy(0, 0);
  sync_threads();  // affine
  int head = 0;
  NO_UNROLL for (int first = 0; first < rows_end;) {
    const int stage = first / S::chunk % 2, own = tile * lane.warp, row = first + own;
    T* const keys = key_tiles + stage * S::row_tile;
    T* const key_rows = keys + own * S::raw_stride;
    copy_async_wait<0>();
    sync_warp();
    if (problem.layer_norm == LayerNorm::head) {  // counted 0: "head" LayerNorm
      polynomial::head_statistics<S>(own_statistics, key_rows, query_rows, arguments.layer_norm_eps, lane);
      sync_warp();
    }
    if (head == 0) {
      finish_keys<S>(key_rows, own_statistics, affine + group_size * S::affine_size, rows_end - row, lane);
      publish_state(state, published + stage * Published<S>::elements, terms + stage * Published<S>::terms,
                    lane);
    }
    uint32_t rows[4];
    row_features<S>(rows, query_rows, own_statistics + tile, affine + head * S::affine_size, rows_end - row,
                    lane);
    if (head == 0) {
      sync_threads();  // phi(k'), v and S are there, and those of the chunk before are free
    } else {
      sync_warp();
    }
    const bool last_head = !grouped || head + 1 == group_size;
    const int next_head = last_head ? 0 : head + 1, next = last_head ? first + S::chunk : first;
    if (next < rows_end) copy(next, next_head);

    const T* const values = value_tiles + stage * S::value_tile;
    float out[8][4] = {}, sum[4] = {};
    multiply_state<T, S>(out, sum, rows, published + stage * Published<S>::elements,
                         terms + stage * Published<S>::terms, lane);
    multiply_tokens<T, S>(out, sum, rows, keys, values, own, lane);
    if (last_head) add_chunk(state, keys, values, lane);

    UNROLL for (int half = 0; half < 2; ++half) {
      const float inverse = problem.normalize ? fast_reciprocal(sum[2 * half] + arguments.eps) : 1.0f;
      const int index = row + lane.group + 8 * half;
      if (lane.pair == 0 && blockIdx.y == 0 && index < rows_end) {
        origins->r[head * problem.seqlen + index] = inverse;
      }
      UNROLL for (int n = 0; n < 8; ++n) out[n][2 * half] *= inverse, out[n][2 * half + 1] *= inverse;
    }
    polynomial::store_rows(
        staging, out,
        origins->y + head * problem.y.head_stride + static_cast<int64_t>(row) * row_stride(problem.y),
        row_stride(problem.y), 16, rows_end - row, columns_left, lane);
    head = next_head;
    first = next;
  }
  const Span& span = origins->span;
  if (problem.final_state.kv && span.segment + 1 == arguments.launch.segments) {
    const int64_t index = (span.sequence * problem.kv_heads + span.kv_head) * S::feature_dim;
    float* const kv = static_cast<float*>(problem.final_state.kv) + index * problem.head_dim;
    float* const k = static_cast<float*>(problem.final_state.k) + index;
    sync_warp();  // z
    state.store_public(kv + span.first_column, blockIdx.y == 0 ? k : nullptr, problem.head_dim, columns_left,
                       lane);
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::elementwise
