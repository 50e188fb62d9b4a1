// What the general path computes with its shared-memory tiles: scores, their products with values, products
// of features with the state, and the state's update. No barriers inside. A thread's unit is a 4 x 4 tile in
// registers.
//
// "Rows" are the tokens whose results are computed, "others" the ones they look at: rows are queries and
// others keys in forward and grad q, the reverse in grad k and grad v.
#pragma once

#include "cuda/general/tiles.cuh"

namespace rebased::REBASED_BACKEND {

// Which pairs of a chunk of rows and a chunk of others count: others up to the row's own token, or from it on
// when `later`; the chunks begin `distance` tokens apart and hold `rows` and `others` tokens.
struct Reach {
  bool later;
  int64_t distance;  // a multiple of the chunk, >= 0
  int rows, others;

  DEVICE bool contains(int row, int other) const {
    return (later ? other + distance >= row : other <= row + distance) && row < rows && other < others;
  }
  // The others that any of `count` rows from `row` on, a multiple of 4, can reach.
  DEVICE int begin(int row) const { return later && distance == 0 ? row : 0; }
  DEVICE int end(int row, int count) const {
    return !later && distance == 0 ? minimum(row + count, others) : others;
  }
};

// scores[other][row] = sim(row, other) where `other` is in reach of `row`, else 0; and with `gradient`
// score_gradients[other][row] = (their values' product + their extras' product) d sim / d u.
template <bool gradient, class A>
DEVICE void score_tiles(const Tiles<A>& tiles, const Reach& reach, bool keep_scores) {
  const GeneralTiles& plan = tiles.plan;
  const int side = plan.chunk >> 2, stride = plan.row_stride;
  const A* const row_x = tiles.at(plan.row_features);
  const A* const other_x = tiles.at(plan.other_features);
  for (int tile = threadIdx.x; tile < side * side; tile += blockDim.x) {
    // four consecutive rows; others `side` apart, so that lanes with neighbouring others meet no bank twice
    const int row = tile / side * 4, other = tile % side;
    A u[4][4] = {};  // [other][row]
    for (int i = 0; i < tiles.features.dim; ++i) {
      const Quad<A> x = load_quad(row_x + i * stride + row);
      UNROLL for (int o = 0; o < 4; ++o) {
        const A y = other_x[i * stride + other + o * side];
        UNROLL for (int r = 0; r < 4; ++r) u[o][r] += y * x.x[r];
      }
    }
    A c[4][4] = {};
    if constexpr (gradient) {
      const A* const row_values = tiles.at(plan.row_values) + row * plan.value_stride;
      const A* const other_values = tiles.at(plan.other_values) + other * plan.value_stride;
      for (int column = 0; column < 4 * tiles.quads(); column += 4) {
        Quad<A> x[4];
        UNROLL for (int r = 0; r < 4; ++r) x[r] = load_quad(row_values + r * plan.value_stride + column);
        UNROLL for (int o = 0; o < 4; ++o) {
          const Quad<A> y = load_quad(other_values + o * side * plan.value_stride + column);
          UNROLL for (int r = 0; r < 4; ++r) {
            UNROLL for (int n = 0; n < 4; ++n) c[o][r] += x[r].x[n] * y.x[n];
          }
        }
      }
    }
    UNROLL for (int o = 0; o < 4; ++o) {
      const int o_row = other + o * side;
      Quad<A> score, weight;
      UNROLL for (int r = 0; r < 4; ++r) {
        const bool in_reach = reach.contains(row + r, o_row);
        score.x[r] = in_reach ? tiles.features.score(u[o][r]) : A(0);
        if constexpr (gradient) {
          const A sum =
              c[o][r] + tiles.vector(plan.row_extra)[row + r] * tiles.vector(plan.other_extra)[o_row];
          weight.x[r] = in_reach ? sum * tiles.features.score_derivative(u[o][r]) : A(0);
        }
      }
      if (keep_scores) store_quad(tiles.at(plan.scores) + o_row * stride + row, score);
      if constexpr (gradient) store_quad(tiles.at(plan.score_gradients) + o_row * stride + row, weight);
    }
  }
}

// sums[r][c] += sum over others of scores[other][row + r] other_values[other][column + c]
template <class A>
DEVICE void add_scored_values(A (&sums)[4][4], const Tiles<A>& tiles, int row, int column,
                              const Reach& reach) {
  const GeneralTiles& plan = tiles.plan;
  const A* const scores = tiles.at(plan.scores) + row;
  const A* const values = tiles.at(plan.other_values) + column;
  const int end = reach.end(row, 4);
  for (int other = reach.begin(row); other < end; ++other) {
    const Quad<A> score = load_quad(scores + other * plan.row_stride);
    const Quad<A> value = load_quad(values + other * plan.value_stride);
    UNROLL for (int r = 0; r < 4; ++r) {
      UNROLL for (int n = 0; n < 4; ++n) sums[r][n] += score.x[r] * value.x[n];
    }
  }
}

// sums[r][c] += sum_f weight(f) phi_f(x_{row + r}) state[f][column + c]. Off-diagonal entries come first, so
// that the weights are factors of the sums. Call with sums = 0.
template <class A>
DEVICE void query_state(A (&sums)[4][4], const Tiles<A>& tiles, int row, int column) {
  const GeneralTiles& plan = tiles.plan;
  const Features<A>& features = tiles.features;
  const int stride = plan.row_stride;
  const A* const x = tiles.at(plan.row_features) + row;
  const A* const state = tiles.state + column;
  const auto add_run = [&](int feature, int first, int second, int length) {
    const A* s = state + static_cast<int64_t>(feature) * plan.value_stride;
    const A* x_first = x + first * stride;
    const A* x_second = x + second * stride;
    for (int n = 0; n < length; ++n) {
      const Quad<A> a = load_quad(x_first), b = load_quad(x_second), value = load_quad(s);
      UNROLL for (int r = 0; r < 4; ++r) {
        const A phi = a.x[r] * b.x[r];
        UNROLL for (int c = 0; c < 4; ++c) sums[r][c] += phi * value.x[c];
      }
      x_first += stride, x_second += stride, s += plan.value_stride;
    }
  };
  const auto scale = [&](A factor) {
    UNROLL for (int r = 0; r < 4; ++r) { UNROLL for (int c = 0; c < 4; ++c) sums[r][c] *= factor; }
  };
  if (features.circulant_begin < features.count) {
    features.for_each_run(1, features.dim, add_run);
    scale(2);
    features.for_each_run(0, 1, add_run);
    scale(features.quadratic);
  }
  for (int f = features.linear_begin; f < features.circulant_begin; ++f) {
    const Quad<A> a = load_quad(x + (f - features.linear_begin) * stride);
    const Quad<A> value = load_quad(state + static_cast<int64_t>(f) * plan.value_stride);
    UNROLL for (int r = 0; r < 4; ++r) {
      UNROLL for (int c = 0; c < 4; ++c) sums[r][c] += a.x[r] * value.x[c];
    }
  }
  if (features.linear_begin > 0) {
    const Quad<A> value = load_quad(state);
    UNROLL for (int r = 0; r < 4; ++r) { UNROLL for (int c = 0; c < 4; ++c) sums[r][c] += value.x[c]; }
  }
}

// Parts that a row's denominator is summed in: whole chunks of threads make one each, and the threads that
// are left over none.
DEVICE int denominator_part_count(const GeneralTiles& plan) { return plan.threads / plan.chunk; }

// thread_vector = parts of the rows' denominators: part p of row `row` is entry p chunk + row. The rows'
// scores and, with `with_state`, their features against the state's sums. Added to what is there when
// `accumulate`.
template <class A>
DEVICE void denominator_parts(const Tiles<A>& tiles, const Reach& reach, bool with_state, bool accumulate) {
  const GeneralTiles& plan = tiles.plan;
  const Features<A>& features = tiles.features;
  const int parts = denominator_part_count(plan), stride = plan.row_stride;
  const int row = threadIdx.x % plan.chunk, part = threadIdx.x / plan.chunk;
  if (part >= parts) return;
  A sum = 0;
  if (with_state) {
    const A* const x = tiles.at(plan.row_features) + row;
    const A* const sums = tiles.state_sums();
    const auto add_run = [&](int feature, int first, int second, int length) {
      for (int n = part; n < length; n += parts) {
        sum += x[(first + n) * stride] * x[(second + n) * stride] * sums[feature + n];
      }
    };
    features.for_each_run(1, features.dim, add_run);
    sum *= 2;
    features.for_each_run(0, 1, add_run);
    sum *= features.quadratic;
    for (int f = features.linear_begin + part; f < features.circulant_begin; f += parts) {
      sum += x[(f - features.linear_begin) * stride] * sums[f];
    }
    if (features.linear_begin > 0 && part == 0) sum += sums[0];
  }
  const int end = reach.end(row, 1);
  for (int other = part; other < end; other += parts) sum += tiles.at(plan.scores)[other * stride + row];
  A* const target = tiles.thread_vector() + threadIdx.x;
  *target = accumulate ? *target + sum : sum;
}

// state[f][c] += sum_j phi_f(x_j) values[j][c], and the sums += sum_j phi_f(x_j) extra[j]. A chunk is summed
// from zero, so that the state is rounded once a chunk, and not once a token.
template <class A>
DEVICE void update_state(const Tiles<A>& tiles, int rows) {
  const GeneralTiles& plan = tiles.plan;
  const int stride = plan.row_stride, quads = tiles.quads();
  const A* const x = tiles.at(plan.other_features);
  const A* const values = tiles.at(plan.other_values);
  const A* const extra = tiles.vector(plan.other_extra);
  for (int tile = threadIdx.x; tile < plan.padded_features / 4 * quads; tile += blockDim.x) {
    const int feature = tile / quads * 4, column = (tile - tile / quads * quads) * 4;
    A* const state = tiles.state + static_cast<int64_t>(feature) * plan.value_stride + column;
    A sums[4][4] = {};
    const A *first[4], *second[4];
    UNROLL for (int f = 0; f < 4; ++f) {
      const auto pair = tiles.features.pair(feature + f);
      first[f] = x + pair.first * stride;
      second[f] = x + pair.second * stride;
    }
    for (int row = 0; row < rows; row += 4) {  // rows past the end are zeros
      Quad<A> value[4];
      UNROLL for (int r = 0; r < 4; ++r) value[r] =
          load_quad(values + (row + r) * plan.value_stride + column);
      UNROLL for (int f = 0; f < 4; ++f) {
        const Quad<A> a = load_quad(first[f] + row), b = load_quad(second[f] + row);
        UNROLL for (int r = 0; r < 4; ++r) {
          const A phi = a.x[r] * b.x[r];
          UNROLL for (int c = 0; c < 4; ++c) sums[f][c] += phi * value[r].x[c];
        }
      }
    }
    A total[4][4];
    load_tile(total, state, plan.value_stride);
    if (tiles.carries) {
      A carry[4][4];
      A* const carries = tiles.carries + (state - tiles.state);
      load_tile(carry, carries, plan.value_stride);
      UNROLL for (int f = 0; f < 4; ++f) {
        UNROLL for (int c = 0; c < 4; ++c) add_compensated(total[f][c], sums[f][c], carry[f][c]);
      }
      store_tile(carries, plan.value_stride, carry);
    } else {
      UNROLL for (int f = 0; f < 4; ++f) { UNROLL for (int c = 0; c < 4; ++c) total[f][c] += sums[f][c]; }
    }
    store_tile(state, plan.value_stride, total);
  }
  for (int f = threadIdx.x; f < tiles.features.count; f += blockDim.x) {
    const auto pair = tiles.features.pair(f);
    A sum = 0;
    for (int row = 0; row < rows; ++row) {
      sum += x[pair.first * stride + row] * x[pair.second * stride + row] * extra[row];
    }
    A& total = tiles.state_sums()[f];
    if (tiles.carries) {
      add_compensated(total, sum, tiles.carries[&total - tiles.state]);
    } else {
      total += sum;
    }
  }
}

}  // namespace rebased::REBASED_BACKEND
