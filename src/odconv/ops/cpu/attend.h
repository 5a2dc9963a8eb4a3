// The attention where no gradients are wanted.
#pragma once

#include <optional>

#include "epilogue.h"

namespace odconv {

// out = matrix x + bias, for a matrix of `rows` rows of `count` numbers; four rows at a time, to hide each other's latency.
template <class M, class T = typename Stored<M>::Sum>
void apply(const M* matrix, int64_t rows, int64_t count, const T* x, const M* bias, T* out) {
  using S = Simd<T>;
  for (int64_t row = 0; row < rows; row += 4) {
    const M* at[4];
    for (int64_t i = 0; i < 4; ++i) at[i] = matrix + std::min(row + i, rows - 1) * count;
    typename S::Vec sums[4] = {};
    T ends[4] = {};
    int64_t j = 0;
    for (; j + S::LANES <= count; j += S::LANES)
      for (int i = 0; i < 4; ++i) sums[i] += Stored<M>::load(at[i] + j) * S::load(x + j);
    for (; j < count; ++j)
      for (int i = 0; i < 4; ++i) ends[i] += T(at[i][j]) * x[j];
    for (int64_t i = 0; i < 4 && row + i < rows; ++i) {
      T sum = ends[i];
      for (int l = 0; l < S::LANES; ++l) sum += sums[i][l];
      out[row + i] = bias ? sum + T(bias[row + i]) : sum;
    }
  }
}

// gain / (1 + exp(-x)), in place.
template <class T>
void sigmoid(T* x, int64_t count, T gain) {
  using S = Simd<T>;
  int64_t i = 0;
  for (; i + S::LANES <= count; i += S::LANES) S::store(x + i, gain / (1 + exponential(-S::load(x + i))));
  for (; i < count; ++i) x[i] = gain / (1 + exponential(-x[i]));
}

template <class T>
void softmax(T* x, int64_t count, T gain) {
  const T most = *std::max_element(x, x + count);
  T sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i] = exponential(x[i] - most);
  for (int64_t i = 0; i < count; ++i) x[i] *= gain / sum;
}

// The mean of each channel, (B, C), of maps of any layout, in float32 or float64.
inline Tensor pool(const Tensor& x) {
  const bool channels_last = has_channels_last(x);
  const Tensor maps = channels_last ? x : as_contiguous(x);
  const int64_t batch = x.size(0), channels = x.size(1), positions = x.numel() / (batch * channels);
  const Tensor out = empty({batch, channels}, sum_type(x));
  with_type(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Stored<T>::Sum;
    const T* in = maps.const_data_ptr<T>();
    Sum* means = out.mutable_data_ptr<Sum>();
    parallel_for(0, batch * (channels_last ? 1 : channels), std::max<int64_t>(1, 32768 / (positions * (channels_last ? channels : 1))),
                     [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        if (channels_last)
          sum_channels<T>(in + i * positions * channels, positions, channels, means + i * channels);
        else
          means[i] = sum_run<T>(in + i * positions, positions);
      const int64_t each = channels_last ? channels : 1;
      for (int64_t i = begin * each; i < end * each; ++i) means[i] /= Sum(positions);
    });
  });
  return out;
}

template <class M>
std::vector<const M*> data_of(const std::vector<Tensor>& tensors) {
  std::vector<const M*> data;
  for (const Tensor& tensor : tensors) data.push_back(tensor.const_data_ptr<M>());
  return data;
}

// What follows the hidden layer's matrix, or the pool where there is none: nothing, a bias, group norm's weight and bias, or batch
// norm's running mean, running variance, weight and bias.
template <class M>
struct Norm {
  std::vector<const M*> data;
  int64_t groups;
  double eps;

  template <class T>
  void operator()(T* z, int64_t hidden) const {
    auto of = [&](int i, int64_t h) { return T(data[i][h]); };
    if (data.size() == 1)
      for (int64_t h = 0; h < hidden; ++h) z[h] += of(0, h);
    if (data.size() == 4)
      for (int64_t h = 0; h < hidden; ++h) z[h] = (z[h] - of(0, h)) * (of(2, h) / std::sqrt(of(1, h) + T(eps))) + of(3, h);
    if (data.size() != 2) return;
    const int64_t count = hidden / groups;
    for (int64_t first = 0; first < hidden; first += count) {
      T mean = 0, variance = 0;
      for (int64_t h = first; h < first + count; ++h) mean += z[h] / T(count);
      for (int64_t h = first; h < first + count; ++h) variance += (z[h] - mean) * (z[h] - mean) / T(count);
      for (int64_t h = first; h < first + count; ++h) z[h] = (z[h] - mean) * (of(0, h) / std::sqrt(variance + T(eps))) + of(1, h);
    }
  }
};

// What makes gates of the logits of heads, which are the rows of one matrix or a matrix each: sigmoids, or a softmax for the head of
// that number, times a gain.
struct Heads {
  const std::vector<Tensor>&weights, &biases;  // (outputs, h) and (outputs)
  const Numbers& sizes;
  const std::vector<double>& gains;
  int64_t softmax;
};

// fc -> norm -> ReLU -> heads -> gates, without fc and ReLU where there is no hidden layer, for pooled inputs (B, C). Parameters of
// 16 bits are computed with in float32, in which the inputs then are.
inline std::vector<Tensor> attend(const Tensor& pooled, const Optional& fc, const std::vector<Tensor>& norm, int64_t groups, double eps,
                                  const Heads& heads, const Optional& temperature) {
  const int64_t batch = pooled.size(0), channels = pooled.size(1), hidden = fc ? fc->size(0) : channels;
  const double divisor = temperature ? *temperature->const_data_ptr<float>() : 1;
  int64_t outputs = 0;
  std::vector<Tensor> gates;
  for (int64_t size : heads.sizes) {
    outputs += size;
    gates.push_back(empty({batch, size}, pooled.scalar_type()));
  }
  const int64_t work = hidden * (outputs + (fc ? channels : 0));
  with_type(heads.weights[0].scalar_type(), [&](auto zero) {
    using M = decltype(zero);
    using T = typename Stored<M>::Sum;
    const T* x = pooled.const_data_ptr<T>();
    const M* matrix = fc ? fc->const_data_ptr<M>() : nullptr;
    const Norm<M> normalise = {data_of<M>(norm), groups, eps};
    const std::vector<const M*> weights = data_of<M>(heads.weights), biases = data_of<M>(heads.biases);
    std::vector<T*> out;
    for (const Tensor& gate : gates) out.push_back(gate.mutable_data_ptr<T>());
    parallel_for(0, batch, std::max<int64_t>(1, 65536 / work), [&](int64_t begin, int64_t end) {
      std::vector<T> z(hidden);
      for (int64_t b = begin; b < end; ++b) {
        const T* in = x + b * channels;
        if (fc)
          apply<M>(matrix, hidden, channels, in, nullptr, z.data());
        else
          std::copy(in, in + channels, z.data());
        normalise(z.data(), hidden);
        if (fc)
          for (T& one : z) one = one < 0 ? T(0) : one;  // as torch's ReLU, a NaN stays
        in = z.data();
        for (size_t i = 0, row = 0; i < gates.size(); row += heads.sizes[i++]) {
          const int64_t size = heads.sizes[i], own = heads.weights.size() > 1 ? i : 0, first = heads.weights.size() > 1 ? 0 : row;
          T* gate = out[i] + b * size;
          apply<M>(weights[own] + first * hidden, size, hidden, in, biases[own] + first, gate);
          for (int64_t o = 0; o < size; ++o) gate[o] /= T(divisor);
          int64_t(i) == heads.softmax ? softmax(gate, size, T(heads.gains[i])) : sigmoid(gate, size, T(heads.gains[i]));
        }
      }
    });
  });
  return gates;
}

}  // namespace odconv
