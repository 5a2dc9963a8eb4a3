// The attention where no gradients are wanted.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/movedim.h>

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
void softmax(T* x, int64_t count) {
  const T most = *std::max_element(x, x + count);
  T sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i] = exponential(x[i] - most);
  for (int64_t i = 0; i < count; ++i) x[i] /= sum;
}

// The mean of each channel, (B, C), of maps of any layout, in float32 or float64.
inline at::Tensor pool(const at::Tensor& x) {
  const at::Tensor last = x.movedim(1, -1);
  const bool channels_last = last.is_contiguous();
  const at::Tensor maps = channels_last ? last : x.contiguous();
  const int64_t batch = x.size(0), channels = x.size(1), positions = x.numel() / (batch * channels);
  const bool half = x.element_size() == 2;
  at::Tensor out = at::empty({batch, channels}, x.options().dtype(half ? at::kFloat : x.scalar_type()));
  auto run = [&](auto zero) {
    using T = decltype(zero);
    using Sum = typename Stored<T>::Sum;
    const T* in = maps.const_data_ptr<T>();
    Sum* means = out.mutable_data_ptr<Sum>();
    at::parallel_for(0, batch * (channels_last ? 1 : channels), std::max<int64_t>(1, 32768 / (positions * (channels_last ? channels : 1))),
                     [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        if (channels_last)
          sum_channels<T>(in + i * positions * channels, positions, channels, means + i * channels);
        else
          means[i] = sum_run<T>(in + i * positions, positions);
      const int64_t each = channels_last ? channels : 1;
      for (int64_t i = begin * each; i < end * each; ++i) means[i] /= Sum(positions);
    });
  };
  switch (x.scalar_type()) {
    case at::kHalf: run(at::Half()); break;
    case at::kBFloat16: run(at::BFloat16()); break;
    case at::kDouble: run(double()); break;
    default: run(float());
  }
  return out;
}

// fc -> batch norm by its running statistics -> ReLU -> heads -> gates, for pooled inputs (B, C). `norm` holds mean,
// variance, weight and bias, or nothing. Parameters of 16 bits are computed with in float32, in which the inputs then are. A head is a weight (O, h), its bias, and its sigmoid's gain, or 0 for a softmax.
inline std::vector<at::Tensor> attend(const at::Tensor& pooled, const std::optional<at::Tensor>& fc, const std::vector<at::Tensor>& norm, double eps,
                           const std::vector<at::Tensor>& weights, const std::vector<at::Tensor>& biases,
                           at::ArrayRef<double> gains, const std::optional<at::Tensor>& temperature) {
  const int64_t batch = pooled.size(0), channels = pooled.size(1), hidden = fc ? fc->size(0) : channels;
  const double divisor = temperature ? *temperature->const_data_ptr<float>() : 1;
  int64_t outputs = 0;
  for (const at::Tensor& weight : weights) outputs += weight.size(0);
  const int64_t work = hidden * (outputs + (fc ? channels : 0));
  std::vector<at::Tensor> gates;
  for (const at::Tensor& weight : weights) gates.push_back(at::empty({batch, weight.size(0)}, pooled.options()));
  auto run = [&](auto zero) {
    using M = decltype(zero);
    using T = typename Stored<M>::Sum;
    const T* x = pooled.const_data_ptr<T>();
    at::parallel_for(0, batch, std::max<int64_t>(1, 65536 / work), [&](int64_t begin, int64_t end) {
      std::vector<T> z(hidden);
      for (int64_t b = begin; b < end; ++b) {
        const T* in = x + b * channels;
        if (fc) {
          apply<M>(fc->const_data_ptr<M>(), hidden, channels, in, nullptr, z.data());
          for (int64_t h = 0; h < hidden; ++h) {
            if (!norm.empty()) {
              auto of = [&](int i) { return T(norm[i].const_data_ptr<M>()[h]); };
              z[h] = (z[h] - of(0)) * (of(2) / std::sqrt(of(1) + T(eps))) + of(3);
            }
            z[h] = z[h] < 0 ? T(0) : z[h];  // as torch's ReLU, a NaN stays
          }
          in = z.data();
        }
        for (size_t i = 0; i < weights.size(); ++i) {
          const int64_t size = weights[i].size(0);
          T* row = gates[i].mutable_data_ptr<T>() + b * size;
          apply<M>(weights[i].const_data_ptr<M>(), size, hidden, in, biases[i].const_data_ptr<M>(), row);
          for (int64_t o = 0; o < size; ++o) row[o] /= T(divisor);
          gains[i] == 0 ? softmax(row, size) : sigmoid(row, size, T(gains[i]));
        }
      }
    });
  };
  switch (weights[0].scalar_type()) {
    case at::kHalf: run(at::Half()); break;
    case at::kBFloat16: run(at::BFloat16()); break;
    case at::kDouble: run(double()); break;
    default: run(float());
  }
  return gates;
}

}  // namespace odconv
