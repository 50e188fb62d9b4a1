// The reverse state of the polynomial maps: what the queries behind a chunk leave for its keys. With the
// queries q" = sqrt(r) q' it is
//   T = sum over later queries of phi(q") g^T        M = -(sum of delta q" q"^T)
// where g is grad y and delta is g . y, without r. `taylor` has below T the sums of r q' g^T and of r g, and
// beside M those of -delta r q' and of -delta r. How it is spread over warps and how it is published is in
// state.cuh. Products have no weights here, and those of the query side in a slot.
//
// This file has how a chunk of queries joins the state, and the kernel that sums the queries of each segment
// alone.
#pragma once

#include "cuda/tensor_core/polynomial/gradient.cuh"
#include "cuda/tensor_core/polynomial/queries.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::polynomial {

// Multiplies T by the weights of the query side, which slots and public gradients have, or divides it by
// them.
template <class T, class S>
DEVICE void weigh(State<T, S>& state, bool divide, const Lane& lane) {
  constexpr float quadratic = S::taylor ? 0.5f : 1.0f;
  state.visit_tiles(lane, [&](float (&c)[4], int row, int rows, int) {
    UNROLL for (int j = 0; j < 4; ++j) {
      const int own = lane.group + 8 * (j >> 1);
      const float weight = row + own < S::feature_dim        ? quadratic
                           : row + own < S::Slot::linear_row ? 2 * quadratic
                                                             : 1.0f;
      if (own < rows) c[j] *= divide ? 1.0f / weight : weight;
    }
  });
}

// Adds to T the 16 queries from `token` on: `features` is the feature tile, g the fragments B (16 tokens, 64
// columns) of their gradients, which lie in `gradients`.
template <class T, class S>
DEVICE void add_queries(State<T, S>& state, const char* memory, const T* features, const T* gradients,
                        const uint32_t (&g)[columns / tile][4], int token, const Lane& lane) {
  using Spread = StateShape<S>;
  const T* const place = features + token + lane.column_of_parity();
  uint32_t base[4], phi[4], own[4];  // A (16 features, 16 tokens); B of the warp's own columns
  ldmatrix_transposed(own, gradients + (token + lane.row_of_parity()) * value_stride + tile * lane.warp +
                               lane.column_of_parity());
  ldmatrix(base, place + parity_row(lane, S::half_rows) * S::feature_stride);
  UNROLL for (int e = 0; e < Spread::own_slabs; ++e) {
    const int row = parity_row(lane, S::rotated_half_rows) + Spread::slab_offsets * state.slab(e, lane);
    ldmatrix(phi, place + row * S::feature_stride);
    multiply<T>(phi, phi, base);
    UNROLL for (int i = 0; i < Spread::own_columns / tile; ++i) {
      const uint32_t* const b = Spread::by_features ? g[i] : own;
      mma_m16n8k16<T>(state.full[e][2 * i], phi, b[0], b[1]);
      mma_m16n8k16<T>(state.full[e][2 * i + 1], phi, b[2], b[3]);
    }
  }
  if constexpr (S::feature_dim == 16) {  // offset 8 is the fragment's other half
    phi[0] = multiply_pairs<T>(base[0], base[1]), phi[2] = multiply_pairs<T>(base[2], base[3]);
  } else {  // the last four products of offset 4 repeat the first four; who reads the state leaves them out
    ldmatrix(phi, place + (parity_row(lane, 0) + S::feature_dim / 2) * S::feature_stride);
    multiply<T>(phi, phi, base);
  }
  phi[1] = phi[3] = 0u;
  if constexpr (S::taylor) {
    const char* const roots = memory + QueryTiles<S>::roots + 8 * token + 16 * lane.pair;
    const float2 first = load_shared<float2>(roots), second = load_shared<float2>(roots + 64);
    if (lane.group == 0) {  // the constant, times r
      phi[1] = pack<T>(first.x * first.x, first.y * first.y);
      phi[3] = pack<T>(second.x * second.x, second.y * second.y);
    }
    const uint32_t low = pack<T>(first.x, first.y), high = pack<T>(second.x, second.y);
    base[0] = multiply_pairs<T>(base[0], low), base[1] = multiply_pairs<T>(base[1], low);
    base[2] = multiply_pairs<T>(base[2], high), base[3] = multiply_pairs<T>(base[3], high);
    mma_m16n8k16<T>(state.linear[0], base, own[0], own[1]);
    mma_m16n8k16<T>(state.linear[1], base, own[2], own[3]);
  }
  mma_m16n8k16<T>(state.half[0], phi, own[0], own[1]);
  mma_m16n8k16<T>(state.half[1], phi, own[2], own[3]);
}

// Adds a chunk's queries to M, by warp 0. `ordered`: M is in the order of features of gradient.cuh.
template <bool ordered, class T, class S>
DEVICE void add_sums(State<T, S>& state, char* memory, const Lane& lane) {
  using Tiles = QueryTiles<S>;
  float m[S::units][4], linear[4] = {}, count = 0;
  state.get_gram(m, lane);
  const int row = halves_row(lane, S::half_rows);
  const T* place = reinterpret_cast<const T*>(memory + Tiles::queries) +
                   (ordered ? Order<S>::feature(row) : row) * S::feature_stride + lane.column_of_halves();
  const char* offsets = memory + Tiles::minus_delta + 16 * lane.pair;
  const char* roots = memory + Tiles::roots + 16 * lane.pair;
  NO_UNROLL for (int token = 0; token < S::chunk; token += tile) {
    uint32_t b[4];  // B (16 tokens, 16 features)
    ldmatrix(b, place);
    const float2 first = load_shared<float2>(offsets), second = load_shared<float2>(offsets + 64);
    const uint32_t low = pack<T>(first.x, first.y), high = pack<T>(second.x, second.y);
    const uint32_t a[4] = {multiply_pairs<T>(b[0], low), multiply_pairs<T>(b[2], low),
                           multiply_pairs<T>(b[1], high), multiply_pairs<T>(b[3], high)};
    UNROLL for (int n = 0; n < S::units; ++n) mma_m16n8k16<T>(m[n], a, b[2 * n], b[2 * n + 1]);
    if constexpr (S::taylor) {
      const float2 r0 = load_shared<float2>(roots), r1 = load_shared<float2>(roots + 64);
      mma_m16n8k16<T>(linear, a, pack<T>(r0.x, r0.y), pack<T>(r1.x, r1.y));
      if (lane.group == 0) {
        count +=
            first.x * r0.x * r0.x + first.y * r0.y * r0.y + second.x * r1.x * r1.x + second.y * r1.y * r1.y;
      }
      roots += 8 * tile;
    }
    place += tile;
    offsets += 8 * tile;
  }
  state.set_gram(m, lane);
  if constexpr (S::taylor) {
    if (lane.pair == 0) {
      float* const sums = state.gram + StateShape<S>::gram_floats + lane.group;
      sums[0] += linear[0];
      sums[8] += linear[2];
    }
    reinterpret_cast<float*>(memory + Tiles::count)[lane.lane] += count;
  }
}

// -(sum of delta r) of taylor, from the lanes of warp 0.
template <class S>
DEVICE float total_count(const char* memory, const Lane& lane) {
  if (!S::taylor || lane.warp > 0) return 0.0f;
  float count = reinterpret_cast<const float*>(memory + QueryTiles<S>::count)[lane.lane];
  UNROLL for (int distance = 1; distance < 32; distance *= 2) count += shuffle_xor(count, distance);
  return count;
}

// ---- from slots, and to the public gradient ----

// Sets the state that a block begins with, M in the order of features of gradient.cuh.
template <class T, class S>
DEVICE void start_reverse_state(State<T, S>& state, char* memory, const Arguments<BackwardProblem>& arguments,
                                const Span& span, const Lane& lane) {
  const float count = state.start(arguments, span, true, lane);
  weigh(state, true, lane);
  if (lane.warp > 0) return;
  sync_warp();
  order_sums(state, lane);
  if (S::taylor) {
    reinterpret_cast<float*>(memory + QueryTiles<S>::count)[lane.lane] = lane.lane == 0 ? count : 0.0f;
  }
}

// Stores the gradient of the initial state, its k in `k_sums` (column groups, sequences, kv heads, features).
template <class T, class S>
DEVICE void store_initial_gradient(State<T, S>& state, const char* memory, const BackwardProblem& problem,
                                   float* k_sums, const Span& span, const Lane& lane) {
  const int64_t index = span.sequence * problem.kv_heads + span.kv_head;
  const int64_t heads = problem.num_sequences * problem.kv_heads, features = S::Slot::rows;
  weigh(state, false, lane);
  if (lane.warp == 0) order_sums<true>(state, lane);
  state.store_public(static_cast<float*>(problem.grad_initial_state.kv) +
                         index * features * problem.head_dim + span.first_column,
                     k_sums + (blockIdx.y * heads + index) * features, total_count<S>(memory, lane), true,
                     problem.head_dim, static_cast<int>(problem.head_dim) - span.first_column, lane);
}

// ---- the reverse states of segments ----

template <class S>
constexpr int64_t reverse_segment_bytes(int64_t group_size) {
  return QueryTiles<S>::end + (group_size + 1) * S::feature_dim * 8;
}

// Leaves the reverse sums over the rows of each segment in the segment's slot; those of the first segment
// only where launch.all_segments says so.
template <class T, class S>
KERNEL void LAUNCH_BOUNDS(threads, 3)
    reverse_segment_kernel(Arguments<BackwardProblem> arguments, const float* deltas) {
  using Tiles = QueryTiles<S>;
  DYNAMIC_SHARED_MEMORY(char, memory);
  SHARED_MEMORY(QueryOrigins, origins, 1);
  const BackwardProblem& problem = arguments.problem;
  Lane lane;
  lane.warp = shuffle(lane.warp, 0);  // the same in all lanes, and the compiler knows
  const Span span = find_span(problem, arguments.launch, S::chunk);
  if (span.segment == 0 && !arguments.launch.all_segments) return;
  const int rows_end = span.rows, group_size = arguments.group_size;
  const T* const features = reinterpret_cast<const T*>(memory + Tiles::queries);
  float2* const affine = reinterpret_cast<float2*>(memory + Tiles::end);
  if (threadIdx.x == 0) origins->set<T>(arguments, deltas, span);
  load_affine<S>(affine, arguments, span.kv_head, group_size);
  if (problem.layer_norm == LayerNorm::none) clear_query_statistics<S>(memory);
  State<T, S> state;
  state.gram = reinterpret_cast<float*>(memory + Tiles::gram);
  state.clear(lane);
  if (S::taylor && lane.warp == 0) reinterpret_cast<float*>(memory + Tiles::count)[lane.lane] = 0;
  clear_narrow_tiles(reinterpret_cast<T*>(memory + Tiles::gradients), 2 * S::value_tile,
                     arguments.pieces.grad_y);
  sync_threads();
  const auto copy = [&](int first, int head, int stage) {
    copy_queries<T, S>(memory, *origins, arguments, head, stage, first, rows_end);
    copy_async_commit();
  };
  int first = (rows_end + S::chunk - 1) / S::chunk * S::chunk - S::chunk, head = group_size - 1, stage = 0;
  if (first >= 0) copy(first, head, stage);
  NO_UNROLL for (; first >= 0; stage ^= 1) {
    copy_async_wait<0>();
    if (arguments.pieces.read == 2) {  // counted 0: narrow rows
      bring_narrow_queries<T, S, true>(memory, *origins, arguments, head, stage, first, rows_end);
    }
    sync_warp();
    store_queries<T, S>(memory, arguments, affine + head * S::feature_dim, stage, lane,
                        [](int, const auto&) {});
    if (head == 0) first -= S::chunk;
    head = head == 0 ? group_size - 1 : head - 1;
    sync_threads();
    if (first >= 0) copy(first, head, stage ^ 1);
    const T* const gradients = reinterpret_cast<const T*>(memory + Tiles::gradients) + stage * S::value_tile;
    const T* place = gradients + lane.row_of_parity() * value_stride + lane.column_of_parity();
    NO_UNROLL for (int token = 0; token < S::chunk; token += tile) {
      uint32_t g[columns / tile][4];
      UNROLL for (int i = 0; i < columns / tile && StateShape<S>::by_features; ++i)
          ldmatrix_transposed(g[i], place + tile * i);
      add_queries<T, S>(state, memory, features, gradients, g, token, lane);
      place += tile * value_stride;
    }
    if (lane.warp == 0) add_sums<false>(state, memory, lane);  // counted 1/4: one warp
    if (first >= 0) sync_threads();                            // all have read the feature tile
  }
  sync_warp();  // the last chunk's sums, which lanes of warp 0 have left to others
  weigh(state, false, lane);
  state.store(arguments.slots + span.slot * S::Slot::size, total_count<S>(memory, lane), lane);
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::polynomial
