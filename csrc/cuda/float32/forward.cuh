// Forward of the float32 path: q, k, v in float32 with 16 features, on the ordinary (FFMA) units.
//
// A block of 128 threads walks one segment of one sequence for one kv head, all its query heads, and 64 value
// columns, in chunks of 64 tokens:
//   y_i = (sum_{j in chunk, j <= i} sim(i, j) v_j + phi(q'_i) S) / (the same with v = 1, + eps)
// and then S takes the chunk in. S and its sums stay in shared memory from the first chunk to the last,
// started from a slot of the workspace that segment_states and scan_states have filled. Products are sums in
// registers: y in tiles of 8 tokens x 4 columns a thread, the update of S in tiles of 9 features x 8 columns.
// Memory: q, k, v are read once per column group, y and r written once; per segment one slot is read.
// No buffer is doubled: a chunk's loads wait while other blocks of the multiprocessor compute.
#pragma once

#include "cuda/float32/products.cuh"

namespace rebased::REBASED_BACKEND::float32_path {

// Where scores[key][query] of queries from 32 half on begin; keys from 32 on have no others.
struct Scores {
  float* tile;

  DEVICE float* row(int key, int query) const {
    constexpr int half = ForwardTiles::half;
    return key < half ? tile + key * ForwardShape::row_stride + query
                      : tile + half * ForwardShape::row_stride + (key - half) * ForwardTiles::half_stride +
                            query - half;
  }
};

// scores[key][query] = sim for key <= query, else 0. Warps 0, 1, 2 each have 32 queries x 32 keys, in tiles
// of 8 consecutive queries x 4 keys a thread; the queries before all keys have no warp.
template <FeatureMap map>
DEVICE void fill_scores(const Scores& scores, const float* queries, const float* keys,
                        const Features<float>& features) {
  constexpr int half = ForwardTiles::half, stride = ForwardShape::row_stride;
  const int warp = static_cast<int>(threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  if (warp == 3) return;
  const int query = (warp > 0 ? half : 0) + lane / 8 * 8, key = (warp == 2 ? half : 0) + lane % 8;
  float u[4][8] = {};  // keys 8 apart, so that lanes store neighbouring rows
  UNROLL for (int i = 0; i < feature_dim; ++i) {
    float x[8], y[4];
    load_floats(x, queries + i * stride + query);
    UNROLL for (int n = 0; n < 4; ++n) y[n] = keys[i * stride + key + 8 * n];
    add_outer(u, y, x);
  }
  UNROLL for (int n = 0; n < 4; ++n) {
    UNROLL for (int r = 0; r < 8; ++r) {
      u[n][r] = key + 8 * n <= query + r ? features.score(u[n][r]) : 0.0f;
    }
    float* const row = scores.row(key + 8 * n, query);
    store_shared(row, float4{u[n][0], u[n][1], u[n][2], u[n][3]});
    store_shared(row + 4, float4{u[n][4], u[n][5], u[n][6], u[n][7]});
  }
}

// sums[r][c] += sum over keys of scores[key][token + r] values[key][column + c]
DEVICE void add_scored_values(float (&sums)[8][4], const Scores& scores, const float* values,
                              const OutputTile<ForwardShape>& tile) {
  constexpr int half = ForwardTiles::half;
  const auto add = [&](const float* weights, int stride, const float* others) {
    NO_UNROLL for (int begin = 0; begin < half; begin += 4) {
      UNROLL for (int key = begin; key < begin + 4; ++key) {
        float weight[8], value[4];
        load_floats(weight, weights + key * stride);
        load_floats(value, others + key * ForwardShape::value_stride);
        add_outer(sums, weight, value);
      }
    }
  };
  const float* const column = values + tile.column;
  add(scores.row(0, tile.token), ForwardShape::row_stride, column);
  if (tile.token >= half) {
    add(scores.row(half, tile.token), ForwardTiles::half_stride, column + half * ForwardShape::value_stride);
  }
}

template <FeatureMap map>
KERNEL void LAUNCH_BOUNDS(threads, 2) forward_kernel(Call<ForwardProblem> call) {
  using Shape = ForwardShape;
  constexpr ForwardTiles tiles(map, 1);  // offsets do not depend on the group's size
  constexpr int chunk = Shape::chunk;
  DYNAMIC_SHARED_MEMORY(float, shared);
  SHARED_MEMORY(float*, carries, 1);
  float* const state = shared + tiles.state;
  float* const sums = shared + tiles.sums;
  float* const queries = shared + tiles.queries;
  float* const keys = shared + tiles.keys;
  float* const values = shared + tiles.values;
  float* const parts = shared + tiles.parts;
  float* const affine = shared + tiles.affine;
  const Scores scores{shared + tiles.scores};
  const ForwardProblem& problem = call.problem;
  const Block block(call);
  start_carries(carries, call, block);
  const Features<float> features = make_features<map>(problem);
  const HeadNorm<float> query = query_norm(call, features), key = key_norm<float>(call);
  const int columns_left = static_cast<int>(problem.head_dim) - first_column();
  const int64_t group = group_size(problem);
  const bool keep_state = problem.final_state.kv && block.last_segment();
  bool state_is_zero = block.first_segment() && !given(problem.initial_state);

  start_state<map, Shape>(state, sums, call, block, call.workspace.states, problem.initial_state, false);
  load_affine(affine, problem, block.kv_head);
  sync_threads();
  for (int64_t number = block.chunk_begin; number < block.chunk_end; ++number) {
    const int64_t row0 = block.row_of(number);
    const int rows = block.rows_of(number);
    for (int64_t member = 0; member < group; ++member) {
      const int64_t head = block.kv_head * group + member;
      const int thread = thread_index_anew(), token = thread % chunk, part = thread / chunk;
      if (member == 0) {
        const float* const v = head_rows<float>(problem.v, block.batch, block.kv_head, row0) + first_column();
        copy_values<Shape>(values, v, problem.v.row_stride, rows, columns_left);
        copy_async_commit();
      }
      const bool is_key = part == 1;  // threads 0..63 bring a row of q each, threads 64..127 one of k
      if (!is_key || member == 0) {
        const float* const row = is_key
                                     ? head_rows<float>(problem.k, block.batch, block.kv_head, row0 + token)
                                     : head_rows<float>(problem.q, block.batch, head, row0 + token);
        const Norm<float> norm = is_key ? key.at(problem, block.batch, block.kv_head, row0)
                                        : query.at(problem, block.batch, head, row0);
        load_feature_row<map, Shape>(is_key ? keys : queries, nullptr, token, row, token < rows, features,
                                     with_affine(norm, affine + (is_key ? group : member) * affine_size));
      }
      sync_threads();  // features
      fill_scores<map>(scores, queries, keys, features);
      float sum = state_is_zero ? 0.0f : query_sums<map, Shape>(queries + token, sums, part);
      if (member == 0) copy_async_wait<0>();
      sync_threads();  // scores and values
      if (part == 0 || token >= ForwardTiles::half) {
        const int first = part * ForwardTiles::half;
        for (int n = first; n < first + ForwardTiles::half; ++n) sum += *scores.row(n, token);
      }
      parts[thread] = sum;
      sync_threads();

      const OutputTile<Shape> tile(thread_index_anew());
      float out[8][4] = {};
      if (!state_is_zero) {
        query_state<map, Shape>(out, queries + tile.token, state + tile.column);
      }
      add_scored_values(out, scores, values, tile);
      float* const y = head_rows<float>(problem.y, block.batch, head, row0) + first_column() + tile.column;
      UNROLL for (int n = 0; n < 8; ++n) {
        const int row = tile.token + n;
        const float denominator = parts[row] + parts[chunk + row] + static_cast<float>(problem.eps);
        const float r = problem.normalize ? reciprocal(denominator) : 1.0f;
        if (row < rows && tile.column < columns_left) {
          store_global(y + row * problem.y.row_stride,
                       float4{r * out[n][0], r * out[n][1], r * out[n][2], r * out[n][3]});
        }
        if (row < rows && tile.column == 0 && blockIdx.y == 0) {
          static_cast<float*>(problem.r)[(block.batch * problem.heads + head) * problem.seqlen + row0 + row] =
              r;
        }
      }
      sync_threads();  // every thread has read the tiles and the state
    }
    if (number + 1 < block.chunk_end || keep_state) {
      update_state<map, Shape>(state, sums, carries, keys, values, nullptr, rows);
      state_is_zero = false;
      sync_threads();
    }
  }
  if (keep_state) {
    const int64_t index = block.state_index() * state_features(map);
    store_state<map, Shape>(
        state, sums, static_cast<float*>(problem.final_state.kv) + index * problem.head_dim,
        blockIdx.y == 0 && problem.final_state.k ? static_cast<float*>(problem.final_state.k) + index
                                                 : nullptr,
        static_cast<int>(problem.head_dim), false, features);
  }
}

// The sums of each segment but the last by themselves, into the next segment's slot.
template <FeatureMap map, class Shape, class AnyProblem>
KERNEL void LAUNCH_BOUNDS(threads, 2) segment_states(Call<AnyProblem> call) {
  using Tiles = StateTiles<Shape>;
  DYNAMIC_SHARED_MEMORY(float, shared);
  SHARED_MEMORY(float*, carries, 1);
  constexpr Tiles tiles(map, 1);
  float* const state = shared + tiles.state;
  float* const sums = shared + tiles.sums;
  float* const keys = shared + tiles.features;
  float* const values = shared + tiles.values;
  const AnyProblem& problem = call.problem;
  const Block block(call);
  if (block.last_segment()) return;
  const Features<float> features = make_features<map>(problem);
  const HeadNorm<float> key = key_norm<float>(call);
  const int token = static_cast<int>(threadIdx.x);
  const int columns_left = static_cast<int>(problem.head_dim) - first_column();

  float* const affine = shared + tiles.affine;
  const float* const key_affine = affine + group_size(problem) * affine_size;
  for (int i = token; i < tiles.features; i += threads) shared[i] = 0;
  load_affine(affine, problem, block.kv_head);
  start_carries(carries, call, block);
  sync_threads();
  for (int64_t number = block.chunk_begin; number < block.chunk_end; ++number) {
    const int64_t row0 = block.row_of(number);
    const int rows = block.rows_of(number);
    const float* const v = head_rows<float>(problem.v, block.batch, block.kv_head, row0) + first_column();
    copy_values<Shape>(values, v, problem.v.row_stride, rows, columns_left);
    copy_async_commit();
    if (token < Shape::chunk) {
      const float* const k = head_rows<float>(problem.k, block.batch, block.kv_head, row0 + token);
      load_feature_row<map, Shape>(
          keys, nullptr, token, k, token < rows, features,
          with_affine(key.at(problem, block.batch, block.kv_head, row0), key_affine));
    }
    copy_async_wait<0>();
    sync_threads();
    update_state<map, Shape>(state, sums, carries, keys, values, nullptr, rows);
    sync_threads();
  }
  const int head_dim = static_cast<int>(problem.head_dim);
  float* const slot =
      call.template region<float>(call.workspace.states) + (block.index + 1) * call.tiles.slot_size();
  store_state<map, Shape>(state, sums, slot,
                          blockIdx.y == 0 ? slot + call.tiles.padded_features * head_dim : nullptr, head_dim,
                          false, features);
}

}  // namespace rebased::REBASED_BACKEND::float32_path
