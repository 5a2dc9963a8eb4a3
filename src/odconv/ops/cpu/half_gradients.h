// The gradients of kernels and attentions in bfloat16 and float16, by oneDNN's microkernel, with float32 sums.
//
// The gradient of a tile's mixed kernel, [tap][row][lane], sums over positions, so that pairs are those of two positions. Both maps
// are copied for that, once for all tiles: the input as [sample][row][remainder][position], padded as in half.h, so that each tap
// reads a run; the gradient of the output as [sample][block of lanes][position / 2][lane][2], with zeros where the padded map has
// positions that are no outputs.
#pragma once

#include "half.h"

namespace odconv {

constexpr int64_t SUMMED = 256;  // positions of one product: their gradients stay in the first-level cache

// Round up to one of a few sizes an octave, since the microkernel is generated for each pitch anew: odd multiples of a line of the cache,
// so that rows do not share places in it.
inline int64_t pitch_of(int64_t numbers) {
  constexpr int64_t LINE = 32;
  int64_t unit = 2 * LINE;
  while (8 * unit < numbers) unit *= 2;
  return ceil_div(numbers - LINE, unit) * unit + LINE;
}

// Which position of a map lies at each place of its padded form, [remainder][position], and none beyond; -1 stands for zeros.
inline std::vector<int64_t> places_of(const Axes& size, const Phase& phase, const Padding& padding, int64_t pitch) {
  std::vector<int64_t> out;
  each(phase.jump, [&](const Axes& remainder) {
    each(padding.extent, [&](const Axes& at) {
      int64_t position = 0;
      for (int a = 0; a < 3; ++a) {
        const int64_t y = phase.low[a] + remainder[a] + at[a] * phase.jump[a];
        position = position < 0 || y < 0 || y >= size[a] ? -1 : position * size[a] + y;
      }
      out.push_back(position);
    });
  });
  out.resize(pitch, -1);
  return out;
}

// Which output lies there.
inline std::vector<int64_t> output_places_of(const Phase& phase, const Padding& padding, int64_t total) {
  std::vector<int64_t> out(total, -1);
  int64_t index = 0;
  each(phase.count, [&](const Axes& at) { out[(at[0] * padding.extent[1] + at[1]) * padding.extent[2] + at[2]] = index++; });
  return out;
}

// Read a vector of `count` numbers and zeros; zeros alone, where a place is none.
template <class T>
typename Stored<T>::Short read_place(const T* x, int64_t place, int64_t step, int64_t count) {
  typename Stored<T>::Short out = {};
  if (place >= 0 && count >= Simd<float>::LANES) return Stored<T>::read(x + place * step);
  if (place >= 0) std::memcpy(static_cast<void*>(&out), x + place * step, count * sizeof(T));
  return out;
}

// Copy one sample, [position][channel], as [channel][place].
template <class T>
void place_rows(const T* x, int64_t channels, const std::vector<int64_t>& places, T* out) {
  using S = Simd<float>;
  constexpr int L = S::LANES;
  const int64_t pitch = places.size();
  for (int64_t p = 0; p < pitch; p += 2 * L)
    for (int64_t c = 0; c < channels; c += L) {
      const int64_t count = std::min<int64_t>(L, channels - c);
      typename S::Vec v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i)
        v[i] = typename S::Vec(Stored<T>::join(read_place(x + c, places[p + 2 * i], channels, count), read_place(x + c, places[p + 2 * i + 1], channels, count)));
      transpose<float>(v);
      for (int i = 0; i < count; ++i) S::store(reinterpret_cast<float*>(out + (c + i) * pitch + p), v[i]);
    }
}

// Copy some lanes of one sample's gradient, [position][channel], as pairs, [place / 2][lane][2].
template <class T>
void place_pairs(const T* grad, int64_t channels, const Span& lanes, int64_t width, const std::vector<int64_t>& places, T* out) {
  using H = Stored<T>;
  constexpr int L = Simd<float>::LANES;
  for (size_t p = 0; p < places.size(); p += 2, out += 2 * width)
    for (int64_t l = 0; l < width; l += L) {
      const T* in = grad + lanes.first + l;
      const int64_t count = lanes.count - l;
      *reinterpret_cast<typename H::LooseBits*>(out + 2 * l) =
          H::join(read_place(in, places[p], channels, count), read_place(in, places[p + 1], channels, count));
    }
}

// Both maps as they are read for the gradients of a layer's kernels.
template <class T>
struct Copies {
  Padding padding;
  int64_t channels, total, pitch;  // rows of all groups; positions that are summed over, whole products
  Tensor rows, lanes;
  std::vector<int64_t> from;  // of a sample, where the lanes that begin at a channel lie; last, where they all end
};

template <class T>
Copies<T> copy_pairs(const T* x, const Axes& size, const T* grad, const Kernels<float>& kernels, int64_t groups, const std::vector<Span>& blocks,
                     int64_t batch, const Phase& phase) {
  constexpr int L = Simd<float>::LANES;
  constexpr ScalarType type = torch::headeronly::CppTypeToScalarType<T>::value;
  Copies<T> out;
  out.padding = padding_of(size, groups * kernels.rows, phase);
  out.channels = groups * kernels.rows;
  out.total = ceil_div(out.padding.wide, 32) * 32;
  const int64_t parts = out.padding.numbers / out.padding.channels;
  out.pitch = pitch_of(std::max(parts, *std::max_element(out.padding.from.begin(), out.padding.from.end()) + out.total));
  const std::vector<int64_t> places = places_of(size, phase, out.padding, out.pitch), output_places = output_places_of(phase, out.padding, out.total);
  const int64_t filters = groups * kernels.lanes, positions = size[0] * size[1] * size[2],
                outputs = phase.count[0] * phase.count[1] * phase.count[2], count = blocks.size();
  out.from.assign(filters + 1, 0);
  int64_t end = 0;
  for (int64_t g = 0; g < groups; ++g)
    for (const Span& lanes : blocks) {
      out.from[g * kernels.lanes + lanes.first] = end;
      end += out.total * ceil_div(lanes.count, L) * L;
    }
  out.from[filters] = end;
  out.rows = empty({batch * out.channels * out.pitch}, type);
  out.lanes = empty({batch * end}, type);
  T *to_rows = out.rows.template mutable_data_ptr<T>(), *to_lanes = out.lanes.template mutable_data_ptr<T>();
  parallel_for(0, batch * (1 + groups * count), 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / (1 + groups * count), at = task % (1 + groups * count) - 1;
      if (at < 0) {
        place_rows<T>(x + b * positions * out.channels, out.channels, places, to_rows + b * out.channels * out.pitch);
      } else {
        const Span& block = blocks[at % count];
        const Span lanes = {at / count * kernels.lanes + block.first, block.count};
        place_pairs<T>(grad + b * outputs * filters, filters, lanes, ceil_div(block.count, L) * L, output_places,
                       to_lanes + b * out.from[filters] + out.from[lanes.first]);
      }
    }
  });
  return out;
}

// Computes the gradient of a tile's mixed kernel; see TileGradient.
template <class T>
class PairsGradient {
 public:
  explicit PairsGradient(const Copies<T>& copies) : copies_(copies) {}
  PairsGradient(const PairsGradient&) = delete;
  ~PairsGradient() { at::native::cpublas::brgemm_release(); }

  void add(const Tile& tile, int64_t first_channel, int64_t first_filter, const Panel& panel, float* mixed_grad) {
    const int64_t width = tile.vectors * Simd<float>::LANES, pitch = copies_.pitch;
    const T* rows = copies_.rows.template const_data_ptr<T>() + (panel.sample * copies_.channels + first_channel) * pitch;
    const T* lanes = copies_.lanes.template const_data_ptr<T>() + panel.sample * copies_.from.back() + copies_.from[first_filter];
    for (int64_t p = 0; p < copies_.total; p += SUMMED) {
      const int64_t count = std::min(SUMMED, copies_.total - p);
      float* to = mixed_grad;
      for (int64_t from : copies_.padding.from) {
        at::native::cpublas::brgemm(tile.rows, width, count, pitch, width, width, p > 0, rows + from + p, lanes + p * width, to);
        to += tile.rows * width;
      }
    }
  }

 private:
  const Copies<T>& copies_;
};

// Blocks of rows whose n kernels, with their gradients, the second-level cache holds; at least `least` if rows allow.
template <class T>
std::vector<Span> rows_of_pairs(const Kernels<T>& kernels, int64_t least) {
  constexpr int64_t MOST = 768 * 1024, WIDTH = VECTORS * Simd<T>::LANES;
  const int64_t most = std::clamp<int64_t>(MOST / ((2 * kernels.n + 1) * kernels.taps * WIDTH * int64_t(sizeof(T))), 1, TILE_ROWS);
  return split(kernels.rows, std::max(ceil_div(kernels.rows, most), std::min(least, ceil_div(kernels.rows, 16))));
}

}  // namespace odconv
