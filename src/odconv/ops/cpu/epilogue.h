// What is done to outputs while they lie in the cache: a bias, an activation, and the sums of each channel's line, of which the
// next layer's pooling is made.
#pragma once

#include <cmath>
#include <limits>
#include <string_view>

#include "simd.h"

namespace odconv {

// ---- activations, of a number or a vector ---------------------------------------------------------------------------

inline float exponential(float x) { return std::exp(x); }
inline double exponential(double x) { return std::exp(x); }

inline Simd<double>::Vec exponential(Simd<double>::Vec x) {
  for (int l = 0; l < Simd<double>::LANES; ++l) x[l] = std::exp(x[l]);
  return x;
}

// To two units in the last place: x = n log 2 + r, and a polynomial of r whose coefficients are those of Cephes' expf.
inline Simd<float>::Vec exponential(Simd<float>::Vec x) {
  using Vec = Simd<float>::Vec;
  using Int = Simd<float>::Mask;
  constexpr float ROUND = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction
  x = x < -87.0f ? Vec{} - 87.0f : x;
  x = x > 88.0f ? Vec{} + 88.0f : x;
  const Vec shifted = x * 1.44269504f + ROUND, n = shifted - ROUND, r = x - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = Vec{} + 1.9875691500e-4f;
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = p * r + c;
  return (p * r * r + r + 1.0f) * Vec((Int(shifted) << 23) + (127 << 23));
}

template <class V>
V clamp(V x, V low, V high) {  // a NaN stays one, as in PyTorch
  x = x < low ? low : x;
  return x > high ? high : x;
}

struct Identity {
  template <class V>
  V operator()(V x) const { return x; }
};

struct ReLU {
  template <class V>
  V operator()(V x) const { return x < V{} ? V{} : x; }
};

struct ReLU6 {
  template <class V>
  V operator()(V x) const { return clamp(x, V{}, V{} + 6); }
};

struct Hardswish {
  template <class V>
  V operator()(V x) const { return x * clamp(x + 3, V{}, V{} + 6) / 6; }
};

struct SiLU {
  template <class V>
  V operator()(V x) const { return x / (1 + exponential(V{} - x)); }
};

// What `body` returns for the activation of that name: mostly a function made for it.
template <class F>
auto with_activation(std::string_view name, F body) {
  if (name == "none") return body(Identity());
  if (name == "relu") return body(ReLU());
  if (name == "relu6") return body(ReLU6());
  if (name == "hardswish") return body(Hardswish());
  require(name == "silu", "activation must be none, relu, relu6, hardswish or silu, got ", name);
  return body(SiLU());
}

// ---- sums ------------------------------------------------------------------------------------------------------------

// Sums of `count` vectors of channels that follow each other, in blocks, so that rounding does not grow with count.
template <class T>
void sum_channels(const T* x, int64_t count, int64_t channels, typename Stored<T>::Sum* out) {
  using Sum = typename Stored<T>::Sum;
  using S = Simd<Sum>;
  constexpr int64_t L = S::LANES, BLOCK = 64;
  auto sum = [&](int64_t c, auto vectors) {
    typename S::Vec all[vectors] = {};
    for (int64_t first = 0; first < count; first += BLOCK) {
      typename S::Vec part[vectors] = {};
      for (int64_t i = first; i < std::min(first + BLOCK, count); ++i)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) part[v] += Stored<T>::load(x + i * channels + c + v * L);
      for (int v = 0; v < vectors; ++v) all[v] += part[v];
    }
    for (int v = 0; v < vectors; ++v) S::store(out + c + v * L, all[v]);
    return c + vectors * L;
  };
  int64_t c = 0;
  while (c + 4 * L <= channels) c = sum(c, std::integral_constant<int, 4>());
  while (c + L <= channels) c = sum(c, std::integral_constant<int, 1>());
  if (c < channels && channels > L) c = sum(channels - L, std::integral_constant<int, 1>());  // which overlaps the one before
  for (; c < channels; ++c) {
    out[c] = 0;
    for (int64_t first = 0; first < count; first += BLOCK) {
      Sum part = 0;
      for (int64_t i = first; i < std::min(first + BLOCK, count); ++i) part += Sum(x[i * channels + c]);
      out[c] += part;
    }
  }
}

template <class T>
typename Stored<T>::Sum sum_run(const T* x, int64_t count) {
  using S = Stored<T>;
  using Sum = typename S::Sum;
  constexpr int64_t L = Simd<Sum>::LANES, BLOCK = 4 * L;
  typename S::Vec sums[4] = {};
  int64_t i = 0;
  for (; i + BLOCK <= count; i += BLOCK)
    for (int v = 0; v < 4; ++v) sums[v] += S::load(x + i + v * L);
  const typename S::Vec all = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  Sum sum = 0;
  for (; i < count; ++i) sum += Sum(x[i]);
  for (int l = 0; l < L; ++l) sum += all[l];
  return sum;
}

// ---- the epilogue ----------------------------------------------------------------------------------------------------

// What is added to each filter, of all samples or one of each.
template <class T>
struct Bias {
  const T* data;
  int64_t sample_step;
  const T* of_sample(int64_t sample) const { return data ? data + sample * sample_step : nullptr; }
};

constexpr int64_t STREAMED_BYTES = 12 * 1024 * 1024;  // of a map that the caches would not keep for the layer that reads it

// Whether a map of that many filters a group is written past the caches, which saves reading what is overwritten.
inline bool is_streamed(const Tensor& y, int64_t filters) {
  const int64_t size = y.element_size();
  return y.numel() * size >= STREAMED_BYTES && has_channels_last(y) && filters * size % VECTOR_BYTES == 0 &&
         reinterpret_cast<uintptr_t>(y.const_data_ptr()) % VECTOR_BYTES == 0;
}

// A line is a run of outputs along the last axis; the order in which it is summed does not depend on how work is split.
template <class T>
struct Epilogue {
  Bias<T> bias = {nullptr, 0};
  std::string_view activation = "none";
  T* line_sums = nullptr;  // (B, lines, filters), or null where none are wanted
  int64_t lines = 0, filters = 0;
  bool streamed = false;  // past the caches, in whole vectors, not of 16 bits

  bool is_empty() const { return !bias.data && activation == "none" && !line_sums; }
  T* line(int64_t sample, int64_t index) const { return line_sums ? line_sums + (sample * lines + index) * filters : nullptr; }
};

// ---- writing ---------------------------------------------------------------------------------------------------------

// What some filters are multiplied by and plus, and the sums of the line that is being written.
template <class T>
struct Lanes {
  static constexpr int64_t MOST = 64;
  alignas(VECTOR_BYTES) T filter[MOST], bias[MOST], line[MOST];
  const bool streamed;

  // From `first` on, `count` of them.
  Lanes(const Epilogue<T>& epilogue, const T* filters, int64_t sample, int64_t first, int64_t count) : streamed(epilogue.streamed) {
    std::fill_n(filter, MOST, T(1)), std::fill_n(bias, MOST, T(0)), std::fill_n(line, MOST, T(0));
    if (filters) std::copy_n(filters, count, filter);
    if (epilogue.bias.data) std::copy_n(epilogue.bias.of_sample(sample) + first, count, bias);
  }

  // Give the sums of a line away, where they are wanted, and begin another one.
  void end_line(T* to, int64_t count) {
    if (to) std::copy_n(line, count, to);
    std::fill_n(line, MOST, T(0));
  }
};

// Write the sums of one filter's positions plus its bias, activated.
template <class T, class A>
void write_run(const T* sums, int64_t count, T bias, T* out) {
  using S = Simd<T>;
  int64_t k = 0;
  for (; k + S::LANES <= count; k += S::LANES) S::store(out + k, A()(S::load(sums + k) + bias));
  for (; k < count; ++k) out[k] = A()(sums[k] + bias);
}

// Write V vectors of the sums of some positions of a line, times the filters, plus the bias, activated, and add them to the line's.
// The last vector has `last` lanes.
template <class T, class A, int V>
void write_vectors(const typename Stored<T>::Sum* sums, int64_t width, int64_t positions, int64_t last, Lanes<typename Stored<T>::Sum>& lanes,
                   int64_t first, T* out, int64_t step) {
  using S = Simd<typename Stored<T>::Sum>;
  constexpr int L = S::LANES;
  const bool streamed = std::is_same_v<T, typename Stored<T>::Sum> && lanes.streamed;
  typename S::Vec filter[V], bias[V], line[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    filter[v] = S::load(lanes.filter + first + v * L);
    bias[v] = S::load(lanes.bias + first + v * L);
    line[v] = S::load(lanes.line + first + v * L);
  }
  for (int64_t p = 0; p < positions; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const typename S::Vec y = A()(S::load(sums + p * width + v * L) * filter[v] + bias[v]);
      line[v] += y;
      if (streamed) {
        stream(out + p * step + v * L, y);
      } else if (v + 1 < V || last == L) {
        Stored<T>::store(out + p * step + v * L, y);
      } else {
        T rest[L];
        Stored<T>::store(rest, y);
        std::copy_n(rest, last, out + p * step + v * L);
      }
    }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) S::store(lanes.line + first + v * L, line[v]);
}

// The same for `count` lanes, in as many vectors as that takes.
template <class T, class A>
void write_positions(const typename Stored<T>::Sum* sums, int64_t width, int64_t positions, int64_t count, Lanes<typename Stored<T>::Sum>& lanes,
                     T* out, int64_t step) {
  constexpr int L = Simd<typename Stored<T>::Sum>::LANES;
  for (int64_t l = 0; l < count; l += 4 * L) {
    const int64_t vectors = std::min<int64_t>(4, ceil_div(count - l, L)), last = std::min<int64_t>(L, count - l - (vectors - 1) * L);
    auto write = vectors == 4   ? write_vectors<T, A, 4>
                 : vectors == 3 ? write_vectors<T, A, 3>
                 : vectors == 2 ? write_vectors<T, A, 2>
                                : write_vectors<T, A, 1>;
    write(sums + l, width, positions, last, lanes, l, out + l, step);
  }
}

}  // namespace odconv
