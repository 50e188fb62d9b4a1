// What forward and backward share: the part of the workspace that all workers see, the passes before and
// between the items, and the packing of a chunk. It includes simd/ and tokens/, and no code of one direction.
//
// A sequence that is cut into segments takes three passes: the state that each segment adds, from zero; the
// running sums of these in order, from the initial state; then the items, each from its own start state.
#pragma once

#include "cpu/tokens/features.h"

namespace rebased::cpu::REBASED_ISA {

// Where the sweeps of a backward leave the gradients of q and k, which LayerNorm::token takes on in a later
// pass, and those of gamma and beta.
template <class T>
struct GradientTargets {
  MutableRows query_target, key_target;
  bool accumulator_target;       // both targets are in T, not in the problem's dtype
  T *query_affine, *key_affine;  // [item][query head of the group or 1][2][feature_dim]
  T* shared_key_affine;          // what the worker of the queries adds to key_affine for keys that it takes
  bool share_keys = false;       // whether the worker of the queries takes some of the keys

  GradientTargets(const BackwardProblem& p, Arena& arena) : query_target(p.grad_q), key_target(p.grad_k) {
    accumulator_target = p.layer_norm == LayerNorm::token && !is_accumulator<T>(p.dtype);
    if (!accumulator_target) return;
    const int64_t row = p.feature_dim, head = p.seqlen * row;
    if (p.wants_queries())
      query_target = {arena.take<T>(p.batch * p.heads * head), p.heads * head, head, row};
    if (p.wants_keys())
      key_target = {arena.take<T>(p.batch * p.kv_heads * head), p.kv_heads * head, head, row};
  }
};

// Tokens of a chunk. Scores cost chunk * (feature_dim + head_dim) a token, and a state's products cost the
// same whatever the chunk is, so the shortest chunk that amortises reading and writing a state is best. With
// AMX that is longer, since its products are cheap beside that traffic. The quadratic form, which a large
// feature_dim takes, packs keys once per chunk of queries. The recurrence of the elementwise maps only wants
// its chunk to stay in the first cache.
template <class T>
inline int chunk_length(const Problem& p) {
#if defined(__AMX_BF16__)
  constexpr int chunk = 64;
#else
  constexpr int chunk = 32;
#endif
  return is_elementwise(p) ? 64 : p.feature_dim <= 32 ? chunk : 128;
}

// A chunk of keys meets block b of queries: calls body(Constant<vectors>, Constant<masked>, key) for each
// tile of kRows keys that these queries may see. `diagonal` says that the chunk is their own. A tile of one
// vector is the second of the block's two, since the first sees none of its keys.
template <class T, class Body>
REBASED_INLINE void for_seen_keys(int b, int key_rows, bool diagonal, const Body& body) {
  const int end = diagonal ? smaller(key_rows, (b + 1) * kLanes<T>) : key_rows;
  for (int j = 0; j < end; j += kRows) {
    const int first = j - b * kLanes<T>;  // the tile's first key, counted from lane 0's own
    if (!diagonal || first + kRows <= 0)
      body(Constant<kVectors>{}, Constant<0>{}, j);
    else if (first < kWidth<T>)
      body(Constant<kVectors>{}, Constant<1>{}, j);
    else
      body(Constant<1>{}, Constant<1>{}, j);
  }
}

// The workspace of a call begins with what all workers share.
template <class AnyProblem>
inline Arena workspace_of(const AnyProblem& p, const Parallel* parallel) {
  return {parallel ? static_cast<char*>(p.workspace) : nullptr};
}
// After it lies a scratch of each worker, which take(arena) makes.
template <class Take>
class Scratches {
 public:
  Scratches(const Arena& shared, const Take& take) : take_(take), base_(shared.base), shared_(shared.used) {
    Arena one{nullptr};
    take(one);
    bytes_ = one.used;
  }
  int64_t workspace_bytes(int64_t workers) const { return shared_ + workers * bytes_; }
  auto operator()(int64_t worker) const {
    Arena own{base_, workspace_bytes(worker)};
    return take_(own);
  }

 private:
  const Take take_;
  char* base_;
  int64_t shared_, bytes_;
};

template <class T>
struct Call {
  const Problem& base;
  Sizes<T> sizes;
  Schedule<T> schedule;
  FeaturePair<T>* pairs;
  T* statistics;  // mean and rstd of q, then of k, each (batch, seqlen); null unless LayerNorm::token

  // With an arena whose base is null only the arena's size counts.
  Call(const Problem& p, int threads, Arena& arena, bool needs_state, int64_t parts)
      : base(p), sizes(p, chunk_length<T>(p)) {
    schedule.sequences = arena.take<Sequence>(p.num_sequences);
    pairs = sizes.polynomial ? arena.take<FeaturePair<T>>(sizes.feature_pad) : nullptr;
    statistics = p.layer_norm == LayerNorm::token ? arena.take<T>(4 * p.batch * p.seqlen) : nullptr;
    if (!arena.base) return;
    schedule.fill(p, sizes, threads, parts, needs_state);
    if (pairs) fill_feature_pairs(p, sizes, pairs);
  }

  int64_t heads_together(int /*threads*/) const { return 1; }  // how many a worker walks side by side
  int64_t group() const { return base.kv_heads ? base.heads / base.kv_heads : 0; }
  int64_t token_block() const { return int64_t(sizes.feature_rows) * kLanes<T>; }
  Tokens<T> key_tokens(const Item& item) const {
    return head_tokens<T>(base, sizes, false, statistics, item.batch, item.kv_head);
  }
  Tokens<T> query_tokens(const Item& item, int64_t head) const {
    return head_tokens<T>(base, sizes, true, statistics, item.batch, head);
  }
  static void clear(T* target, int64_t count) { __builtin_memset(target, 0, count * sizeof(T)); }

  T* take_states(Arena& arena, int64_t most_items) const {
    const bool cut = most_items > base.num_sequences * base.kv_heads;
    return cut ? arena.take<T>(most_items * sizes.state_size) : nullptr;
  }

  // Packs tokens of a chunk, and queues the rows that the sweep packs next. H and inv: as in pack_block.
  void pack_tokens(const Tokens<T>& t, int64_t row, int rows, const Ahead& ahead, T* X, T* H = nullptr,
                   T* inv = nullptr) const {
    const int64_t block = token_block();
    for (int b = 0; b * kLanes<T> < rows; b++)
      pack_block<T>(t, row + b * kLanes<T>, smaller(rows - b * kLanes<T>, kLanes<T>), X + b * block,
                    H ? H + b * block : nullptr, inv ? inv + b * kLanes<T> : nullptr);
    queue_rows(ahead, t.data, row, rows, t.row_stride, t.feature_dim);
  }
  void pack_values(const ConstRows& source, int64_t batch, int64_t head, int64_t row, int rows,
                   const Ahead& ahead, T* values) const {
    const char* data =
        head_rows<T>(source, batch, head, base.dtype) + sizes.first_column * bytes_of<T>(base.dtype);
    with_element<T>(base.dtype, [&](auto element) {
      using E = typename decltype(element)::type;
      read_panels<T>(reinterpret_cast<const E*>(data) + row * source.row_stride, source.row_stride, rows,
                     sizes.head_dim, sizes.chunk, values);
    });
    queue_rows(ahead, data, row, rows, source.row_stride, sizes.head_dim);
  }
  void queue_rows(const Ahead& ahead, const char* data, int64_t row, int rows, int64_t row_stride,
                  int width) const {
    if (!ahead.queue) return;
    const int64_t bytes = bytes_of<T>(base.dtype);
    ahead.queue->add(uintptr_t(data) + (row + ahead.rows) * row_stride * bytes, row_stride * bytes, rows,
                     width * bytes);
  }

  static constexpr int64_t kRowsOfItem = 256;  // tokens of an item in the passes over whole tokens

  // LayerNorm::token: mean and rstd of every token, over all its heads.
  void compute_statistics(const Parallel& parallel, bool of_queries = true, bool of_keys = true) const {
    if (!statistics) return;
    const Problem& p = base;
    const int64_t parts = (p.seqlen + kRowsOfItem - 1) / kRowsOfItem, tokens = p.batch * p.seqlen;
    for_items(parallel, 2 * p.batch * parts, [&](int64_t item, int) {
      const bool query = item < p.batch * parts;
      if (query ? !of_queries : !of_keys) return;
      const int64_t batch = item / parts % p.batch, begin = item % parts * kRowsOfItem;
      T* mean = statistics + (query ? 0 : 2) * tokens + batch * p.seqlen;
      with_element<T>(p.dtype, [&](auto element) {
        using E = typename decltype(element)::type;
        token_statistics<T, E>(query ? p.q : p.k, batch, query ? p.heads : p.kv_heads, sizes.feature_dim,
                               begin, smaller(begin + kRowsOfItem, p.seqlen), T(p.layer_norm_eps), mean,
                               mean + tokens);
      });
    });
  }

  // The state that segment n of a sequence added, counted from its last one when reversed.
  T* segment_state(T* states, const Sequence& sequence, int64_t kv_head, int64_t n, bool reversed) const {
    const int64_t segment = reversed ? sequence.segments - 1 - n : n;
    return states + ((sequence.first_segment + segment) * base.kv_heads + kv_head) * sizes.state_size;
  }
  // On entry `states` holds what each segment added; on return it holds the state before each segment, or
  // after it when reversed, the given state included.
  void sum_states(const Parallel& parallel, T* states, const ConstState& given, bool reversed) const {
    const Problem& p = base;
    for_items(parallel, p.num_sequences * p.kv_heads, [&](int64_t item, int) {
      const Sequence& sequence = schedule.sequences[item / p.kv_heads];
      const int64_t size = sizes.state_size;
      if (sequence.quadratic || sequence.segments == 1) return;
      const auto state_of = [&](int64_t n) {
        return segment_state(states, sequence, item % p.kv_heads, n, reversed);
      };
      // shift by one segment, from the far end, then sum up
      for (int64_t n = sequence.segments - 1; n > 0; n--)
        __builtin_memcpy(state_of(n), state_of(n - 1), size * sizeof(T));
      import_state(sizes, given, item, state_of(0));
      for (int64_t n = 1; n < sequence.segments; n++) {
        const T* before = state_of(n - 1);
        T* state = state_of(n);
        for (int64_t i = 0; i < size; i++) state[i] += before[i];
      }
    });
  }

  // Brings an item's start state: the given one for the first item on the way, else what sum_states made of
  // its segment. Returns whether it is zero. The quadratic form has none.
  bool take_start_state(const Item& item, bool first, const ConstState& given, const T* states,
                        T* state) const {
    if (item.quadratic) return true;
    if (first)
      import_state(sizes, given, item.sequence * base.kv_heads + item.kv_head, state);
    else
      __builtin_memcpy(state, states + item.number * sizes.state_size, sizes.state_size * sizeof(T));
    return first && !given.kv;
  }

  // Zeroes the rows of a packed batch that belong to no sequence.
  void zero_unowned_rows(const MutableRows& rows, int64_t heads, int64_t width) const {
    const Problem& p = base;
    if (!schedule.packed || !rows.data) return;
    const int64_t begin = p.num_sequences ? schedule.sequences[0].begin : p.seqlen;
    const int64_t end = p.num_sequences ? schedule.sequences[p.num_sequences - 1].end : p.seqlen;
    const int64_t bytes = bytes_of<T>(p.dtype);
    for (int64_t head = 0; head < heads; head++) {
      char* data = const_cast<char*>(head_rows<T>(rows, 0, head, p.dtype));
      for (int64_t row = 0; row < p.seqlen; row++)
        if (row < begin || row >= end)
          __builtin_memset(data + row * rows.row_stride * bytes, 0, width * bytes);
    }
  }
};

}  // namespace rebased::cpu::REBASED_ISA
