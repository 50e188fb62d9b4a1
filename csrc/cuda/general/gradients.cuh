// Gradients of one chunk's rows with respect to what their features are made of, and from there back through
// the map, the affine and LayerNorm; for queries and keys alike.
//
//   through scores  grad x_a += sum over others of score_gradients[other] other_x_a
//   through states  g_f = weight(f) (sum_c state[f][c] value_c + sum_f extra), then the product rule: entry
//                   (first, second) adds g_f x_second to grad x_first and g_f x_first to grad x_second
#pragma once

#include "cuda/general/block.cuh"

namespace rebased::REBASED_BACKEND {

// A thread's unit here: four consecutive rows of one feature index a. body(a, row).
template <class A, class Body>
DEVICE void for_each_gradient(const Tiles<A>& tiles, const Body& body) {
  const int groups = tiles.plan.chunk / 4;
  for (int unit = threadIdx.x; unit < groups * tiles.features.dim; unit += blockDim.x) {
    body(unit / groups, unit % groups * 4);
  }
}

template <class A>
DEVICE void clear_gradients(const Tiles<A>& tiles) {
  for_each_gradient(tiles, [&](int a, int row) {
    store_quad(tiles.at(tiles.plan.row_gradient) + a * tiles.plan.row_stride + row, Quad<A>{});
  });
}

template <class A>
DEVICE void add_score_gradients(const Tiles<A>& tiles, const Reach& reach) {
  const GeneralTiles& plan = tiles.plan;
  const int stride = plan.row_stride;
  for_each_gradient(tiles, [&](int a, int row) {
    A* const target = tiles.at(plan.row_gradient) + a * stride + row;
    const A* const weights = tiles.at(plan.score_gradients) + row;
    const A* const other_x = tiles.at(plan.other_features) + a * stride;
    Quad<A> sum = load_quad(target);
    const int end = reach.end(row, 4);
    for (int other = reach.begin(row); other < end; other += 4) {  // entries out of reach are zeros
      const Quad<A> x = load_quad(other_x + other);
      UNROLL for (int o = 0; o < 4; ++o) {
        const Quad<A> weight = load_quad(weights + (other + o) * stride);
        UNROLL for (int r = 0; r < 4; ++r) sum.x[r] += weight.x[r] * x.x[o];
      }
    }
    store_quad(target, sum);
  });
}

// feature_gradients[f - begin][row] = g_f of each row, for `count` features from `begin` on, a multiple of 4.
template <class A>
DEVICE void feature_gradients(const Tiles<A>& tiles, int begin, int count) {
  const GeneralTiles& plan = tiles.plan;
  const int lanes = count / 4, units = lanes * (plan.chunk / 4);
  for (int unit = threadIdx.x; unit < units; unit += blockDim.x) {
    // features `lanes` apart, so that lanes with neighbouring features meet no bank twice
    const int lane = unit % lanes, row = unit / lanes * 4;
    const A* const state = tiles.state + static_cast<int64_t>(begin + lane) * plan.value_stride;
    const A* const values = tiles.at(plan.row_values) + row * plan.value_stride;
    A sums[4][4] = {};  // [feature][row]
    for (int column = 0; column < 4 * tiles.quads(); column += 4) {
      Quad<A> value[4];
      UNROLL for (int r = 0; r < 4; ++r) value[r] = load_quad(values + r * plan.value_stride + column);
      UNROLL for (int f = 0; f < 4; ++f) {
        const Quad<A> s = load_quad(state + static_cast<int64_t>(f * lanes) * plan.value_stride + column);
        UNROLL for (int r = 0; r < 4; ++r) {
          UNROLL for (int c = 0; c < 4; ++c) sums[f][r] += s.x[c] * value[r].x[c];
        }
      }
    }
    const Quad<A> extra = load_quad(tiles.vector(plan.row_extra) + row);
    UNROLL for (int f = 0; f < 4; ++f) {
      const int feature = begin + lane + f * lanes;
      const A weight = tiles.features.weight(feature), sum = tiles.state_sums()[feature];
      Quad<A> gradient;
      UNROLL for (int r = 0; r < 4; ++r) gradient.x[r] = weight * (sums[f][r] + sum * extra.x[r]);
      store_quad(tiles.at(plan.feature_gradients) + (lane + f * lanes) * plan.row_stride + row, gradient);
    }
  }
}

// The product rule for the features in feature_gradients.
template <class A>
DEVICE void gather_feature_gradients(const Tiles<A>& tiles, int begin, int count) {
  const GeneralTiles& plan = tiles.plan;
  const Features<A>& features = tiles.features;
  const int stride = plan.row_stride, dim = features.dim;
  const int end = minimum(begin + count, features.count);
  for_each_gradient(tiles, [&](int a, int row) {
    A* const target = tiles.at(plan.row_gradient) + a * stride + row;
    const A* const gradients = tiles.at(plan.feature_gradients) + row;
    const A* const x = tiles.at(plan.row_features) + row;
    Quad<A> sum = load_quad(target);
    const auto add = [&](int feature, int factor) {
      if (feature < begin || feature >= end) return;
      const Quad<A> gradient = load_quad(gradients + (feature - begin) * stride);
      const Quad<A> other = load_quad(x + factor * stride);
      UNROLL for (int r = 0; r < 4; ++r) sum.x[r] += gradient.x[r] * other.x[r];
    };
    const int linear = features.linear_begin + a;
    if (linear < features.circulant_begin) add(linear, dim);
    if (end > features.circulant_begin) {
      const int first_offset = maximum(begin - features.circulant_begin, 0) / dim;
      const int last_offset = (end - 1 - features.circulant_begin) / dim;
      for (int offset = first_offset; offset <= last_offset; ++offset) {
        const int slab = features.circulant_begin + offset * dim;
        const int next = a + offset < dim ? a + offset : a + offset - dim;
        const int previous = a >= offset ? a - offset : a - offset + dim;
        add(slab + a, next);
        add(slab + previous, previous);
      }
    }
    store_quad(target, sum);
  });
}

// The part of grad x that comes through the state. Holds barriers; the tiles it reads must be in place, and
// after it one more is due before the feature gradients' place is used again.
template <class A>
DEVICE void add_state_gradients(const Tiles<A>& tiles) {
  const int padded = tiles.plan.padded_features;
  for (int begin = 0; begin < padded; begin += tiles.plan.gradient_features) {
    const int count = minimum(tiles.plan.gradient_features, padded - begin);
    if (begin > 0) sync_threads();
    feature_gradients(tiles, begin, count);
    sync_threads();
    gather_feature_gradients(tiles, begin, count);
  }
}

// Turns row_gradient into the gradient of the rows before LayerNorm and stores it, and adds the chunk's part
// of the gradients of gamma and beta to affine (2, dim), if given, which only this block writes; `member` is
// the query head's number in its group, 0 for keys. "token" LayerNorm stops after the affine's output: that
// goes to `unfinished` (rows, dim). Holds one barrier; one more is due before the tiles are used again.
template <class E, class A>
DEVICE void finish_gradients(const Tiles<A>& tiles, int rows, const Norm<A>& norm, E* target,
                             int64_t target_stride, A* unfinished, A* affine, int member) {
  const GeneralTiles& plan = tiles.plan;
  const int stride = plan.row_stride, dim = tiles.features.dim;
  A* const gradient = tiles.at(plan.row_gradient);
  const A* const normalized = tiles.at(plan.row_normalized);
  for (int row = threadIdx.x; row < rows; row += blockDim.x) {
    A sum = 0, dot = 0;
    for (int a = 0; a < dim; ++a) {
      const A x = normalized[a * stride + row];
      const A value = gradient[a * stride + row] * tiles.features.derivative(norm.affine(x, a), norm.scale);
      gradient[a * stride + row] = value;
      const A h = norm.gamma ? norm.gamma[a] * value : value;
      sum += h;
      dot += h * x;
    }
    tiles.vector(plan.row_sum)[row] = sum / dim;
    tiles.vector(plan.row_dot)[row] = dot / dim;
  }
  sync_threads();
  for (int index = threadIdx.x; index < rows * dim; index += blockDim.x) {
    const int row = index / dim, a = index - row * dim;
    const A value = gradient[a * stride + row];
    if (unfinished) {
      unfinished[index] = value;
    } else {
      A h = norm.gamma ? norm.gamma[a] * value : value;
      if (norm.mode == LayerNorm::head) {
        h = tiles.vector(plan.row_scale)[row] *
            (h - tiles.vector(plan.row_sum)[row] -
             normalized[a * stride + row] * tiles.vector(plan.row_dot)[row]);
      }
      target[row * target_stride + a] = convert<E>(h);
    }
  }
  for (int a = threadIdx.x; affine && a < dim; a += blockDim.x) {
    A gamma = 0, beta = 0;
    for (int row = 0; row < rows; ++row) {
      gamma += gradient[a * stride + row] * normalized[a * stride + row];
      beta += gradient[a * stride + row];
    }
    if (tiles.carries) {
      A* const carries = tiles.carries + plan.slot_size() + 2 * dim * member;
      add_compensated(affine[a], gamma, carries[a]);
      add_compensated(affine[dim + a], beta, carries[dim + a]);
    } else {
      affine[a] += gamma;
      affine[dim + a] += beta;
    }
  }
}

}  // namespace rebased::REBASED_BACKEND
