// A walk through memory that waits once for several of its loads. For device code.
#pragma once

#include <type_traits>

#include "cuda/device/device.cuh"

namespace rebased::REBASED_BACKEND {

// Calls visit(entry, *entry) for `count` entries from `entry` on, which are `step` apart, in this order.
// Several entries are loaded at a time; in a plain loop each load would wait for what the visit before it
// stores.
template <class T, class Visit>
DEVICE void visit_ahead(T* entry, int64_t step, int count, const Visit& visit) {
  constexpr int batch = 8;
  std::remove_const_t<T> values[batch];
  NO_UNROLL for (; count > 0; count -= batch) {
    T* next = entry;
    UNROLL for (int n = 0; n < batch; ++n, next += step) {
      if (n < count) values[n] = *next;
    }
    UNROLL for (int n = 0; n < batch; ++n, entry += step) {
      if (n < count) visit(entry, values[n]);
    }
  }
}

}  // namespace rebased::REBASED_BACKEND
