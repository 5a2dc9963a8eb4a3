// Depth-wise layers on channels-last maps: vectors run over channels.
#pragma once

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

// Write the sums of P positions for V vectors of channels, `step` numbers apart, and add them to `line` too.
template <class T, int P, int V, class A>
[[gnu::always_inline]] inline void write_sums(const typename Stored<T>::Vec (&sums)[P][V], const typename Stored<T>::Sum* bias, T* y, int64_t step,
                                              typename Stored<T>::Sum* line) {
  using S = Simd<typename Stored<T>::Sum>;
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    typename S::Vec all = S::load(line + v * S::LANES);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const typename S::Vec sum = A()(bias ? sums[p][v] + S::load(bias + v * S::LANES) : sums[p][v]);
      Stored<T>::store(y + p * step + v * S::LANES, sum);
      all += sum;
    }
    S::store(line + v * S::LANES, all);
  }
}

// What the taps of a position or of some read: each from its place on, in `count` taps.
template <class T>
struct Met {
  const T* x;
  int64_t jump, channels;  // how far apart the positions of outputs are, and those of inputs
  const int64_t* from;
  int64_t count;
  const typename Stored<T>::Sum* const* kernels;
};

// The sums of one position, tap by tap.
template <class T, int V, class A>
void multiply_taps(const Met<T>& met, const typename Stored<T>::Sum* bias, T* y, int64_t step, typename Stored<T>::Sum* line) {
  using S = Simd<typename Stored<T>::Sum>;
  typename S::Vec sums[1][V] = {};
  for (int64_t t = 0; t < met.count; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[0][v] += S::load(met.kernels[t] + v * S::LANES) * Stored<T>::load(met.x + met.from[t] + v * S::LANES);
  write_sums<T, 1, V, A>(sums, bias, y, step, line);
}

// The sums of P positions, J inputs apart, where W taps that follow each other make a row: what several taps read is read once.
template <class T, int V, class A, int P, int W, int J>
void multiply_rows(const Met<T>& met, const typename Stored<T>::Sum* bias, T* y, int64_t step, typename Stored<T>::Sum* line) {
  using S = Simd<typename Stored<T>::Sum>;
  typename S::Vec sums[P][V] = {};
  for (int64_t row = 0; row < met.count; row += W) {
    const T* at = met.x + met.from[row];
    typename S::Vec weights[W][V];
#pragma GCC unroll 8
    for (int t = 0; t < W; ++t)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) weights[t][v] = S::load(met.kernels[row + t] + v * S::LANES);
    const int64_t apart = W > 1 ? met.channels : met.jump;
#pragma GCC unroll 16
    for (int q = 0; q < (P - 1) * J + W; ++q)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const typename S::Vec read = Stored<T>::load(at + q * apart + v * S::LANES);
#pragma GCC unroll 8
        for (int t = 0; t < W; ++t)
          if (q >= t && (q - t) % J == 0 && (q - t) / J < P) sums[(q - t) / J][v] += weights[t][v] * read;
      }
  }
  write_sums<T, P, V, A>(sums, bias, y, step, line);
}

constexpr int PLACES = 4;  // positions whose sums are computed together

// Those functions by vectors: for one position, and for some, of rows of 3 or 5 taps at stride 1 or 2, or of single taps.
template <class T>
using MultiplyMet = void (*)(const Met<T>&, const typename Stored<T>::Sum*, T*, int64_t, typename Stored<T>::Sum*);

template <class T, class A, int... V>
MultiplyMet<T> pick_met(int vectors, int positions, int width, int64_t jump, std::integer_sequence<int, V...>) {
  static constexpr MultiplyMet<T> one[] = {multiply_taps<T, V + 1, A>...}, single[] = {multiply_rows<T, V + 1, A, PLACES, 1, 1>...},
                                  three[] = {multiply_rows<T, V + 1, A, PLACES, 3, 1>...}, three_apart[] = {multiply_rows<T, V + 1, A, PLACES, 3, 2>...},
                                  five[] = {multiply_rows<T, V + 1, A, PLACES, 5, 1>...}, five_apart[] = {multiply_rows<T, V + 1, A, PLACES, 5, 2>...};
  const auto* table = positions == 1 ? one : width == 1 ? single : width == 3 ? (jump == 1 ? three : three_apart) : (jump == 1 ? five : five_apart);
  return table[vectors - 1];
}

// How many taps of a phase, in the order of their offsets, make a row that is read at once: 1, 3 or 5.
inline int row_width(const Phase& phase) {
  int64_t width = 1;
  const std::vector<Tap>& taps = phase.taps;
  while (width < int64_t(taps.size()) && taps[width].offset[0] == taps[0].offset[0] && taps[width].offset[1] == taps[0].offset[1]) ++width;
  const bool next = width == 1 || taps[1].offset[2] == taps[0].offset[2] + 1;
  return (width == 3 || width == 5) && next && phase.jump[2] < 3 ? int(width) : 1;
}

// Convolve each channel of a map, [sample][position][channel], with its own kernel, [sample][tap][channel], of at least a
// vector of channels, into the positions of a phase. The last vector may overlap the one before.
template <class T>
void convolve_depthwise(const T* x, const Axes& size, const typename Stored<T>::Sum* kernels, int64_t taps,
                        const Epilogue<typename Stored<T>::Sum>& epilogue, int64_t channels, int64_t batch, Phase phase, const Axes& y_size, T* y) {
  using Sum = typename Stored<T>::Sum;
  constexpr int L = Simd<Sum>::LANES, V = 4;
  const auto pick = with_activation(epilogue.activation, [](auto activate) { return &pick_met<T, decltype(activate), 0, 1, 2, 3>; });
  order_taps(phase);
  const int width = row_width(phase);
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
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / lines, i = task % lines / count[1], j = task % count[1];
      const T* map = x + b * size[0] * step[0];
      const int64_t line_of_y = (b * y_size[0] + phase.origin[0] + i * phase.stride[0]) * y_size[1] + phase.origin[1] + j * phase.stride[1];
      T* out = y + (line_of_y * y_size[2] + phase.origin[2]) * channels;
      met.clear(), starts.clear();
      for (const Tap& tap : phase.taps) {
        const int64_t row = i * phase.jump[0] + tap.offset[0], column = j * phase.jump[1] + tap.offset[1];
        if (row < 0 || row >= size[0] || column < 0 || column >= size[1]) continue;
        met.push_back(&tap);
        starts.push_back(row * step[0] + column * step[1]);
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
        const MultiplyMet<T> one = pick(vectors, 1, width, phase.jump[2], {}), several = pick(vectors, PLACES, width, phase.jump[2], {});
        auto run = [&](int64_t k, MultiplyMet<T> multiply, const std::vector<int64_t>& at, const std::vector<const Sum*>& of) {
          const Sum* add = epilogue.bias.data ? epilogue.bias.of_sample(b) + c : nullptr;
          multiply({map + k * jump + c, jump, channels, at.data(), int64_t(at.size()), of.data()}, add, out + k * apart + c, apart, line);
        };
        auto border = [&](int64_t k) {
          some.clear(), chosen.clear();
          for (size_t t = 0; t < met.size(); ++t) {
            const int64_t place = k * phase.jump[2] + met[t]->offset[2];
            if (place >= 0 && place < size[2]) some.push_back(from[t]), chosen.push_back(weights[t]);
          }
          run(k, one, some, chosen);
        };
        for (int64_t k = 0; k < first; ++k) border(k);
        int64_t k = first;
        for (; k + PLACES <= last; k += PLACES) run(k, several, from, weights);
        for (; k < last; ++k) run(k, one, from, weights);
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
