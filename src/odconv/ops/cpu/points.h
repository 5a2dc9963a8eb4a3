// Kernels of one tap on contiguous maps: vectors run over positions, so that neither kernels nor sums are transposed. A sample's
// outputs are a matrix product, its mixed kernel (filters x channels) times its map (channels x positions).
//
//   for each task = a group's filters, or some of them, x a sample       (in parallel)
//     mix the kernels, which lie in the second-level cache from the sample before  -> mixed, as in the weight
//     for each few vectors of positions
//       copy what they read of the map                                   -> window[channel][position], zeros beyond the map
//       for some filters: accumulate mixed x window, a block of channels after the other; apply the epilogue, write
#pragma once

#include "convolve.h"

namespace odconv {

constexpr int64_t BLOCK_LANES = 12;  // that are written at a time: few enough to be written while the next ones are computed

// Whether one tap meets each position of a contiguous map, of so many positions that vectors over them are full enough.
inline bool by_point(const Tensor& x, const Geometry& g) {
  const int64_t positions = x.numel() / (x.size(0) * x.size(1)), lanes = VECTOR_BYTES / int64_t(x.element_size());
  const Axes ones = {1, 1, 1};
  return g.kernel == ones && g.stride == ones && g.padding == Axes() && 5 * ceil_div(positions, lanes) * lanes <= 6 * positions;
}

// Convolve every sample's map, (B, groups * rows, positions), with its own mixed kernel of one tap, into y.
template <class T>
void convolve_points(const T* x, const Kernels<T>& kernels, int64_t groups, const Gates<T>& gates, const Epilogue<T>& epilogue, int64_t batch,
                     int64_t positions, T* y) {
  constexpr int L = Simd<T>::LANES;
  const int64_t rows = kernels.rows, threads = int64_t(get_num_threads()), vectors = ceil_div(positions, L);
  const int64_t held = std::max<int64_t>(L, HELD_NUMBERS / ((kernels.n + 1) * rows));  // lanes of a task, at most
  const int64_t apart = std::min(ceil_div(kernels.lanes, L), std::max(ceil_div(kernels.lanes, held), ceil_div(threads, batch * groups)));
  const std::vector<Span> sides = split(kernels.lanes, apart, L), row_blocks = split(rows, ceil_div(rows, TILE_ROWS)),
                          panels = split(vectors, ceil_div(vectors, VECTORS));
  const auto write = with_activation(epilogue.activation, [](auto activate) { return &write_run<T, decltype(activate)>; });
  parallel_for(0, groups * apart * batch, 1, [&](int64_t begin, int64_t end) {
    Scratch<T>& scratch = Scratch<T>::mine();
    T* window = scratch.window.get(rows * VECTORS * L);
    T* sums = scratch.out.get(BLOCK_LANES * VECTORS * L);
    std::vector<Step> steps(rows);
    std::vector<const T*> filters;
    std::vector<T> totals;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / (apart * batch), sample = task % batch;
      const Span& side = sides[task / batch % apart];
      const int64_t channel = (sample * groups + group) * rows, filter = (sample * groups + group) * kernels.lanes + side.first;
      const Factors<T> factors = {gates.rows ? gates.rows + channel : nullptr, gates.lanes ? gates.lanes + filter : nullptr,
                                  gates.taps ? gates.taps[sample] : T(1)};
      const Kernels<T> mixed = blend<T>(kernels.of_sample(sample).of_group(group), side, gates.shares ? gates.shares + sample * kernels.n : nullptr,
                                        scratch.blend, factors);
      const T* bias = epilogue.bias.data ? epilogue.bias.of_sample(sample) + group * kernels.lanes + side.first : nullptr;
      filters.resize(side.count);
      for (int64_t l = 0; l < side.count; ++l) filters[l] = mixed.data + (side.first + l) * mixed.lane_step;
      totals.assign(side.count, T(0));
      for (const Span& panel : panels) {
        const int64_t first = panel.first * L, width = panel.count * L, count = std::min(width, positions - first);
        for (int64_t r = 0; r < rows; ++r) {
          copy_run<T>(x + (channel + r) * positions + first, count, panel.count, window + r * width);
          steps[r] = {r * mixed.row_step, r * width};
        }
        for (int64_t l = 0; l < side.count; l += BLOCK_LANES) {
          const int64_t lanes = std::min(BLOCK_LANES, side.count - l);
          for (const Span& block : row_blocks)
            multiply<T>(filters.data() + l, lanes, panel.count, window, steps.data() + block.first, block.count, sums, block.first > 0);
          for (int64_t i = 0; i < lanes; ++i) {
            T* to = y + (filter + l + i) * positions + first;
            write(sums + i * width, count, bias ? bias[l + i] : T(0), to);
            if (epilogue.line_sums) totals[l + i] += sum_run<T>(to, count);
          }
        }
      }
      if (epilogue.line_sums) std::copy(totals.begin(), totals.end(), epilogue.line(sample, 0) + group * kernels.lanes + side.first);
    }
  });
}

}  // namespace odconv
