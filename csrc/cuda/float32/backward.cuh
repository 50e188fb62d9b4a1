// Backward of the float32 path: two sweeps of 128-thread blocks, cut as in the forward, in chunks of 32.
//
// With g^ = r grad y, delta = g^ . y and c_ij = g^_i . v_j - delta_i for j <= i:
//   grad_q_kernel   walks forward with S and z:  grad q'_i = sum_{j <= i} c_ij sim'(u_ij) k'_j
//                                                            + J(q'_i)^T (S g^_i - delta_i z)
//   grad_kv_kernel  walks back with T = sum over later i of phi(q'_i) g^_i^T and M = -sum delta_i phi(q'_i):
//                   grad v_j = sum_{i >= j} sim(i, j) g^_i + phi(k'_j) T
//                   grad k'_j = sum_{i >= j} c_ij sim'(u_ij) q'_i + J(k'_j)^T (T v_j + M)
// where J applies the derivative of the features. S, T and the sums carry the query side's weights and stay
// in shared memory. Each block owns the rows that it writes; of heads wider than 64 columns each column group
// leaves a part of grad q' and grad k', which finish_gradients sums in order.
// Memory, per column group: q, k, v, grad y, r and delta are read once a sweep, grad q, grad k and grad v
// written once.
#pragma once

#include "cuda/float32/gradients.cuh"

namespace rebased::REBASED_BACKEND::float32_path {

// tile = r grad_y of a chunk's rows, and minus_delta; zeros past the last row and column.
DEVICE void load_query_gradients(float* tile, float* minus_delta, const Call<BackwardProblem>& call,
                                 const Block& block, int64_t head, int64_t row0, int rows, int columns_left) {
  using Shape = BackwardShape;
  constexpr int quads = columns / 4, step = threads / quads;
  const BackwardProblem& problem = call.problem;
  const int64_t row_index = (block.batch * problem.heads + head) * problem.seqlen + row0;
  const float* const source = head_rows<float>(problem.grad_y, block.batch, head, row0) + first_column();
  const float* const r = static_cast<const float*>(problem.r) + row_index;
  const int column = static_cast<int>(threadIdx.x % quads) * 4;
  UNROLL for (int begin = 0; begin < Shape::chunk; begin += step) {
    const int token = begin + static_cast<int>(threadIdx.x / quads);
    // one of the lanes that share a row reads its r
    float factor = 1;
    if (problem.normalize) {
      if (column == 0 && token < rows) factor = r[token];
      factor = shuffle(factor, static_cast<int>(threadIdx.x & 16));
    }
    float4 value{0.0f, 0.0f, 0.0f, 0.0f};
    if (token < rows && column < columns_left) {
      value = load_constant<float4>(source + token * problem.grad_y.row_stride + column);
      value.x *= factor, value.y *= factor, value.z *= factor, value.w *= factor;
    }
    store_shared(tile + token * Shape::value_stride + column, value);
  }
  const int token = static_cast<int>(threadIdx.x);
  const float* const delta = call.template region<float>(call.workspace.delta);
  if (token < Shape::chunk) minus_delta[token] = delta && token < rows ? -delta[row_index + token] : 0.0f;
}

// Warp 0 brings a chunk's rows of query head `member`, and warp 1 with new_keys those of k. Those whose
// gradients are computed, of k or of q, leave LayerNorm(x) and 1 / standard deviation too.
template <FeatureMap map>
DEVICE void load_rows(float* shared, const BackwardTiles& tiles, bool keys_are_rows, bool new_keys,
                      const Call<BackwardProblem>& call, const Block& block, int64_t member, int64_t row0,
                      int rows, const Features<float>& features) {
  using Shape = BackwardShape;
  static_assert(Shape::chunk == 32, "a warp is a chunk's rows");
  const BackwardProblem& problem = call.problem;
  const int token = static_cast<int>(threadIdx.x % Shape::chunk), warp = static_cast<int>(threadIdx.x / 32);
  const bool is_key = warp == 1;
  if (warp > 1 || (is_key && !new_keys)) return;
  const int64_t group = group_size(problem), head = block.kv_head * group + member;
  const float* const source = is_key ? head_rows<float>(problem.k, block.batch, block.kv_head, row0 + token)
                                     : head_rows<float>(problem.q, block.batch, head, row0 + token);
  const Norm<float> norm = is_key ? key_norm<float>(call).at(problem, block.batch, block.kv_head, row0)
                                  : query_norm(call, features).at(problem, block.batch, head, row0);
  const bool is_row = is_key == keys_are_rows;
  const float deviation = load_feature_row<map, Shape>(
      shared + (is_key ? tiles.keys : tiles.queries), is_row ? shared + tiles.normalized : nullptr, token,
      source, token < rows, features,
      with_affine(norm, shared + tiles.affine + (is_key ? group : member) * affine_size));
  if (is_row) shared[tiles.deviations + token] = deviation;
}

// Of the buffers (column groups, batch, heads, seqlen, feature_dim); null where absent.
DEVICE float* partial_rows(const Call<BackwardProblem>& call, const Region& region, const Block& block,
                           int64_t head, int64_t heads, int64_t row0) {
  float* const partial = call.template region<float>(region);
  const int64_t group = blockIdx.y, head_index = (group * call.problem.batch + block.batch) * heads + head;
  return partial ? partial + (head_index * call.problem.seqlen + row0) * feature_dim : nullptr;
}

// Of (sequences, heads, segments, column groups, 2, feature_dim); null where absent.
DEVICE float* affine_partial(const Call<BackwardProblem>& call, const Region& region, const Block& block,
                             int64_t head, int64_t heads) {
  float* const partial = call.template region<float>(region);
  const int64_t index = (block.sequence * heads + head) * block.segments + block.segment;
  return partial ? partial + (index * gridDim.y + blockIdx.y) * affine_size : nullptr;
}

template <FeatureMap map>
KERNEL void LAUNCH_BOUNDS(threads, 2) grad_q_kernel(Call<BackwardProblem> call) {
  using Shape = BackwardShape;
  DYNAMIC_SHARED_MEMORY(float, shared);
  SHARED_MEMORY(float*, carries, 1);
  const BackwardProblem& problem = call.problem;
  const int group = static_cast<int>(group_size(problem));
  const BackwardTiles tiles(map, false, group);
  float* const queries = shared + tiles.queries;
  float* const keys = shared + tiles.keys;
  float* const values = shared + tiles.values;
  float* const gradients = shared + tiles.gradients;
  float* const score_gradients = shared + tiles.score_gradients;
  float* const affine_sums = shared + tiles.affine_sums;
  const float* const minus_delta = shared + tiles.minus_delta;
  const Block block(call);
  const Features<float> features = make_features<map>(problem);
  const HeadNorm<float> query = query_norm(call, features);
  const RowOwner owner;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int columns_left = static_cast<int>(problem.head_dim) - first_column();
  bool state_is_zero = block.first_segment() && !given(problem.initial_state);

  start_state<map, Shape>(shared + tiles.state, shared + tiles.sums, call, block, call.workspace.states,
                          problem.initial_state, false);
  load_affine(shared + tiles.affine, problem, block.kv_head);
  for (int n = thread; n < group * threads / 32 * affine_size; n += threads) affine_sums[n] = 0;
  start_carries(carries, call, block);
  sync_threads();
  for (int64_t number = block.chunk_begin; number < block.chunk_end; ++number) {
    const int64_t row0 = block.row_of(number);
    const int rows = block.rows_of(number);
    for (int member = 0; member < group; ++member) {
      const int64_t head = block.kv_head * group + member;
      if (member == 0) {
        const float* const v = head_rows<float>(problem.v, block.batch, block.kv_head, row0) + first_column();
        copy_values<Shape>(values, v, problem.v.row_stride, rows, columns_left);
        copy_async_commit();
      }
      load_rows<map>(shared, tiles, false, member == 0, call, block, member, row0, rows, features);
      load_query_gradients(gradients, shared + tiles.minus_delta, call, block, head, row0, rows,
                           columns_left);
      if (member == 0) copy_async_wait<0>();
      sync_threads();  // the tiles
      fill_score_gradients<map, false>(nullptr, score_gradients, queries, keys, gradients, values,
                                       blockIdx.y == 0 ? minus_delta : nullptr);
      float gradient[4] = {};
      if (!state_is_zero) {
        add_state_gradients<map>(gradient, queries, gradients, shared + tiles.state, shared + tiles.sums,
                                 minus_delta, blockIdx.y == 0, owner);
      }
      sync_threads();
      add_score_gradients<false>(gradient, score_gradients, keys, owner);
      const RowTarget target{
          head_rows<float>(problem.grad_q, block.batch, head, row0), problem.grad_q.row_stride,
          partial_rows(call, call.workspace.query_gradient, block, head, problem.heads, row0),
          affine_sums + (member * (threads / 32) + warp) * affine_size,
          affine_carries<map>(*carries, member)};
      const Norm<float> norm = with_affine(query.at(problem, block.batch, head, row0),
                                           shared + tiles.affine + member * affine_size);
      finish_rows<map>(gradient, shared + tiles.normalized, shared + tiles.deviations, rows, norm, target,
                       owner);
      sync_threads();  // every thread has read the tiles and the state
    }
    if (number + 1 < block.chunk_end) {
      update_state<map, Shape>(shared + tiles.state, shared + tiles.sums, carries, keys, values, nullptr,
                               rows);
      state_is_zero = false;
      sync_threads();
    }
  }
  for (int member = 0; member < group; ++member) {
    float* const partial = affine_partial(call, call.workspace.query_affine, block,
                                          block.kv_head * group + member, problem.heads);
    if (partial) store_affine_sums(partial, affine_sums + member * (threads / 32) * affine_size);
  }
}

template <FeatureMap map>
KERNEL void LAUNCH_BOUNDS(threads, 2) grad_kv_kernel(Call<BackwardProblem> call) {
  using Shape = BackwardShape;
  DYNAMIC_SHARED_MEMORY(float, shared);
  SHARED_MEMORY(float*, carries, 1);
  const BackwardProblem& problem = call.problem;
  const int group = static_cast<int>(group_size(problem));
  const BackwardTiles tiles(map, true, group);
  float* const state = shared + tiles.state;
  float* const sums = shared + tiles.sums;
  float* const queries = shared + tiles.queries;
  float* const keys = shared + tiles.keys;
  float* const values = shared + tiles.values;
  float* const gradients = shared + tiles.gradients;
  float* const scores = shared + tiles.scores;
  float* const score_gradients = shared + tiles.score_gradients;
  float* const minus_delta = shared + tiles.minus_delta;
  float* const affine_sums = shared + tiles.affine_sums;
  const Block block(call);
  const Features<float> features = make_features<map>(problem);
  const HeadNorm<float> key = key_norm<float>(call);
  const RowOwner owner;
  const OutputTile<Shape> tile(static_cast<int>(threadIdx.x));
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32;
  const int columns_left = static_cast<int>(problem.head_dim) - first_column();
  const bool keep_state = problem.grad_initial_state.kv && block.first_segment();
  bool state_is_zero = block.last_segment() && !given(problem.grad_final_state);

  start_state<map, Shape>(state, sums, call, block, call.workspace.reverse_states, problem.grad_final_state,
                          true);
  load_affine(shared + tiles.affine, problem, block.kv_head);
  for (int n = thread; n < threads / 32 * affine_size; n += threads) affine_sums[n] = 0;
  start_carries(carries, call, block);
  sync_threads();
  for (int64_t number = block.chunk_end - 1; number >= block.chunk_begin; --number) {
    const int64_t row0 = block.row_of(number);
    const int rows = block.rows_of(number);
    const bool update = number > block.chunk_begin || keep_state, read_state = !state_is_zero;
    float gradient[4] = {}, out[4][4] = {};  // of k' and v, over all query heads
    for (int member = 0; member < group; ++member) {
      const int64_t head = block.kv_head * group + member;
      if (member == 0) {
        const float* const v = head_rows<float>(problem.v, block.batch, block.kv_head, row0) + first_column();
        copy_values<Shape>(values, v, problem.v.row_stride, rows, columns_left);
        copy_async_commit();
      }
      load_rows<map>(shared, tiles, true, member == 0, call, block, member, row0, rows, features);
      load_query_gradients(gradients, minus_delta, call, block, head, row0, rows, columns_left);
      if (member == 0) copy_async_wait<0>();
      sync_threads();  // the tiles
      fill_score_gradients<map, true>(scores, score_gradients, keys, queries, values, gradients,
                                      blockIdx.y == 0 ? minus_delta : nullptr);
      if (member == 0 && read_state) {
        add_state_gradients<map>(gradient, keys, values, state, sums, nullptr, blockIdx.y == 0, owner);
        query_state<map, Shape>(out, keys + tile.token, state + tile.column);
      }
      sync_threads();
      add_score_gradients<true>(gradient, score_gradients, queries, owner);
      NO_UNROLL for (int begin = tile.token / 16 * 16; begin < Shape::chunk; begin += 4) {
        UNROLL for (int other = begin; other < begin + 4; ++other) {
          float weights[4], value[4];
          load_floats(weights, scores + other * BackwardTiles::score_stride + tile.token);
          load_floats(value, gradients + other * Shape::value_stride + tile.column);
          add_outer(out, weights, value);
        }
      }
      if (update) {
        update_state<map, Shape>(state, sums, carries, queries, gradients, minus_delta, rows);
        state_is_zero = false;
      }
      sync_threads();  // every thread has read the tiles
    }
    float* const grad_v = head_rows<float>(problem.grad_v, block.batch, block.kv_head, row0) + first_column();
    UNROLL for (int r = 0; r < 4; ++r) {
      if (tile.token + r >= rows || tile.column >= columns_left) continue;
      store_global(grad_v + (tile.token + r) * problem.grad_v.row_stride + tile.column,
                   float4{out[r][0], out[r][1], out[r][2], out[r][3]});
    }
    const RowTarget target{
        head_rows<float>(problem.grad_k, block.batch, block.kv_head, row0), problem.grad_k.row_stride,
        partial_rows(call, call.workspace.key_gradient, block, block.kv_head, problem.kv_heads, row0),
        affine_sums + warp * affine_size, affine_carries<map>(*carries, 0)};
    const Norm<float> norm = with_affine(key.at(problem, block.batch, block.kv_head, row0),
                                         shared + tiles.affine + group * affine_size);
    finish_rows<map>(gradient, shared + tiles.normalized, shared + tiles.deviations, rows, norm, target,
                     owner);
    sync_threads();  // the rows' tiles are read
  }
  float* const partial =
      affine_partial(call, call.workspace.key_affine, block, block.kv_head, problem.kv_heads);
  if (partial) store_affine_sums(partial, affine_sums);
  if (keep_state) {
    const int64_t index = block.state_index() * state_features(map);
    float* const grad_sums = static_cast<float*>(problem.grad_initial_state.k);
    store_state<map, Shape>(state, sums,
                            static_cast<float*>(problem.grad_initial_state.kv) + index * problem.head_dim,
                            blockIdx.y == 0 && grad_sums ? grad_sums + index : nullptr,
                            static_cast<int>(problem.head_dim), true, features);
  }
}

// T and M of each segment but the first by themselves, into the slot of the segment before.
template <FeatureMap map>
KERNEL void LAUNCH_BOUNDS(threads, 2) reverse_segment_states(Call<BackwardProblem> call) {
  using Shape = BackwardShape;
  constexpr StateTiles<Shape> tiles(map, 1);
  DYNAMIC_SHARED_MEMORY(float, shared);
  SHARED_MEMORY(float*, carries, 1);
  float* const queries = shared + tiles.features;
  float* const gradients = shared + tiles.values;
  float* const minus_delta = shared + tiles.extra;
  const BackwardProblem& problem = call.problem;
  const Block block(call);
  if (block.first_segment()) return;
  const Features<float> features = make_features<map>(problem);
  const HeadNorm<float> query = query_norm(call, features);
  const int token = static_cast<int>(threadIdx.x), group = static_cast<int>(group_size(problem));
  const int columns_left = static_cast<int>(problem.head_dim) - first_column();

  float* const affine = shared + tiles.affine;
  for (int n = token; n < tiles.features; n += threads) shared[n] = 0;
  load_affine(affine, problem, block.kv_head);
  start_carries(carries, call, block);
  sync_threads();
  for (int64_t number = block.chunk_begin; number < block.chunk_end; ++number) {
    const int64_t row0 = block.row_of(number);
    const int rows = block.rows_of(number);
    for (int member = 0; member < group; ++member) {
      const int64_t head = block.kv_head * group + member;
      if (token < Shape::chunk) {
        const float* const q = head_rows<float>(problem.q, block.batch, head, row0 + token);
        load_feature_row<map, Shape>(
            queries, nullptr, token, q, token < rows, features,
            with_affine(query.at(problem, block.batch, head, row0), affine + member * affine_size));
      }
      load_query_gradients(gradients, minus_delta, call, block, head, row0, rows, columns_left);
      sync_threads();
      update_state<map, Shape>(shared + tiles.state, shared + tiles.sums, carries, queries, gradients,
                               minus_delta, rows);
      sync_threads();
    }
  }
  const int head_dim = static_cast<int>(problem.head_dim);
  float* const slot =
      call.template region<float>(call.workspace.reverse_states) + (block.index - 1) * call.tiles.slot_size();
  store_state<map, Shape>(shared + tiles.state, shared + tiles.sums, slot,
                          blockIdx.y == 0 ? slot + call.tiles.padded_features * head_dim : nullptr, head_dim,
                          false, features);
}

}  // namespace rebased::REBASED_BACKEND::float32_path
