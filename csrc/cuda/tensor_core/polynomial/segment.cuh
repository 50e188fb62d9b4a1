// The pass that leaves the states of segments in the workspace, for the polynomial maps: the forward's walk
// over k and v alone.
#pragma once

#include "cuda/tensor_core/polynomial/state.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::polynomial {

// Dynamic shared memory, as offsets in bytes.
template <class S>
struct SegmentTiles {
  static constexpr int values = 0;                             // (2, chunk, 64)
  static constexpr int keys = values + 2 * S::value_tile * 2;  // feature tile
  static constexpr int key_rows = keys + S::feature_tile * 2;  // raw tile
  static constexpr int statistics = key_rows + S::raw_tile * 2;
  static constexpr int gram = statistics + 2 * S::chunk * 8;
  static constexpr int affine = gram + StateShape<S>::gram_bytes;
  static constexpr int bytes = affine + S::feature_dim * 8;
};

// Leaves the sums over the rows of each segment in the segment's slot; those of the last segment only where
// launch.all_segments says so.
template <class T, class S>
KERNEL void LAUNCH_BOUNDS(threads, 3) segment_state_kernel(Arguments<Problem> arguments) {
  using L = SegmentTiles<S>;
  const Problem& problem = arguments.problem;
  DYNAMIC_SHARED_MEMORY(char, memory);
  SHARED_MEMORY(Origins<T>, origins, 1);
  T* const keys = reinterpret_cast<T*>(memory + L::keys);
  T* const values = reinterpret_cast<T*>(memory + L::values);
  T* const key_rows = reinterpret_cast<T*>(memory + L::key_rows);
  float2* const affine = reinterpret_cast<float2*>(memory + L::affine);
  float2* const statistics = reinterpret_cast<float2*>(memory + L::statistics);
  Lane lane;
  lane.warp = shuffle(lane.warp, 0);
  if (threadIdx.x == 0) origins->set(arguments, S::chunk);
  if (problem.layer_norm == LayerNorm::none) clear_statistics<S>(statistics);
  sync_threads();
  const Span& span = origins->span;
  if (span.segment + 1 == arguments.launch.segments && !arguments.launch.all_segments) return;
  const int rows_end = span.rows, columns_left = static_cast<int>(problem.head_dim) - first_column();
  load_affine<S>(affine, arguments, span.kv_head, 0);

  State<T, S> state;
  state.gram = reinterpret_cast<float*>(memory + L::gram);
  state.clear(lane);
  const auto copy_chunk = [&](int first, auto whole) {
    constexpr bool all = decltype(whole)::value;
    const int thread = thread_index_anew();
    copy_rows<S, all>(key_rows, origins->k, row_stride(problem.k), arguments.pieces.k, first, rows_end,
                      thread);
    if (problem.layer_norm == LayerNorm::token) {
      copy_statistics<S, all>(statistics, origins->key_statistics, origins->key_statistics, first, rows_end,
                              thread);
    }
    copy_values<S, all>(values + first / S::chunk % 2 * S::value_tile, origins->v, row_stride(problem.v),
                        arguments.pieces.v, first, rows_end, columns_left, thread);
  };
  const auto copy = [&](int first) {
    if (first + S::chunk <= rows_end && columns_left >= columns && arguments.pieces.read == 16) {
      copy_chunk(first, std::true_type());
    } else {
      copy_chunk(first, std::false_type());  // counted 0: rows or columns are missing
    }
    copy_async_commit();
  };

  clear_narrow_tiles(values, 2 * S::value_tile, arguments.pieces.v);
  sync_threads();  // affine, statistics, cleared tiles
  if (rows_end > 0) copy(0);
  NO_UNROLL for (int first = 0; first < rows_end; first += S::chunk) {
    copy_async_wait<0>();
    if (arguments.pieces.read == 2) {  // counted 0: narrow rows
      const int thread = thread_index_anew();
      bring_narrow_tiles<S, true>(key_rows, S::raw_stride, origins->k, row_stride(problem.k),
                                  arguments.pieces.k, S::feature_dim, first, rows_end, thread);
      bring_narrow_tiles<S, true>(values + first / S::chunk % 2 * S::value_tile, value_stride, origins->v,
                                  row_stride(problem.v), arguments.pieces.v, minimum(columns_left, columns),
                                  first, rows_end, thread);
    }
    sync_warp();
    UNROLL for (int i = 0; i < S::own_tiles; ++i) {
      const int token = tile * lane.warp + i * tiles_apart(lane.warp);
      const T* const rows = key_rows + token * S::raw_stride;
      if (problem.layer_norm == LayerNorm::head) {  // counted 0: "head" LayerNorm
        head_statistics<S>(statistics + 2 * token, rows, rows, arguments.layer_norm_eps, lane);
        sync_warp();
      }
      uint32_t terms[2 * S::units];
      normalize<S>(terms, rows, statistics + 2 * token, affine, rows_end - first - token, lane);
      store_terms<S>(keys, terms, token, lane);
    }
    sync_threads();  // k' and v are there, and the value tile of the chunk before is free
    if (first + S::chunk < rows_end) copy(first + S::chunk);
    const T* of_values = value_place(values + first / S::chunk % 2 * S::value_tile, lane);
    const T* terms = term_place<S>(keys, lane);
    NO_UNROLL for (int token = 0; token < S::chunk; token += tile) {
      uint32_t v[columns / tile][4];
      UNROLL for (int i = 0; i < columns / tile && StateShape<S>::by_features; ++i) {
        ldmatrix_transposed(v[i], of_values + tile * i);
      }
      add_tokens(state, terms, v, of_values, lane);
      of_values += tile * value_stride;
      terms += tile;
    }
    if (lane.warp == 0) add_gram(state, keys, lane);  // counted 1/4: one warp
    if (first + S::chunk < rows_end) sync_threads();  // all have read k'
  }
  sync_warp();
  state.store(arguments.slots + span.slot * S::Slot::size, static_cast<float>(rows_end), lane);
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::polynomial
