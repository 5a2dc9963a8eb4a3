// The attention where no gradients are wanted.
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/narrow.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/view.h>

#include <cmath>
#include <optional>

#include "simd.h"

namespace odconv {

// out = matrix x + bias, for a matrix of `rows` rows of `count` numbers; four rows at a time, to hide each other's latency.
template <class T>
void apply(const T* matrix, int64_t rows, int64_t count, const T* x, const T* bias, T* out) {
  using S = Simd<T>;
  for (int64_t row = 0; row < rows; row += 4) {
    const T* at[4];
    for (int64_t i = 0; i < 4; ++i) at[i] = matrix + std::min(row + i, rows - 1) * count;
    typename S::Vec sums[4] = {};
    T ends[4] = {};
    int64_t j = 0;
    for (; j + S::LANES <= count; j += S::LANES)
      for (int i = 0; i < 4; ++i) sums[i] += S::load(at[i] + j) * S::load(x + j);
    for (; j < count; ++j)
      for (int i = 0; i < 4; ++i) ends[i] += at[i][j] * x[j];
    for (int64_t i = 0; i < 4 && row + i < rows; ++i) {
      T sum = ends[i];
      for (int l = 0; l < S::LANES; ++l) sum += sums[i][l];
      out[row + i] = bias ? sum + bias[row + i] : sum;
    }
  }
}

// fc -> batch norm by its running statistics -> ReLU -> heads -> gates, for pooled inputs (B, C). `norm` holds mean,
// variance, weight and bias, or nothing. A head is a weight (O, h), its bias, and its sigmoid's gain, or 0 for a softmax.
inline std::vector<at::Tensor> attend(const at::Tensor& pooled, const std::optional<at::Tensor>& fc, const std::vector<at::Tensor>& norm, double eps,
                           const std::vector<at::Tensor>& weights, const std::vector<at::Tensor>& biases,
                           at::ArrayRef<double> gains, const std::optional<at::Tensor>& temperature) {
  const int64_t batch = pooled.size(0), channels = pooled.size(1), hidden = fc ? fc->size(0) : channels;
  const double divisor = temperature ? *temperature->const_data_ptr<float>() : 1;
  int64_t outputs = 0;
  for (const at::Tensor& weight : weights) outputs += weight.size(0);
  const int64_t work = hidden * (outputs + (fc ? channels : 0));
  at::Tensor logits = at::empty({batch * outputs}, pooled.options());  // those of a head lie together, to be its gates
  std::vector<at::Tensor> gates;
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* x = pooled.const_data_ptr<T>();
    T* out = logits.mutable_data_ptr<T>();
    at::parallel_for(0, batch, std::max<int64_t>(1, 65536 / work), [&](int64_t begin, int64_t end) {
      std::vector<T> z(hidden);
      for (int64_t b = begin; b < end; ++b) {
        const T* in = x + b * channels;
        if (fc) {
          apply<T>(fc->const_data_ptr<T>(), hidden, channels, in, nullptr, z.data());
          for (int64_t h = 0; h < hidden; ++h) {
            if (!norm.empty()) {
              const T scale = norm[2].const_data_ptr<T>()[h] / std::sqrt(norm[1].const_data_ptr<T>()[h] + T(eps));
              z[h] = (z[h] - norm[0].const_data_ptr<T>()[h]) * scale + norm[3].const_data_ptr<T>()[h];
            }
            z[h] = z[h] < 0 ? T(0) : z[h];  // as torch's ReLU, a NaN stays
          }
          in = z.data();
        }
        T* to = out;
        for (size_t i = 0; i < weights.size(); ++i) {
          const int64_t size = weights[i].size(0);
          T* row = to + b * size;
          apply<T>(weights[i].const_data_ptr<T>(), size, hidden, in, biases[i].const_data_ptr<T>(), row);
          for (int64_t o = 0; o < size; ++o) row[o] /= T(divisor);
          to += batch * size;
        }
      }
    });
  };
  pooled.scalar_type() == at::kDouble ? run(double()) : run(float());
  int64_t first = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t size = weights[i].size(0);
    at::Tensor gate = logits.narrow(0, first, batch * size).view({batch, size});
    gate = gains[i] == 0 ? gate.softmax(1) : gate.sigmoid_();
    gates.push_back(gains[i] == 0 || gains[i] == 1 ? gate : gate.mul_(gains[i]));
    first += batch * size;
  }
  return gates;
}

}  // namespace odconv
