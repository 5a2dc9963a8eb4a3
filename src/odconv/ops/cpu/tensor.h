// Tensors by PyTorch's stable ABI: what is compiled against one version runs with all later ones, whatever the Python.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace odconv {

using torch::headeronly::ScalarType;
using torch::stable::get_num_threads;
using torch::stable::parallel_for;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
using Numbers = std::vector<int64_t>;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

inline std::ostream& operator<<(std::ostream& out, const Shape& shape) {
  out << "[";
  for (size_t i = 0; i < shape.size(); ++i) out << (i ? ", " : "") << shape[i];
  return out << "]";
}

inline bool is_same(const Shape& one, const Shape& other) { return std::equal(one.begin(), one.end(), other.begin(), other.end()); }

// Throw what Python knows as a RuntimeError, unless it holds.
template <class... Parts>
void require(bool holds, const Parts&... parts) {
  if (holds) return;
  std::ostringstream text;
  text << "odconv: ";
  ((text << parts), ...);
  throw std::runtime_error(text.str());
}

inline bool is_half(const Tensor& x) { return x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half; }

// The dtype that is computed with.
inline ScalarType sum_type(const Tensor& x) { return is_half(x) ? ScalarType::Float : x.scalar_type(); }

// Call with a number of a tensor's dtype, whose type that says.
template <class Run>
void with_type(ScalarType type, Run run) {
  switch (type) {
    case ScalarType::Half: return run(c10::Half());
    case ScalarType::BFloat16: return run(c10::BFloat16());
    case ScalarType::Double: return run(double());
    default: run(float());
  }
}

template <class Run>
void with_sum_type(const Tensor& x, Run run) {
  x.scalar_type() == ScalarType::Double ? run(double()) : run(float());
}

template <class Run>
void with_half_type(const Tensor& x, Run run) {
  x.scalar_type() == ScalarType::Half ? run(c10::Half()) : run(c10::BFloat16());
}

// Whether a map has strides that PyTorch takes as those of channels-last ones; of one with a single position it does not say so.
inline bool is_channels_last(const Tensor& x) {
  if (x.dim() < 4 || x.stride(1) == 0) return false;
  Numbers axes = {1};
  for (int64_t axis = x.dim() - 1; axis > 1; --axis) axes.push_back(axis);
  axes.push_back(0);
  int64_t least = 0;
  for (int64_t axis : axes) {
    const int64_t stride = x.stride(axis);
    if (x.size(axis) == 0 || stride < least || (axis == 0 && least == x.stride(1))) return false;
    least = stride * std::max<int64_t>(1, x.size(axis));
  }
  return true;
}

// A tensor of new memory, whose axes follow each other in memory in that order.
inline Tensor empty(Shape shape, ScalarType type, Shape order = {}) {
  Numbers strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0; stride *= std::max<int64_t>(1, shape[order.empty() ? i : order[i]])) strides[order.empty() ? i : order[i]] = stride;
  AtenTensorHandle made;
  const auto dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  const auto error = aoti_torch_empty_strided(shape.size(), shape.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &made);
  require(error == AOTI_TORCH_SUCCESS, "no memory for a tensor of shape ", shape);
  return Tensor(made);
}

inline Tensor zeros(Shape shape, ScalarType type) {
  Tensor made = empty(shape, type);
  std::fill_n(static_cast<char*>(made.mutable_data_ptr()), made.numel() * made.element_size(), 0);
  return made;
}

// Batch, space, channels.
inline Numbers channels_last(int64_t axes) {
  Numbers order = {0};
  for (int64_t axis = 2; axis < axes; ++axis) order.push_back(axis);
  order.push_back(1);
  return order;
}

// A map of that shape, (B, O, *map), with its channels last in memory, or first.
inline Tensor empty_map(Shape shape, ScalarType type, bool last) { return last ? empty(shape, type, channels_last(shape.size())) : empty(shape, type); }

// Whether a map's channels lie next to each other in memory, and its positions without gaps.
inline bool has_channels_last(const Tensor& x) {
  int64_t stride = 1;
  const Numbers order = channels_last(x.dim());
  for (size_t i = order.size(); i-- > 0; stride *= x.size(order[i]))
    if (x.size(order[i]) > 1 && x.stride(order[i]) != stride) return false;
  return true;
}

// The same numbers with a map's channels last in memory.
inline Tensor with_channels_last(const Tensor& x) {
  if (has_channels_last(x)) return x;
  Tensor made = empty_map(x.sizes(), x.scalar_type(), true);
  return torch::stable::copy_(made, x);
}

inline Tensor as_contiguous(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

inline Tensor converted(const Tensor& x, ScalarType type) { return x.scalar_type() == type ? x : torch::stable::to(x, type); }

inline Tensor sum_first(const Tensor& x) { return torch::stable::sum(x, Shape({0})); }

}  // namespace odconv
