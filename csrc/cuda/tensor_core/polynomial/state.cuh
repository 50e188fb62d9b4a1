// The running state S of the polynomial maps, split over its features: sums over tokens of phi(k') v^T as C
// fragments (features, columns) that mma accumulates into, and Z and taylor's further sums in shared memory.
//
// With d = 16 warp w holds the slabs of offsets 2 w and 2 w + 1 with all 64 columns. With d = 8 two slabs of
// two offsets each, and for every d the half slab (with taylor's constant 1 as its ninth feature) and
// taylor's k', are split over columns instead, 16 a warp. Once a chunk the state is rounded and published as
// a tile (features, columns), of which ldmatrix makes fragments B of phi(q') S.
//
// Accumulating in place saves the addition of each chunk's sums, but tensor cores truncate: the plan keeps
// segments short (tensor_core::drifting_rows), and states of segments are added in float32.
#pragma once

#include "cuda/tensor_core/polynomial/rows.cuh"
#include "cuda/tensor_core/product.cuh"

namespace rebased::REBASED_BACKEND::tensor_core::polynomial {

// How a state is spread over warps and over the rows of its published tile.
template <class S>
struct StateShape {
  static constexpr bool by_features = S::feature_dim == 16;  // whether full slabs are split over warps
  static constexpr int slabs = S::feature_dim / 2 * S::feature_dim / tile;  // full slabs of 16 features
  static constexpr int own_slabs = by_features ? slabs / warps : slabs;
  static constexpr int own_columns = by_features ? columns : tile;
  static constexpr int slab_offsets = tile / S::feature_dim;  // offsets in a slab
  // rows of the published tile; those of the half slab past its features are zeros
  static constexpr int half_row = slabs * tile, linear_row = half_row + tile,
                       rows = S::taylor ? linear_row + tile : half_row + 8;
  // Z as C fragments of warp 0's lanes (units, 32 lanes, 4), and as fragments B: the rounded numbers, then
  // what rounding took from them, with d = 16 (2, 32 lanes, 4) and with d = 8 (32 lanes, 2). Behind both,
  // taylor's sum of k' as floats.
  static constexpr int gram_floats = S::units * 32 * 4, gram_words = 2 * 32 * S::units * S::units;
  static constexpr int linear_floats = S::taylor ? S::feature_dim : 0;
  static constexpr int gram_bytes = (gram_floats + linear_floats) * 4,
                       gram_term_bytes = (gram_words + linear_floats) * 4;
};

template <class T, class S>
struct State {
  using Spread = StateShape<S>;
  using Slot = typename S::Slot;

  float full[Spread::own_slabs][Spread::own_columns / 8][4];
  float half[2][4];
  float linear[2][4];  // of taylor
  float* gram;         // Z in shared memory, and behind it taylor's sum of k'; warp 0 alone touches them

  // The warp's slab number e of its own, and the first of its columns.
  static DEVICE int slab(int e, const Lane& lane) {
    return Spread::by_features ? Spread::own_slabs * lane.warp + e : e;
  }
  static DEVICE int first_column(const Lane& lane) { return Spread::by_features ? 0 : tile * lane.warp; }

  // Calls visit(fragment, row of the slot, rows, column) for each C fragment: `rows` is how many of the 16
  // rows of the fragment the slot has, side by side from `row` on.
  template <class Visit>
  DEVICE void visit_tiles(const Lane& lane, const Visit& visit) {
    UNROLL for (int e = 0; e < Spread::own_slabs; ++e) {
      UNROLL for (int n = 0; n < Spread::own_columns / 8; ++n) {
        visit(full[e][n], tile * slab(e, lane), tile, first_column(lane) + 8 * n);
      }
    }
    UNROLL for (int n = 0; n < 2; ++n) {
      const int column = tile * lane.warp + 8 * n;
      visit(half[n], Slot::half_row, S::feature_dim / 2, column);
      if constexpr (S::taylor) visit(linear[n], Slot::linear_row, S::feature_dim, column);
    }
  }

  DEVICE void clear(const Lane& lane) {
    UNROLL for (int n = 0; n < Spread::own_columns / 8; ++n) {
      UNROLL for (int e = 0; e < Spread::own_slabs; ++e) {
        UNROLL for (int j = 0; j < 4; ++j) full[e][n][j] = 0;
      }
    }
    UNROLL for (int j = 0; j < 4; ++j) half[0][j] = half[1][j] = linear[0][j] = linear[1][j] = 0;
    if (lane.warp > 0) return;
    set_gram({}, lane);
    if (lane.lane < Spread::linear_floats) gram[Spread::gram_floats + lane.lane] = 0;
  }

  // Sets the state that the block begins with, or the reverse state. Returns the number of keys in it.
  template <class AnyProblem>
  DEVICE float start(const Arguments<AnyProblem>& arguments, const Span& span, bool reverse,
                     const Lane& lane) {
    clear(lane);
    float z[S::units][4] = {}, sum = 0, count = 0;
    visit_start<Slot>(arguments, span, reverse, [&](const float* slot) {
      visit_tiles(lane, [&](float (&c)[4], int row, int rows, int column) {
        add_tile<columns>(c, slot + row * columns + column, rows, lane);
      });
      if constexpr (S::taylor) {
        UNROLL for (int n = 0; n < 2; ++n) {  // the ninth row of the half slab's fragment
          if (lane.group > 0) continue;
          const float2 pair = load_global<float2>(slot + constant_place(n, lane));
          half[n][2] += pair.x, half[n][3] += pair.y;
        }
        sum += load_global<float>(slot + Slot::linear + lane.lane % S::feature_dim);
        count += load_global<float>(slot + Slot::count);
      }
      if (lane.warp > 0) return;
      UNROLL for (int n = 0; n < S::units; ++n) {
        add_tile<S::feature_dim>(z[n], slot + Slot::gram + 8 * n, S::feature_dim, lane);
      }
    });
    if (lane.warp > 0) return count;
    set_gram(z, lane);
    if (lane.lane < Spread::linear_floats) gram[Spread::gram_floats + lane.lane] = sum;
    return count;
  }

  // Stores the state in a slot.
  DEVICE void store(float* slot, float count, const Lane& lane) {
    visit_tiles(lane, [&](float (&c)[4], int row, int rows, int column) {
      store_tile<columns>(slot + row * columns + column, c, rows, lane);
    });
    if constexpr (S::taylor) {
      UNROLL for (int n = 0; n < 2; ++n) {
        if (lane.group == 0) store_global(slot + constant_place(n, lane), float2{half[n][2], half[n][3]});
      }
    }
    if (lane.warp > 0) return;
    float z[S::units][4];
    get_gram(z, lane);
    UNROLL for (int n = 0; n < S::units; ++n) {
      store_tile<S::feature_dim>(slot + Slot::gram + 8 * n, z[n], S::feature_dim, lane);
    }
    if (lane.lane < Spread::linear_floats)
      slot[Slot::linear + lane.lane] = gram[Spread::gram_floats + lane.lane];
    if (S::taylor && lane.lane == 0) slot[Slot::count] = count;
  }

  // Stores the state, or the gradient of a state, in its public form: kv (features, head_dim) from the
  // block's first column on, and k (features), which is null where another block stores it.
  DEVICE void store_public(float* kv, float* k, float count, bool gradient, int64_t head_dim,
                           int columns_left, const Lane& lane) {
    const auto store_row = [&](int row, int column, float x, float y) {
      float* const place = kv + Slot::public_feature(row) * head_dim + column;
      if (head_dim % 2 == 0) {
        if (column < columns_left) store_global(place, float2{x, y});
      } else {
        if (column < columns_left) place[0] = x;
        if (column + 1 < columns_left) place[1] = y;
      }
    };
    visit_tiles(lane, [&](float (&c)[4], int row, int rows, int column) {
      UNROLL for (int j = 0; j < 2; ++j) {
        const int own = lane.group + 8 * j;
        if (own < rows) store_row(row + own, column + 2 * lane.pair, c[2 * j], c[2 * j + 1]);
      }
    });
    if constexpr (S::taylor) {
      UNROLL for (int n = 0; n < 2; ++n) {
        const int column = tile * lane.warp + 8 * n + 2 * lane.pair;
        if (lane.group == 0) store_row(Slot::constant_row, column, half[n][2], half[n][3]);
      }
    }
    if (!k || lane.warp > 0) return;
    float z[S::units][4];
    get_gram(z, lane);
    UNROLL for (int n = 0; n < S::units; ++n) {
      UNROLL for (int j = 0; j < 4; ++j) {
        const int row = fragment_row(j, lane), column = fragment_column(n, j, lane);
        if (!Slot::is_public_product(row, column)) continue;
        k[Slot::public_product(row, column)] = z[n][j] * (1.0f / Slot::gram_weight(row, column, gradient));
      }
    }
    if (lane.lane < Spread::linear_floats) k[1 + lane.lane] = gram[Spread::gram_floats + lane.lane];
    if (S::taylor && lane.lane == 0) k[0] = count;
  }

  // Where the lane's two columns of taylor's sum of v^T lie in a slot, of the half slab's fragment n.
  static DEVICE int constant_place(int n, const Lane& lane) {
    return Slot::constant_row * columns + tile * lane.warp + 8 * n + 2 * lane.pair;
  }

  DEVICE void get_gram(float (&z)[S::units][4], const Lane& lane) const {
    UNROLL for (int n = 0; n < S::units; ++n) {
      const float4 c = load_shared<float4>(gram + (32 * n + lane.lane) * 4);
      z[n][0] = c.x, z[n][1] = c.y, z[n][2] = c.z, z[n][3] = c.w;
    }
  }
  DEVICE void set_gram(const float (&z)[S::units][4], const Lane& lane) {
    UNROLL for (int n = 0; n < S::units; ++n) {
      store_shared(gram + (32 * n + lane.lane) * 4, float4{z[n][0], z[n][1], z[n][2], z[n][3]});
    }
  }
};

// ---- a chunk's contribution ----

// Where a lane's ldmatrix reads the fragment A (16 features, 16 tokens) of a feature tile, and its
// ldmatrix_transposed the first 16 columns of a value tile.
template <class S, class T>
DEVICE const T* term_place(const T* terms, const Lane& lane) {
  return terms + parity_row(lane, S::half_rows) * S::feature_stride + lane.column_of_parity();
}
template <class T>
DEVICE const T* value_place(const T* values, const Lane& lane) {
  return values + lane.row_of_parity() * value_stride + lane.column_of_parity();
}

// Adds 16 tokens, from the lane's places of their tiles; v is their value fragments B of all columns, which
// are read where full slabs are split over features.
template <class T, class S>
DEVICE void add_tokens(State<T, S>& state, const T* terms, const uint32_t (&v)[columns / tile][4],
                       const T* values, const Lane& lane) {
  using Spread = StateShape<S>;
  uint32_t base[4], phi[4], own_v[4];  // base and phi are fragments A (16 features, 16 tokens)
  ldmatrix_transposed(own_v, values + tile * lane.warp);
  ldmatrix(base, terms);
  UNROLL for (int e = 0; e < Spread::own_slabs; ++e) {
    const int rotation = Spread::slab_offsets * State<T, S>::slab(e, lane) +
                         (S::units == 1 && lane.lane & 8 ? S::rotated_half_rows : 0);
    ldmatrix(phi, terms + rotation * S::feature_stride);
    multiply<T>(phi, phi, base);
    UNROLL for (int i = 0; i < Spread::own_columns / tile; ++i) {
      const uint32_t* const b = Spread::by_features ? v[i] : own_v;
      mma_m16n8k16<T>(state.full[e][2 * i], phi, b[0], b[1]);
      mma_m16n8k16<T>(state.full[e][2 * i + 1], phi, b[2], b[3]);
    }
  }
  if constexpr (S::feature_dim == 16) {  // offset 8 is the fragment's other half
    phi[0] = multiply_pairs<T>(base[0], base[1]);
    phi[2] = multiply_pairs<T>(base[2], base[3]);
  } else {  // the last four products of offset 4 repeat the first four
    ldmatrix(phi, terms + S::feature_dim / 2 * S::feature_stride);
    phi[0] = lane.group < S::feature_dim / 2 ? multiply_pairs<T>(base[0], phi[0]) : 0u;
    phi[2] = lane.group < S::feature_dim / 2 ? multiply_pairs<T>(base[2], phi[2]) : 0u;
  }
  // the constant is 1 for padded tokens too, since their values are 0
  phi[1] = phi[3] = S::taylor && lane.group == 0 ? pack<T>(1.0f, 1.0f) : 0u;
  mma_m16n8k16<T>(state.half[0], phi, own_v[0], own_v[1]);
  mma_m16n8k16<T>(state.half[1], phi, own_v[2], own_v[3]);
  if constexpr (S::taylor) {
    mma_m16n8k16<T>(state.linear[0], base, own_v[0], own_v[1]);
    mma_m16n8k16<T>(state.linear[1], base, own_v[2], own_v[3]);
  }
}

// Adds a chunk to Z and to taylor's sum of k'; by warp 0.
template <class T, class S>
DEVICE void add_gram(State<T, S>& state, const T* terms, const Lane& lane) {
  float z[S::units][4], sum[4] = {};
  state.get_gram(z, lane);
  UNROLL for (int token = 0; token < S::chunk; token += tile) {
    uint32_t b[2 * S::units];  // fragment B (16 tokens, features)
    ldmatrix(b, terms + halves_row(lane, S::half_rows) * S::feature_stride + token + lane.column_of_halves());
    const uint32_t a[4] = {b[0], S::units > 1 ? b[2 * S::units - 2] : 0u, b[1],
                           S::units > 1 ? b[2 * S::units - 1] : 0u};
    UNROLL for (int n = 0; n < S::units; ++n) mma_m16n8k16<T>(z[n], a, b[2 * n], b[2 * n + 1]);
    if constexpr (S::taylor) mma_m16n8k16<T>(sum, a, pack<T>(1.0f, 1.0f), pack<T>(1.0f, 1.0f));
  }
  state.set_gram(z, lane);
  if (S::taylor && lane.pair == 0) {
    float* const linear = state.gram + StateShape<S>::gram_floats + lane.group;
    linear[0] += sum[0];
    linear[8] += sum[2];
  }
}

// ---- the published tile ----

// Where a row of the tile begins. With a shift the rows of each slab of 16 lie that much further down from
// its ninth on, and each slab twice that: for an ldmatrix of rows that are not side by side.
template <int shift = 0>
HOST_DEVICE constexpr int published_row(int row) {
  return row * value_stride + row / tile * 2 * shift + (row & 8 ? shift : 0);
}

// Stores two C fragments side by side, rounded; `whole` or their first 8 rows alone.
template <int shift = 0, class T>
DEVICE void publish_tile(T* place, const float (&left)[4], const float (&right)[4], bool whole,
                         const Lane& lane) {
  const uint32_t words[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]),
                             pack<T>(right[0], right[1]), pack<T>(right[2], right[3])};
  if (whole) {
    stmatrix<value_stride * 2, published_row<shift>(8) * 2>(place, words);
  } else {
    T* const own = place + lane.group * value_stride + 2 * lane.pair;
    store_shared(own, words[0]);
    store_shared(own + 8, words[2]);
  }
}

// published (StateShape::rows, 64); Z goes to gram_terms.
template <int shift = 0, class T, class S>
DEVICE void publish_state(const State<T, S>& state, T* published, uint32_t* gram_terms, const Lane& lane) {
  using Spread = StateShape<S>;
  UNROLL for (int e = 0; e < Spread::own_slabs; ++e) {
    T* const place =
        published + published_row<shift>(tile) * State<T, S>::slab(e, lane) + State<T, S>::first_column(lane);
    UNROLL for (int n = 0; n < Spread::own_columns / 8; n += 2) {
      publish_tile<shift>(place + 8 * n, state.full[e][n], state.full[e][n + 1], true, lane);
    }
  }
  T* const own = published + tile * lane.warp;
  publish_tile<shift>(own + published_row<shift>(Spread::half_row), state.half[0], state.half[1], S::taylor,
                      lane);
  if constexpr (S::taylor) {
    publish_tile<shift>(own + published_row<shift>(Spread::linear_row), state.linear[0], state.linear[1],
                        true, lane);
  }
  if (lane.warp > 0) return;  // counted 1/4 from here: one warp
  float z[S::units][4];
  uint32_t high[S::units * S::units], low[S::units * S::units];
  state.get_gram(z, lane);
  UNROLL for (int n = 0; n < S::units; ++n) {
    UNROLL for (int h = 0; h < S::units; ++h) {  // Z is symmetric: a C fragment is B, of the columns 8 h ..
      const uint32_t rounded = pack<T>(z[n][2 * h], z[n][2 * h + 1]);
      const float2 value = unpack<T>(rounded);
      high[S::units * h + n] = rounded;
      low[S::units * h + n] = pack<T>(z[n][2 * h] - value.x, z[n][2 * h + 1] - value.y);
    }
  }
  if constexpr (S::units == 2) {
    store_shared(gram_terms + 4 * lane.lane, uint4{high[0], high[1], high[2], high[3]});
    store_shared(gram_terms + 128 + 4 * lane.lane, uint4{low[0], low[1], low[2], low[3]});
  } else {
    store_shared(gram_terms + 2 * lane.lane, uint2{high[0], low[0]});
  }
  if (lane.lane < Spread::linear_floats) {
    store_shared(gram_terms + Spread::gram_words + lane.lane, state.gram[Spread::gram_floats + lane.lane]);
  }
}

}  // namespace rebased::REBASED_BACKEND::tensor_core::polynomial
