// What one call works with: sizes padded to whole tiles, the table of features, the items of work and the
// carving of the workspace. It includes simd/ and op/ alone.
//
// The shapes of buffers; a block is kLanes tokens, a panel kLanes columns, and the last panel is kWidth
// columns where that is enough:
//   tokens    [block][feature_rows][kLanes]                        q' or k' transposed: lanes are tokens
//   values    [panel][rows][kLanes]                                v, y or their gradients: lanes are columns
//   state     [panel][feature_pad][kLanes], then [feature_pad]     S or T, then its denominator
#pragma once

#include "cpu/simd/elements.h"
#include "cpu/simd/prefetch.h"
#include "op/backend.h"
#include "op/feature_map.h"

namespace rebased::cpu::REBASED_ISA {

constexpr int kSlab = 160;  // most features that are laid out at once for a block
constexpr int kLargestChunk = 128;
constexpr int64_t kLongRows = 16384;  // items of more rows than these are summed as long_sums.h says

// Feature f of the polynomial maps is X[first] X[second]: rows of a token block, which holds, after the
// feature_dim rows of q' or k', a row of ones (`taylor`'s lower degrees) and a row of zeros (padding).
template <class T>
struct FeaturePair {
  int32_t first, second;
  T weight;  // which phi(q') carries and phi(k') does not; scale is already in q'
};

// Whether phi works on each entry alone: those maps are a recurrence (recurrent/), without scores.
inline bool is_elementwise(const Problem& p) { return !is_polynomial(p.feature_map); }

template <class T>
struct Sizes {
  int feature_dim, feature_rows;  // d; d + 2 rounded up to whole tiles
  int head_dim, value_columns;    // dv; rounded up to whole vectors
  int features, feature_pad;      // F; rounded up to whole products
  int slab;                       // features of a block that are laid out at once
  int chunk, blocks;              // tokens of a chunk, kLanes-blocks of it
  bool polynomial;
  bool has_long_rows;                 // whether an item can have more than kLongRows
  T a0, a1, a2;                       // sim = a0 + a1 u + a2 u^2
  int64_t state_kv, state_size;       // elements of the numerator's state, and of both states
  int first_column = 0, all_columns;  // of the head's values: where head_dim begins, and how many there are

  explicit Sizes(const Problem& p, int chunk_limit) {
    feature_dim = int(p.feature_dim), head_dim = int(p.head_dim);
    feature_rows = int(round_up(feature_dim + 2, kRows));
    all_columns = head_dim;
    polynomial = !is_elementwise(p);
    has_long_rows = sizeof(T) == 4 && p.seqlen > kLongRows;
    const bool taylor = p.feature_map == FeatureMap::taylor;
    features =
        !polynomial ? feature_dim : feature_dim * (feature_dim + 1) / 2 + (taylor ? 1 + feature_dim : 0);
    feature_pad = int(round_up(features, polynomial ? kProductRows : larger(kRows, kWidth<T>)));
    slab = feature_pad <= kSlab ? feature_pad : kSlab / kProductRows * kProductRows;
    a0 = taylor ? 1 : 0, a1 = taylor ? 1 : 0, a2 = taylor ? T(0.5) : T(1);
    const int64_t longest = round_up(larger<int64_t>(p.seqlen, 1), kLanes<T>);
    chunk = int(smaller<int64_t>(round_up(chunk_limit, kLanes<T>), longest));
    blocks = chunk / kLanes<T>;
    set_columns(0, head_dim);
  }
  // Works on columns [begin, end) of the values only.
  void set_columns(int begin, int end) {
    first_column = begin, head_dim = end - begin;
    value_columns = int(round_up(head_dim, kWidth<T>));
    state_kv = int64_t(feature_pad) * value_columns;
    state_size = round_up(state_kv + feature_pad, 64 / int64_t(sizeof(T)));
  }
  // Whether `rows` tokens are cheaper with every score computed than with a state.
  bool quadratic_is_cheaper(int64_t rows) const {
    return polynomial && rows * (feature_dim + head_dim) <
                             4 * int64_t(features) * head_dim + int64_t(chunk) * (feature_dim + head_dim);
  }
};

template <int N>
struct Constant {
  static constexpr int value = N;
};
// Calls body(Constant<NV>, column) for each panel of values; a panel's offset is column * rows.
template <class T, class Body>
REBASED_INLINE void for_panels(int value_columns, const Body& body) {
  int column = 0;
  for (; column + kLanes<T> <= value_columns; column += kLanes<T>) body(Constant<kVectors>{}, column);
  if (column < value_columns) body(Constant<1>{}, column);
}

template <class T>
inline void fill_feature_pairs(const Problem& p, const Sizes<T>& s, FeaturePair<T>* pairs) {
  const int d = s.feature_dim, ones = d, zeros = d + 1;
  int f = 0;
  if (p.feature_map == FeatureMap::taylor) {
    pairs[f++] = {ones, ones, s.a0};
    for (int i = 0; i < d; i++) pairs[f++] = {i, ones, s.a1};
  }
  for (int entry = 0; f < s.features; entry++, f++) {
    const int first = entry % d, second = (first + entry / d) % d;
    pairs[f] = {first, second, entry < d ? s.a2 : 2 * s.a2};
  }
  for (; f < s.feature_pad; f++) pairs[f] = {zeros, zeros, 0};
}

// Hands out aligned pieces of the workspace; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <class T>
  T* take(int64_t count) {
    T* piece = base ? reinterpret_cast<T*>(base + used) : nullptr;
    used = round_up(used + count * int64_t(sizeof(T)), 64);
    return piece;
  }
};

// A sequence's rows and its segments. The segments of all sequences are numbered through.
struct Sequence {
  int64_t begin, end;
  int64_t first_segment, segments, segment_length;
  bool quadratic;
};

// One item of work: a segment of a sequence, for one kv head and its group of query heads, and one part of
// what is to be done there.
struct Item {
  int64_t sequence, batch, kv_head, segment, part;
  int64_t number;  // counts segments and kv heads, not parts
  int64_t sequence_begin, sequence_end, begin, end;
  bool quadratic, first, last;
};

// Parts are independent pieces that an item falls into at little extra cost, so that few heads keep the
// threads busy: the value columns in forward, the two sweeps in backward. Only what is still missing then is
// cut into segments, since with states that repeats half of the work.
template <class T>
struct Schedule {
  Sequence* sequences;
  int64_t num_sequences, kv_heads, parts, total_segments;
  bool packed;

  // Most segments that `fill` can make.
  static int64_t bound(const Problem& p, const Sizes<T>& s, int threads, int64_t parts) {
    const int64_t chunks = (p.seqlen + s.chunk - 1) / s.chunk;
    return p.num_sequences * larger<int64_t>(1, smaller(wanted(p, threads, parts, true), chunks));
  }
  // Segments per sequence. Segments of the quadratic form cost nothing but are uneven, so each thread gets
  // four.
  static int64_t wanted(const Problem& p, int threads, int64_t parts, bool quadratic) {
    const int64_t items = larger<int64_t>(1, p.num_sequences * p.kv_heads * parts);
    const int64_t enough = threads == 1 ? 1 : (quadratic ? 4 : 1) * threads;
    return (enough + items - 1) / items;
  }
  void fill(const Problem& p, const Sizes<T>& s, int threads, int64_t of_parts, bool needs_state) {
    parts = of_parts;
    num_sequences = p.num_sequences, kv_heads = p.kv_heads, packed = p.cu_seqlens != nullptr;
    total_segments = 0;
    int64_t previous = 0;
    for (int64_t n = 0; n < num_sequences; n++) {
      Sequence& sequence = sequences[n];
      sequence.begin = 0, sequence.end = p.seqlen;
      if (packed) {
        if (n == 0) previous = smaller(larger<int64_t>(p.cu_seqlens[0], 0), p.seqlen);
        sequence.begin = previous;
        sequence.end = previous = smaller(larger(p.cu_seqlens[n + 1], previous), p.seqlen);
      }
      const int64_t rows = sequence.end - sequence.begin;
      sequence.quadratic = !needs_state && s.quadratic_is_cheaper(rows);
      const int64_t segments = larger<int64_t>(
          1, smaller(wanted(p, threads, parts, sequence.quadratic), (rows + s.chunk - 1) / s.chunk));
      sequence.segment_length = round_up((rows + segments - 1) / segments, s.chunk);
      sequence.segments = rows == 0 ? 1 : (rows + sequence.segment_length - 1) / sequence.segment_length;
      sequence.first_segment = total_segments;
      total_segments += sequence.segments;
    }
  }
  int64_t heads() const { return total_segments * kv_heads; }  // items without their parts
  int64_t items() const { return heads() * parts; }
  Item item(int64_t number) const {
    Item item;
    item.part = number % parts;
    item.number = number / parts;
    item.kv_head = item.number % kv_heads;
    const int64_t segment = item.number / kv_heads;
    int64_t low = 0, high = num_sequences;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (sequences[middle].first_segment <= segment)
        low = middle;
      else
        high = middle;
    }
    const Sequence& s = sequences[low];
    item.sequence = low, item.batch = packed ? 0 : low, item.segment = segment - s.first_segment;
    item.sequence_begin = s.begin, item.sequence_end = s.end;
    item.begin = s.begin + item.segment * s.segment_length;
    item.end = smaller(item.begin + s.segment_length, s.end);
    item.quadratic = s.quadratic;
    item.first = item.segment == 0, item.last = item.segment == s.segments - 1;
    return item;
  }
  bool cut() const { return total_segments > num_sequences; }

  // How many heads of a segment one worker takes side by side, at most `most`. Each thread has two such runs
  // or more, so that none waits long for a slow one. The n-th head of a run is next_head(first, n).
  int64_t heads_together(int threads, int64_t most) const {
    int64_t together = smaller(most, kv_heads);
    while (together > 1 && (kv_heads % together || (threads > 1 && items() / together < 2 * threads)))
      together--;
    return larger<int64_t>(together, 1);
  }
  Item run_of_heads(int64_t number, int64_t together) const {
    return item(number / parts * together * parts + number % parts);
  }
  static Item next_head(Item item, int64_t n) {
    item.kv_head += n, item.number += n;
    return item;
  }
};

// Runs body(item, worker) for every item. Workers take the next item as they get free, so chance decides
// which worker runs an item, but no result depends on it.
template <class Body>
inline void for_items(const Parallel& parallel, int64_t items, const Body& body) {
  struct Context {
    const Body* body;
    int64_t items, next;
  } context{&body, items, 0};
  const int64_t workers = smaller<int64_t>(parallel.threads, items);
  const auto work = [](int64_t begin, int64_t end, void* pointer) {
    Context& c = *static_cast<Context*>(pointer);
    for (int64_t worker = begin; worker < end; worker++)
      for (;;) {
        const int64_t item = __atomic_fetch_add(&c.next, 1, __ATOMIC_RELAXED);
        if (item >= c.items) break;
        (*c.body)(item, int(worker));
      }
  };
  if (workers == 1)
    work(0, 1, &context);
  else if (workers > 1)
    parallel.run(workers, work, &context);
}

template <class T, class Pointer>
REBASED_INLINE auto head_rows(const RowsOf<Pointer>& rows, int64_t batch, int64_t head, Dtype dtype) {
  using Bytes = decltype((const char*)nullptr);
  return static_cast<Bytes>(rows.data) +
         (batch * rows.batch_stride + head * rows.head_stride) * bytes_of<T>(dtype);
}

}  // namespace rebased::cpu::REBASED_ISA
