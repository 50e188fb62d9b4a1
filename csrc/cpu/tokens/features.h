// The features of the polynomial maps: phi of a block of tokens, the state's update, import and export, and
// the gradient of phi. It includes simd/ and tokens/ and knows neither chunks' order nor items.
#pragma once

#include "cpu/simd/microkernel.h"
#include "cpu/tokens/layer_norm.h"
#include "cpu/tokens/long_sums.h"

namespace rebased::cpu::REBASED_ISA {

// The features pairs[0 .. kRows) of a block, target: [kRows][kLanes]. body(r, n, phi) sees each vector on its
// way.
template <class T, bool Weighted, class Body>
REBASED_INLINE void feature_tile(const FeaturePair<T>* pairs, const T* X, T* target, const Body& body) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) {
    const T *first = X + pairs[r].first * kLanes<T>, *second = X + pairs[r].second * kLanes<T>;
    const T weight = pairs[r].weight;
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; n++) {
      Vector<T> phi = load(first + n * kWidth<T>) * load(second + n * kWidth<T>);
      if (Weighted) phi *= weight;
      store(target + r * kLanes<T> + n * kWidth<T>, phi);
      body(r, n, phi);
    }
  }
}

// The weights of a block's tokens; null: 1.
template <class T>
REBASED_INLINE void load_weights(const T* token_weights, Vector<T> (&weights)[kVectors]) {
#pragma GCC unroll 2
  for (int n = 0; n < kVectors; n++)
    weights[n] = token_weights ? load(token_weights + n * kWidth<T>) : broadcast<T>(1);
}

// state += sum over the chunk's tokens of phi(token) values^T. `tokens` is q' or k' of the chunk. Weighted
// puts the query's weights on the features; token_weights, by token of the chunk and null for 1, are factors
// of the denominator's sum alone. Long: the sum goes to `sums`, and the state is made of these. features is
// scratch: [block][kRows][kLanes].
template <class T, bool Weighted, bool Long>
inline void update_state_as(const Sizes<T>& s, const FeaturePair<T>* pairs, const T* tokens,
                            const T* token_weights, const T* values, int rows, T* state, LongSums<T>* sums,
                            T* features, PrefetchQueue* queue) {
  T* target = Long ? sums->recent : state;
  const int blocks = (rows + kLanes<T> - 1) / kLanes<T>;
  const int64_t token_block = int64_t(s.feature_rows) * kLanes<T>;
  for (int f = 0; f < s.feature_pad; f += kRows) {
    queue->advance();
    constexpr int64_t phi_block = kRows * kLanes<T>;
    Vector<T> phi_sums[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; r++) phi_sums[r] = Vector<T>{};
    for (int b = 0; b < blocks; b++) {
      Vector<T> weights[kVectors];
      load_weights(token_weights ? token_weights + b * kLanes<T> : nullptr, weights);
      feature_tile<T, Weighted>(pairs + f, tokens + b * token_block, features + b * phi_block,
                                [&](int r, int n, Vector<T> phi) { phi_sums[r] += phi * weights[n]; });
    }
    add_row_sums<T, kRows>(phi_sums, target + s.state_kv + f);
    for_panels<T>(s.value_columns, [&](auto vectors, int column) {
      constexpr int NV = decltype(vectors)::value, columns = NV * kWidth<T>;
      const int64_t part = int64_t(column) * s.feature_pad + f * columns;
      const T* panel = values + int64_t(column) * s.chunk;
      Tile<T, NV> tile;
      tile.load_rows(target + part, columns);
      for (int b = 0; b < blocks; b++)
        tile.template multiply_rows<kLanes<T>>(smaller(rows - b * kLanes<T>, kLanes<T>),
                                               features + b * phi_block, panel + b * kLanes<T> * columns);
      tile.store_rows(target + part, columns);
      if (!Long) return;
      tile.add_rows(sums->base + part, columns);
      tile.store_rows(state + part, columns);
    });
  }
  if (!Long) return;
  for (int f = 0; f < s.feature_pad; f++)
    state[s.state_kv + f] = sums->base[s.state_kv + f] + target[s.state_kv + f];
  sums->add(rows);
}
template <class T, bool Weighted>
inline void update_state(const Sizes<T>& s, const FeaturePair<T>* pairs, const T* tokens,
                         const T* token_weights, const T* values, int rows, T* state, LongSums<T>* sums,
                         T* features, PrefetchQueue* queue) {
  const auto update = sums->active ? update_state_as<T, Weighted, true> : update_state_as<T, Weighted, false>;
  update(s, pairs, tokens, token_weights, values, rows, state, sums, features, queue);
}

// The state of this backend from a public one, which is [feature][head_dim] and [feature] without padding. A
// null source is zero.
template <class T>
inline void import_state(const Sizes<T>& s, const ConstState& source, int64_t number, T* state) {
  for (int64_t i = 0; i < s.state_size; i++) state[i] = 0;
  if (!source.kv) return;
  const T* kv = static_cast<const T*>(source.kv) + number * s.features * s.all_columns + s.first_column;
  const T* k = static_cast<const T*>(source.k) + number * s.features;
  read_panels<T>(kv, s.all_columns, s.features, s.head_dim, s.feature_pad, state);
  for (int f = 0; f < s.features; f++) state[s.state_kv + f] = k[f];
}
// The other way round.
template <class T>
inline void export_state(const Sizes<T>& s, const T* state, const MutableState& target, int64_t number) {
  T* kv = static_cast<T*>(target.kv) + number * s.features * s.all_columns + s.first_column;
  T* k = static_cast<T*>(target.k) + number * s.features;
  write_panels<T>(state, s.features, s.head_dim, s.feature_pad, kv, s.all_columns);
  for (int f = 0; f < s.features && s.first_column == 0; f++) k[f] = state[s.state_kv + f];
}

// dX += (d phi / d X)^T tile, where the tile holds the gradients of kRows features.
template <class T, bool Weighted>
REBASED_INLINE void add_feature_gradient(const FeaturePair<T>* pairs, const Tile<T, kVectors>& tile,
                                         const T* X, T* dX) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; r++) {
    const FeaturePair<T> pair = pairs[r];
#pragma GCC unroll 2
    for (int n = 0; n < kVectors; n++) {
      const int lane = n * kWidth<T>;
      const Vector<T> gradient = Weighted ? tile.sum[r][n] * pair.weight : tile.sum[r][n];
      T *first = dX + pair.first * kLanes<T> + lane, *second = dX + pair.second * kLanes<T> + lane;
      store(first, load(first) + gradient * load(X + pair.second * kLanes<T> + lane));
      store(second, load(second) + gradient * load(X + pair.first * kLanes<T> + lane));
    }
  }
}

// dX += (d phi / d X)^T (state values^T + state_k token_weights^T) for a block: the part of the gradient of
// q' or k' that comes through a state. values: [value_columns][kLanes], transposed. Weighted puts the query's
// weights on, for a state that has none.
template <class T, bool Weighted>
inline void state_gradient(const Sizes<T>& s, const FeaturePair<T>* pairs, const T* state, const T* values,
                           const T* token_weights, const T* X, T* dX, PrefetchQueue* queue) {
  Vector<T> weights[kVectors];
  load_weights(token_weights, weights);
  for (int f = 0; f < s.feature_pad; f += kRows) {
    queue->advance();
    Tile<T, kVectors> tile;
    tile.set_outer(state + s.state_kv + f, weights);
    for_panels<T>(s.value_columns, [&](auto vectors, int column) {
      constexpr int columns = decltype(vectors)::value * kWidth<T>;
      tile.template multiply_rows<columns>(columns, state + int64_t(column) * s.feature_pad + f * columns,
                                           values + column * kLanes<T>);
    });
    add_feature_gradient<T, Weighted>(pairs + f, tile, X, dX);
  }
}

}  // namespace rebased::cpu::REBASED_ISA
