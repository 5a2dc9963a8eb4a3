// Dynamic convolution on the CPU: kernels are mixed a tile at a time and multiplied while the tile is in the cache.
//
// The three products of a training step (output, gradient of the input, gradient of the kernels) are one microkernel,
//
//     out[m][:] += sum_j a[m][steps[j].a] * b[steps[j].b][:]
//
// whose rows m are positions (or taps), whose vectors run over filters (or channels), and whose reduction j runs over taps
// and channels (or positions). The vectors of b are a tile of one sample's mixed kernel, stored [channel][tap][filter]; a
// points into the map, or into a zero-padded copy of the part of it that the tile needs, so nothing is ever unfolded.
//
// Outputs, and gradients of the input, depend neither on the number of threads nor on the rest of the batch: each of their
// sums has one order. Those of kernels and attentions run over the batch; they are the same from run to run.
//
// simd.h has the microkernel, kernels.h tiles of kernels, maps.h what meets what; convolve.h puts them together and explains
// the whole, half.h and half_gradients.h do so in bfloat16 and float16; epilogue.h is what is done to outputs besides. Forms of their
// own have kernels of one tap on contiguous maps, points.h, maps of few positions, samples.h, depth-wise layers, planes.h, and those on channels-last
// maps, depthwise.h. cells.h has the gradients of cells, attend.h the attention; this file makes operators of them.

#include "attend.h"
#include "cells.h"
#include "depthwise.h"
#include "half_gradients.h"
#include "planes.h"
#include "points.h"
#include "samples.h"

namespace odconv {
namespace {

// The spatial axes of a shape: a map of one, two or three axes as one of three, the first of them first.
Axes three(Shape values, int64_t fill) {
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

template <class T>
Bias<T> bias_of(const Optional& bias) {
  return {numbers<T>(bias), bias && bias->size(0) > 1 ? bias->size(1) : 0};
}

Geometry geometry_of(Shape kernel, Shape stride, Shape padding, Shape dilation,
                     int64_t groups) {
  return {three(kernel, 1), three(stride, 1), three(padding, 0), three(dilation, 1), groups};
}

// Python has checked the arguments of layers and says what is wrong with them; these checks keep a direct call of an operator,
// with whatever arguments, from dividing by zero and from reading or writing elsewhere.
bool is_plain(const Tensor& tensor, const Tensor& x) {
  return tensor.is_contiguous() && tensor.scalar_type() == x.scalar_type() && tensor.is_cpu();
}

// Whether an attention has the dtype of x, or that of its sums.
bool is_gate(const Tensor& tensor, const Tensor& x) {
  return tensor.is_contiguous() && tensor.is_cpu() && (tensor.scalar_type() == x.scalar_type() || tensor.scalar_type() == sum_type(x));
}

// As it is computed with: numbers of 16 bits in float32.
Optional in_sums(const Optional& tensor) { return tensor ? Optional(converted(*tensor, sum_type(*tensor))) : tensor; }

bool is_strided(const Tensor& x) { return x.layout() == torch::headeronly::Layout::Strided && x.is_cpu(); }

bool are_numbers(const Tensor& x) {
  return is_strided(x) && (x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::Double);
}

// The shape of the output, of a geometry that was checked.
std::vector<int64_t> check_geometry(const Tensor& x, int64_t filters, Shape kernel, Shape stride,
                                    Shape padding, Shape dilation) {
  const size_t axes = x.dim() - 2;
  constexpr int64_t MOST = int64_t(1) << 31;  // no sum or product of two overflows
  auto within = [&](Shape values, int64_t least) {
    return values.size() == axes && std::all_of(values.begin(), values.end(), [&](int64_t v) { return least <= v && v < MOST; });
  };
  require(within(kernel, 1) && within(stride, 1) && within(padding, 0) && within(dilation, 1), "kernel size ", kernel,
          ", stride ", stride, ", padding ", padding, " and dilation ", dilation, " must have ", axes,
          " numbers each, of at least 1, 1, 0 and 1");
  std::vector<int64_t> size = {x.size(0), filters};
  for (size_t a = 0; a < axes; ++a) {
    const int64_t reach = dilation[a] * (kernel[a] - 1) + 1, extent = x.size(a + 2) + 2 * padding[a];
    require(x.size(a + 2) < MOST && reach <= extent, "a kernel that reaches over ", reach, " does not fit a padded map of ",
            extent);
    size.push_back((extent - reach) / stride[a] + 1);
  }
  return size;
}

void check_weight(const Tensor& x, const Tensor& weight, int64_t groups) {
  require((are_numbers(x) || (is_half(x) && is_strided(x))) && x.dim() > 2 && x.dim() < 6 && x.numel() > 0,
          "x must have 1, 2 or 3 axes of space, numbers of floating point, and some of them, got shape ", x.sizes());
  require(weight.dim() == x.dim() + 1 && weight.numel() > 0 && is_plain(weight, x) && groups > 0 &&
              weight.size(1) % groups == 0 && x.size(1) == weight.size(2) * groups,
          "x of shape ", x.sizes(), " does not fit a contiguous weight of shape ", weight.sizes(), " and its dtype, in ",
          groups, " groups");
}

// The same, of arguments that were checked.
std::vector<int64_t> check(const Tensor& x, const Tensor& weight, const Optional& kernel, const Optional& spatial,
                           const Optional& channel, const Optional& filter, const Numbers& stride, const Numbers& padding,
                           const Numbers& dilation, int64_t groups) {
  check_weight(x, weight, groups);
  const int64_t batch = x.size(0), taps = weight.numel() / (weight.size(0) * weight.size(1) * weight.size(2));
  auto fits = [&](const Optional& tensor, int64_t size) {
    return !tensor || (tensor->dim() > 1 && tensor->size(0) == batch && tensor->numel() == batch * size && is_gate(*tensor, x));
  };
  require(fits(kernel, weight.size(0)) && fits(spatial, taps) && fits(channel, x.size(1)) && fits(filter, weight.size(1)) &&
              (kernel || weight.size(0) == 1 || weight.size(0) == batch),
          "attentions do not fit x of shape ", x.sizes(), " and a weight of shape ", weight.sizes());
  return check_geometry(x, weight.size(1), weight.sizes().slice(3), stride, padding, dilation);
}

// Of all heads together, or 0 where one has none or there are more than a matrix may have rows.
int64_t outputs_of(const Numbers& sizes) {
  int64_t outputs = 0;
  for (int64_t size : sizes) {
    if (size < 1 || size > (int64_t(1) << 31)) return 0;
    outputs += size;
  }
  return outputs;
}

Tensor pool_checked(const Tensor& x) {
  require((are_numbers(x) || (is_half(x) && is_strided(x))) && x.dim() > 2 && x.numel() > 0,
          "x must be a map of numbers of floating point, got shape ", x.sizes());
  return pool(x);
}

std::vector<Tensor> attend_checked(const Tensor& pooled, const Optional& fc, const std::vector<Tensor>& norm, int64_t groups, double eps,
                                   const std::vector<Tensor>& weights, const std::vector<Tensor>& biases, const Numbers& sizes,
                                   const std::vector<double>& gains, int64_t softmax, const Optional& temperature) {
  require(are_numbers(pooled) && pooled.dim() == 2 && pooled.size(1) > 0 && pooled.is_contiguous(),
          "pooled must be contiguous numbers (B, C), got shape ", pooled.sizes());
  require(!weights.empty() && (weights[0].scalar_type() == pooled.scalar_type() || (is_half(weights[0]) && pooled.scalar_type() == ScalarType::Float)),
          "the layers of the attention must have the dtype of pooled, or 16 bits beside float32");
  const int64_t hidden = fc && fc->dim() > 0 ? fc->size(0) : pooled.size(1), outputs = outputs_of(sizes);
  auto fits = [&](const Tensor& tensor, int64_t rows, int64_t columns) {
    return tensor.dim() > 0 && tensor.size(0) == rows && rows > 0 && tensor.numel() == rows * columns && is_plain(tensor, weights[0]);
  };
  bool all = (!fc || fits(*fc, hidden, pooled.size(1))) && norm.size() < 5 && norm.size() != 3 && groups > 0 && hidden % groups == 0 &&
             (weights.size() == 1 || weights.size() == sizes.size()) && biases.size() == weights.size() && gains.size() == sizes.size() &&
             outputs > 0 && softmax < int64_t(sizes.size());
  for (const Tensor& tensor : norm) all = all && fits(tensor, hidden, 1);
  for (size_t i = 0; all && i < weights.size(); ++i) {
    const int64_t rows = weights.size() == 1 ? outputs : sizes[i];
    all = fits(weights[i], rows, hidden) && fits(biases[i], rows, 1);
  }
  require(all, "the layers of the attention do not fit pooled of shape ", pooled.sizes(), " and each other");
  require(!temperature || (temperature->scalar_type() == ScalarType::Float && temperature->numel() == 1 && temperature->is_cpu()),
          "temperature must be one number in float32");
  return attend(pooled, fc, norm, groups, eps, {weights, biases, sizes, gains, softmax}, temperature);
}

// What is done to the outputs, in the dtype of sums: the bias, the activation, and where the sums of lines go, or nowhere; and
// whether they are written past the caches.
struct Extras {
  Optional bias;
  std::string_view activation;
  Tensor line_sums;  // (B, lines, O), or undefined
};

template <class T>
Epilogue<T> epilogue_of(const Extras& extras, bool streamed = false) {
  const Tensor& sums = extras.line_sums;
  return {bias_of<T>(extras.bias), extras.activation, sums.defined() ? sums.mutable_data_ptr<T>() : nullptr,
          sums.defined() ? sums.size(1) : 0, sums.defined() ? sums.size(2) : 0, streamed};
}

// Whether 16 bits are multiplied as they are, with so many channels a group.
bool by_pairs(ScalarType dtype, int64_t channels, int64_t groups) {
  return (groups == 1 || channels % 2 == 0) && multiplies_pairs(dtype);
}

// The kernels of a weight of 16 bits.
template <class T>
Kernels<T> kernels_of(const Tensor& weight, int64_t groups, bool per_sample) {
  const int64_t channels = weight.size(2), one = weight.numel() / weight.size(0), taps = one / (weight.size(1) * channels);
  return {weight.const_data_ptr<T>(), per_sample ? 1 : weight.size(0), one, channels, weight.size(1) / groups, taps, taps, channels * taps,
          per_sample ? one : 0};
}

// Kernels packed for conv_half, or nothing where that does not take them.
Tensor pack_kernels(const Tensor& weight, int64_t groups) {
  require(weight.dim() > 3 && weight.dim() < 7 && weight.numel() > 0 && is_half(weight) && weight.is_contiguous() && groups > 0 &&
              weight.size(1) % groups == 0,
          "weight must be contiguous numbers of 16 bits (n, O, C / groups, ...), got shape ", weight.sizes());
  if ((weight.size(1) == groups && weight.size(2) == 1) || !by_pairs(weight.scalar_type(), weight.size(2), groups))
    return empty({0}, weight.scalar_type());
  Tensor out;
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T> kernels = kernels_of<T>(weight, groups, false);
    out = empty({groups * packed_of(kernels).from.back()}, weight.scalar_type());
    pack_half<T>(kernels, groups, out.mutable_data_ptr<T>());
  };
  with_half_type(weight, run);
  return out;
}

// In bfloat16 and float16, by products of pairs.
Tensor conv_half(const Tensor& x, const Tensor& weight, const Optional& kernel, const Optional& spatial, const Optional& channel,
                 const Optional& filter, const Optional& packed, const Extras& extras, const std::vector<int64_t>& size, const Geometry& g) {
  const bool per_sample = !kernel && weight.size(0) > 1;
  const Optional shares = in_sums(kernel), by_tap = in_sums(spatial), by_channel = in_sums(channel), by_filter = in_sums(filter);
  const Gates<float> gates = {numbers<float>(shares), numbers<float>(by_tap), numbers<float>(by_channel), numbers<float>(by_filter)};
  const Tensor last = with_channels_last(x), out = empty_map(size, x.scalar_type(), true);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T> kernels = kernels_of<T>(weight, g.groups, per_sample);
    require(!packed || (!per_sample && is_plain(*packed, x) && packed->numel() == g.groups * packed_of(kernels).from.back()),
            "packed must be what pack makes of weight");
    const Axes y_size = three(Shape(size).slice(2), 1);
    convolve_half<T>(last.const_data_ptr<T>(), three(x.sizes().slice(2), 1), kernels, numbers<T>(packed), g.groups, gates, epilogue_of<float>(extras),
                     x.size(0), forward_phase(g, y_size), y_size, out.mutable_data_ptr<T>());
  };
  with_half_type(x, run);
  return is_channels_last(x) ? out : as_contiguous(out);
}

// Whether the vectors of a depth-wise layer run over channels.
bool is_over_channels(const Tensor& x, const Tensor& weight, int64_t groups) {
  return weight.size(1) == groups && weight.size(2) == 1 && groups >= VECTOR_BYTES / 4 && (is_half(x) || !x.is_contiguous());
}

// Depth-wise, on channels-last maps.
Tensor conv_depthwise(const Tensor& x, const Tensor& weight, const Optional& kernel, const Optional& spatial, const Optional& channel,
                      const Optional& filter, const Extras& extras, const std::vector<int64_t>& size, const Geometry& g) {
  const Optional kernels = in_sums(weight), shares = in_sums(kernel), taps = in_sums(spatial), rows = in_sums(channel), lanes = in_sums(filter);
  const int64_t tap_count = g.kernel[0] * g.kernel[1] * g.kernel[2];
  const Tensor last = with_channels_last(x), out = empty_map(size, x.scalar_type(), true);
  const Tensor mixed = empty({x.size(0), tap_count, g.groups}, sum_type(x));
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Stored<T>::Sum;
    const Gates<Sum> gates = {numbers<Sum>(shares), numbers<Sum>(taps), numbers<Sum>(rows), numbers<Sum>(lanes)};
    mix_taps<Sum>(kernels->const_data_ptr<Sum>(), weight.size(0), !kernel && weight.size(0) > 1, tap_count, g.groups, gates, x.size(0), mixed.mutable_data_ptr<Sum>());
    const Axes y_size = three(Shape(size).slice(2), 1);
    convolve_depthwise<T>(last.const_data_ptr<T>(), three(x.sizes().slice(2), 1), mixed.const_data_ptr<Sum>(), tap_count,
                          epilogue_of<Sum>(extras), g.groups, x.size(0), forward_phase(g, y_size), y_size, out.mutable_data_ptr<T>());
  });
  return is_channels_last(x) ? out : as_contiguous(out);
}

// What the vectors run over in float32 and float64: a channel's positions, depth-wise or with one tap, or filters.
enum class Layout { planes, points, filters };

Layout layout_of(const Tensor& x, const Tensor& weight, const Geometry& g) {
  if (is_channels_last(x) || !x.is_contiguous()) return Layout::filters;
  if (by_plane(x, weight, g.groups)) return Layout::planes;
  return by_point(x, g) ? Layout::points : Layout::filters;
}

// In float32 and float64.
Tensor conv_dense(const Tensor& x, const Tensor& weight, const Optional& kernel, const Optional& spatial, const Optional& channel,
                  const Optional& filter, const Extras& extras, const std::vector<int64_t>& size, const Geometry& g, Layout layout) {
  const Tensor y = empty_map(size, x.scalar_type(), is_channels_last(x));
  const int64_t filters = weight.size(1) / g.groups, channels = weight.size(2);
  const int64_t taps = g.kernel[0] * g.kernel[1] * g.kernel[2], one = weight.numel() / weight.size(0);
  const bool per_sample = !kernel && weight.size(0) > 1;
  const int64_t n = per_sample ? 1 : weight.size(0);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* data = weight.const_data_ptr<T>();
    const Gates<T> gates = {numbers<T>(kernel), numbers<T>(spatial), numbers<T>(channel), numbers<T>(filter)};
    const Phase phase = forward_phase(g, three(Shape(size).slice(2), 1));
    if (layout == Layout::planes)
      return convolve_planes<T>(x.const_data_ptr<T>(), three(x.sizes().slice(2), 1), data, n, per_sample, g.groups, gates,
                                epilogue_of<T>(extras), x.size(0), phase, g.stride, y.mutable_data_ptr<T>());
    const Kernels<T> kernels = {data, n, one, channels, filters, taps, taps, channels * taps, per_sample ? one : 0};
    if (layout == Layout::points)
      return convolve_points<T>(x.const_data_ptr<T>(), kernels, g.groups, gates, epilogue_of<T>(extras), x.size(0), x.numel() / (x.size(0) * x.size(1)),
                                y.mutable_data_ptr<T>());
    convolve<T>(map_of<const T>(x, x.const_data_ptr<T>()), map_of<T>(y, y.mutable_data_ptr<T>()), kernels, g.groups, gates,
                epilogue_of<T>(extras, is_streamed(y, filters)), x.size(0), {phase});
  };
  with_sum_type(x, run);
  return y;
}

// The means of maps, (B, O), of the sums of their lines, which are in one order.
Tensor means_of(const Tensor& line_sums, int64_t positions) {
  const int64_t lines = line_sums.size(1), filters = line_sums.size(2);
  const Tensor means = empty({line_sums.size(0), filters}, line_sums.scalar_type());
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* in = line_sums.const_data_ptr<T>();
    T* out = means.mutable_data_ptr<T>();
    parallel_for(0, line_sums.size(0), std::max<int64_t>(1, 32768 / (lines * filters)), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        sum_channels<T>(in + b * lines * filters, lines, filters, out + b * filters);
        for (int64_t o = 0; o < filters; ++o) out[b * filters + o] /= T(positions);
      }
    });
  };
  with_sum_type(line_sums, run);
  return means;
}

// The convolution and its epilogue; the means are undefined where they are not wanted.
std::tuple<Tensor, Tensor> conv_fused(const Tensor& x, const Tensor& weight, const Optional& kernel, const Optional& spatial,
                                      const Optional& channel, const Optional& filter, const Numbers& stride, const Numbers& padding,
                                      const Numbers& dilation, int64_t groups, const Optional& bias, std::string_view activation,
                                      bool means, const Optional& packed) {
  const std::vector<int64_t> size = check(x, weight, kernel, spatial, channel, filter, stride, padding, dilation, groups);
  require(!bias || (bias->dim() == 2 && (bias->size(0) == 1 || bias->size(0) == size[0]) && bias->size(1) == size[1] && is_plain(*bias, x)),
          "bias must be contiguous numbers (1 or B, O) in the dtype of x");
  const Geometry g = geometry_of(weight.sizes().slice(3), stride, padding, dilation, groups);
  const bool over_channels = is_over_channels(x, weight, groups);
  if (is_half(x) && !over_channels && !by_pairs(x.scalar_type(), weight.size(2), groups)) {
    auto [y, found] = conv_fused(*in_sums(x), *in_sums(weight), in_sums(kernel), in_sums(spatial), in_sums(channel), in_sums(filter), stride,
                                 padding, dilation, groups, in_sums(bias), activation, means, {});
    return {converted(y, x.scalar_type()), found};
  }
  const Layout layout = over_channels || is_half(x) ? Layout::filters : layout_of(x, weight, g);
  const Axes count = three(Shape(size).slice(2), 1);
  Extras extras = {in_sums(bias), activation, {}};
  const bool by_line = means && count[1] * count[2] > 1;  // a map of one axis has no lines to sum
  if (by_line) extras.line_sums = empty({size[0], layout == Layout::filters ? count[0] * count[1] : 1, size[1]}, sum_type(x));
  const Tensor y = over_channels ? conv_depthwise(x, weight, kernel, spatial, channel, filter, extras, size, g)
                   : is_half(x)  ? conv_half(x, weight, kernel, spatial, channel, filter, packed, extras, size, g)
                                 : conv_dense(x, weight, kernel, spatial, channel, filter, extras, size, g, layout);
  return {y, by_line ? means_of(extras.line_sums, count[0] * count[1] * count[2]) : means ? pool(y) : Tensor()};
}

Tensor conv(const Tensor& x, const Tensor& weight, const Optional& kernel, const Optional& spatial, const Optional& channel,
            const Optional& filter, const Numbers& stride, const Numbers& padding, const Numbers& dilation, int64_t groups,
            const Optional& bias) {
  return std::get<0>(conv_fused(x, weight, kernel, spatial, channel, filter, stride, padding, dilation, groups, bias, "none", false, {}));
}

// Arguments of kernels that are put together of cells, (n, co, ci, 1, ...), by shares, (B, taps * (O / co) * (C / ci), n).
std::vector<int64_t> check_cells(const Tensor& x, const Tensor& cells, const Tensor& shares, int64_t filters, const Numbers& kernel,
                                 const Numbers& stride, const Numbers& padding, const Numbers& dilation) {
  require(are_numbers(x) && x.dim() > 2 && x.dim() < 6 && x.numel() > 0, "x must have 1, 2 or 3 axes of space, "
          "numbers in float32 or float64, and some of them, got shape ", x.sizes());
  const std::vector<int64_t> size = check_geometry(x, filters, kernel, stride, padding, dilation);
  require(cells.dim() == x.dim() + 1 && cells.numel() > 0 && cells.numel() == cells.size(0) * cells.size(1) * cells.size(2) &&
              is_plain(cells, x) && filters > 0 && filters % cells.size(1) == 0 && x.size(1) % cells.size(2) == 0,
          "cells of shape ", cells.sizes(), " do not make kernels of ", filters, " filters for x of shape ", x.sizes());
  int64_t pieces = filters / cells.size(1) * (x.size(1) / cells.size(2));
  for (int64_t taps : kernel) pieces *= taps;
  require(shares.dim() == 3 && shares.size(0) == x.size(0) && shares.size(1) == pieces && shares.size(2) == cells.size(0) &&
              is_plain(shares, x),
          "shares must have shape (B, ", pieces, ", ", cells.size(0), "), got ", shares.sizes());
  return size;
}

// Kernels that are put together of cells, as outputs meet them, or the gradient of x.
template <class T>
Kernels<T> kernels_of_cells(const Tensor& cells, const Tensor& shares, int64_t filters, int64_t channels, int64_t taps, bool from_outputs) {
  const int64_t n = cells.size(0), co = cells.size(1), ci = cells.size(2), across = channels / ci, blocks = filters / co * across;
  const T *data = cells.const_data_ptr<T>(), *rows = shares.const_data_ptr<T>();
  if (from_outputs) return {data, n, co * ci, channels, filters, taps, 1, ci, 0, Cells<T>{rows, ci, co, 1, across, blocks}};
  return {data, n, co * ci, filters, channels, taps, ci, 1, 0, Cells<T>{rows, co, ci, across, 1, blocks}};
}

Tensor conv_cells(const Tensor& x, const Tensor& cells, const Tensor& shares, int64_t filters, const Numbers& kernel,
                  const Numbers& stride, const Numbers& padding, const Numbers& dilation) {
  const std::vector<int64_t> size = check_cells(x, cells, shares, filters, kernel, stride, padding, dilation);
  const Geometry g = geometry_of(kernel, stride, padding, dilation, 1);
  const int64_t taps = g.kernel[0] * g.kernel[1] * g.kernel[2];
  const Tensor y = empty_map(size, x.scalar_type(), is_channels_last(x));
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T> kernels = kernels_of_cells<T>(cells, shares, filters, x.size(1), taps, true);
    convolve<T>(map_of<const T>(x, x.const_data_ptr<T>()), map_of<T>(y, y.mutable_data_ptr<T>()), kernels, 1, {}, {}, x.size(0),
                {forward_phase(g, three(Shape(size).slice(2), 1))});
  };
  with_sum_type(x, run);
  return y;
}

// A place for the gradient of x, with zeros where no output reads: a stride beyond the kernel leaves inputs out.
Tensor empty_gradient(const Tensor& x, const std::vector<Phase>& phases) {
  int64_t met = 0;
  for (const Phase& phase : phases) met += phase.count[0] * phase.count[1] * phase.count[2];
  Tensor made = torch::stable::empty_like(x);
  return met * x.size(0) * x.size(1) == x.numel() ? made : torch::stable::zero_(made);
}

// The gradients of x, of the cells and of the shares; what is not asked for is empty.
std::tuple<Tensor, Tensor, Tensor> conv_cells_backward(const Tensor& grad, const Tensor& x, const Tensor& cells, const Tensor& shares,
                                                       const Numbers& kernel, const Numbers& stride, const Numbers& padding,
                                                       const Numbers& dilation, bool to_x, bool to_kernels) {
  require(grad.dim() == x.dim() && grad.scalar_type() == x.scalar_type() && is_strided(grad),
          "grad must be numbers in the dtype of x and with its axes, got shape ", grad.sizes());
  const int64_t filters = grad.size(1), channels = x.size(1), batch = x.size(0);
  const std::vector<int64_t> size = check_cells(x, cells, shares, filters, kernel, stride, padding, dilation);
  require(is_same(grad.sizes(), size), "grad must have shape ", size, ", got ", grad.sizes());
  const Geometry g = geometry_of(kernel, stride, padding, dilation, 1);
  const int64_t taps = g.kernel[0] * g.kernel[1] * g.kernel[2];
  auto none = [&] { return empty({0}, x.scalar_type()); };
  Tensor x_grad = none(), cells_grad = none(), shares_grad = none();
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const auto upstream = map_of<const T>(grad, grad.const_data_ptr<T>());
    if (to_x) {
      const std::vector<Phase> phases = backward_phases(g, three(x.sizes().slice(2), 1));
      x_grad = empty_gradient(x, phases);
      const Kernels<T> kernels = kernels_of_cells<T>(cells, shares, filters, channels, taps, false);
      convolve<T>(upstream, map_of<T>(x_grad, x_grad.mutable_data_ptr<T>()), kernels, 1, {}, {}, batch, phases);
    }
    if (to_kernels) {
      const Kernels<T> kernels = kernels_of_cells<T>(cells, shares, filters, channels, taps, true);
      const std::vector<Tile> tiles = cell_tiles(kernels);
      cells_grad = empty(cells.sizes(), x.scalar_type());
      const Tensor parts = empty({int64_t(tiles.size()), batch, shares.size(1), shares.size(2)}, x.scalar_type());
      cell_gradients<T>(map_of<const T>(x, x.const_data_ptr<T>()), upstream, kernels, batch, forward_phase(g, upstream.size), tiles,
                        cells_grad.mutable_data_ptr<T>(), parts.mutable_data_ptr<T>());
      shares_grad = sum_first(parts);
    }
  };
  with_sum_type(x, run);
  return {x_grad, cells_grad, shares_grad};
}

// Arguments of conv_samples: the shares (B, n, taps) are of each sample's taps.
std::vector<int64_t> check_samples(const Tensor& x, const Tensor& weight, const Tensor& shares, const Numbers& stride, const Numbers& padding,
                                   const Numbers& dilation) {
  check_weight(x, weight, 1);
  require(are_numbers(x) && shares.dim() == 3 && shares.size(0) == x.size(0) && shares.size(1) == weight.size(0) &&
              shares.size(1) * shares.size(2) * weight.size(1) * weight.size(2) == weight.numel() && is_plain(shares, x),
          "shares of shape ", shares.sizes(), " do not fit x of shape ", x.sizes(), " and a weight of shape ", weight.sizes(),
          ", in float32 or float64");
  return check_geometry(x, weight.size(1), weight.sizes().slice(3), stride, padding, dilation);
}

template <class T>
Batch<T> batch_of(const Tensor& x, const Tensor& weight, const Tensor& shares, const std::vector<int64_t>& size, const Geometry& g) {
  const Axes in = three(x.sizes().slice(2), 1), out = three(Shape(size).slice(2), 1);
  return {weight.const_data_ptr<T>(), shares.const_data_ptr<T>(), x.size(0), weight.size(0), weight.size(1), weight.size(2), shares.size(2),
          in[0] * in[1] * in[2], out[0] * out[1] * out[2], pairs_of(g, in, out)};
}

Tensor conv_samples(const Tensor& x, const Tensor& weight, const Tensor& shares, const Numbers& stride, const Numbers& padding,
                    const Numbers& dilation) {
  const std::vector<int64_t> size = check_samples(x, weight, shares, stride, padding, dilation);
  const Geometry g = geometry_of(weight.sizes().slice(3), stride, padding, dilation, 1);
  const Tensor last = with_channels_last(x), y = empty_map(size, x.scalar_type(), true);
  with_sum_type(x, [&](auto zero) {
    using T = decltype(zero);
    convolve_samples<T>(batch_of<T>(x, weight, shares, size, g), last.const_data_ptr<T>(), y.mutable_data_ptr<T>());
  });
  return is_channels_last(x) ? y : as_contiguous(y);
}

// The gradients of x and of the shares, and of the kernels; what is not asked for is empty.
std::tuple<Tensor, Tensor, Tensor> conv_samples_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& shares,
                                                         const Numbers& stride, const Numbers& padding, const Numbers& dilation,
                                                         bool to_samples, bool to_kernels) {
  const std::vector<int64_t> size = check_samples(x, weight, shares, stride, padding, dilation);
  require(is_same(grad.sizes(), size) && grad.scalar_type() == x.scalar_type() && is_strided(grad),
          "grad must be numbers of shape ", size, " in the dtype of x, got shape ", grad.sizes());
  const Geometry g = geometry_of(weight.sizes().slice(3), stride, padding, dilation, 1);
  const Tensor upstream = with_channels_last(grad), last = with_channels_last(x);
  auto none = [&] { return empty({0}, x.scalar_type()); };
  Tensor x_grad = none(), weight_grad = none(), shares_grad = none();
  with_sum_type(x, [&](auto zero) {
    using T = decltype(zero);
    const Batch<T> batch = batch_of<T>(x, weight, shares, size, g);
    const T *from = upstream.const_data_ptr<T>(), *in = last.const_data_ptr<T>();
    if (to_samples) {
      const std::vector<Span> blocks = split(batch.channels, ceil_div(batch.channels, SHARED_CHANNELS));
      x_grad = torch::stable::empty_like(x);
      Tensor out = with_channels_last(x_grad);  // itself, where that is how it lies in memory
      const Tensor parts = empty({int64_t(blocks.size()), shares.size(0), shares.size(1), shares.size(2)}, x.scalar_type());
      differentiate_samples<T>(batch, from, in, blocks, out.mutable_data_ptr<T>(), parts.mutable_data_ptr<T>());
      if (out.get() != x_grad.get()) torch::stable::copy_(x_grad, out);
      shares_grad = sum_first(parts);
    }
    if (to_kernels) {
      weight_grad = empty(weight.sizes(), x.scalar_type());
      kernel_gradients_of_samples<T>(batch, from, in, weight_grad.mutable_data_ptr<T>());
    }
  });
  return {x_grad, weight_grad, shares_grad};
}

// The gradients of x and of a depth-wise kernel for each sample, over channels.
std::tuple<Tensor, Tensor> backward_over_channels(const Tensor& grad, const Tensor& x, const Tensor& weight, const Geometry& g, bool to_x,
                                                  bool to_weights) {
  const Tensor upstream = with_channels_last(grad), last = with_channels_last(x);
  const Axes x_size = three(x.sizes().slice(2), 1), y_size = three(grad.sizes().slice(2), 1);
  const int64_t taps = g.kernel[0] * g.kernel[1] * g.kernel[2], batch = x.size(0);
  Tensor x_grad = empty({0}, x.scalar_type()), weight_grad = empty({0}, x.scalar_type());
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Stored<T>::Sum;
    if (to_x) {
      const Tensor kernels = *in_sums(weight), mixed = empty({batch, taps, g.groups}, sum_type(x));
      mix_taps<Sum>(kernels.const_data_ptr<Sum>(), 1, batch > 1, taps, g.groups, {}, batch, mixed.mutable_data_ptr<Sum>());
      const std::vector<Phase> phases = backward_phases(g, x_size);
      x_grad = empty_gradient(x, phases);
      Tensor out = with_channels_last(x_grad);  // itself, where that is how it lies in memory
      for (const Phase& phase : phases)
        convolve_depthwise<T>(upstream.const_data_ptr<T>(), y_size, mixed.const_data_ptr<Sum>(), taps, {}, g.groups, batch, phase, x_size,
                              out.mutable_data_ptr<T>());
      if (out.get() != x_grad.get()) torch::stable::copy_(x_grad, out);
    }
    if (to_weights) {
      weight_grad = empty(weight.sizes(), x.scalar_type());
      gradients_depthwise<T>(last.const_data_ptr<T>(), x_size, upstream.const_data_ptr<T>(), g.groups, batch, forward_phase(g, y_size),
                             weight_grad.mutable_data_ptr<T>());
    }
  });
  return {x_grad, weight_grad};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;  // of x, weight, kernel, spatial, channel and filter

// None of them: what an operator returns shares no memory.
Gradients no_gradients(ScalarType type) {
  auto none = [&] { return empty({0}, type); };
  return {none(), none(), none(), none(), none(), none()};
}

// Of the attention of each tap.
Numbers spatial_shape(int64_t batch, const Tensor& weight) {
  Numbers shape = {batch};
  for (int64_t size : weight.sizes().slice(3)) shape.push_back(size);
  return shape;
}

// Those of a depth-wise kernel for each sample: of no attentions there is no gradient.
Gradients gradients_over_channels(const Tensor& grad, const Tensor& x, const Tensor& weight, const Geometry& g, bool to_x, bool to_weights) {
  const ScalarType type = x.scalar_type();
  Gradients found = no_gradients(type);
  auto& [x_grad, weight_grad, kernel_grad, spatial_grad, channel_grad, filter_grad] = found;
  std::tie(x_grad, weight_grad) = backward_over_channels(grad, x, weight, g, to_x, to_weights);
  if (!to_weights) return found;
  kernel_grad = zeros({x.size(0), weight.size(0)}, type), spatial_grad = zeros(spatial_shape(x.size(0), weight), type);
  channel_grad = zeros({x.size(0), x.size(1)}, type), filter_grad = zeros({x.size(0), weight.size(1)}, type);
  return found;
}

// Compute the gradients of the kernels and all attentions, which are numbers in the dtype of sums, into those found.
template <class T, class Make>
void find_kernel_gradients(Make make, const Kernels<T>& kernels, int64_t groups, const Gates<T>& gates, int64_t batch, const Phase& phase,
                           int64_t panel_positions, const std::vector<Span>& rows, const std::vector<Span>& lanes, const Tensor& weight, Gradients& found) {
  constexpr ScalarType type = torch::headeronly::CppTypeToScalarType<T>::value;
  const std::vector<Phase> phases = {phase};
  const int64_t high = rows.size(), wide = lanes.size(), count = groups * wide * high;
  Partial partial = {zeros({count, batch, kernels.n}, type), zeros({count, batch, kernels.taps}, type), zeros({wide, batch, groups * kernels.rows}, type),
                     zeros({high, batch, groups * kernels.lanes}, type)};
  auto& [x_grad, weight_grad, kernel_grad, spatial_grad, channel_grad, filter_grad] = found;
  weight_grad = empty(weight.sizes(), type);
  gradients<T>(make, kernels, groups, gates, batch, phase, panels_of(phases, batch, 1, panel_positions), rows, lanes,
               weight_grad.mutable_data_ptr<T>(), partial);
  kernel_grad = kernels.per_sample() ? zeros({batch, batch}, type) : sum_first(partial.shares);
  spatial_grad = torch::stable::view(sum_first(partial.taps), spatial_shape(batch, weight));
  channel_grad = sum_first(partial.rows);
  filter_grad = sum_first(partial.lanes);
}

// Of 16 bits, by products of pairs.
Gradients backward_by_pairs(const Tensor& grad, const Tensor& x, const Tensor& weight, const Gates<float>& gates, const Geometry& g, bool per_sample,
                            bool to_x, bool to_weights) {
  const int64_t n = per_sample ? 1 : weight.size(0), batch = x.size(0), filters = weight.size(1) / g.groups, channels = weight.size(2);
  const int64_t taps = g.kernel[0] * g.kernel[1] * g.kernel[2], one = weight.numel() / weight.size(0), apart = per_sample ? one : 0;
  const Tensor upstream = with_channels_last(grad), last = with_channels_last(x);
  const Axes x_size = three(x.sizes().slice(2), 1), y_size = three(grad.sizes().slice(2), 1);
  Gradients found = no_gradients(x.scalar_type());
  auto run = [&](auto zero) {
    using T = decltype(zero);
    if (to_x) {
      const std::vector<Phase> phases = backward_phases(g, x_size);
      Tensor& x_grad = std::get<0>(found) = empty_gradient(x, phases);
      Tensor out = with_channels_last(x_grad);  // itself, where that is how it lies in memory
      const Kernels<T> kernels = {weight.const_data_ptr<T>(), n, one, filters, channels, taps, channels * taps, taps, apart};
      for (const Phase& phase : phases)
        convolve_half<T>(upstream.const_data_ptr<T>(), y_size, kernels, nullptr, g.groups, {gates.shares, gates.taps, gates.lanes, gates.rows}, {}, batch,
                         phase, x_size, out.mutable_data_ptr<T>());
      if (out.get() != x_grad.get()) torch::stable::copy_(x_grad, out);
    }
    if (to_weights) {
      const Tensor exact = *in_sums(weight);
      const Kernels<float> kernels = {exact.const_data_ptr<float>(), n, one, channels, filters, taps, taps, channels * taps, apart};
      const std::vector<Span> lanes = lane_blocks(kernels);
      const std::vector<Span> rows = rows_of_pairs(kernels, ceil_div(2 * int64_t(get_num_threads()), int64_t(lanes.size()) * g.groups));
      const Phase phase = forward_phase(g, y_size);
      const Copies<T> copies = copy_pairs<T>(last.const_data_ptr<T>(), x_size, upstream.const_data_ptr<T>(), kernels, g.groups, lanes, batch, phase);
      find_kernel_gradients<float>([&] { return PairsGradient<T>(copies); }, kernels, g.groups, gates, batch, phase,
                                   y_size[0] * y_size[1] * y_size[2], rows, lanes, exact, found);
    }
  };
  with_half_type(x, run);
  return found;
}

Gradients conv_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Optional& kernel, const Optional& spatial,
                        const Optional& channel, const Optional& filter, const Numbers& stride, const Numbers& padding, const Numbers& dilation,
                        int64_t groups, bool to_x, bool to_weights) {
  const std::vector<int64_t> size = check(x, weight, kernel, spatial, channel, filter, stride, padding, dilation, groups);
  const ScalarType type = x.scalar_type();
  require(is_same(grad.sizes(), size) && grad.scalar_type() == type && is_strided(grad), "grad must be numbers of shape ", size,
          " in the dtype of x, got shape ", grad.sizes());
  const Geometry g = geometry_of(weight.sizes().slice(3), stride, padding, dilation, groups);
  const bool per_sample = !kernel && weight.size(0) > 1, plain = weight.size(0) == x.size(0) && !kernel && !spatial && !channel && !filter;
  if (plain && is_over_channels(x, weight, groups)) return gradients_over_channels(grad, x, weight, g, to_x, to_weights);
  const int64_t n = per_sample ? 1 : weight.size(0), batch = x.size(0), filters = weight.size(1) / groups, channels = weight.size(2);
  const int64_t taps = g.kernel[0] * g.kernel[1] * g.kernel[2], one = weight.numel() / weight.size(0);
  if (is_half(x)) {
    const Optional shares = in_sums(kernel), by_tap = in_sums(spatial), by_channel = in_sums(channel), by_filter = in_sums(filter);
    const Gates<float> gates = {numbers<float>(shares), numbers<float>(by_tap), numbers<float>(by_channel), numbers<float>(by_filter)};
    const bool pairs = (groups == 1 || filters % 2 == 0) && by_pairs(type, channels, groups);
    auto found = pairs ? backward_by_pairs(grad, x, weight, gates, g, per_sample, to_x, to_weights)
                       : conv_backward(*in_sums(grad), *in_sums(x), *in_sums(weight), shares, by_tap, by_channel, by_filter, stride, padding, dilation,
                                       groups, to_x, to_weights);
    const auto& [x_grad, weight_grad, kernel_grad, spatial_grad, channel_grad, filter_grad] = found;
    auto as_given = [&](const Tensor& sums, const Optional& given) { return converted(sums, given ? given->scalar_type() : type); };
    return {converted(x_grad, type), converted(weight_grad, type), as_given(kernel_grad, kernel), as_given(spatial_grad, spatial),
            as_given(channel_grad, channel), as_given(filter_grad, filter)};
  }
  Gradients found = no_gradients(type);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* data = weight.const_data_ptr<T>();
    const auto upstream = map_of<const T>(grad, grad.const_data_ptr<T>());
    if (to_x) {
      const std::vector<Phase> phases = backward_phases(g, three(x.sizes().slice(2), 1));
      Tensor& x_grad = std::get<0>(found) = empty_gradient(x, phases);
      const Kernels<T> kernels = {data, n, one, filters, channels, taps, channels * taps, taps, per_sample ? one : 0};
      const Gates<T> gates = {numbers<T>(kernel), numbers<T>(spatial), numbers<T>(filter), numbers<T>(channel)};
      if (x_grad.is_contiguous() && grad.is_contiguous() && by_point(grad, g))
        convolve_points<T>(upstream.data, kernels, groups, gates, {}, batch, grad.numel() / (grad.size(0) * grad.size(1)), x_grad.mutable_data_ptr<T>());
      else
        convolve<T>(upstream, map_of<T>(x_grad, x_grad.mutable_data_ptr<T>()), kernels, groups, gates, {}, batch, phases);
    }
    if (to_weights) {
      const Kernels<T> kernels = {data, n, one, channels, filters, taps, taps, channels * taps, per_sample ? one : 0};
      const Gates<T> gates = {numbers<T>(kernel), numbers<T>(spatial), numbers<T>(channel), numbers<T>(filter)};
      const std::vector<Span> lanes = lane_blocks(kernels);
      const std::vector<Span> rows = row_blocks(kernels, ceil_div(4 * int64_t(get_num_threads()), int64_t(lanes.size()) * groups));
      const auto source = map_of<const T>(x, x.const_data_ptr<T>());
      const Phase phase = forward_phase(g, upstream.size);
      find_kernel_gradients<T>([&] { return TileGradient<T>(source, upstream, phase); }, kernels, groups, gates, batch, phase, PANEL_POSITIONS, rows,
                               lanes, weight, found);
    }
  };
  with_sum_type(x, run);
  return found;
}

// As the operator's schema has it: an operator returns no undefined tensor.
std::tuple<Tensor, Tensor> conv_fused_checked(const Tensor& x, const Tensor& weight, const Optional& kernel, const Optional& spatial,
                                              const Optional& channel, const Optional& filter, const Numbers& stride,
                                              const Numbers& padding, const Numbers& dilation, int64_t groups, const Optional& bias,
                                              const std::string& activation, bool means, const Optional& packed) {
  auto [y, found] = conv_fused(x, weight, kernel, spatial, channel, filter, stride, padding, dilation, groups, bias, activation, means, packed);
  return {y, means ? found : empty({0}, x.scalar_type())};
}

}  // namespace
}  // namespace odconv

STABLE_TORCH_LIBRARY_IMPL(odconv, CPU, library) {
  library.impl("conv", TORCH_BOX(&odconv::conv));
  library.impl("conv_fused", TORCH_BOX(&odconv::conv_fused_checked));
  library.impl("conv_samples", TORCH_BOX(&odconv::conv_samples));
  library.impl("conv_samples_backward", TORCH_BOX(&odconv::conv_samples_backward));
  library.impl("conv_cells", TORCH_BOX(&odconv::conv_cells));
  library.impl("conv_cells_backward", TORCH_BOX(&odconv::conv_cells_backward));
  library.impl("conv_backward", TORCH_BOX(&odconv::conv_backward));
  library.impl("pack", TORCH_BOX(&odconv::pack_kernels));
  library.impl("pool", TORCH_BOX(&odconv::pool_checked));
  library.impl("attend", TORCH_BOX(&odconv::attend_checked));
}
