// Sums over long items. A float that takes in one token after the other is off by about sqrt(tokens)
// roundings, and by more once a token is too small to move it. In items of more than kLongRows rows a state
// is therefore base + recent: `recent` is summed from zero over kFoldRows rows and then joins `base`, where a
// carry keeps what rounding takes and gives it back the next time. A chunk of `outer` and `taylor` makes its
// state of the two sums. The recurrence of the elementwise maps takes in token after token as in short items,
// and begins anew from the two sums every kRefreshRows rows. It includes schedule.h alone.
#pragma once

#include "cpu/schedule.h"

namespace rebased::cpu::REBASED_ISA {

constexpr int64_t kFoldRows = 4096, kRefreshRows = 256;

template <class T>
struct LongSums {
  T *base, *recent, *carry;  // each laid out as the state is; null where no item is long
  int64_t size;              // elements of each
  int64_t rows, old;         // that `recent` has taken in, and that a recurrence has since it began anew
  bool active;               // whether the present item is long

  static LongSums* make(const Sizes<T>& s, Arena& arena) {
    LongSums* sums = arena.take<LongSums>(1);
    T* base = arena.take<T>(s.has_long_rows ? s.state_size : 0);
    T* recent = arena.take<T>(s.has_long_rows ? s.state_size : 0);
    T* carry = arena.take<T>(s.has_long_rows ? s.state_size : 0);
    if (sums) *sums = LongSums{base, recent, carry, s.state_size, 0, 0, false};
    return sums;
  }
  // The sums begin as a state's numerator and denominator; null: zero.
  void start(const Sizes<T>& s, int64_t item_rows, const T* kv, const T* k) {
    active = s.has_long_rows && item_rows > kLongRows;
    if (!active) return;
    size = s.state_size, rows = old = 0;
    __builtin_memset(base, 0, size * sizeof(T));
    __builtin_memset(recent, 0, size * sizeof(T));
    __builtin_memset(carry, 0, size * sizeof(T));
    if (kv) __builtin_memcpy(base, kv, s.state_kv * sizeof(T));
    if (k) __builtin_memcpy(base + s.state_kv, k, s.feature_pad * sizeof(T));
  }
  void start(const Sizes<T>& s, int64_t item_rows, const T* state) {
    start(s, item_rows, state, state + s.state_kv);
  }
  // To be called when `recent` has taken in more rows. Returns whether a recurrence is to begin anew.
  bool add(int64_t more_rows) {
    rows += more_rows, old += more_rows;
    if (rows >= kFoldRows) {
      for (int64_t i = 0; i < size; i++) {
        const T before = base[i], added = recent[i] + carry[i];
        base[i] = before + added;
        carry[i] = added - (base[i] - before);
        recent[i] = 0;
      }
      rows = 0;
    }
    if (old < kRefreshRows) return false;
    old = 0;
    return true;
  }
  // Writes entries [begin, begin + count) of the state to `target`.
  void copy(int64_t begin, int64_t count, T* target) const {
    for (int64_t i = 0; i < count; i++) target[i] = base[begin + i] + recent[begin + i];
  }
};

}  // namespace rebased::cpu::REBASED_ISA
