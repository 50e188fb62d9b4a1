// Backward of the polynomial maps, the reverse sweep, which makes grad v and grad k.
//
// A block walks its segment from the last chunk to the first and keeps the reverse state T, M of all later
// chunks (reverse.cuh). With q" = sqrt(r) q', u = q"_i . k'_j, g = grad y and delta = g . y
//   grad v_j  = sum_{i in chunk, i >= j} u^2 g_i + phi(k'_j) T
//   grad k'_j = 2 (sum_{i in chunk, i >= j} (g_i . v_j - delta_i) u q"_i + J(k'_j)^T (T v_j) / 2 + M k'_j)
// for outer. The score of taylor times r is (w^2 + r) / 2 with w = u + sqrt(r_i). In the place of u^2 it has
// (w^2 + r_i) / 2, for which grad v is summed twofold, and in the place of u, for grad k', w without the 2.
//
// Each warp owns one or two row tiles of 16 keys, w and 7 - w, whose causal work together is the same for
// all warps: their k' and v, grad k' and grad v stay in its registers. A step is a chunk of one query head,
// and the query heads of the kv head follow each other before the block goes on to the next chunk.
//
// Memory: q, k, v, grad y, r and delta are read once per column group; grad k and grad v are written once.
#pragma once

#include "cuda/tensor_core/polynomial/grad_kv_products.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::polynomial {

// Tiles of the sweep, as offsets in bytes, behind those of the queries.
template <class S>
struct GradKvTiles {
  using Queries = QueryTiles<S>;
  static constexpr int values = Queries::end;  // (chunk, 64) of v
  // q" transposed with its features in the order of gradient.cuh, which with d = 8 is the feature tile
  static constexpr int ordered_queries = S::feature_dim == 8 ? Queries::queries : values + S::value_tile * 2;
  static constexpr int raw =
      values + S::value_tile * 2 + (S::feature_dim == 8 ? 0 : S::feature_dim * S::feature_stride * 2);
  static constexpr int raw_tile = S::chunk * S::feature_dim;                 // (2, chunk, d) of k
  static constexpr int statistics = raw + 2 * raw_tile * 2;                  // (2, chunk) of k
  static constexpr int gram_terms = statistics + 2 * S::chunk * 8;           // M, as publish_state leaves Z
  static constexpr int state = gram_terms + StateShape<S>::gram_term_bytes;  // T, published
  static constexpr int affine_sums =
      state +
      (published_row<published_shift<S>>(StateShape<S>::rows - 1) + value_stride) * 2;  // (warps, 2, d)
  static constexpr int affine = affine_sums + warps * 2 * S::feature_dim * 4;           // (group size + 1, d)
  static constexpr int64_t bytes(int64_t group_size) {
    return affine + (group_size + 1) * S::feature_dim * 8;
  }
};

// Where the keys of a block begin.
template <class T>
struct KeyOrigins {
  const T *k, *v;
  const float* statistics;
  T *grad_k, *grad_v;  // grad_k is null where `partial` is written instead
  float* partial;

  DEVICE void set(const Arguments<BackwardProblem>& arguments, const BackwardBuffers& buffers,
                  const Span& span) {
    const BackwardProblem& problem = arguments.problem;
    const int64_t row =
        ((blockIdx.y * problem.batch + span.batch) * problem.kv_heads + span.kv_head) * problem.seqlen +
        span.begin;
    k = first_row<T>(problem.k, span, span.kv_head);
    v = first_row<T>(problem.v, span, span.kv_head) + span.first_column;
    statistics = arguments.launch.key_statistics;
    if (statistics) statistics += 2 * (span.batch * problem.seqlen + span.begin);
    partial = buffers.key_gradient ? buffers.key_gradient + row * arguments.problem.feature_dim : nullptr;
    grad_k = partial ? nullptr : first_row<T>(problem.grad_k, span, span.kv_head);
    grad_v = first_row<T>(problem.grad_v, span, span.kv_head) + span.first_column;
  }
};

// What bring_narrow_tiles does, with this warp's rows of k and v in a chunk.
template <class T, class S, bool settle>
DEVICE void bring_narrow_keys(char* memory, const KeyOrigins<T>& origins,
                              const Arguments<BackwardProblem>& arguments, int stage, int first, int end) {
  using Tiles = GradKvTiles<S>;
  const BackwardProblem& problem = arguments.problem;
  const int thread = thread_index_anew();
  bring_narrow_tiles<S, settle>(reinterpret_cast<T*>(memory + Tiles::raw) + stage * Tiles::raw_tile,
                                S::feature_dim, origins.k, row_stride(problem.k), arguments.pieces.k,
                                S::feature_dim, first, end, thread);
  bring_narrow_tiles<S, settle>(reinterpret_cast<T*>(memory + Tiles::values), value_stride, origins.v,
                                row_stride(problem.v), arguments.pieces.v,
                                minimum(static_cast<int>(problem.head_dim) - first_column(), columns), first,
                                end, thread);
}

// Starts the copies of this warp's rows of k and v of a chunk, with zeros past the row `end` and past the
// last column.
template <class T, class S>
DEVICE void copy_keys(char* memory, const KeyOrigins<T>& origins, const Arguments<BackwardProblem>& arguments,
                      int stage, int first, int end) {
  using Tiles = GradKvTiles<S>;
  const BackwardProblem& problem = arguments.problem;
  constexpr int units = S::units;
  const int thread = thread_index_anew(), lane = thread & 31, warp = thread >> 5;
  const int begin = tile * warp, apart = tiles_apart(warp), left = end - first - begin;
  const bool whole =
      first + S::chunk <= end && problem.head_dim >= first_column() + columns && arguments.pieces.read == 16;
  const int64_t k_stride = row_stride(problem.k) * static_cast<int64_t>(sizeof(T)),
                v_stride = row_stride(problem.v) * static_cast<int64_t>(sizeof(T));
  if (origins.statistics && lane < tile * S::own_tiles) {  // a token a lane
    const int token = begin + lane % tile + lane / tile * apart;
    const bool present = whole || first + token < end;
    copy_async<8>(memory + Tiles::statistics + 8 * (stage * S::chunk + token),
                  present ? origins.statistics + 2 * (first + token) : problem.r, present ? 8 : 0);
  }
  const int row = lane / units % tile, unit = 16 * (lane % units), value_row = lane / 8,
            column = 8 * (lane % 8);
  const char* k = reinterpret_cast<const char*>(origins.k) + (first + begin + row) * k_stride + unit;
  const char* v =
      reinterpret_cast<const char*>(origins.v) + (first + begin + value_row) * v_stride + sizeof(T) * column;
  char* k_place = memory + Tiles::raw + (stage * S::chunk + begin + row) * S::feature_dim * sizeof(T) + unit;
  char* v_place = memory + Tiles::values + ((begin + value_row) * value_stride + column) * sizeof(T);
  const bool has_column = column < static_cast<int>(problem.head_dim) - first_column();
  const auto copy_tile = [&](bool all, int rows_left) {
    if (lane < tile * units && (all || arguments.pieces.k == 16)) {
      const bool present = all || row < rows_left;
      copy_async<16>(k_place, present ? k : problem.k.data, present ? 16 : 0);
    }
    UNROLL for (int i = 0; i < 4 && (all || arguments.pieces.v == 16); ++i) {
      const bool present = all || (value_row + 4 * i < rows_left && has_column);
      copy_async<16>(v_place + 4 * i * value_stride * sizeof(T), present ? v : problem.v.data,
                     present ? 16 : 0);
      v += 4 * v_stride;
    }
    k += apart * k_stride, v += (apart - tile) * v_stride;
    k_place += apart * S::feature_dim * sizeof(T), v_place += apart * value_stride * sizeof(T);
  };
  if (whole) {
    UNROLL for (int own = 0; own < S::own_tiles; ++own) copy_tile(true, 0);
  } else {  // counted 0: rows or columns are missing
    NO_UNROLL for (int own = 0; own < S::own_tiles; ++own) copy_tile(false, left - own * apart);
    bring_narrow_keys<T, S, false>(memory, origins, arguments, stage, first, end);
  }
}

// x = gamma LayerNorm(k) + beta of the warp's rows, and `rows`, the fragments A of them.
template <class T, class S>
DEVICE void load_keys(float (&x)[S::own_tiles][Order<S>::numbers],
                      uint32_t (&rows)[S::own_tiles][2 * S::units], const T* raw, const float2* statistics,
                      const float2* affine, const Lane& lane) {
  constexpr int of_lane = Order<S>::of_lane;
  float gamma[of_lane], beta[of_lane];
  load_parameters<S>(gamma, beta, affine, lane);
  UNROLL for (int o = 0; o < S::own_tiles; ++o) {
    UNROLL for (int half = 0; half < 2; ++half) {
      const int row = own_tile(lane.warp, o) + lane.group + 8 * half;
      float values[of_lane];
      load_features<S>(values, raw + row * S::feature_dim, lane);
      const float2 own = load_shared<float2>(statistics + row);
      const float shift = -own.x * own.y;
      UNROLL for (int i = 0; i < of_lane; ++i) {
        values[i] = (values[i] * own.y + shift) * gamma[i] + beta[i];
        x[o][of_lane * half + i] = values[i];
      }
      UNROLL for (int n = 0; n < S::units; ++n) rows[o][2 * n + half] =
          pack<T>(values[2 * n], values[2 * n + 1]);
    }
  }
}

// Finishes grad k of the warp's rows of a chunk, whose `raw` rows and statistics lie in shared memory.
// `sums` are those of the warp for the gradients of gamma and beta.
template <class T, class S>
DEVICE void finish_keys(const float (&sum)[S::own_tiles][S::units][4], const T* raw, const float2* statistics,
                        const float2* affine, float* sums, const KeyOrigins<T>& origins,
                        const Arguments<BackwardProblem>& arguments, int first, int end, const Lane& lane) {
  constexpr int of_lane = Order<S>::of_lane;
  const BackwardProblem& problem = arguments.problem;
  AffineSums<S> affine_sums;
  UNROLL for (int o = 0; o < S::own_tiles; ++o) {
    UNROLL for (int half = 0; half < 2; ++half) {
      const int row = own_tile(lane.warp, o) + lane.group + 8 * half;
      const bool present = first + row < end;
      const float factor = !present ? 0.0f : S::taylor ? 1.0f : 2.0f;
      float gradient[of_lane], own_raw[of_lane];
      UNROLL for (int i = 0; i < of_lane; ++i) gradient[i] = factor * sum[o][i / 2][2 * half + (i & 1)];
      load_features<S>(own_raw, raw + row * S::feature_dim, lane);
      const float2 own = load_shared<float2>(statistics + row);
      affine_sums.add(gradient, own_raw, own);
      if (origins.partial) {
        if (present)
          store_features<S>(origins.partial + (first + row) * int64_t{S::feature_dim}, gradient, lane);
      } else {  // counted 0: no "token" LayerNorm
        finish_row<S>(gradient, own_raw, own, affine, problem.layer_norm, lane);
        T* const target = origins.grad_k + static_cast<int64_t>(first + row) * row_stride(problem.grad_k);
        if (present) store_features<S>(target, gradient, lane, arguments.pieces.grad_k);
      }
    }
  }
  affine_sums.add_to(sums, lane);
}

// Stores grad v of the warp's rows of a chunk. Its way leads through the warp's rows of a tile of gradients
// that no warp reads any more.
template <class T, class S>
DEVICE void store_value_gradient(const float (&out)[S::own_tiles][columns / 8][4], T* staging,
                                 const KeyOrigins<T>& origins, const Arguments<BackwardProblem>& arguments,
                                 int first, int end, const Lane& lane) {
  const int columns_left = static_cast<int>(arguments.problem.head_dim) - first_column(),
            stride = row_stride(arguments.problem.grad_v), piece = arguments.pieces.grad_v;
  const int row = lane.lane / 8, column = 8 * (lane.lane % 8);
  UNROLL for (int o = 0; o < S::own_tiles; ++o) {
    const int begin = own_tile(lane.warp, o), left = end - first - begin;
    T* const own = staging + begin * value_stride;
    UNROLL for (int n = 0; n < columns / 8; n += 2) {
      float c[2][4];
      UNROLL for (int i = 0; i < 2; ++i) {
        UNROLL for (int j = 0; j < 4; ++j) c[i][j] = out[o][n + i][j] * (S::taylor ? 0.5f : 1.0f);
      }
      const uint32_t rounded[4] = {pack<T>(c[0][0], c[0][1]), pack<T>(c[0][2], c[0][3]),
                                   pack<T>(c[1][0], c[1][1]), pack<T>(c[1][2], c[1][3])};
      stmatrix<2 * value_stride>(own + 8 * n, rounded);
    }
    sync_warp();
    const T* const unit = own + row * value_stride + column;
    T* const target = origins.grad_v + static_cast<int64_t>(first + begin + row) * stride + column;
    const auto store = [&](int i) {
      store_global(target + static_cast<int64_t>(4 * i) * stride,
                   load_shared<uint4>(unit + 4 * i * value_stride));
    };
    if (piece < 16) {  // counted 0: narrow rows
      store_narrow_rows(own, value_stride, origins.grad_v + static_cast<int64_t>(first + begin) * stride,
                        stride, piece, minimum(columns_left, columns), left);
    } else if (left >= tile && columns_left >= columns) {
      UNROLL for (int i = 0; i < 4; ++i) store(i);
    } else {  // counted 0: rows or columns are missing
      NO_UNROLL for (int i = 0; i < 4; ++i) {
        if (row + 4 * i < left && column < columns_left) store(i);
      }
    }
  }
  sync_warp();
}

template <class T, class S, bool grouped>
KERNEL void LAUNCH_BOUNDS(threads, 2)
    grad_kv_kernel(Arguments<BackwardProblem> arguments, BackwardBuffers buffers) {
  using Tiles = GradKvTiles<S>;
  using Queries = QueryTiles<S>;
  DYNAMIC_SHARED_MEMORY(char, memory);
  SHARED_MEMORY(QueryOrigins, query_origins, 1);
  SHARED_MEMORY(KeyOrigins<T>, key_origins, 1);
  const BackwardProblem& problem = arguments.problem;
  const int warp =
      shuffle(static_cast<int>(threadIdx.x / 32), 0);  // the same in all lanes, and the compiler knows
  const int group_size = grouped ? arguments.group_size : 1;
  const Span span = find_span(problem, arguments.launch, S::chunk);
  const int rows_end = span.rows;
  T* const published = reinterpret_cast<T*>(memory + Tiles::state);
  T* const ordered = reinterpret_cast<T*>(memory + Tiles::ordered_queries);
  uint32_t* const gram_terms = reinterpret_cast<uint32_t*>(memory + Tiles::gram_terms);
  float2* const affine = reinterpret_cast<float2*>(memory + Tiles::affine);
  float* const affine_sums = reinterpret_cast<float*>(memory + Tiles::affine_sums);

  if (threadIdx.x == 0) {
    query_origins->template set<T>(arguments, buffers.delta, span);
    key_origins->set(arguments, buffers, span);
  }
  load_affine<S>(affine, arguments, span.kv_head, group_size);
  if (problem.layer_norm == LayerNorm::none) {
    clear_statistics<S>(reinterpret_cast<float2*>(memory + Tiles::statistics));
    clear_query_statistics<S>(memory);
  }
  for (int i = static_cast<int>(threadIdx.x); i < warps * 2 * S::feature_dim; i += threads)
    affine_sums[i] = 0;
  clear_narrow_tiles(reinterpret_cast<T*>(memory + Queries::gradients), 2 * S::value_tile,
                     arguments.pieces.grad_y);
  clear_narrow_tiles(reinterpret_cast<T*>(memory + Tiles::values), S::value_tile, arguments.pieces.v);

  State<T, S> state;
  state.gram = reinterpret_cast<float*>(memory + Queries::gram);
  start_reverse_state(state, memory, arguments, span, lane_anew(warp));
  const auto publish = [&] {
    publish_state<published_shift<S>>(state, published, gram_terms, lane_anew(warp));
  };
  const auto copy = [&](int first, int head, int stage, int key_stage) {
    copy_queries<T, S>(memory, *query_origins, arguments, head, stage, first, rows_end);
    if (head + 1 == group_size) {
      copy_keys<T, S>(memory, *key_origins, arguments, key_stage, first, rows_end);
    }
    copy_async_commit();
  };
  const auto wait = [&](int first, int head, int stage, int key_stage) {
    copy_async_wait<0>();
    if (arguments.pieces.read > 2) return;  // counted 0 from here: narrow rows
    bring_narrow_queries<T, S, true>(memory, *query_origins, arguments, head, stage, first, rows_end);
    if (head + 1 == group_size) {
      bring_narrow_keys<T, S, true>(memory, *key_origins, arguments, key_stage, first, rows_end);
    }
  };
  const auto store_step = [&](int head, int stage) {
    const Lane lane = lane_anew(warp);
    [[maybe_unused]] T* const place =
        ordered + Order<S>::position(lane.group) * S::feature_stride + 2 * lane.pair;
    store_queries<T, S>(
        memory, arguments, affine + head * S::feature_dim, stage, lane,
        [&]([[maybe_unused]] int token, [[maybe_unused]] const uint32_t (&terms)[2 * S::units]) {
          if constexpr (S::units > 1) {
            UNROLL for (int i = 0; i < 4; ++i) {  // features g + 8 stand four rows behind g
              store_shared(place + token + (i >> 1) * 4 * S::feature_stride + 8 * (i & 1), terms[i]);
            }
          }
        });
  };
  sync_threads();
  const int last = (rows_end + S::chunk - 1) / S::chunk * S::chunk - S::chunk;
  int stage = 0, key_stage = 0;
  if (last >= 0) copy(last, group_size - 1, 0, 0);
  publish();
  NO_UNROLL for (int first = last; first >= 0; first -= S::chunk, key_stage ^= 1, stage ^= 1) {
    const T* const raw = reinterpret_cast<const T*>(memory + Tiles::raw) + key_stage * Tiles::raw_tile;
    float2* const statistics = reinterpret_cast<float2*>(memory + Tiles::statistics) + key_stage * S::chunk;
    int head = group_size - 1;
    const auto copy_next = [&] {  // the query heads from the last to the first, then the chunk before
      const bool last_step = !grouped || head == 0;
      if (last_step && first == 0) return;
      copy(last_step ? first - S::chunk : first, last_step ? group_size - 1 : head - 1, stage ^ 1,
           key_stage ^ 1);
    };
    uint32_t rows[S::own_tiles][2 * S::units], row_values[S::own_tiles][columns / tile][4];
    float sum[S::own_tiles][S::units][4], out[S::own_tiles][columns / 8][4] = {};
    wait(first, head, stage, key_stage);
    sync_warp();
    store_step(head, stage);
    {
      const Lane lane = lane_anew(warp);
      float x[S::own_tiles][Order<S>::numbers], gradient[S::own_tiles][Order<S>::numbers];
      if (problem.layer_norm == LayerNorm::head) {  // counted 0: "head" LayerNorm
        own_statistics<S, S::feature_dim>(statistics, raw, arguments.layer_norm_eps, lane);
        sync_warp();
      }
      load_keys<T, S>(x, rows, raw, statistics, affine + group_size * S::feature_dim, lane);
      const T* const values = reinterpret_cast<const T*>(memory + Tiles::values) +
                              lane.row_of_parity() * value_stride + lane.column_of_parity();
      UNROLL for (int o = 0; o < S::own_tiles; ++o) {
        UNROLL for (int i = 0; i < columns / tile; ++i)
            ldmatrix(row_values[o][i], values + own_tile(warp, o) * value_stride + tile * i);
      }
      sync_threads();
      copy_next();
      const Lane again = lane_anew(warp);
      products_gradient<T, S>(gradient, x, row_values, published, again);
      multiply_sums<T, S>(sum, rows, gram_terms, again);
      float slab[S::own_tiles][S::units][4] = {};
      if (S::taylor) {
        offset_gradient<T, S>(slab, row_values, published, StateShape<S>::linear_row, false, again);
      }
      UNROLL for (int o = 0; o < S::own_tiles; ++o) {
        UNROLL for (int n = 0; n < S::units; ++n) {
          UNROLL for (int j = 0; j < 4; ++j) {
            sum[o][n][j] += gradient[o][Order<S>::place(n, j)];
            if (S::taylor) sum[o][n][j] += slab[o][n][j];
          }
        }
      }
    }
    multiply_state<T, S>(out, rows, published, lane_anew(warp));
    while (true) {
      add_step<T, S>(out, sum, state, rows, row_values, memory, ordered, stage, lane_anew(warp));
      if (!grouped || head == 0) break;
      --head;
      stage ^= 1;
      wait(first, head, stage, key_stage);
      sync_threads();  // all have read the feature tile
      store_step(head, stage);
      sync_threads();
      copy_next();
    }
    finish_keys<T, S>(sum, raw, statistics, affine + group_size * S::feature_dim,
                      affine_sums + warp * 2 * S::feature_dim, *key_origins, arguments, first, rows_end,
                      lane_anew(warp));
    sync_threads();  // no one reads T or the gradients of this step any more
    store_value_gradient<T, S>(out, reinterpret_cast<T*>(memory + Queries::gradients) + stage * S::value_tile,
                               *key_origins, arguments, first, rows_end, lane_anew(warp));
    if (first > 0) publish();
  }

  sync_threads();
  if (buffers.key_affine && threadIdx.x < 2 * S::feature_dim) {
    float total = 0;
    for (int w = 0; w < warps; ++w) total += affine_sums[w * 2 * S::feature_dim + threadIdx.x];
    const int64_t block = static_cast<int64_t>(blockIdx.x) * gridDim.y + blockIdx.y;
    buffers.key_affine[block * 2 * S::feature_dim + threadIdx.x] = total;
  }
  if (problem.grad_initial_state.kv && span.segment == 0) {
    store_initial_gradient(state, memory, problem, buffers.initial_sums, span, lane_anew(warp));
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::polynomial
