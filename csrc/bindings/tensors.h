// From torch's stable tensors to a Problem: checks, copies where a layout is not understood, and allocation.
//
// The checks here come first; what they refuse Python checks once more, to say it for people
// (rebased_cuda/attention.py). std::invalid_argument arrives in Python as ValueError.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <initializer_list>
#include <limits>
#include <optional>
#include <stdexcept>
#include <string>

#include "bindings/row_layout.h"
#include "op/feature_map.h"
#include "op/problem.h"

// What a failed torch call said: there since torch 2.12 or so, null before.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace rebased {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The message: a literal, or a function that makes one, so that a call which is right allocates nothing.
inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(std::string("rebased_cuda: ") + message);
}
template <class Message>
auto require(bool condition, const Message& message) -> decltype(message(), void()) {
  if (!condition) require(false, message().c_str());
}

// A failed allocation should read "out of memory", not "API call failed".
template <class Function>
auto torch_call(Function&& function) -> decltype(function()) {
  try {
    return function();
  } catch (const std::exception&) {
    const char* what =
        torch_exception_get_what_without_backtrace ? torch_exception_get_what_without_backtrace() : nullptr;
    if (what != nullptr && *what != '\0') throw std::runtime_error(what);
    throw;
  }
}

inline Dtype dtype_of(const Tensor& q) {
  switch (q.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    default:
      throw std::invalid_argument("rebased_cuda: q: dtype must be float32, float64, float16 or bfloat16");
  }
}
inline ScalarType accumulator_type(Dtype dtype) {
  return dtype == Dtype::float64 ? ScalarType::Double : ScalarType::Float;
}

inline FeatureMap feature_map_of(const std::string& name) {
  if (name == "outer") return FeatureMap::outer;
  if (name == "square") return FeatureMap::square;
  if (name == "taylor") return FeatureMap::taylor;
  if (name == "elu") return FeatureMap::elu;
  require(name == "identity",
          [&] { return "feature_map: must be outer, square, taylor, elu or identity, got " + name; });
  return FeatureMap::identity;
}
inline LayerNorm layer_norm_of(const std::string& name) {
  if (name == "none") return LayerNorm::none;
  if (name == "token") return LayerNorm::token;
  require(name == "head", [&] { return "layer_norm: must be none, token or head, got " + name; });
  return LayerNorm::head;
}

// A tensor's sizes and strides, fetched once: each fetch crosses the ABI.
struct Layout {
  explicit Layout(const Tensor& tensor) : dims(tensor.dim()) {
    int64_t *tensor_sizes = nullptr, *tensor_strides = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor.get(), &tensor_sizes));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor.get(), &tensor_strides));
    sizes = tensor_sizes, strides = tensor_strides;
  }
  int64_t dims;
  const int64_t *sizes, *strides;
};

// The tensor, or a copy whose rows backends take as they lie.
inline Tensor with_dense_rows(const Tensor& tensor) {
  const Layout layout(tensor);
  const RowLayout rows(layout.sizes, layout.strides, layout.dims, static_cast<int64_t>(tensor.element_size()),
                       reinterpret_cast<uintptr_t>(tensor.const_data_ptr()),
                       tensor.scalar_type() == ScalarType::BFloat16);
  if (rows.dense && rows.aligned) return tensor;
  return torch_call(
      [&] { return rows.dense ? torch::stable::clone(tensor) : torch::stable::contiguous(tensor); });
}

// The addresses from a tensor's first element to behind its last; none where it has no element.
struct Extent {
  uintptr_t begin = 0, end = 0;
  bool overlaps(const Extent& other) const {
    return begin != end && other.begin != other.end && begin < other.end && other.begin < end;
  }
};

// A storage can be shrunk or freed under a tensor (untyped_storage().resize_, as sharding does between uses):
// the tensor still has its sizes, and to read it would be a crash. Refuses one that is not all in its
// storage.
inline Extent extent_of(const char* name, const Tensor& tensor) {
  const Layout layout(tensor);
  int64_t elements = 1, held = 0;
  for (int64_t i = 0; i < layout.dims; ++i) {
    if (layout.sizes[i] == 0) return {};
    elements += (layout.sizes[i] - 1) * layout.strides[i];
  }
  const int64_t size = static_cast<int64_t>(tensor.element_size());
  const int64_t needed = (tensor.storage_offset() + elements) * size;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(tensor.get(), &held));
  require(needed <= held, [&] {
    return std::string(name) + ": its storage was freed or shrunk: it takes " + std::to_string(needed) +
           " bytes and has " + std::to_string(held);
  });
  const auto begin = reinterpret_cast<uintptr_t>(tensor.const_data_ptr());
  return {begin, begin + static_cast<uintptr_t>(elements * size)};
}
inline const Tensor& with_memory(const char* name, const Tensor& tensor, Extent* extent = nullptr) {
  const Extent found = extent_of(name, tensor);
  if (extent != nullptr) *extent = found;
  return tensor;
}
inline const OptionalTensor& with_memory(const char* name, const OptionalTensor& tensor,
                                         Extent* extent = nullptr) {
  if (tensor) with_memory(name, *tensor, extent);
  return tensor;
}

// Whether an element of a tensor of this layout, the first at address `first`, lies in `memory`. A tensor
// with gaps whose extent reaches in is looked at part by part: rows that lie around the memory share none of
// it.
inline bool has_element_in(const Extent& memory, uintptr_t first, uintptr_t size, const int64_t* sizes,
                           const int64_t* strides, int64_t dims) {
  int64_t last = 0, count = 1;
  for (int64_t i = 0; i < dims; ++i) {
    if (sizes[i] == 0) return false;
    last += (sizes[i] - 1) * strides[i];
    if (strides[i] != 0) count *= sizes[i];
  }
  if (!memory.overlaps({first, first + static_cast<uintptr_t>(last + 1) * size})) return false;
  if (last + 1 == count) return true;
  for (int64_t i = 0; i < (strides[0] == 0 ? 1 : sizes[0]); ++i) {
    const uintptr_t part = first + static_cast<uintptr_t>(i * strides[0]) * size;
    if (has_element_in(memory, part, size, sizes + 1, strides + 1, dims - 1)) return true;
  }
  return false;
}
inline bool has_element_in(const Extent& memory, const Tensor& tensor) {
  const Layout layout(tensor);
  return has_element_in(memory, reinterpret_cast<uintptr_t>(tensor.const_data_ptr()), tensor.element_size(),
                        layout.sizes, layout.strides, layout.dims);
}

inline Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch_call([&] { return torch::stable::contiguous(tensor); });
}
inline OptionalTensor as_contiguous(const OptionalTensor& tensor) {
  return tensor ? OptionalTensor(as_contiguous(*tensor)) : OptionalTensor();
}

inline ConstRows const_rows(const Tensor& tensor) {
  const Layout layout(tensor);
  const auto used_stride = [&](int64_t i) { return layout.sizes[i] == 1 ? 0 : layout.strides[i]; };
  return {tensor.const_data_ptr(), used_stride(0), used_stride(1), layout.dims == 4 ? used_stride(2) : 0};
}
inline MutableRows mutable_rows(const Tensor& tensor) {
  return {tensor.mutable_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2)};
}
inline const void* const_pointer(const OptionalTensor& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

constexpr int64_t kMostDimensions = 4;

// In a test build all that an operator allocates begins as NaN (bytes of 255: NaN in every floating-point
// type), so that what a call forgets to write is seen.
inline void poison([[maybe_unused]] const Tensor& tensor) {
#if defined(REBASED_EMULATOR)
  if (tensor.numel() == 0) return;
  if (tensor.is_cpu()) {
    std::memset(tensor.mutable_data_ptr(), 255, static_cast<size_t>(tensor.numel()) * tensor.element_size());
  } else {
    const bool bytes = tensor.scalar_type() == ScalarType::Byte;
    torch::stable::fill_(tensor, bytes ? 255 : std::numeric_limits<double>::quiet_NaN());
  }
#endif
}

// On like's device. Not torch::stable::new_empty: that goes through the dispatcher, boxed, which for an
// operator's several outputs is a good part of a small call.
inline Tensor empty_strided(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dims,
                            ScalarType type) {
  return torch_call([&] {
    int32_t device = 0, index = 0;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &index));
    const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
    AtenTensorHandle handle = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(dims, sizes, strides, dtype, device, index, &handle));
    const Tensor tensor(handle);
    poison(tensor);
    return tensor;
  });
}
// Contiguous; sizes: of at most kMostDimensions.
inline Tensor empty(const Tensor& like, const int64_t* sizes, int64_t dims, ScalarType type) {
  int64_t strides[kMostDimensions], stride = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    strides[i] = stride;
    stride *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return empty_strided(like, sizes, strides, dims, type);
}
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  return empty(like, sizes.begin(), static_cast<int64_t>(sizes.size()), type);
}
// (batch, heads, rows, width) laid out in memory as `like` is: (batch, rows, heads, width) where like's heads
// are closer together than its rows, so that y.transpose(1, 2).reshape(batch, rows, -1) costs no copy.
// rebased_cuda/autograd.py tells the compiler the same rule.
inline Tensor empty_rows(const Tensor& like, int64_t batch, int64_t heads, int64_t rows, int64_t width) {
  const int64_t sizes[] = {batch, heads, rows, width};
  if (like.stride(1) >= like.stride(2)) return empty(like, sizes, 4, like.scalar_type());
  const auto extent = [](int64_t size) { return size > 1 ? size : 1; };
  const int64_t row = extent(heads) * extent(width);
  const int64_t strides[] = {extent(rows) * row, extent(width), row, 1};
  return empty_strided(like, sizes, strides, 4, like.scalar_type());
}
// The stable ABI has no undefined tensors: an absent output is one with no elements.
inline Tensor absent(const Tensor& like, ScalarType type) { return empty(like, {0}, type); }

}  // namespace rebased
