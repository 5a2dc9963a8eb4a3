// Dynamic convolution on the CPU: kernels are mixed a tile at a time and multiplied while the tile is in the cache.
//
// The three products of a training step (output, gradient of the input, gradient of the kernels) are one microkernel,
//
//     out[m][:] += sum_j a[m][steps[j].a] * b[steps[j].b][:]
//
// whose rows m are positions (or taps), whose vectors run over filters (or channels), and whose reduction j runs over taps
// and channels (or positions). The vectors of b are a tile of one sample's mixed kernel, stored [tap][channel][filter]; a
// points into the map, or into a zero-padded copy of the part of it that the tile needs, so nothing is ever unfolded.
//
// Outputs, and gradients of the input, depend neither on the number of threads nor on the rest of the batch: each of their
// sums has one order. Those of kernels and attentions run over the batch; they are the same from run to run.
//
// simd.h has the microkernel, kernels.h tiles of kernels, maps.h what meets what, convolve.h puts them together, planes.h is
// for depth-wise layers, attend.h for the attention; this file makes operators of them.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/view.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include "attend.h"
#include "convolve.h"
#include "planes.h"

namespace odconv {
namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;

// The spatial axes of a shape: a map of one, two or three axes as one of three, the first of them first.
Axes three(at::IntArrayRef values, int64_t fill) {
  Axes out = {fill, fill, fill};
  out[0] = values[0];
  if (values.size() > 1) out[2] = values[values.size() - 1];
  if (values.size() == 3) out[1] = values[1];
  return out;
}

template <class T, class U>
Map<T> map_of(const Tensor& x, U* data) {
  return {data, x.stride(0), x.stride(1), three(x.sizes().slice(2), 1), three(x.strides().slice(2), 0)};
}

template <class T>
const T* numbers(const Optional& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

Geometry geometry_of(const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                     int64_t groups) {
  return {three(weight.sizes().slice(3), 1), three(stride, 1), three(padding, 0), three(dilation, 1), groups};
}

// Python has checked the arguments and says what is wrong with them; this only keeps a wrong call from reading elsewhere.
void check(const Tensor& x, const Tensor& weight, const Optional& kernel, const Optional& spatial, const Optional& channel,
           const Optional& filter, int64_t groups) {
  TORCH_CHECK(weight.dim() == x.dim() + 1 && x.dim() > 2 && groups > 0 && weight.size(1) % groups == 0 &&
                  x.size(1) == weight.size(2) * groups && weight.is_contiguous() && weight.dtype() == x.dtype() &&
                  (x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble),
              "odconv: x of shape ", x.sizes(), " does not fit a contiguous weight of shape ", weight.sizes());
  const int64_t batch = x.size(0), taps = weight.numel() / (weight.size(0) * weight.size(1) * weight.size(2));
  auto fits = [&](const Optional& tensor, int64_t size) {
    return !tensor || (tensor->numel() == batch * size && tensor->is_contiguous() && tensor->dtype() == x.dtype());
  };
  TORCH_CHECK(fits(kernel, weight.size(0)) && fits(spatial, taps) && fits(channel, x.size(1)) && fits(filter, weight.size(1)) &&
                  (kernel || weight.size(0) == 1),
              "odconv: attentions do not fit x of shape ", x.sizes(), " and a weight of shape ", weight.sizes());
}

Tensor conv(const Tensor& x, const Tensor& weight, const Optional& kernel, const Optional& spatial,
            const Optional& channel, const Optional& filter, at::IntArrayRef stride, at::IntArrayRef padding,
            at::IntArrayRef dilation, int64_t groups) {
  check(x, weight, kernel, spatial, channel, filter, groups);
  const Geometry g = geometry_of(weight, stride, padding, dilation, groups);
  std::vector<int64_t> size = {x.size(0), weight.size(1)};
  for (int64_t a = 0; a < int64_t(stride.size()); ++a)
    size.push_back((x.size(a + 2) + 2 * padding[a] - dilation[a] * (weight.size(a + 3) - 1) - 1) / stride[a] + 1);
  Tensor y = at::empty(size, x.options().memory_format(x.suggest_memory_format()));
  const int64_t filters = weight.size(1) / groups, channels = weight.size(2);
  const int64_t taps = g.kernel[0] * g.kernel[1] * g.kernel[2], one = weight.numel() / weight.size(0);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* data = weight.const_data_ptr<T>();
    const Kernels<T> kernels = {data, weight.size(0), one, channels, filters, taps, taps, channels * taps};
    const Weights<T> weights = {numbers<T>(kernel), numbers<T>(spatial), numbers<T>(channel), numbers<T>(filter)};
    const auto out = map_of<T>(y, y.mutable_data_ptr<T>());
    if (by_plane(x, weight, groups) && y.is_contiguous())
      return convolve_planes<T>(x.const_data_ptr<T>(), three(x.sizes().slice(2), 1), data, weight.size(0), groups, weights,
                                x.size(0), forward_phase(g, out.size), g.stride, y.mutable_data_ptr<T>());
    convolve<T>(map_of<const T>(x, x.const_data_ptr<T>()), out, kernels, groups, weights,
                x.size(0), {forward_phase(g, out.size)});
  };
  x.scalar_type() == at::kDouble ? run(double()) : run(float());
  return y;
}

Gradients conv_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Optional& kernel, const Optional& spatial,
    const Optional& channel, const Optional& filter, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool to_x, bool to_weights) {
  check(x, weight, kernel, spatial, channel, filter, groups);
  if (weight.size(1) == groups && weight.size(2) == 1)
    return depthwise_backward(grad, x, weight, kernel, spatial, channel, filter, stride, padding, dilation, to_x, to_weights);
  const Geometry g = geometry_of(weight, stride, padding, dilation, groups);
  const int64_t n = weight.size(0), batch = x.size(0), filters = weight.size(1) / groups, channels = weight.size(2);
  const int64_t taps = g.kernel[0] * g.kernel[1] * g.kernel[2], one = weight.numel() / n;
  auto none = [&] { return at::empty({0}, x.options()); };
  Tensor x_grad = none(), weight_grad = none(), kernel_grad = none(), spatial_grad = none(), channel_grad = none(),
         filter_grad = none();
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* data = weight.const_data_ptr<T>();
    const auto upstream = map_of<const T>(grad, grad.const_data_ptr<T>());
    if (to_x) {
      const std::vector<Phase> phases = backward_phases(g, three(x.sizes().slice(2), 1));
      int64_t met = 0;  // inputs that some output reads; a stride beyond the kernel leaves others
      for (const Phase& phase : phases) met += phase.count[0] * phase.count[1] * phase.count[2];
      x_grad = met * batch * x.size(1) == x.numel() ? at::empty_like(x) : at::zeros_like(x);
      const auto out = map_of<T>(x_grad, x_grad.mutable_data_ptr<T>());
      const Kernels<T> kernels = {data, n, one, filters, channels, taps, channels * taps, taps};
      const Weights<T> weights = {numbers<T>(kernel), numbers<T>(spatial), numbers<T>(filter), numbers<T>(channel)};
      convolve<T>(upstream, out, kernels, groups, weights, batch, phases);
    }
    if (to_weights) {
      weight_grad = at::empty_like(weight);
      const Kernels<T> kernels = {data, n, one, channels, filters, taps, taps, channels * taps};
      const Weights<T> weights = {numbers<T>(kernel), numbers<T>(spatial), numbers<T>(channel), numbers<T>(filter)};
      const std::vector<Span> columns = columns_of(kernels);
      const int64_t wide = columns.size();
      const std::vector<Span> rows = rows_of(kernels, ceil_div(4 * at::get_num_threads(), wide * groups));
      const int64_t high = rows.size(), count = groups * wide * high;
      Partial partial = {at::zeros({count, batch, n}, x.options()), at::zeros({count, batch, taps}, x.options()),
                            at::zeros({wide, batch, groups * channels}, x.options()),
                            at::zeros({high, batch, groups * filters}, x.options())};
      gradients<T>(map_of<const T>(x, x.const_data_ptr<T>()), upstream, kernels, groups, weights,
                   batch, forward_phase(g, upstream.size), rows, columns, weight_grad.mutable_data_ptr<T>(), partial);
      kernel_grad = partial.shares.sum(0);
      std::vector<int64_t> shape = {batch};
      for (int64_t size : weight.sizes().slice(3)) shape.push_back(size);
      spatial_grad = partial.taps.sum(0).view(shape);
      channel_grad = partial.rows.sum(0);
      filter_grad = partial.lanes.sum(0);
    }
  };
  x.scalar_type() == at::kDouble ? run(double()) : run(float());
  return {x_grad, weight_grad, kernel_grad, spatial_grad, channel_grad, filter_grad};
}

}  // namespace
}  // namespace odconv

TORCH_LIBRARY_IMPL(odconv, CPU, library) {
  library.impl("conv", odconv::conv);
  library.impl("conv_backward", odconv::conv_backward);
  library.impl("attend", odconv::attend);
}
