// The states of segments in the workspace, for the maps whose score is a polynomial of q'.k'; their sums in
// the order of the segments, and their way from and to the public form of a state.
//
// A slot is a plain matrix, so that a kernel can read it in any order of features, and then a few sums:
//   rows    (rows, 64): for each product x_i x_((i + e) mod d) the sum over tokens of it times v^T, in the
//           public order: d rows for each offset e below d/2 and d/2 rows for e = d/2, so that each product
//           stands once and without a weight. For taylor then d rows of sums of k' v^T, and one of v^T. A
//           slot belongs to one column group; columns past head_dim hold zeros.
//   gram    (d, d): Z, the sum of k' k'^T
//   linear  (d) of taylor: the sum of k';  count, of taylor: the number of keys
// Slots are numbered as Span::slot says: (sequence, kv head, segment, column group).
//
// The reverse state has the same form: rows are T, with the weights of the query side, so that they are the
// gradient of the public state as it is. M stands in the place of Z and weighs nothing: the public gradient
// of a product off the diagonal, which Z has twice, is twice that of M, and taylor's a2 halves all of it.
#pragma once

#include "cuda/device/load_ahead.cuh"
#include "cuda/tensor_core/rows.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::polynomial {

template <FeatureMap feature_map, int dim>
struct Slot {
  static_assert(is_polynomial(feature_map) && dim % 8 == 0);
  static constexpr FeatureMap map = feature_map;
  static constexpr int feature_dim = dim;
  static constexpr bool taylor = map == FeatureMap::taylor;
  // rows of the matrix: where the half slab begins, taylor's sums of k' v^T, its sum of v^T, and the end
  static constexpr int half_row = dim * dim / 2, linear_row = half_row + dim / 2,
                       constant_row = linear_row + dim, rows = linear_row + (taylor ? dim + 1 : 0);
  // offsets in floats
  static constexpr int gram = rows * columns, linear = gram + dim * dim, count = linear + dim;
  static constexpr int size = static_cast<int>(polynomial_slot_floats(map, dim));
  static constexpr int used = taylor ? count + 1 : linear;  // the floats behind these are padding
  static_assert(used <= size && size % 4 == 0);

  // The public number of a row, and of the product x_i x_j.
  HOST_DEVICE static constexpr int public_feature(int row) {
    return !taylor ? row : row < linear_row ? 1 + dim + row : row < constant_row ? 1 + row - linear_row : 0;
  }
  HOST_DEVICE static constexpr int public_product(int i, int j) {
    const int offset = (j - i + dim) % dim;
    return public_feature(offset < dim / 2    ? dim * offset + i
                          : offset == dim / 2 ? dim * offset + (i < j ? i : j)
                                              : dim * (dim - offset) + j);
  }
  // Whether the public order has x_i x_j, and not x_j x_i in its place.
  HOST_DEVICE static constexpr bool is_public_product(int i, int j) {
    const int offset = (j - i + dim) % dim;
    return i < dim && (offset < dim / 2 || (offset == dim / 2 && i < j));
  }
  // By what an entry of the public gradient is multiplied to become that of M.
  HOST_DEVICE static constexpr float gram_weight(int i, int j, bool gradient) {
    return !gradient ? 1.0f : (taylor ? 2.0f : 1.0f) * (i == j ? 1.0f : 0.5f);
  }
};

// ---- slots to fragments and back ----

// Calls visit(slot) for each slot of the sum that a block begins with. Where scan_kernel has run that is the
// block's own slot. Otherwise these are the slots of the segments before its own, or in `reverse` of those
// behind it, in the order in which scan_kernel adds them, so that sums have the same bits.
template <class S, class AnyProblem, class Visit>
DEVICE void visit_start(const Arguments<AnyProblem>& arguments, const Span& span, bool reverse,
                        const Visit& visit) {
  if (!arguments.slots) return;
  const int step = reverse ? -1 : 1;
  const int first = reverse ? arguments.launch.segments - 1 : 0;
  const int end = arguments.scanned ? span.segment + step : span.segment;
  NO_UNROLL for (int segment = arguments.scanned ? span.segment : first; segment != end; segment += step) {
    visit(arguments.slots +
          (span.slot + (segment - span.segment) * static_cast<int64_t>(gridDim.y)) * S::size);
  }
}

// Adds to a C fragment the first `rows` rows, at most 16, of a row-major matrix that begins at `place`.
template <int stride>
DEVICE void add_tile(float (&c)[4], const float* place, int rows, const Lane& lane) {
  const float* const own = place + lane.group * stride + 2 * lane.pair;
  UNROLL for (int half = 0; half < 2; ++half) {
    if (lane.group + 8 * half >= rows) continue;
    const float2 pair = load_global<float2>(own + 8 * half * stride);
    c[2 * half] += pair.x, c[2 * half + 1] += pair.y;
  }
}

// Stores a C fragment so that add_tile finds it again.
template <int stride>
DEVICE void store_tile(float* place, const float (&c)[4], int rows, const Lane& lane) {
  float* const own = place + lane.group * stride + 2 * lane.pair;
  UNROLL for (int half = 0; half < 2; ++half) {
    if (lane.group + 8 * half < rows)
      store_global(own + 8 * half * stride, float2{c[2 * half], c[2 * half + 1]});
  }
}

// ---- sums over segments ----

// Entry `index` of the slot of column group `group`, from the public state, or the gradient of a state, of
// one kv head.
template <class S>
DEVICE float public_entry(const float* kv, const float* k, int index, int group, int64_t head_dim,
                          bool gradient) {
  if (index < S::gram) {
    const int64_t column = columns * group + index % columns;
    return column < head_dim ? kv[S::public_feature(index / columns) * head_dim + column] : 0.0f;
  }
  if (index < S::linear) {
    const int i = (index - S::gram) / S::feature_dim, j = (index - S::gram) % S::feature_dim;
    return k[S::public_product(i, j)] * S::gram_weight(i, j, gradient);
  }
  return k[index < S::count ? 1 + index - S::linear : 0];
}

constexpr int scan_threads = 256;

// Makes the states that the segments start from. Before, the slot of each segment holds the sums of its own
// rows; the slot of the last segment, in the order of the scan, holds nothing. Afterwards a slot holds the
// sums over all segments before its own, from the initial state on. For the reverse state the order is
// reversed. One thread takes one float of all slots. grid (num_sequences * kv_heads, blocks of slot entries,
// column groups)
template <class S>
KERNEL void LAUNCH_BOUNDS(scan_threads, 1)
    scan_kernel(float* slots, int segments, ConstState start, int64_t head_dim, bool reverse) {
  const int index = static_cast<int>(blockIdx.y * scan_threads + threadIdx.x),
            group = static_cast<int>(blockIdx.z);
  if (index >= S::used) return;
  const int64_t head = blockIdx.x;
  float sum = 0;
  // the gradients of the Gram matrix and of the other sums count once, not once for each column group
  if (start.kv && !(reverse && group > 0 && index >= S::gram)) {
    sum =
        public_entry<S>(static_cast<const float*>(start.kv) + head * S::rows * head_dim,
                        static_cast<const float*>(start.k) + head * S::rows, index, group, head_dim, reverse);
  }
  const int64_t step = static_cast<int64_t>(gridDim.z) * S::size;
  float* const first = slots + (head * segments * gridDim.z + group) * S::size + index;
  float* const last = first + (segments - 1) * step;
  visit_ahead(reverse ? last : first, reverse ? -step : step, segments - 1, [&](float* entry, float own) {
    *entry = sum;
    sum += own;
  });
  *(reverse ? first : last) = sum;
}

// Writes the public state, or the gradient of a state, of each kv head: the sum of the slots of its segments.
// The denominator's terms of a gradient differ from one column group to the next, and are summed over the
// groups. Those of a state are the same in all groups. The grid is that of scan_kernel.
template <class S>
KERNEL void LAUNCH_BOUNDS(scan_threads, 1)
    sum_slots_kernel(const float* slots, int segments, float* kv, float* k, int64_t head_dim, bool gradient) {
  const int index = static_cast<int>(blockIdx.y * scan_threads + threadIdx.x),
            group = static_cast<int>(blockIdx.z), groups = static_cast<int>(gridDim.z);
  if (index >= S::used) return;
  const int64_t head = blockIdx.x;
  const auto sum_of = [&](int of_group) {
    const int64_t step = static_cast<int64_t>(groups) * S::size;
    const float* const first = slots + (head * segments * groups + of_group) * S::size + index;
    float sum = 0;
    visit_ahead(gradient ? first + (segments - 1) * step : first, gradient ? -step : step, segments,
                [&](const float*, float own) { sum += own; });
    return sum;
  };
  if (index < S::gram) {
    const int64_t column = columns * group + index % columns;
    if (column < head_dim) {
      kv[(head * S::rows + S::public_feature(index / columns)) * head_dim + column] = sum_of(group);
    }
    return;
  }
  int feature = index < S::count ? 1 + index - S::linear : 0;
  float weight = 1;
  if (index < S::linear) {  // of the two equal products, the one that the public order has
    const int i = (index - S::gram) / S::feature_dim, j = (index - S::gram) % S::feature_dim;
    if (!S::is_public_product(i, j)) return;
    feature = S::public_product(i, j);
    weight = 1.0f / S::gram_weight(i, j, gradient);
  }
  if (group > 0) return;
  float sum = sum_of(0);
  for (int other = 1; gradient && other < groups; ++other) sum += sum_of(other);
  k[head * S::rows + feature] = sum * weight;
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::polynomial
