// Backward of the polynomial maps, the sweep that makes grad q and leaves delta for the sweep that makes grad
// k.
//
// A block of four warps walks its segment forwards, with the state of all earlier chunks (state.cuh). A warp
// has the rows of one or two tiles of 16 tokens (rows.cuh) and some features of the state. Of every chunk the
// block takes all query heads of its kv head in turn, and with the last of them adds the chunk to the state.
// With g = grad y and c = g.v, and sums over the chunk's tokens that a query sees, outer has
//   H = J(q')^T (S g) / 2 + sum of c u k'        G = Z q' + sum of u k'
// delta / r = g.y = r q'.H, for which no y is read, and grad q' = 2 r (H - delta / r G). taylor, whose
// features are not all of degree 2, has
//   H = J(q')^T (S g) + sum of c (1 + u) k'      G = Z q' + sum of all earlier k' + sum of (1 + u) k'
// delta / r = r (phi(q').(S g) + sum of c sim), summed apart, and grad q' = r (H - delta / r G).
//
// In a sequence's first chunk c - delta / r is the small difference of large numbers for rows that see few
// keys. There delta / r comes from y, as exact as y is, and is subtracted from c before that is rounded.
//
// Memory: q, k, v, grad y and r are read once per column group, and y of a sequence's first chunk; grad q and
// delta / r are written once.
#pragma once

#include "cuda/tensor_core/polynomial/grad_q_products.cuh"
#include "cuda/tensor_core/polynomial/grad_q_rows.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::polynomial {

template <class T, class S, bool grouped>
KERNEL void LAUNCH_BOUNDS(threads, 2)
    grad_q_kernel(Arguments<BackwardProblem> arguments, BackwardBuffers buffers) {
  using L = GradQTiles<S>;
  constexpr int numbers = Order<S>::numbers, of_lane = Order<S>::of_lane, dim = S::feature_dim;
  DYNAMIC_SHARED_MEMORY(char, memory);
  SHARED_MEMORY(GradQOrigins<T>, origins, 1);
  const BackwardProblem& problem = arguments.problem;
  const int group_size = grouped ? arguments.group_size : 1;
  const int warp =
      shuffle(static_cast<int>(threadIdx.x / 32), 0);  // the same in all lanes, and the compiler knows
  T* const keys = reinterpret_cast<T*>(memory + L::keys);
  T* const scored_keys = reinterpret_cast<T*>(memory + L::scored_keys);
  T* const key_rows = reinterpret_cast<T*>(memory + L::key_rows);
  T* const gradients = reinterpret_cast<T*>(memory + L::gradients);
  T* const published = reinterpret_cast<T*>(memory + L::state);
  float* const deltas = reinterpret_cast<float*>(memory + L::deltas);
  float2* const affine = reinterpret_cast<float2*>(memory + L::affine);
  uint32_t* const gram_terms = reinterpret_cast<uint32_t*>(memory + L::gram_terms);

  if (threadIdx.x == 0) origins->template set_all<S>(arguments, buffers, memory);
  sync_threads();
  for (int i = static_cast<int>(threadIdx.x); i < group_size * warps * 2 * dim; i += threads)
    origins->affine_sums[i] = 0;
  if (problem.layer_norm == LayerNorm::none) {
    UNROLL for (int i = 0; i < 2; ++i)
        clear_statistics<S>(reinterpret_cast<float2*>(memory + L::statistics) + i * 2 * S::chunk);
  }
  clear_narrow_tiles(reinterpret_cast<T*>(memory + L::values), 2 * S::value_tile, arguments.pieces.v);
  clear_narrow_tiles(gradients, S::value_tile, arguments.pieces.grad_y);
  sync_threads();
  const int rows_end = origins->span.rows;
  load_affine<S>(affine, arguments, origins->span.kv_head, group_size);
  State<T, S> state;
  state.gram = reinterpret_cast<float*>(memory + L::gram);
  state.start(arguments, origins->span, false, lane_anew(warp));
  if (warp == 0) {
    sync_warp();
    order_sums(state, lane_anew(warp));
  }
  const auto publish = [&] {
    publish_state<published_shift<S>>(state, published, gram_terms, lane_anew(warp));
  };
  // of one query head, and with the first of them also k, v and the statistics of k
  const auto copy_step = [&](int first, int head, int stage, auto whole) {
    const int value_stage = grouped ? first / S::chunk % 2 : stage;
    constexpr bool all = decltype(whole)::value;
    const int thread = thread_index_anew();
    const int columns_left = static_cast<int>(problem.head_dim) - first_column();
    copy_rows<S, all, dim>(reinterpret_cast<T*>(memory + L::query_rows) + stage * L::query_tile,
                           origins->q + (grouped ? head * problem.q.head_stride : 0), row_stride(problem.q),
                           arguments.pieces.q, first, rows_end, thread);
    if (problem.layer_norm == LayerNorm::token) {
      copy_statistics<S, all>(reinterpret_cast<float2*>(memory + L::statistics) + stage * 2 * S::chunk,
                              origins->key_statistics, origins->query_statistics, first, rows_end, thread);
    }
    copy_own_gradients<S, all>(gradients, reinterpret_cast<float*>(memory + L::r) + stage * S::chunk,
                               origins->grad_y + (grouped ? head * problem.grad_y.head_stride : 0),
                               row_stride(problem.grad_y), arguments.pieces.grad_y,
                               origins->r + (grouped ? head * problem.seqlen : 0), first, rows_end,
                               columns_left, thread);
    if (grouped && head > 0) return;
    copy_rows<S, all>(key_rows, origins->k, row_stride(problem.k), arguments.pieces.k, first, rows_end,
                      thread);
    copy_values<S, all>(reinterpret_cast<T*>(memory + L::values) + value_stage * S::value_tile, origins->v,
                        row_stride(problem.v), arguments.pieces.v, first, rows_end, columns_left, thread);
  };
  const auto settle = [&](int first, int head, int stage) {
    const int value_stage = grouped ? first / S::chunk % 2 : stage, thread = thread_index_anew();
    const int width = minimum(static_cast<int>(problem.head_dim) - first_column(), columns);
    bring_narrow_tiles<S, true>(reinterpret_cast<T*>(memory + L::query_rows) + stage * L::query_tile, dim,
                                origins->q + (grouped ? head * problem.q.head_stride : 0),
                                row_stride(problem.q), arguments.pieces.q, dim, first, rows_end, thread);
    bring_narrow_tiles<S, true>(
        gradients, value_stride, origins->grad_y + (grouped ? head * problem.grad_y.head_stride : 0),
        row_stride(problem.grad_y), arguments.pieces.grad_y, width, first, rows_end, thread);
    if (grouped && head > 0) return;
    bring_narrow_tiles<S, true>(key_rows, S::raw_stride, origins->k, row_stride(problem.k),
                                arguments.pieces.k, dim, first, rows_end, thread);
    bring_narrow_tiles<S, true>(reinterpret_cast<T*>(memory + L::values) + value_stage * S::value_tile,
                                value_stride, origins->v, row_stride(problem.v), arguments.pieces.v, width,
                                first, rows_end, thread);
  };
  const auto copy = [&](int first, int head, int stage) {
    const int columns_left = static_cast<int>(problem.head_dim) - first_column();
    if (first + S::chunk <= rows_end && columns_left >= columns && arguments.pieces.read == 16) {
      copy_step(first, head, stage, std::true_type());
    } else {
      copy_step(first, head, stage, std::false_type());  // counted 0: rows or columns are missing
    }
    copy_async_commit();
  };

  sync_threads();  // affine, statistics, the state's sums
  if (rows_end > 0) copy(0, 0, 0);
  publish();
  int head = 0, stage = 0;
  NO_UNROLL for (int first = 0; first < rows_end;) {
    // v changes with the chunk, and what has stages beside it with the query head too
    const int value_stage = grouped ? first / S::chunk % 2 : stage;
    const bool first_head = !grouped || head == 0, last_head = !grouped || head + 1 == group_size;
    const T* const queries = reinterpret_cast<const T*>(memory + L::query_rows) + stage * L::query_tile;
    float2* const statistics = reinterpret_cast<float2*>(memory + L::statistics) + stage * 2 * S::chunk;
    const float2* const query_affine = affine + (grouped ? head * dim : 0);
    copy_async_wait<0>();
    if (arguments.pieces.read == 2) settle(first, head, stage);  // counted 0: narrow rows
    sync_warp();
    uint32_t rows[S::own_tiles][2 * S::units], row_gradients[S::own_tiles][columns / tile][4];  // fragments A
    float x[S::own_tiles][numbers];                                                             // q'
    {
      const Lane lane = lane_anew(warp);
      if (problem.layer_norm == LayerNorm::head) {  // counted 0: "head" LayerNorm
        UNROLL for (int o = 0; o < S::own_tiles; ++o) {
          const int token = tile * warp + o * tiles_apart(warp);
          head_statistics<S, dim>(statistics + 2 * token, key_rows + token * S::raw_stride,
                                  queries + token * dim, arguments.layer_norm_eps, lane);
        }
        sync_warp();
      }
      float gamma[of_lane], beta[of_lane];
      load_parameters<S>(gamma, beta, query_affine, lane);
      UNROLL for (int o = 0; o < S::own_tiles; ++o) {
        const int token = tile * warp + o * tiles_apart(warp);
        if (first_head) {
          uint32_t terms[2 * S::units];
          normalize<S>(terms, key_rows + token * S::raw_stride, statistics + 2 * token,
                       affine + group_size * dim, rows_end - first - token, lane);
          store_terms<S>(keys, terms, token, lane);
          if constexpr (dim == 16) {
            T* const place =
                scored_keys + Order<S>::position(lane.group) * S::feature_stride + token + 2 * lane.pair;
            UNROLL for (int i = 0; i < 4; ++i)  // features g + 8 stand four rows behind g
                store_shared(place + (i >> 1) * 4 * S::feature_stride + 8 * (i & 1), terms[i]);
          }
        }
        UNROLL for (int half = 0; half < 2; ++half) {
          const int row = lane.group + 8 * half;
          float raw[of_lane];
          load_features<S>(raw, queries + (token + row) * dim, lane);
          const float2 own = load_shared<float2>(statistics + 2 * token + tile + row);
          const float shift = -own.x * own.y;
          float* const numbers_of_row = x[o] + of_lane * half;
          UNROLL for (int i = 0; i < of_lane; ++i) numbers_of_row[i] =
              (raw[i] * own.y + shift) * gamma[i] + beta[i];
          UNROLL for (int n = 0; n < S::units; ++n) rows[o][2 * n + half] =
              pack<T>(numbers_of_row[2 * n], numbers_of_row[2 * n + 1]);
        }
        const T* const own_gradients =
            gradients + (token + lane.row_of_parity()) * value_stride + lane.column_of_parity();
        UNROLL for (int i = 0; i < columns / tile; ++i)
            ldmatrix(row_gradients[o][i], own_gradients + tile * i);
      }
    }
    const bool from_y = first == 0 && blockIdx.x % arguments.launch.segments == 0;
    if (from_y) {  // counted 0: the first chunk
      deltas_from_y<S>(deltas, gradients, origins->y + (grouped ? head * problem.y.head_stride : 0),
                       row_stride(problem.y), arguments.pieces.y, rows_end,
                       static_cast<int>(problem.head_dim) - first_column(), problem.normalize, warp);
    }
    if (first_head) {
      sync_threads();  // k', v and the state are there, and of the chunk before nothing is in use
    } else {
      sync_warp();
    }
    const int next_head = last_head ? 0 : head + 1, next = last_head ? first + S::chunk : first;
    if (next < rows_end) copy(next, next_head, stage ^ 1);

    float h_sum[S::own_tiles][S::units][4], g_sum[S::own_tiles][S::units][4], dots[S::own_tiles][2] = {};
    {
      const Lane lane = lane_anew(warp);
      float gradient[S::own_tiles][numbers];
      products_gradient<T, S>(gradient, x, row_gradients, published, lane);
      if constexpr (S::taylor) linear_gradient<T, S>(gradient, dots, x, row_gradients, published, lane);
      multiply_sums<T, S>(g_sum, rows, gram_terms, lane);
      UNROLL for (int o = 0; o < S::own_tiles; ++o) {
        UNROLL for (int n = 0; n < S::units; ++n) {
          UNROLL for (int j = 0; j < 4; ++j) h_sum[o][n][j] = gradient[o][Order<S>::place(n, j)];
        }
      }
      if (from_y) {  // counted 0: the first chunk; of G the state's part now, the chunk's own with its pairs
        UNROLL for (int o = 0; o < S::own_tiles; ++o) {
          UNROLL for (int j = 0; j < 4; ++j) {
            const int row = tile * warp + o * tiles_apart(warp) + fragment_row(j, lane);
            const float delta = load_shared<float>(deltas + row);
            UNROLL for (int n = 0; n < S::units; ++n) h_sum[o][n][j] -= delta * g_sum[o][n][j];
          }
        }
      }
    }
    {
      const Lane lane = lane_anew(warp);
      const T* const values = reinterpret_cast<const T*>(memory + L::values) + value_stage * S::value_tile;
      const T* value_rows = values + lane.row_of_halves() * value_stride + lane.column_of_halves();
      const T* own_values = value_place(values, lane);
      const T* terms = term_place<S>(keys, lane);
      const T* key_place = scored_keys + lane.row_of_halves() * S::feature_stride + lane.column_of_halves();
      NO_UNROLL for (int token = 0; token < S::chunk; token += tile) {
        if (token <=
            tile * warp + (S::own_tiles - 1) * tiles_apart(warp)) {  // counted 5/8, 13/16: up to its own tile
          const KeyTile<T, S> tokens(value_rows, key_place,
                                     dim == 8 ? key_place : terms + (scored_keys - keys));
          UNROLL for (int o = S::own_tiles - 1; o >= 0; --o) {
            const int own = tile * warp + o * tiles_apart(warp);
            if (o + 1 < S::own_tiles && token > own) continue;  // counted 5/8, 9/16 from here
            tokens.add_pairs(h_sum[o], g_sum[o], dots[o], rows[o], row_gradients[o], token == own, from_y,
                             deltas + own, lane);
          }
        }
        if (last_head) {
          uint32_t v[columns / tile][4];
          UNROLL for (int i = 0; i < columns / tile && StateShape<S>::by_features; ++i)
              ldmatrix_transposed(v[i], own_values + tile * i);
          add_tokens(state, terms, v, own_values, lane);
        }
        value_rows += tile * value_stride, own_values += tile * value_stride;
        terms += tile, key_place += tile;
      }
      if (last_head && warp == 0) add_gram(state, scored_keys, lane);  // counted 1/4: one warp
    }
    {
      const Lane lane = lane_anew(warp);
      AffineSums<S> sums;
      const float common_factor = origins->factor;
      UNROLL for (int o = 0; o < S::own_tiles; ++o) {
        const int begin = tile * warp + o * tiles_apart(warp), token = begin + lane.group;
        const int64_t row_of_heads = first + token + (grouped ? head * problem.seqlen : 0);
        float* const delta_rows = origins->delta + row_of_heads;
        float* const partial_rows = origins->partial + row_of_heads * dim;
        UNROLL for (int half = 0; half < 2; ++half) {
          const int row = token + 8 * half;
          const bool present = row < rows_end - first;
          const float r = load_shared<float>(memory + L::r + (stage * S::chunk + row) * 4);
          float gradient[of_lane], raw[of_lane], delta = dots[o][half];
          UNROLL for (int i = 0; i < of_lane; ++i) gradient[i] = h_sum[o][i >> 1][2 * half + (i & 1)];
          if constexpr (!S::taylor) {
            UNROLL for (int n = 0; n < S::units; ++n) {
              const float2 q = unpack<T>(rows[o][2 * n + half]);
              delta += gradient[2 * n] * q.x + gradient[2 * n + 1] * q.y;
            }
          }
          delta = problem.normalize ? r * quad_sum(delta) : 0.0f;
          const float factor = present ? common_factor * r : 0.0f, subtracted = from_y ? 0.0f : delta;
          UNROLL for (int i = 0; i < of_lane; ++i) gradient[i] =
              factor * (gradient[i] - subtracted * g_sum[o][i >> 1][2 * half + (i & 1)]);
          if (from_y) delta = load_shared<float>(deltas + row);
          if (lane.pair == 0 && present) store_global(delta_rows + 8 * half, delta);
          load_features<S>(raw, queries + row * dim, lane);
          const float2 own = load_shared<float2>(statistics + 2 * begin + tile + row - begin);
          sums.add(gradient, raw, own);
          if (buffers.query_gradient) {
            if (present) store_features<S>(partial_rows + 8 * half * dim, gradient, lane);
          } else {  // counted 0: no "token" LayerNorm
            finish_row<S>(gradient, raw, own, query_affine, problem.layer_norm, lane);
            T* const target = origins->grad_q + (first + row) * problem.grad_q.row_stride +
                              (grouped ? head * problem.grad_q.head_stride : 0);
            if (present) store_features<S>(target, gradient, lane, arguments.pieces.grad_q);
          }
        }
      }
      sums.add_to(origins->affine_sums + ((grouped ? head * warps : 0) + warp) * 2 * dim, lane);
    }
    if (last_head) {
      if (next < rows_end) {
        sync_threads();  // all have read the state and k'
        publish();
      }
    }
    stage ^= 1;
    head = next_head;
    first = next;
  }

  sync_threads();
  if (!buffers.query_affine) return;
  const Span& span = origins->span;
  for (int i = static_cast<int>(threadIdx.x); i < group_size * 2 * dim; i += threads) {
    const int member = i / (2 * dim), entry = i % (2 * dim);
    float sum = 0;
    for (int w = 0; w < warps; ++w) sum += origins->affine_sums[(member * warps + w) * 2 * dim + entry];
    const int64_t query_head = span.sequence * problem.heads + span.kv_head * group_size + member;
    const int64_t block = query_head * arguments.launch.segments + span.segment;
    // where another kernel goes on, the gradients are multiplied by the scale already
    buffers.query_affine[(block * gridDim.y + blockIdx.y) * 2 * dim + entry] =
        buffers.query_gradient ? sum : arguments.scale * sum;
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::polynomial
