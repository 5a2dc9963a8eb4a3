// Depth-wise layers on channels-last maps: vectors run over channels, and nothing is copied.
#pragma once

#include "convolve.h"

namespace odconv {

// The sums of P positions, each `jump` numbers after the one before, for V vectors of channels: taps at `from` a position.
// What is written is added to `line` too.
template <class T, int P, int V, class A>
void multiply_taps(const T* x, int64_t jump, const std::vector<int64_t>& from, const typename Stored<T>::Sum* const* kernels,
                   const typename Stored<T>::Sum* bias, T* y, int64_t channels, typename Stored<T>::Sum* line) {
  using S = Stored<T>;
  constexpr int L = Simd<typename S::Sum>::LANES;
  typename S::Vec sums[P][V] = {};
  const int64_t taps = from.size(), *offsets = from.data();
  for (int64_t t = 0; t < taps; ++t) {
    const T* at = x + offsets[t];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const typename S::Vec weight = Simd<typename S::Sum>::load(kernels[t] + v * L);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sums[p][v] += weight * S::load(at + p * jump + v * L);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    typename S::Vec all = Simd<typename S::Sum>::load(line + v * L);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const typename S::Vec sum = A()(bias ? sums[p][v] + Simd<typename S::Sum>::load(bias + v * L) : sums[p][v]);
      S::store(y + p * channels + v * L, sum);
      all += sum;
    }
    Simd<typename S::Sum>::store(line + v * L, all);
  }
}

// Convolve each channel of a map, [sample][position][channel], with its own kernel, [sample][tap][channel], of at least a
// vector of channels. The last vector may overlap the one before.
template <class T, class A>
void convolve_depthwise(const T* x, const Axes& size, const typename Stored<T>::Sum* kernels, const Epilogue<typename Stored<T>::Sum>& epilogue,
                        int64_t channels, int64_t batch, const Phase& phase, T* y) {
  using Sum = typename Stored<T>::Sum;
  constexpr int L = Simd<Sum>::LANES, P = 4, V = 4;
  const Axes& count = phase.count;
  const Axes step = {size[1] * size[2] * channels, size[2] * channels, channels};
  const int64_t taps = phase.taps.size(), jump = phase.jump[2] * channels;
  // the outputs of a line between which every tap lies inside it
  const int64_t first = std::clamp<int64_t>(ceil_div(std::max<int64_t>(-phase.low[2], 0), phase.jump[2]), 0, count[2]);
  const int64_t last = std::clamp<int64_t>((size[2] - 1 - phase.high[2] + phase.jump[2]) / phase.jump[2], first, count[2]);
  const int64_t lines = count[0] * count[1], grain = std::max<int64_t>(1, 32768 / (count[2] * channels * taps));
  at::parallel_for(0, batch * lines, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> from, some;
    std::vector<const Tap*> met;
    std::vector<const Sum*> weights, chosen;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / lines, i = task % lines / count[1], j = task % count[1];
      const T* in = x + b * size[0] * step[0] + i * phase.jump[0] * step[0] + j * phase.jump[1] * step[1];
      T* out = y + task * count[2] * channels;
      met.clear();
      for (const Tap& tap : phase.taps) {
        const int64_t row = i * phase.jump[0] + tap.offset[0], column = j * phase.jump[1] + tap.offset[1];
        if (row >= 0 && row < size[0] && column >= 0 && column < size[1]) met.push_back(&tap);
      }
      for (int64_t c = 0; c < channels;) {
        const int vectors = channels - c >= V * L ? V : 1;
        c = std::min(c, channels - vectors * L);
        alignas(VECTOR_BYTES) Sum line[V * L] = {};
        from.clear(), weights.clear();
        for (const Tap* tap : met) {
          from.push_back(tap->offset[0] * step[0] + tap->offset[1] * step[1] + tap->offset[2] * step[2]);
          weights.push_back(kernels + (b * taps + tap->index) * channels + c);
        }
        auto run = [&](int64_t k, bool block, const std::vector<int64_t>& at, const std::vector<const Sum*>& of) {
          const T* a = in + k * jump + c;
          T* to = out + k * channels + c;
          const Sum* add = epilogue.bias.data ? epilogue.bias.of_sample(b) + c : nullptr;
          auto multiply = vectors == V ? (block ? multiply_taps<T, P, V, A> : multiply_taps<T, 1, V, A>)
                                       : (block ? multiply_taps<T, P, 1, A> : multiply_taps<T, 1, 1, A>);
          multiply(a, jump, at, of.data(), add, to, channels, line);
        };
        auto border = [&](int64_t k) {
          some.clear(), chosen.clear();
          for (size_t t = 0; t < met.size(); ++t) {
            const int64_t place = k * phase.jump[2] + met[t]->offset[2];
            if (place >= 0 && place < size[2]) some.push_back(from[t]), chosen.push_back(weights[t]);
          }
          run(k, false, some, chosen);
        };
        for (int64_t k = 0; k < first; ++k) border(k);
        int64_t k = first;
        for (; k + P <= last; k += P) run(k, true, from, weights);
        for (; k < last; ++k) run(k, false, from, weights);
        for (; k < count[2]; ++k) border(k);
        if (Sum* sums = epilogue.line(b, task % lines)) std::copy_n(line, vectors * L, sums + c);
        c += vectors * L;
      }
    }
  });
}

}  // namespace odconv
