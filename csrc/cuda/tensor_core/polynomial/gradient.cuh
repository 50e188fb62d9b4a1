// Backward of the maps whose score is a polynomial of u = q'.k' (outer, taylor): how a warp holds rows of q'
// or k' and what it makes of the gradient of their features, up to the row's end.
//
// Order of features. A lane holds d / 4 features that lie side by side, of rows g and g + 8 of a tile of 16
// rows: with d = 16 the features 4t .. 4t + 3, with d = 8 the features 2t and 2t + 1. Rounded in pairs these
// numbers are a fragment A of mma if column 8n + 2t + j of a fragment is feature (d / 4) t + 2n + j. All
// fragments that meet such rows have their features in this order. Then x_(a - 1) is in the same lane as x_a
// for all but one of its features, and 8 or 4 bytes a lane are a row in memory.
//
// From a state. G = S g has a number G_(e,a) for the product x_a x_(a + e), and the gradient of x_a is
//   sum over e of G_(e,a) x_(a + e) + G_(e,a - e) x_(a - e)
// with each product once, in which offset 0 counts once: half of J(x)^T G for outer, all of it for taylor.
// The second term takes Horner's rule: from the last offset down, moving by one position at each.
#pragma once

#include <type_traits>

#include "cuda/tensor_core/polynomial/state.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::polynomial {

// What depends on the lane, worked out anew, so that it need not live in registers in between. `warp` is the
// same in all lanes, and the compiler knows.
DEVICE Lane lane_anew(int warp) {
  Lane lane;
  const int thread = thread_index_anew();
  lane.warp = warp, lane.lane = thread & 31, lane.group = lane.lane >> 2, lane.pair = lane.lane & 3;
  return lane;
}

template <class S>
struct Order {
  static constexpr int of_lane = S::feature_dim / 4;  // features of a row that a lane holds
  static constexpr int numbers = 2 * of_lane;         // of rows g and g + 8, those of row g first
  // Which of a lane's numbers is element j of C fragment n.
  HOST_DEVICE static constexpr int place(int n, int j) { return of_lane * (j >> 1) + 2 * n + (j & 1); }
  // The feature in row or column `position` of a fragment, and the row or column of a feature.
  HOST_DEVICE static constexpr int feature(int position) {
    return of_lane * ((position & 7) >> 1) + 2 * (position >> 3) + (position & 1);
  }
  HOST_DEVICE static constexpr int position(int feature) {
    return 8 * (feature % of_lane / 2) + 2 * (feature / of_lane) + (feature & 1);
  }
};

// ---- a lane's part of a row (d) that begins at `row` ----

// Of numbers of type T, in shared memory.
template <class S, class T>
DEVICE void load_features(float (&x)[Order<S>::of_lane], const T* row, const Lane& lane) {
  const T* const place = row + Order<S>::of_lane * lane.pair;
  if constexpr (S::feature_dim == 8) {
    const float2 a = unpack<T>(load_shared<uint32_t>(place));
    x[0] = a.x, x[1] = a.y;
  } else {
    const uint2 raw = load_shared<uint2>(place);
    const float2 a = unpack<T>(raw.x), b = unpack<T>(raw.y);
    x[0] = a.x, x[1] = a.y, x[2] = b.x, x[3] = b.y;
  }
}

// Of gamma and beta as load_affine leaves them.
template <class S>
DEVICE void load_parameters(float (&gamma)[Order<S>::of_lane], float (&beta)[Order<S>::of_lane],
                            const float2* row, const Lane& lane) {
  UNROLL for (int i = 0; i < Order<S>::of_lane; i += 2) {
    const float4 pair = load_shared<float4>(row + Order<S>::of_lane * lane.pair + i);
    gamma[i] = pair.x, beta[i] = pair.y, gamma[i + 1] = pair.z, beta[i + 1] = pair.w;
  }
}

// To global memory, as floats or rounded to T; `piece` as row_piece() has it for the rows.
template <class S, class T>
DEVICE void store_features(T* row, const float (&x)[Order<S>::of_lane], const Lane& lane, int piece = 16) {
  T* const place = row + Order<S>::of_lane * lane.pair;
  if constexpr (std::is_same_v<T, float>) {
    if constexpr (S::feature_dim == 8) {
      store_global(place, float2{x[0], x[1]});
    } else {
      store_global(place, float4{x[0], x[1], x[2], x[3]});
    }
  } else if (piece < 2 * Order<S>::of_lane) {  // counted 0: narrow rows
    UNROLL for (int i = 0; i < Order<S>::of_lane; ++i) place[i] = from_float<T>(x[i]);
  } else if constexpr (S::feature_dim == 8) {
    store_global(place, pack<T>(x[0], x[1]));
  } else {
    store_global(place, uint2{pack<T>(x[0], x[1]), pack<T>(x[2], x[3])});
  }
}

// ---- products over the d features ----

// c += rows b, where rows is a fragment A (16 rows, d) and b a fragment B (d, 8 columns).
template <class T, class S>
DEVICE void multiply_features(float (&c)[4], const uint32_t (&rows)[2 * S::units], const uint32_t* b) {
  if constexpr (S::feature_dim == 8) {
    mma_m16n8k8<T>(c, rows[0], rows[1], b[0]);
  } else {
    mma_m16n8k16<T>(c, rows, b[0], b[1]);
  }
}

// ---- from a state ----

// Brings the sums of the denominator of a state, which are in the natural order of features where it has just
// been started, into the order of features, or back; warp 0.
template <bool back = false, class T, class S>
DEVICE void order_sums(State<T, S>& state, const Lane& lane) {
  const auto from = [](int place) { return back ? Order<S>::position(place) : Order<S>::feature(place); };
  if constexpr (S::feature_dim == 16) {  // with d = 8 the order is the natural one
    float z[S::units][4];
    UNROLL for (int n = 0; n < S::units; ++n) {
      UNROLL for (int j = 0; j < 4; ++j) {
        const int row = from(fragment_row(j, lane)), column = from(fragment_column(n, j, lane));
        const int of_lane = 4 * (row & 7) + (column & 7) / 2;
        z[n][j] = state.gram[(32 * (column >> 3) + of_lane) * 4 + 2 * (row >> 3) + (column & 1)];
      }
    }
    float* const linear = state.gram + StateShape<S>::gram_floats;
    const bool has_linear = lane.lane < StateShape<S>::linear_floats;
    const float sum = has_linear ? linear[from(lane.lane)] : 0.0f;
    sync_warp();
    state.set_gram(z, lane);
    if (has_linear) linear[lane.lane] = sum;
    sync_warp();
  }
}

// product = rows Z, and for taylor with the sum of k' added to each row; gram_terms as publish_state leaves
// them.
template <class T, class S>
DEVICE void multiply_sums(float (&product)[S::own_tiles][S::units][4],
                          const uint32_t (&rows)[S::own_tiles][2 * S::units], const uint32_t* gram_terms,
                          const Lane& lane) {
  UNROLL for (int n = 0; n < S::units; ++n) {
    float2 sum{0, 0};
    if constexpr (S::taylor) {
      sum = load_shared<float2>(gram_terms + StateShape<S>::gram_words + 8 * n + 2 * lane.pair);
    }
    UNROLL for (int o = 0; o < S::own_tiles; ++o) {
      float (&c)[4] = product[o][n];
      c[0] = c[2] = sum.x, c[1] = c[3] = sum.y;
    }
  }
  if constexpr (S::units == 2) {
    UNROLL for (int part = 0; part < 2; ++part) {
      const uint4 b = load_shared<uint4>(gram_terms + 128 * part + 4 * lane.lane);
      UNROLL for (int o = 0; o < S::own_tiles; ++o) {
        mma_m16n8k16<T>(product[o][0], rows[o], b.x, b.y);
        mma_m16n8k16<T>(product[o][1], rows[o], b.z, b.w);
      }
    }
  } else {
    const uint2 b = load_shared<uint2>(gram_terms + 2 * lane.lane);
    UNROLL for (int o = 0; o < S::own_tiles; ++o) {
      mma_m16n8k8<T>(product[o][0], rows[o][0], rows[o][1], b.x);
      mma_m16n8k8<T>(product[o][0], rows[o][0], rows[o][1], b.y);
    }
  }
}

// Of the published state, which has each slab's rows from 8 on and each further slab 32 bytes further down
// with d = 16, so that an ldmatrix of rows in the order of features meets all banks.
template <class S>
constexpr int published_shift = S::feature_dim == 8 ? 0 : tile;

// slab[o] = the gradient of the 16 products (d = 8: of the 8 products) whose rows of the state begin at
// first_row: values (16 tokens, 64 columns) times these rows. `half`: there are half of them, and they come
// twice.
template <class T, class S>
DEVICE void offset_gradient(float (&slab)[S::own_tiles][S::units][4],
                            const uint32_t (&values)[S::own_tiles][columns / tile][4], const T* published,
                            int first_row, bool half, const Lane& lane) {
  UNROLL for (int o = 0; o < S::own_tiles; ++o) {
    UNROLL for (int n = 0; n < S::units; ++n) { UNROLL for (int j = 0; j < 4; ++j) slab[o][n][j] = 0; }
  }
  constexpr int shift = published_shift<S>;
  const int row = lane.lane & 7;
  if constexpr (S::feature_dim == 8) {
    const T* const rows =
        published + published_row<shift>(first_row + (half ? row & 3 : row)) + 8 * (lane.lane >> 3);
    UNROLL for (int i = 0; i < 2; ++i) {
      uint32_t b[4];  // (32 columns, 8 features)
      ldmatrix(b, rows + 32 * i);
      UNROLL for (int o = 0; o < S::own_tiles; ++o) {
        mma_m16n8k16<T>(slab[o][0], values[o][2 * i], b[0], b[1]);
        mma_m16n8k16<T>(slab[o][0], values[o][2 * i + 1], b[2], b[3]);
      }
    }
  } else {
    const int feature = Order<S>::feature(row) + 2 * (lane.lane >> 4);
    const T* const rows = published + published_row<shift>(first_row) +
                          published_row<shift>(half ? feature & 7 : feature) + lane.column_of_halves();
    UNROLL for (int i = 0; i < columns / tile; ++i) {
      uint32_t b[4];  // (16 columns, 16 features)
      ldmatrix(b, rows + tile * i);
      UNROLL for (int o = 0; o < S::own_tiles; ++o) {
        mma_m16n8k16<T>(slab[o][0], values[o][i], b[0], b[1]);
        mma_m16n8k16<T>(slab[o][1], values[o][i], b[2], b[3]);
      }
    }
  }
}

// gradient = what the head of this file says, without taylor's linear features. x are the rows, values the
// rows of 64 columns that the state is multiplied with.
template <class T, class S>
DEVICE void products_gradient(float (&gradient)[S::own_tiles][Order<S>::numbers],
                              const float (&x)[S::own_tiles][Order<S>::numbers],
                              const uint32_t (&values)[S::own_tiles][columns / tile][4], const T* published,
                              const Lane& lane) {
  constexpr int numbers = Order<S>::numbers, of_lane = Order<S>::of_lane, last = S::feature_dim / 2;
  const int previous = (lane.lane & ~3) | ((lane.pair + 3) & 3);
  const auto rotate = [&](float (&y)[numbers]) {  // puts y_(a - 1) in the place of y_a, cyclically
    UNROLL for (int first = 0; first < numbers; first += of_lane) {
      const float from = shuffle(y[first + of_lane - 1], previous);
      UNROLL for (int i = of_lane - 1; i > 0; --i) y[first + i] = y[first + i - 1];
      y[first] = from;
    }
  };
  float other[S::own_tiles][numbers], moved[S::own_tiles][numbers];  // x_(a + e), the sum of the second terms
  UNROLL for (int o = 0; o < S::own_tiles; ++o) {
    UNROLL for (int i = 0; i < numbers; ++i) {
      other[o][i] = shuffle_xor(x[o][i], 2);  // x_(a + d / 2)
      moved[o][i] = 0;
    }
  }
  UNROLL for (int e = last; e >= 0; --e) {
    float slab[S::own_tiles][S::units][4];
    offset_gradient<T, S>(slab, values, published, S::feature_dim * e, e == last, lane);
    UNROLL for (int o = 0; o < S::own_tiles; ++o) {
      if (e < last && e > 0) rotate(other[o]);
      if (e < last - 1) rotate(moved[o]);
      UNROLL for (int n = 0; n < S::units; ++n) {
        UNROLL for (int j = 0; j < 4; ++j) {
          const int i = Order<S>::place(n, j);
          if (e == last) {  // x_(a + e) is x_(a - e), and both terms are one
            gradient[o][i] = slab[o][n][j] * other[o][i];
          } else {
            if (e > 0) gradient[o][i] += slab[o][n][j] * other[o][i];
            moved[o][i] += slab[o][n][j] * x[o][i];
          }
        }
      }
    }
  }
  UNROLL for (int o = 0; o < S::own_tiles; ++o) {
    UNROLL for (int i = 0; i < numbers; ++i) gradient[o][i] += moved[o][i];
  }
}

// ---- the end of a row ----

// A lane's gradients of gamma and beta, of all rows that it finishes in a step.
template <class S>
struct AffineSums {
  float values[2 * Order<S>::of_lane] = {};  // gamma's, then beta's

  // Adds a row's: `gradient` is that of gamma LayerNorm(x) + beta, or a multiple of it, `raw` the row as it
  // is in memory, and statistics its mean and 1 / deviation.
  DEVICE void add(const float (&gradient)[Order<S>::of_lane], const float (&raw)[Order<S>::of_lane],
                  float2 statistics) {
    const float shift = -statistics.x * statistics.y;
    UNROLL for (int i = 0; i < Order<S>::of_lane; ++i) {
      values[i] += gradient[i] * (raw[i] * statistics.y + shift);
      values[Order<S>::of_lane + i] += gradient[i];
    }
  }

  // Adds the sums over the warp to (2, d) floats in shared memory, which belong to the warp. At each distance
  // two lanes share what is left, so that each lane ends with one number.
  DEVICE void add_to(float* sums, const Lane& lane) {
    constexpr int count = 2 * Order<S>::of_lane;
    const int g = lane.group;
    UNROLL for (int half = count / 2, distance = 1; distance < 8; half /= 2, distance *= 2) {
      const bool upper = (g & distance) != 0;
      if (half == 0) values[0] += shuffle_xor(values[0], 4 * distance);
      UNROLL for (int i = 0; i < half; ++i) {
        const float given = upper ? values[i] : values[i + half], kept = upper ? values[i + half] : values[i];
        values[i] = kept + shuffle_xor(given, 4 * distance);
      }
    }
    // bit 0 of the group has chosen between gamma and beta, its other bits the feature
    const int feature = S::feature_dim == 8 ? g >> 1 & 1 : (g & 2) + (g >> 2);
    float* const place = sums + S::feature_dim * (g & 1) + Order<S>::of_lane * lane.pair + feature;
    if (S::feature_dim > 8 || g < 4) store_shared(place, load_shared<float>(place) + values[0]);
  }
};

// Takes this lane's features of a row's gradient through affine and LayerNorm to the row as it is in memory.
template <class S>
DEVICE void finish_row(float (&gradient)[Order<S>::of_lane], const float (&raw)[Order<S>::of_lane],
                       float2 statistics, const float2* affine, LayerNorm layer_norm, const Lane& lane) {
  constexpr int count = Order<S>::of_lane;
  float gamma[count], beta[count];
  load_parameters<S>(gamma, beta, affine, lane);
  UNROLL for (int i = 0; i < count; ++i) gradient[i] *= gamma[i];
  if (layer_norm != LayerNorm::head) return;
  float normalized[count], sum = 0, product = 0;
  UNROLL for (int i = 0; i < count; ++i) {
    normalized[i] = (raw[i] - statistics.x) * statistics.y;
    sum += gradient[i];
    product += gradient[i] * normalized[i];
  }
  const float mean = quad_sum(sum) * (1.0f / S::feature_dim);
  const float dot = quad_sum(product) * (1.0f / S::feature_dim);
  UNROLL for (int i = 0; i < count; ++i) {
    gradient[i] = statistics.y * (gradient[i] - mean - normalized[i] * dot);
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::polynomial
