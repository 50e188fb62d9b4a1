// Which rows backends take as they lie, for the operators and for what only tells of them. No torch.
#pragma once

#include <cstdint>

namespace rebased {

// Backends want a last stride of 1, and every row at a multiple of 16 bytes where rows have as many: anything
// else is copied. The kernels of bfloat16 load rows as they lie, so that of these only the stride counts. A
// size-1 dimension may have any stride.
struct RowLayout {
  bool dense = true, aligned = true;

  RowLayout(const int64_t* sizes, const int64_t* strides, int64_t dims, int64_t element_size,
            uintptr_t address, bool is_bfloat16) {
    const int64_t last = dims - 1, unit = 16;
    dense = sizes[last] == 1 || strides[last] == 1;
    if (is_bfloat16 || sizes[last] * element_size % unit != 0) return;
    aligned = address % unit == 0;
    for (int64_t i = 0; i < last; ++i) {
      aligned = aligned && (sizes[i] == 1 || strides[i] * element_size % unit == 0);
    }
  }
};

}  // namespace rebased
