// Depth-wise layers, by planes.
#pragma once

#include "convolve.h"

namespace odconv {

// One filter a channel, on contiguous maps of one or two axes: vectors run over positions. A plane is copied with zeros
// around it and taken apart by its coordinates modulo the stride, so that each tap reads it in one run. There are n kernels
// to mix, or one for each sample.
template <class T>
void convolve_planes(const T* x, const Axes& size, const T* kernels, int64_t n, bool per_sample, int64_t channels, const Gates<T>& gates,
                     const Epilogue<T>& epilogue, int64_t batch, const Phase& phase, const Axes& stride, T* y) {
  using S = Simd<T>;
  constexpr int L = S::LANES, BLOCK = 4;
  const int64_t taps = phase.taps.size(), plane = size[0] * size[2], outputs = phase.count[0] * phase.count[2];
  auto extent = [&](int a) { return ceil_div((phase.count[a] - 1) * stride[a] + phase.high[a] + 1 - phase.low[a], stride[a]); };
  const int64_t pitch = extent(2), part = extent(0) * pitch, wide = phase.count[0] * pitch;
  std::vector<int64_t> from;  // where each tap begins to read
  for (const Tap& tap : phase.taps) {
    const int64_t i = tap.offset[0] - phase.low[0], j = tap.offset[2] - phase.low[2];
    from.push_back((i % stride[0] * stride[2] + j % stride[2]) * part + i / stride[0] * pitch + j / stride[2]);
  }
  std::vector<int64_t> row_at;  // where each row of a plane goes; -1 for one that no output meets
  for (int64_t i = 0; i < size[0]; ++i) {
    const int64_t row = i - phase.low[0];
    const bool met = row >= 0 && row < extent(0) * stride[0];
    row_at.push_back(met ? row % stride[0] * stride[2] * part + row / stride[0] * pitch : -1);
  }
  struct Run {
    int64_t first, last, shift;
  };
  std::vector<Run> columns;  // columns p, p + stride, ... of a padded row: number k comes from k * stride + shift
  for (int64_t p = 0; p < stride[2]; ++p) {
    const int64_t shift = p + phase.low[2];
    columns.push_back({std::max<int64_t>(0, ceil_div(-shift, stride[2])),
                       std::min(pitch, ceil_div(size[2] - shift, stride[2])), shift});
  }
  const auto write = with_activation(epilogue.activation, [](auto activate) { return &write_run<T, decltype(activate)>; });
  parallel_for(0, batch * channels, std::max<int64_t>(1, 32768 / (plane + outputs * taps)), [&](int64_t begin, int64_t end) {
    Scratch<T>& scratch = Scratch<T>::mine();
    const int64_t numbers = stride[0] * stride[2] * part;
    const int64_t reach = numbers + pitch + BLOCK * L;  // the last block reads beyond, for sums that are not used
    T* padded = scratch.window.get(reach);
    T* sums = scratch.out.get(wide + BLOCK * L);
    std::vector<T> base(channels * taps), kernel(taps);
    std::fill_n(padded, reach, T(0));  // the same places stay zero for every plane
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / channels, c = task % channels;
      if (task == begin || c == 0) {  // another sample: mix its kernels
        const int64_t last = std::min(channels, c + end - task) * taps;
        std::fill(base.begin(), base.end(), T(0));
        for (int64_t i = 0; i < (per_sample ? 1 : n); ++i) {
          const T share = gates.shares ? gates.shares[b * n + i] : T(1);
          const T* one = kernels + (per_sample ? b : i) * channels * taps;
          for (int64_t e = c * taps; e < last; ++e) base[e] += share * one[e];
        }
      }
      const T scale = (gates.rows ? gates.rows[task] : T(1)) * (gates.lanes ? gates.lanes[task] : T(1));
      for (int64_t t = 0; t < taps; ++t)
        kernel[t] = base[c * taps + t] * scale * (gates.taps ? gates.taps[b * taps + t] : T(1));
      for (int64_t i = 0; i < size[0]; ++i)
        for (int64_t p = 0; p < stride[2] && row_at[i] >= 0; ++p) {
          const Run& run = columns[p];
          const T* in = x + task * plane + i * size[2] + run.shift;
          T* to = padded + row_at[i] + p * part;
          if (stride[2] == 1)
            for (int64_t k = run.first; k < run.last; ++k) to[k] = in[k];
          else
            for (int64_t k = run.first; k < run.last; ++k) to[k] = in[k * stride[2]];
        }
      for (int64_t q = 0; q < wide; q += BLOCK * L) {
        typename S::Vec block[BLOCK] = {};
        for (int64_t t = 0; t < taps; ++t)
          for (int v = 0; v < BLOCK; ++v) block[v] += kernel[t] * S::load(padded + from[t] + q + v * L);
        for (int v = 0; v < BLOCK; ++v) S::store(sums + q + v * L, block[v]);
      }
      const T add = epilogue.bias.data ? epilogue.bias.of_sample(b)[c] : T(0);
      T total = 0;
      for (int64_t i = 0; i < phase.count[0]; ++i) {
        T* line = y + task * outputs + i * phase.count[2];
        write(sums + i * pitch, phase.count[2], add, line);
        if (epilogue.line_sums) total += sum_run<T>(line, phase.count[2]);
      }
      if (epilogue.line_sums) epilogue.line(b, 0)[c] = total;  // a plane is one line
    }
  });
}

inline bool by_plane(const Tensor& x, const Tensor& weight, int64_t groups) {
  return weight.size(1) == groups && weight.size(2) == 1 && x.dim() < 5 && x.is_contiguous();
}

}  // namespace odconv
