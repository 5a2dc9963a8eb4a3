// Depth-wise layers on channels-last maps: vectors run over channels. Numbers of 16 bits are widened a line at a time, once for
// all taps; others are read where they lie.
#pragma once

#include <optional>

#include "convolve.h"

namespace odconv {

// The kernels of a depth-wise layer with all attentions, [sample][tap][channel], of n kernels or one of each sample,
// [kernel][channel][tap].
template <class T>
void mix_taps(const T* kernels, int64_t n, bool per_sample, int64_t taps, int64_t channels, const Gates<T>& gates, int64_t batch, T* out) {
  const int64_t count = per_sample ? batch : n;
  std::vector<T> by_tap(count * taps * channels), scale(channels);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t c = 0; c < channels; ++c) by_tap[(i * taps + t) * channels + c] = kernels[(i * channels + c) * taps + t];
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t c = 0; c < channels; ++c)
      scale[c] = (gates.rows ? gates.rows[b * channels + c] : T(1)) * (gates.lanes ? gates.lanes[b * channels + c] : T(1));
    for (int64_t t = 0; t < taps; ++t, out += channels) {
      const T tap = gates.taps ? gates.taps[b * taps + t] : T(1);
      const T* kernel = &by_tap[(per_sample ? b : 0) * taps * channels + t * channels];
      for (int64_t c = 0; c < channels; ++c) out[c] = (gates.shares ? gates.shares[b * n] : T(1)) * kernel[c];
      for (int64_t i = 1; i < n && !per_sample; ++i)
        for (int64_t c = 0; c < channels; ++c) out[c] += gates.shares[b * n + i] * kernel[i * taps * channels + c];
      for (int64_t c = 0; c < channels; ++c) out[c] *= tap * scale[c];
    }
  }
}

// The sums of P positions, each `jump` numbers after the one before, for V vectors of channels: taps at `from` a position.
// They are written `step` numbers apart, and added to `line` too.
template <class T, class In, int P, int V, class A>
void multiply_taps(const In* x, int64_t jump, const std::vector<int64_t>& from, const typename Stored<T>::Sum* const* kernels,
                   const typename Stored<T>::Sum* bias, T* y, int64_t step, typename Stored<T>::Sum* line) {
  using S = Stored<T>;
  constexpr int L = Simd<typename S::Sum>::LANES;
  typename S::Vec sums[P][V] = {};
  const int64_t taps = from.size(), *offsets = from.data();
  for (int64_t t = 0; t < taps; ++t) {
    const In* at = x + offsets[t];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const typename S::Vec weight = Simd<typename S::Sum>::load(kernels[t] + v * L);
#pragma GCC unroll 8
      for (int p = 0; p < P; ++p) sums[p][v] += weight * Stored<In>::load(at + p * jump + v * L);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    typename S::Vec all = Simd<typename S::Sum>::load(line + v * L);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const typename S::Vec sum = A()(bias ? sums[p][v] + Simd<typename S::Sum>::load(bias + v * L) : sums[p][v]);
      S::store(y + p * step + v * L, sum);
      all += sum;
    }
    Simd<typename S::Sum>::store(line + v * L, all);
  }
}

// Lines of a map, (size[2], channels), in the dtype of sums, the last ones that taps met.
template <class T>
class Lines {
 public:
  using Sum = typename Stored<T>::Sum;
  Lines(int64_t numbers, const Phase& phase) : numbers_(numbers) {
    for (int a = 0; a < 2; ++a) slots_[a] = phase.high[a] + 1 - phase.low[a];
    held_.assign(slots_[0] * slots_[1], nullptr);
    data_ = Scratch<Sum>::mine().window.get(held_.size() * numbers);
  }
  const Sum* data() const { return data_; }

  // Where the line at (row, column), which begins at x, lies in data().
  int64_t at(int64_t row, int64_t column, const T* x) {
    const int64_t slot = row % slots_[0] * slots_[1] + column % slots_[1];
    if (held_[slot] != x) {
      Sum* to = data_ + slot * numbers_;
      constexpr int L = Simd<Sum>::LANES;
      int64_t i = 0;
      for (; i + L <= numbers_; i += L) Simd<Sum>::store(to + i, Stored<T>::load(x + i));
      for (; i < numbers_; ++i) to[i] = Sum(x[i]);
      held_[slot] = x;
    }
    return slot * numbers_;
  }

 private:
  int64_t numbers_, slots_[2];
  std::vector<const T*> held_;
  Sum* data_;
};

// Convolve each channel of a map, [sample][position][channel], with its own kernel, [sample][tap][channel], of at least a
// vector of channels, into the positions of a phase. The last vector may overlap the one before.
template <class T>
void convolve_depthwise(const T* x, const Axes& size, const typename Stored<T>::Sum* kernels, int64_t taps,
                        const Epilogue<typename Stored<T>::Sum>& epilogue, int64_t channels, int64_t batch, const Phase& phase, const Axes& y_size, T* y) {
  using Sum = typename Stored<T>::Sum;
  constexpr bool widens = !std::is_same_v<T, Sum>;
  using In = std::conditional_t<widens, Sum, T>;
  constexpr int L = Simd<Sum>::LANES, P = 4, V = 4;
  // for one position and P of them, of 1 to V vectors
  const auto multiply = with_activation(epilogue.activation, [](auto activate) {
    using A = decltype(activate);
    return std::array{
        std::array{&multiply_taps<T, In, 1, 1, A>, &multiply_taps<T, In, 1, 2, A>, &multiply_taps<T, In, 1, 3, A>, &multiply_taps<T, In, 1, V, A>},
        std::array{&multiply_taps<T, In, P, 1, A>, &multiply_taps<T, In, P, 2, A>, &multiply_taps<T, In, P, 3, A>, &multiply_taps<T, In, P, V, A>}};
  });
  const Axes& count = phase.count;
  const Axes step = {size[1] * size[2] * channels, size[2] * channels, channels};
  const int64_t jump = phase.jump[2] * channels, apart = phase.stride[2] * channels;
  // the outputs of a line between which every tap lies inside it
  const int64_t first = std::clamp<int64_t>(ceil_div(std::max<int64_t>(-phase.low[2], 0), phase.jump[2]), 0, count[2]);
  const int64_t last = std::clamp<int64_t>((size[2] - 1 - phase.high[2] + phase.jump[2]) / phase.jump[2], first, count[2]);
  const int64_t lines = count[0] * count[1], grain = std::max<int64_t>(1, 32768 / (count[2] * channels * int64_t(phase.taps.size())));
  parallel_for(0, batch * lines, grain, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> starts, from, some;  // of the line that a tap meets, and with the tap's place in it
    std::vector<const Tap*> met;
    std::vector<const Sum*> weights, chosen;
    std::optional<Lines<T>> widened;
    if (widens) widened.emplace(size[2] * channels, phase);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / lines, i = task % lines / count[1], j = task % count[1];
      const T* map = x + b * size[0] * step[0];
      const In* lines_at;
      if constexpr (widens)
        lines_at = widened->data();
      else
        lines_at = map;
      const int64_t line_of_y = (b * y_size[0] + phase.origin[0] + i * phase.stride[0]) * y_size[1] + phase.origin[1] + j * phase.stride[1];
      T* out = y + (line_of_y * y_size[2] + phase.origin[2]) * channels;
      met.clear(), starts.clear();
      for (const Tap& tap : phase.taps) {
        const int64_t row = i * phase.jump[0] + tap.offset[0], column = j * phase.jump[1] + tap.offset[1];
        if (row < 0 || row >= size[0] || column < 0 || column >= size[1]) continue;
        const int64_t start = row * step[0] + column * step[1];
        met.push_back(&tap);
        starts.push_back(widens ? widened->at(row, column, map + start) : start);
      }
      for (int64_t c = 0; c < channels;) {
        const int64_t left = ceil_div(channels - c, L);  // in nearly equal blocks
        const int vectors = int(std::min(ceil_div(left, ceil_div(left, V)), channels / L));
        c = std::min(c, channels - vectors * L);
        alignas(VECTOR_BYTES) Sum line[V * L] = {};
        from.clear(), weights.clear();
        for (size_t t = 0; t < met.size(); ++t) {
          from.push_back(starts[t] + met[t]->offset[2] * channels);
          weights.push_back(kernels + (b * taps + met[t]->index) * channels + c);
        }
        auto run = [&](int64_t k, bool block, const std::vector<int64_t>& at, const std::vector<const Sum*>& of) {
          const In* a = lines_at + k * jump + c;
          T* to = out + k * apart + c;
          const Sum* add = epilogue.bias.data ? epilogue.bias.of_sample(b) + c : nullptr;
          multiply[block][vectors - 1](a, jump, at, of.data(), add, to, apart, line);
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

// Add to V vectors of sums the products of `count` positions of two lines.
template <class T, int V>
void add_products(const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t count, typename Stored<T>::Sum* sums) {
  using S = Simd<typename Stored<T>::Sum>;
  typename S::Vec even[V] = {}, odd[V] = {};
  int64_t k = 0;
  for (; k + 2 <= count; k += 2, a += 2 * a_step, b += 2 * b_step)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      even[v] += Stored<T>::load(a + v * S::LANES) * Stored<T>::load(b + v * S::LANES);
      odd[v] += Stored<T>::load(a + a_step + v * S::LANES) * Stored<T>::load(b + b_step + v * S::LANES);
    }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    if (k < count) even[v] += Stored<T>::load(a + v * S::LANES) * Stored<T>::load(b + v * S::LANES);
    S::store(sums + v * S::LANES, S::load(sums + v * S::LANES) + even[v] + odd[v]);
  }
}

// The gradient of each sample's kernel, [sample][channel][tap]: over all outputs, what a tap met times the output's gradient.
template <class T>
void gradients_depthwise(const T* x, const Axes& size, const T* grad, int64_t channels, int64_t batch, const Phase& phase, T* out) {
  using Sum = typename Stored<T>::Sum;
  constexpr int L = Simd<Sum>::LANES, V = 4;
  const std::vector<Span> blocks = split(channels, ceil_div(channels, V * L), L);
  const int64_t taps = phase.taps.size(), jump = phase.jump[2], lines = phase.count[0] * phase.count[1];
  parallel_for(0, batch * blocks.size(), 1, [&](int64_t begin, int64_t end) {
    std::vector<Sum> sums;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / int64_t(blocks.size());
      const Span& block = blocks[task % blocks.size()];
      for (int64_t done = 0; done < block.count;) {  // the last vector may overlap the one before
        const int vectors = block.count - done >= V * L ? V : 1;
        const int64_t width = vectors * L, own = block.first + done, c = std::min(own, channels - width);
        sums.assign(taps * width, Sum(0));
        for (int64_t line = 0; line < lines; ++line) {
          const int64_t i = line / phase.count[1], j = line % phase.count[1];
          const T* to = grad + (b * lines + line) * phase.count[2] * channels + c;
          for (int64_t t = 0; t < taps; ++t) {
            const Axes& offset = phase.taps[t].offset;
            const int64_t row = i * phase.jump[0] + offset[0], column = j * phase.jump[1] + offset[1];
            if (row < 0 || row >= size[0] || column < 0 || column >= size[1]) continue;
            const int64_t first = std::max<int64_t>(0, ceil_div(-std::min<int64_t>(offset[2], 0), jump));
            const int64_t last = offset[2] < size[2] ? std::min(phase.count[2], (size[2] - 1 - offset[2]) / jump + 1) : 0;
            const T* from = x + (((b * size[0] + row) * size[1] + column) * size[2] + first * jump + offset[2]) * channels + c;
            const auto add = vectors == V ? &add_products<T, V> : &add_products<T, 1>;
            if (first < last) add(from, jump * channels, to + first * channels, channels, last - first, &sums[t * width]);
          }
        }
        for (int64_t l = own - c; l < width; ++l)
          for (int64_t t = 0; t < taps; ++t) out[(b * channels + c + l) * taps + phase.taps[t].index] = T(sums[t * width + l]);
        done = c + width - block.first;
      }
    }
  });
}

}  // namespace odconv
