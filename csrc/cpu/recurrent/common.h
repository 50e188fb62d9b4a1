// What forward and backward of the elementwise maps share: a worker's scratch, the packing of a chunk's
// tokens, and how the rows of a tensor become operands of a recurrence. Rows that are whole vectors of the
// accumulation type are operands where they lie, others go through a copy. It includes call.h, tokens/ and
// recurrence.h.
#pragma once

#include "cpu/call.h"
#include "cpu/recurrent/recurrence.h"
#include "cpu/tokens/long_sums.h"
#include "cpu/tokens/token_rows.h"

namespace rebased::cpu::REBASED_ISA {

constexpr int64_t kMostHeads = 2;  // heads that a worker walks side by side, at most

template <class T>
struct ElementwiseScratch {
  T *keys, *queries;       // phi of keys: [token][width], of queries: [query head][token][width]
  T *values, *rows;        // copies of v: [token][columns], and of grad_y: [query head][token][columns]
  T* outputs;              // y or grad_v before it is narrowed, or a copy of y: like rows
  T *affine, *statistics;  // [query heads, then the key][gamma, beta][width], [same][mean, rstd][token]
  T* products;             // [token][kWidth]
  T* factors;              // [query head][token]: r, or in backward -grad_y . y
  T *grad_tokens, *normalized, *sums, *grad_affine;  // backward only
  T *state, *turned;
  LongSums<T>* long_sums[kMostHeads];  // of each head's state, or of `turned` and z or M

  // heads: how many are walked side by side, each with a state, affine and grad_affine of its own.
  ElementwiseScratch(const Sizes<T>& s, int64_t group, Arena& arena, bool backward, int64_t heads = 1) {
    const int64_t chunk = s.chunk, width = s.feature_pad;
    keys = arena.take<T>(chunk * width), queries = arena.take<T>(group * chunk * width);
    values = arena.take<T>(chunk * s.value_columns), rows = arena.take<T>(group * chunk * s.value_columns);
    outputs = arena.take<T>(group * chunk * s.value_columns);
    affine = arena.take<T>(heads * (group + 1) * 2 * width),
    statistics = arena.take<T>((group + 1) * 2 * chunk);
    products = arena.take<T>(chunk * kWidth<T>), factors = arena.take<T>(group * chunk);
    grad_tokens = arena.take<T>(backward ? group * chunk * width : 0);
    normalized = arena.take<T>(backward ? chunk * width : 0);
    sums = arena.take<T>(backward ? 2 * chunk : 0);
    grad_affine = arena.take<T>(backward ? heads * group * 2 * width : 0);
    state = arena.take<T>(heads * s.state_size), turned = arena.take<T>(backward ? heads * s.state_size : 0);
    for (int64_t n = 0; n < heads; n++) long_sums[n] = LongSums<T>::make(s, arena);
  }
  void move_to_head(int64_t n, const Sizes<T>& s, int64_t group) {
    long_sums[0] = long_sums[n];
    state += n * s.state_size, turned += n * s.state_size;
    affine += n * (group + 1) * 2 * s.feature_pad, grad_affine += n * group * 2 * s.feature_pad;
  }
};

template <class T>
struct ElementwiseCall : Call<T> {
  using Scratch = ElementwiseScratch<T>;
  using Call<T>::Call, Call<T>::base, Call<T>::sizes, Call<T>::statistics, Call<T>::group;
  static constexpr int64_t kStateBytes = 20 << 10;  // most of a state, of which each head has its own

  // A head's row is a few cache lines. Where the rows of the other heads lie between it and its next row,
  // heads are walked side by side: together they are one stream, which the hardware follows.
  int64_t all_heads() const {
    const bool rows_apart = base.v.head_stride < base.v.row_stride;
    const bool small = sizes.state_size * int64_t(sizeof(T)) <= kStateBytes;
    return rows_apart && small ? smaller(kMostHeads, base.kv_heads) : 1;
  }
  int64_t heads_together(int threads) const { return this->schedule.heads_together(threads, all_heads()); }
  // Calls body(item, scratch) for `count` heads from that of `first` on.
  template <class Body>
  void for_heads(const Item& first, int64_t count, const Scratch& scratch, const Body& body) const {
    for (int64_t n = 0; n < count; n++) {
      Scratch own = scratch;
      own.move_to_head(n, sizes, group());
      body(Schedule<T>::next_head(first, n), own);
    }
  }

  int width() const { return sizes.feature_pad; }

  // Operands in scratch: [token][row_width].
  template <class Pointer>
  Stream<Pointer> packed(Pointer data, int row_width) const {
    return {data, row_width, int64_t(sizes.chunk) * row_width, 0};
  }
  template <class Pointer>
  static Stream<Pointer> reversed(const Stream<Pointer>& s, int tokens) {
    return {s.data + (tokens - 1) * s.token_stride, -s.token_stride, s.head_stride, s.ahead};
  }
  bool in_place() const { return is_accumulator<T>(base.dtype) && sizes.head_dim % kWidth<T> == 0; }

  // A chunk of v, y or grad_y: `count` heads from `head` on, and the part of the columns that is worked on.
  // The rows that lie `ahead` rows on are fetched meanwhile.
  Stream<const T*> value_rows(const ConstRows& source, int64_t batch, int64_t head, int64_t count,
                              int64_t row, int tokens, T* copy, int64_t ahead) const {
    const int64_t offset = row * source.row_stride + sizes.first_column;
    if (in_place())
      return {reinterpret_cast<const T*>(head_rows<T>(source, batch, head, base.dtype)) + offset,
              source.row_stride, source.head_stride, ahead * source.row_stride};
    with_element<T>(base.dtype, [&](auto element) {
      using E = typename decltype(element)::type;
      for (int64_t g = 0; g < count; g++) {
        const E* rows =
            reinterpret_cast<const E*>(head_rows<T>(source, batch, head + g, base.dtype)) + offset;
        T* target = copy + g * sizes.chunk * sizes.value_columns;
        for (int i = 0; i < tokens; i++)
          for (int n = 0; n < sizes.value_columns; n += kWidth<T>) {
            __builtin_prefetch(rows + (i + ahead) * source.row_stride + n, 0, 2);
            store(target + i * sizes.value_columns + n,
                  read<T>(rows + i * source.row_stride + n, sizes.head_dim - n));
          }
      }
    });
    return packed<const T*>(copy, sizes.value_columns);
  }
  // Where a recurrence leaves rows of y or grad_v; write_values brings them to the tensor.
  Stream<T*> value_sums(const MutableRows& target, int64_t batch, int64_t head, int64_t row, T* copy,
                        int64_t ahead) const {
    if (!in_place()) return packed(copy, sizes.value_columns);
    const int64_t offset = batch * target.batch_stride + head * target.head_stride + row * target.row_stride;
    return {static_cast<T*>(target.data) + offset + sizes.first_column, target.row_stride, target.head_stride,
            ahead * target.row_stride};
  }
  // Brings columns [begin, end), of those that are worked on, from the copy to the tensor.
  void write_values(const MutableRows& target, int64_t batch, int64_t head, int64_t count, int64_t row,
                    int tokens, const T* copy, int begin, int end, int64_t ahead) const {
    if (in_place()) return;
    with_element<T>(base.dtype, [&](auto element) {
      using E = typename decltype(element)::type;
      for (int64_t g = 0; g < count; g++) {
        E* rows = static_cast<E*>(target.data) + batch * target.batch_stride +
                  (head + g) * target.head_stride + row * target.row_stride + sizes.first_column;
        const T* source = copy + g * sizes.chunk * sizes.value_columns;
        for (int i = 0; i < tokens; i++)
          for (int n = begin; n < end; n += kWidth<T>) {
            __builtin_prefetch(rows + (i + ahead) * target.row_stride + n, 0, 2);
            write<T>(rows + i * target.row_stride + n, load(source + i * sizes.value_columns + n),
                     sizes.head_dim - n);
          }
      }
    });
  }

  // gamma and beta of an item's heads, padded: made once an item.
  void pad_affine(const ElementwiseScratch<T>& scratch, const Item& item) const {
    for (int64_t place = 0; place <= group(); place++) {
      const bool query = place < group();
      const Tokens<T> t = head_tokens<T>(base, sizes, query, statistics, item.batch,
                                         query ? item.kv_head * group() + place : item.kv_head);
      T *gamma = scratch.affine + place * 2 * width(), *beta = gamma + width();
      for (int e = 0; e < width(); e++) {
        gamma[e] = e >= t.feature_dim ? 0 : t.gamma ? t.gamma[e] : 1;
        beta[e] = e >= t.feature_dim || !t.beta ? 0 : t.beta[e];
      }
    }
  }
  // The tokens of the group's query head `place`, or of the key for place = group; statistics included.
  TokenRows<T> token_rows(const ElementwiseScratch<T>& scratch, const Item& item, int64_t place, int64_t row,
                          int tokens, int64_t ahead) const {
    const bool query = place < group();
    const Tokens<T> t = head_tokens<T>(base, sizes, query, statistics, item.batch,
                                       query ? item.kv_head * group() + place : item.kv_head);
    TokenRows<T> rows;
    rows.data = t.data + row * t.row_stride * bytes_of<T>(t.dtype), rows.stride = t.row_stride;
    rows.ahead = ahead;
    rows.dtype = t.dtype, rows.map = t.map, rows.norm = t.norm;
    rows.feature_dim = t.feature_dim, rows.width = width();
    rows.gamma = scratch.affine + place * 2 * width(), rows.beta = rows.gamma + width();
    T *mean = scratch.statistics + place * 2 * sizes.chunk, *rstd = mean + sizes.chunk;
    const bool given = t.norm == LayerNorm::token;
    rows.mean = given ? t.mean + row : mean, rows.rstd = given ? t.rstd + row : rstd;
    if (!given) head_statistics(rows, tokens, t.eps, mean, rstd);
    return rows;
  }
  TokenRows<T> pack_keys(const ElementwiseScratch<T>& scratch, const Item& item, int64_t row, int tokens,
                         int64_t ahead) const {
    const TokenRows<T> rows = token_rows(scratch, item, group(), row, tokens, ahead);
    pack_features(rows, tokens, scratch.keys);
    return rows;
  }
  TokenRows<T> pack_queries(const ElementwiseScratch<T>& scratch, const Item& item, int64_t place,
                            int64_t row, int tokens, int64_t ahead) const {
    const TokenRows<T> rows = token_rows(scratch, item, place, row, tokens, ahead);
    pack_features(rows, tokens, queries_of(scratch, place));
    return rows;
  }
  T* queries_of(const ElementwiseScratch<T>& scratch, int64_t place) const {
    return scratch.queries + place * sizes.chunk * width();
  }

  // z += phi(k), summed apart from zero.
  void add_keys_apart(const ElementwiseScratch<T>& scratch, int tokens, T* z) const {
    for (int e = 0; e < width(); e += kWidth<T>) {
      Vector<T> even{}, odd{};  // one sum alone would wait for itself
      int i = 0;
      for (; i + 1 < tokens; i += 2) {
        even += load(scratch.keys + i * width() + e);
        odd += load(scratch.keys + (i + 1) * width() + e);
      }
      if (i < tokens) even += load(scratch.keys + i * width() + e);
      store(z + e, load(z + e) + (even + odd));
    }
  }
  // The state that an item's rows add up to, from zero: add(row, tokens, state) adds a chunk, in a long item
  // to `recent` instead of the state.
  template <class Add>
  void sum_segment(const Item& item, const ElementwiseScratch<T>& scratch, T* state, const Add& add) const {
    LongSums<T>& sums = *scratch.long_sums[0];
    __builtin_memset(state, 0, sizes.state_size * sizeof(T));
    sums.start(sizes, item.end - item.begin, nullptr, nullptr);
    pad_affine(scratch, item);
    for (int64_t row = item.begin; row < item.end; row += sizes.chunk) {
      const int tokens = int(smaller<int64_t>(sizes.chunk, item.end - row));
      add(row, tokens, sums.active ? sums.recent : state);
      if (sums.active) sums.add(tokens);
    }
    if (sums.active) sums.copy(0, sizes.state_size, state);
  }

  // S += phi(k) v^T and z += phi(k) over an item, from zero.
  void add_keys(const Item& item, const ElementwiseScratch<T>& scratch, T* state) const {
    sum_segment(item, scratch, state, [&](int64_t row, int tokens, T* target) {
      pack_keys(scratch, item, row, tokens, sizes.chunk);
      add_keys_apart(scratch, tokens, target + sizes.state_kv);
      Recurrence<T> s{};
      s.tokens = tokens, s.rows = width(), s.lanes = sizes.value_columns, s.updates = 1, s.state = target;
      s.update_rows = packed<const T*>(scratch.keys, width());
      s.update_lanes =
          value_rows(base.v, item.batch, item.kv_head, 1, row, tokens, scratch.values, sizes.chunk);
      recur(s);
    });
  }
};

}  // namespace rebased::cpu::REBASED_ISA
