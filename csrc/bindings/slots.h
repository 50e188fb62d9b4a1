// The slots of the state that a step updates in place: which ones, where they lie, what must not lie there.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "bindings/tensors.h"
#include "op/problem.h"

namespace rebased {

// The values of state_index, where reading them costs no synchronisation. A step of two sequences into one
// slot would be two writers at once.
inline void check_slots(const StepProblem& p) {
  std::vector<bool> used(static_cast<size_t>(p.num_slots));
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t slot = p.state_index[b];
    const auto got = [&] { return ", got " + std::to_string(slot) + " at index " + std::to_string(b); };
    require(slot >= -1 && slot < p.num_slots, [&] {
      return "state_index: must lie in -1 (skip) to " + std::to_string(p.num_slots - 1) + got();
    });
    if (slot < 0) continue;
    require(!used[static_cast<size_t>(slot)], [&] {
      return "state_index: must name each slot once (-1, skip, may repeat)" + got() + " again";
    });
    used[static_cast<size_t>(slot)] = true;
  }
}

// Where a part of the state lies: in `count` slots, each contiguous, `stride` elements (`pitch` bytes) apart.
struct SlotMemory {
  SlotMemory(const char* name, const Tensor& tensor) : extent(extent_of(name, tensor)) {
    const Layout layout(tensor);
    const auto size = static_cast<int64_t>(tensor.element_size());
    int64_t elements = 1;
    bool contiguous = true;
    for (int64_t i = layout.dims - 1; i > 0; --i) {
      contiguous = contiguous && (layout.sizes[i] == 1 || layout.strides[i] == elements);
      elements *= layout.sizes[i];
    }
    count = layout.sizes[0];
    stride = count > 1 ? layout.strides[0] : elements;
    require(count == 0 || (contiguous && stride >= elements),
            [&] { return std::string(name) + ": each slot must be contiguous, and apart from the others"; });
    bytes = static_cast<uintptr_t>(elements * size), pitch = static_cast<uintptr_t>(stride * size);
    // a lazy copy gets memory of its own here
    const auto begin = reinterpret_cast<uintptr_t>(tensor.mutable_data_ptr());
    extent = {begin, begin + (extent.end - extent.begin)};
  }

  // Where the pitches are the same, what holds of one slot holds of all. Others are taken to meet.
  bool overlaps(const SlotMemory& other) const {
    if (!extent.overlaps(other.extent)) return false;
    if (pitch != other.pitch) return true;
    const bool first = extent.begin <= other.extent.begin;
    const SlotMemory &low = first ? *this : other, &high = first ? other : *this;
    const uintptr_t distance = (high.extent.begin - low.extent.begin) % pitch;
    return distance < low.bytes || pitch - distance < high.bytes;
  }
  bool has_element_of(const Extent& memory, const Tensor& tensor) const {
    if (!extent.overlaps(memory)) return false;
    for (int64_t slot = 0; slot < count; ++slot) {
      const uintptr_t begin = extent.begin + static_cast<uintptr_t>(slot) * pitch;
      if (has_element_in({begin, begin + bytes}, tensor)) return true;
    }
    return false;
  }

  Extent extent;  // from the first slot to behind the last
  int64_t count, stride;
  uintptr_t bytes, pitch;  // bytes: of one slot
};

// The state is read and written part by part, in an order that each backend chooses: nothing else that is
// read may lie in its memory.
inline void check_state_apart(const SlotMemory& kv, const SlotMemory& k, const char* name,
                              const Extent& extent, const Tensor* tensor) {
  for (const auto& [part, memory] : {std::pair("kv", &kv), std::pair("k", &k)}) {
    require(!memory->has_element_of(extent, *tensor), [&, part = part] {
      return std::string("state.") + part + ": shares memory with " + name + ", and is updated in place";
    });
  }
}

}  // namespace rebased
