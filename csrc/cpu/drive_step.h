// Step of a whole problem, one token per sequence, with the state before the token and the token's own sim:
//   y = (phi(q') S + sim v) / (phi(q') z + sim + eps),  then  S += phi(k') v^T,  z += phi(k')
// It shares call.h and tokens/ with the other drivers, and no item. instances/ alone includes it.
//
// That equals querying the new state, but the token's own sim is a square here and not a sum of signed
// features, which loses digits where q'.k' is near 0; a first token has no other sim. The state is read once
// and written once, row by row, and each row is queried while it is in registers. A head's features (F of k'
// and F of each query head) lie in the worker's scratch.
#pragma once

#include "cpu/call.h"
#include "cpu/tokens/token_rows.h"

namespace rebased::cpu::REBASED_ISA {

template <class T>
struct StepScratch {
  T *query, *key;     // q' and k', each twice over, so that rotations are contiguous; read by whole vectors
  T* key_features;    // [feature]
  T* query_features;  // [query head of the group][feature], weighted
  T* own;             // [query head]: sim of the token itself
  T* sums;            // [query head][value_columns]
  T* values;          // v of one head
  int64_t features;   // rounded up to whole vectors, zero past F

  StepScratch(const StepProblem& p, const Sizes<T>& s, int64_t group, Arena& arena);
};

constexpr int kStepVectors = 4;  // vectors of a state's row that are updated together

template <class T>
StepScratch<T>::StepScratch(const StepProblem& p, const Sizes<T>& s, int64_t group, Arena& arena) {
  features = round_up(s.features, kWidth<T>);
  query = arena.take<T>(2 * p.feature_dim + 2 * kWidth<T>);
  key = arena.take<T>(2 * p.feature_dim + 2 * kWidth<T>);
  own = arena.take<T>(group);
  key_features = arena.take<T>(features), query_features = arena.take<T>(group * features);
  sums = arena.take<T>(group * s.value_columns);
  values = arena.take<T>(s.value_columns);
}

template <class T>
struct Moments {
  T mean, rstd;
};

// The moments of `heads` heads from `first` on together.
template <class T, class E>
inline Moments<T> moments(const E* first, int64_t heads, int64_t head_stride, int d, T eps) {
  const T count = T(heads * d);
  Vector<T> sum{}, squares{};
  for (int64_t h = 0; h < heads; h++)
    for (int e = 0; e < d; e += kWidth<T>) sum += read<T>(first + h * head_stride + e, d - e);
  const T mean = horizontal_sum<T>(sum) / count;
  for (int64_t h = 0; h < heads; h++)
    for (int e = 0; e < d; e += kWidth<T>) {
      const Vector<T> centered = read<T>(first + h * head_stride + e, d - e) - mean;
      squares += lane_numbers<T>() < typename Simd<T>::Int(d - e) ? centered * centered : Vector<T>{};
    }
  return {mean, 1 / square_root(broadcast<T>(horizontal_sum<T>(squares) / count + eps))[0]};
}
// The moments of a token's q or k over all its heads, for LayerNorm::token.
template <class T, class E>
inline Moments<T> token_moments(const StepProblem& p, bool query, int64_t batch) {
  const ConstRows& rows = query ? p.q : p.k;
  if (p.layer_norm != LayerNorm::token) return {0, 1};
  return moments<T>(static_cast<const E*>(rows.data) + batch * rows.batch_stride,
                    query ? p.heads : p.kv_heads, rows.head_stride, int(p.feature_dim), T(p.layer_norm_eps));
}

// x: q' or k' of one head of one sequence, scale included, repeated to 2 d entries. token: the token's
// moments over all heads.
template <class T, class E>
inline void prepare_token(const StepProblem& p, const Sizes<T>& s, bool query, int64_t batch, int64_t head,
                          Moments<T> token, T* x) {
  const ConstRows& rows = query ? p.q : p.k;
  const Affine& affine = query ? p.query_affine : p.key_affine;
  const int d = s.feature_dim;
  const E* own = static_cast<const E*>(rows.data) + batch * rows.batch_stride + head * rows.head_stride;
  const auto [mean, rstd] =
      p.layer_norm == LayerNorm::head ? moments<T>(own, 1, 0, d, T(p.layer_norm_eps)) : token;
  const T scale = query && s.polynomial ? T(p.scale) : T(1);
  const T* gamma =
      affine.gamma ? static_cast<const T*>(affine.gamma) + head * affine.gamma_head_stride : nullptr;
  const T* beta = affine.beta ? static_cast<const T*>(affine.beta) + head * affine.beta_head_stride : nullptr;
  for (int e = 0; e < d; e += kWidth<T>) {
    Vector<T> value = (read<T>(own + e, d - e) - mean) * rstd;
    if (gamma) value *= read<T>(gamma + e, d - e);
    if (beta) value += read<T>(beta + e, d - e);
    store(x + e, value * scale);
  }
  for (int e = 0; e < d; e++) x[d + e] = x[e];
}

// phi in the order of a public state, with the query's weights where asked for; x as prepare_token leaves it.
template <class T>
inline void token_features(const StepProblem& p, const Sizes<T>& s, bool weighted, const T* x, T* features,
                           int64_t padded) {
  const int d = s.feature_dim;
  if (!s.polynomial) {
    with_map(p.feature_map, [&](auto map) {
      for (int e = 0; e < d; e += kWidth<T>)
        store(features + e, elementwise_feature<T, decltype(map)::value>(read<T>(x + e, d - e)));
    });
  } else {
    T* target = features;
    if (p.feature_map == FeatureMap::taylor) {
      *target++ = weighted ? s.a0 : T(1);
      for (int e = 0; e < d; e++) *target++ = weighted ? s.a1 * x[e] : x[e];
    }
    for (int offset = 0; target < features + s.features; offset++) {
      const T weight = weighted ? (offset ? 2 * s.a2 : s.a2) : T(1);
      const int count = smaller<int>(d, int(features + s.features - target));
      for (int e = 0; e < count; e += kWidth<T>)
        write<T>(target + e, load(x + e) * load(x + offset + e) * weight, count - e);
      target += count;
    }
  }
  for (int64_t f = s.features; f < padded; f++) features[f] = 0;
}

// sim of the token itself, from q' and k' as prepare_token leaves them and their features.
template <class T>
inline T own_sim(const Sizes<T>& s, const StepScratch<T>& scratch, const T* query_features) {
  const T* left = s.polynomial ? scratch.query : query_features;
  const T* right = s.polynomial ? scratch.key : scratch.key_features;
  Vector<T> products{};
  for (int e = 0; e < s.feature_dim; e += kWidth<T>)
    products += read<T>(left + e, s.feature_dim - e) * read<T>(right + e, s.feature_dim - e);
  const T sum = horizontal_sum<T>(products);
  return s.polynomial ? s.a0 + sum * (s.a1 + s.a2 * sum) : sum;
}

// Columns [column, column + NV vectors) of the state, `count` of them within head_dim.
template <class T, int NV, bool OneQuery>
inline void step_columns(const StepScratch<T>& scratch, const Sizes<T>& s, int64_t group, int column,
                         int count, T* state) {
  Vector<T> values[NV], sums[NV] = {};
#pragma GCC unroll 4
  for (int n = 0; n < NV; n++) values[n] = load(scratch.values + column + n * kWidth<T>);
  for (int64_t g = 0; g < group && !OneQuery; g++)
    for (int n = 0; n < NV; n++)
      store(scratch.sums + g * s.value_columns + column + n * kWidth<T>, Vector<T>{});
  const bool whole = count == NV * kWidth<T>;
  for (int f = 0; f < s.features; f++) {
    T* row = state + int64_t(f) * s.head_dim + column;
    // the next head's row: a hardware prefetcher stops at the end of a page
    const T* next = row + int64_t(s.features) * s.head_dim;
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) __builtin_prefetch(next + n * kWidth<T>, 1, 2);
    const T key = scratch.key_features[f];
    Vector<T> entries[NV];
    if (whole) {
#pragma GCC unroll 4
      for (int n = 0; n < NV; n++) {
        entries[n] = load(row + n * kWidth<T>);
        store(row + n * kWidth<T>, entries[n] + key * values[n]);
      }
    } else {
#pragma GCC unroll 4
      for (int n = 0; n < NV; n++) {
        entries[n] = read<T>(row + n * kWidth<T>, count - n * kWidth<T>);
        write<T>(row + n * kWidth<T>, entries[n] + key * values[n], count - n * kWidth<T>);
      }
    }
    if (OneQuery) {
#pragma GCC unroll 4
      for (int n = 0; n < NV; n++) sums[n] += scratch.query_features[f] * entries[n];
      continue;
    }
    for (int64_t g = 0; g < group; g++) {
      const T query = scratch.query_features[g * scratch.features + f];
#pragma GCC unroll 4
      for (int n = 0; n < NV; n++) {
        T* sum = scratch.sums + g * s.value_columns + column + n * kWidth<T>;
        store(sum, load(sum) + query * entries[n]);
      }
    }
  }
  if (OneQuery)
#pragma GCC unroll 4
    for (int n = 0; n < NV; n++) store(scratch.sums + column + n * kWidth<T>, sums[n]);
}

template <class T, int NV>
REBASED_INLINE void step_columns(const StepScratch<T>& scratch, const Sizes<T>& s, int64_t group, int column,
                                 T* state) {
  const int count = smaller(s.head_dim - column, NV * kWidth<T>);
  if (group == 1)
    step_columns<T, NV, true>(scratch, s, group, column, count, state);
  else
    step_columns<T, NV, false>(scratch, s, group, column, count, state);
}

template <class T, class E>
inline void step_head(const StepProblem& p, const Sizes<T>& s, const StepScratch<T>& scratch, int64_t batch,
                      int64_t kv_head, Moments<T> query_moments, Moments<T> key_moments) {
  const int64_t group = p.heads / p.kv_heads;
  const int64_t slot = p.state_index ? p.state_index[batch] : batch;
  const auto output = [&](int64_t g) {
    return static_cast<E*>(p.y.data) + batch * p.y.batch_stride + (kv_head * group + g) * p.y.head_stride;
  };
  if (slot < 0 || slot >= p.num_slots) {
    for (int64_t g = 0; g < group; g++) __builtin_memset(output(g), 0, s.head_dim * sizeof(E));
    return;
  }
  prepare_token<T, E>(p, s, false, batch, kv_head, key_moments, scratch.key);
  token_features(p, s, false, scratch.key, scratch.key_features, scratch.features);
  for (int64_t g = 0; g < group; g++) {
    T* const query_features = scratch.query_features + g * scratch.features;
    prepare_token<T, E>(p, s, true, batch, kv_head * group + g, query_moments, scratch.query);
    token_features(p, s, true, scratch.query, query_features, scratch.features);
    scratch.own[g] = own_sim(s, scratch, query_features);
  }
  const E* v = static_cast<const E*>(p.v.data) + batch * p.v.batch_stride + kv_head * p.v.head_stride;
  for (int n = 0; n < s.value_columns; n += kWidth<T>)
    store(scratch.values + n, read<T>(v + n, s.head_dim - n));

  T* state = static_cast<T*>(p.state.kv) + slot * p.kv_stride + kv_head * s.features * s.head_dim;
  T* denominators = static_cast<T*>(p.state.k) + slot * p.k_stride + kv_head * s.features;
  int column = 0;
  for (; column + kStepVectors * kWidth<T> <= s.value_columns; column += kStepVectors * kWidth<T>)
    step_columns<T, kStepVectors>(scratch, s, group, column, state);
  for (; column < s.value_columns; column += kWidth<T>) step_columns<T, 1>(scratch, s, group, column, state);

  for (int64_t g = 0; g < group; g++) {
    const T* query = scratch.query_features + g * scratch.features;
    Vector<T> sum{};
    for (int f = 0; f < s.features; f += kWidth<T>)
      sum += load(query + f) * read<T>(denominators + f, s.features - f);
    const T own = scratch.own[g];
    const T scale = p.normalize ? 1 / (horizontal_sum<T>(sum) + own + T(p.eps)) : T(1);
    for (int n = 0; n < s.head_dim; n += kWidth<T>) {
      const Vector<T> total = load(scratch.sums + g * s.value_columns + n) + own * load(scratch.values + n);
      write<T>(output(g) + n, total * scale, s.head_dim - n);
    }
  }
  for (int f = 0; f < s.features; f++) denominators[f] += scratch.key_features[f];
}

// Returns the workspace's bytes where `parallel` is null, else 0.
template <class T>
inline int64_t run_step(const StepProblem& p, int threads, const Parallel* parallel) {
  Arena arena = workspace_of(p, parallel);
  const Sizes<T> s(p, 1);
  const int64_t group = p.kv_heads ? p.heads / p.kv_heads : 0;
  const Scratches scratches(arena, [&](Arena& own) { return StepScratch<T>(p, s, group, own); });

  // a second thread pays from about this much state on: waking it takes as long as 500 KB in the cache
  constexpr int64_t bytes_per_thread = 512 << 10;
  const int64_t useful =
      p.batch * p.kv_heads * s.features * s.head_dim * int64_t(sizeof(T)) / bytes_per_thread;
  const int workers = int(larger<int64_t>(1, smaller<int64_t>(threads, useful)));
  if (!parallel) return scratches.workspace_bytes(workers);
  // an item is a sequence, so that its LayerNorm is made once, or one of its heads where sequences are few
  const bool whole = workers == 1 || p.batch >= 4 * workers;
  const int64_t parts = whole ? 1 : p.kv_heads, heads = p.kv_heads / larger<int64_t>(parts, 1);
  const Parallel few{workers, parallel->run};
  for_items(few, p.batch * parts, [&](int64_t item, int worker) {
    const StepScratch<T> scratch = scratches(worker);
    const int64_t batch = item / parts, first = item % parts * heads;
    with_element<T>(p.dtype, [&](auto element) {
      using E = typename decltype(element)::type;
      const Moments<T> query = token_moments<T, E>(p, true, batch),
                       key = token_moments<T, E>(p, false, batch);
      for (int64_t head = first; head < first + heads; head++)
        step_head<T, E>(p, s, scratch, batch, head, query, key);
    });
  });
  return 0;
}

}  // namespace rebased::cpu::REBASED_ISA
