// The reverse state of the tensor-core backward: T, the sum of phi(q') ghat^T, and M, the negative sum of
// delta q' q'^T, over all later rows, where ghat is r grad y and delta is ghat . y. This file has what a
// chunk adds to the reverse state, how float16 would hold numbers as small as r, and the kernel that sums the
// rows of each segment alone.
#pragma once

#include "cuda/tensor_core/sweep.cuh"

namespace rebased::REBASED_BACKEND::tensor_core {

// What a step needs to know of each of its 64 query rows, in shared memory.
//
// float16 has no room for r grad y, so that r_i is split into m_i and a power of two. Tiles hold m_i grad y.
// sim and c are multiplied by the power and by the chunk's `scale`, which makes them of ordinary size; where
// the chunk is summed for T and M, whose largest terms count, they are multiplied by `sum_scale` in its
// place. In bfloat16 m is r, powers and scales are 1, and minus_delta alone is used.
template <class T>
struct QueryRows {
  float* minus_delta;    // -(m grad y . y), which is -delta in bfloat16
  float* column_scales;  // the power times `scale`
  float* sum_scales;     // the power times `sum_scale`

  DEVICE explicit QueryRows(float* arrays)
      : minus_delta(arrays), column_scales(arrays + chunk), sum_scales(arrays + 2 * chunk) {}
  static constexpr int size = is_bfloat16<T> ? chunk : 3 * chunk;
};

struct ChunkScale {
  float scale, inverse, sum_scale, sum_inverse;
};

DEVICE float power_of_two(float value) { return bit_cast<float>(bit_cast<uint32_t>(value) & 0x7f800000u); }
DEVICE float inverse_power(float power) { return bit_cast<float>((254u << 23) - bit_cast<uint32_t>(power)); }

// The scales of a chunk, from r of its rows. The smallest r sets `scale`, since r of a first token may be
// anything; the largest sets `sum_scale`.
template <class T>
DEVICE ChunkScale chunk_scale(const float* r, int rows, const Lane& lane) {
  if constexpr (is_bfloat16<T>) {
    return {1.0f, 1.0f, 1.0f, 1.0f};
  } else {
    float largest = 1e-18f, smallest = 1e18f;
    UNROLL for (int i = 0; i < chunk; i += 32) {
      if (lane.lane + i >= rows) continue;
      const float value = fabsf(r[lane.lane + i]);
      largest = maximum(largest, value);
      smallest = minimum(smallest, maximum(value, 1e-18f));
    }
    largest = minimum(warp_maximum(largest), 1e18f);
    UNROLL for (int distance = 1; distance < 32; distance *= 2) {
      smallest = minimum(smallest, shuffle_xor(smallest, distance));
    }
    const float scale = inverse_power(16.0f * power_of_two(smallest));
    const float sum_scale = minimum(scale, 64.0f * inverse_power(power_of_two(largest)));
    return {scale, inverse_power(scale), sum_scale, inverse_power(sum_scale)};
  }
}

// Turns a tile of grad y into ghat = r grad y in place (for float16 into m grad y, see QueryRows). Writes
// grad y . y, or 0 where the op does not normalise, to `delta` in global memory unless it is null. Eight
// lanes share a row, and the rows of a warp follow each other.
template <class T, int block_threads = threads>
DEVICE void scale_gradients(T* gradients, const T* y, const float* r, const QueryRows<T>& rows,
                            const ChunkScale& scales, float* delta, int rows_left, bool normalize) {
  constexpr int units = columns / 8, step = 32 / units, warp_rows = chunk / (block_threads / 32);
  const int unit = static_cast<int>(threadIdx.x % units);
  const int first =
      static_cast<int>(threadIdx.x / 32) * warp_rows + static_cast<int>(threadIdx.x) % 32 / units;
  float own_dot = 0;
  UNROLL for (int i = 0; i < warp_rows / step; ++i) {
    const int token = first + step * i, offset = value_offset(token, 8 * unit);
    const uint4 g = load_shared<uint4>(gradients + offset), other = load_shared<uint4>(y + offset);
    const uint32_t words[4] = {g.x, g.y, g.z, g.w}, others[4] = {other.x, other.y, other.z, other.w};
    uint32_t scaled[4];
    float factor = r[token], power = 1.0f;  // r of padded rows is 0
    if (!is_bfloat16<T> && factor != 0.0f) {
      power = power_of_two(factor);
      factor *= inverse_power(power);
    }
    float dot = 0;
    UNROLL for (int j = 0; j < 4; ++j) {
      const float2 a = unpack<T>(words[j]), b = unpack<T>(others[j]);
      dot += a.x * b.x + a.y * b.y;
      scaled[j] = pack<T>(factor * a.x, factor * a.y);
    }
    store_shared(gradients + offset, uint4{scaled[0], scaled[1], scaled[2], scaled[3]});
    UNROLL for (int distance = 1; distance < units; distance *= 2) dot += shuffle_xor(dot, distance);
    if (!normalize) dot = 0;
    if (unit == 0) {
      rows.minus_delta[token] = -factor * dot;
      if constexpr (!is_bfloat16<T>) {
        rows.column_scales[token] = power * scales.scale;
        rows.sum_scales[token] = power * scales.sum_scale;
      }
    }
    if (unit == i) own_dot = dot;
  }
  // one access for all rows of the warp, which then covers whole sectors
  const int own = first + step * unit;
  if (delta && unit < warp_rows / step && own < rows_left) delta[own] = own_dot;
}

// How add_chunk weighs the queries of a chunk.
template <class T>
DEVICE TokenWeights chunk_weights(const QueryRows<T>& rows, const ChunkScale& scales) {
  return {rows.minus_delta, rows.sum_scales, scales.sum_inverse};
}

// Leaves the reverse sums over the rows of each segment in the segment's slot; those of the first segment
// only where launch.all_segments says so.
template <class T, class S>
KERNEL void LAUNCH_BOUNDS(threads, backward_blocks(false))
    reverse_segment_kernel(Arguments<BackwardProblem> arguments) {
  SHARED_MEMORY(T, gradient_tiles, 2 * chunk * columns);
  SHARED_MEMORY(T, y, chunk * columns);
  SHARED_MEMORY(T, queries, S::feature_tile);
  SHARED_MEMORY(T, row_elements, threads * S::feature_dim);
  SHARED_MEMORY(float2, given_statistics, threads);
  SHARED_MEMORY(float, affine, S::affine_floats);
  SHARED_MEMORY(float, r, chunk);
  SHARED_MEMORY(float, row_floats, QueryRows<T>::size);
  SHARED_MEMORY(float4, sums, S::sums_size);
  SHARED_MEMORY(BackwardOrigins<T>, origins, 1);
  const BackwardProblem& problem = arguments.problem;
  const RowTile<T> row_tile{row_elements, given_statistics};
  const QueryRows<T> query_rows(row_floats);
  const Lane lane;
  if (threadIdx.x == 0) origins->set(arguments);
  sync_threads();
  const Span& span = origins->span;
  if (span.segment == 0 && !arguments.launch.all_segments) return;
  const int group_size = arguments.group_size, rows_end = span.rows;
  const int columns_left = static_cast<int>(problem.head_dim) - first_column();
  load_affine<S>(affine, arguments, span.kv_head);
  State<S> state(sums);
  state.clear();

  const int token = static_cast<int>(threadIdx.x);  // threads 64..127 hold no row
  const auto stage_of = [&](int first, int head) { return (first / chunk * group_size + head) & 1; };
  const auto bring = [&](const auto& step, int first, int head) {
    if (token < chunk) {
      step.template rows<T, S>(row_tile, origins->q + head * problem.q.head_stride, row_stride(problem.q),
                               arguments.pieces.q, origins->query_statistics, first + token, rows_end);
    }
    origins->bring_gradients(step, gradient_tiles + stage_of(first, head) * chunk * columns, y, r, arguments,
                             first, head, rows_end, columns_left);
    step.commit();
  };
  sync_threads();  // affine
  int first = (rows_end + chunk - 1) / chunk * chunk - chunk, head = group_size - 1;
  if (first >= 0) bring(Start(), first, head);
  while (first >= 0) {
    T* const gradients = gradient_tiles + stage_of(first, head) * chunk * columns;
    copy_async_wait<0>();
    if (arguments.pieces.read == 2) bring(Settle(), first, head);
    sync_threads();
    if (token < chunk) {
      store_row<T, S>(queries, token, row_tile, first + token < rows_end, affine + head * S::affine_size,
                      problem.layer_norm, arguments.layer_norm_eps);
    }
    const ChunkScale scales = chunk_scale<T>(r, rows_end - first, lane);
    scale_gradients<T>(gradients, y, r, query_rows, scales, nullptr, 0, problem.normalize);
    if (head == 0) first -= chunk;
    head = head == 0 ? group_size - 1 : head - 1;
    sync_threads();
    if (first >= 0) bring(Start(), first, head);
    add_chunk<T, S, true>(state, queries, gradients, chunk_weights(query_rows, scales), lane);
  }
  store_state(arguments.slots + span.slot * Slot<S>::size, state, lane);
}

}  // namespace rebased::REBASED_BACKEND::tensor_core
