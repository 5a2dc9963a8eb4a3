// Tiles of kernels: cut out of the weight, mixed, and put back.
#pragma once

#include <optional>

#include "simd.h"

namespace odconv {

struct Span {
  int64_t first, count;
};

struct Tile {
  int64_t first_row, rows, first_lane, lanes;
  int vectors;
};

// How samples' kernels are put together of cells: each tap, block of rows and block of lanes of a kernel is a piece, a mixture of
// all n cells by a row of the sample's shares.
template <class T>
struct Cells {
  const T* shares;                            // (B, taps * blocks, n)
  int64_t rows, lanes;                        // of a cell
  int64_t row_piece, lane_piece, blocks;      // how many pieces further that of the next block of rows, of lanes, and of the next tap is
  int64_t piece(const Tile& tile, int64_t tap) const {
    return tap * blocks + tile.first_row / rows * row_piece + tile.first_lane / lanes * lane_piece;
  }
};

// n kernels seen as [row][lane][tap]: lanes are what the vectors run over, rows what is summed over besides the taps. Where
// every sample has a kernel of its own, n is 1 and sample_step leads from one sample's to the next; else that is 0. With cells,
// data holds n of them, size and steps are those of a cell, and the rest is that of the kernels which are put together.
template <class T>
struct Kernels {
  const T* data;
  int64_t n, size, rows, lanes, taps, row_step, lane_step, sample_step;
  std::optional<Cells<T>> cells = {};
  bool per_sample() const { return sample_step > 0; }
  Kernels of_sample(int64_t sample) const {
    Kernels out = *this;
    out.data += sample * sample_step;
    return out;
  }
  Kernels of_group(int64_t group) const {
    Kernels out = *this;
    out.data += group * rows * lanes * taps;
    return out;
  }
};

// Kernels whose taps and rows are one run a lane, as in a convolution's weight, or whose taps and lanes are one run a
// row, as in the same weight seen from its gradient.
template <class T>
bool rows_run(const Kernels<T>& kernels) {
  return kernels.row_step == kernels.taps;
}

// Where in a tile, [tap][row] at a pitch, the elements of a run [row][tap] lie.
inline void order_of(const Tile& tile, int64_t rows, int64_t taps, int64_t pitch, std::vector<int64_t>& out) {
  out.clear();
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t t = 0; t < taps; ++t) out.push_back((t * tile.rows + r) * pitch);
}

// One kernel's tile as [tap][row][lane], missing lanes zero; rows lie a pitch apart, by default that of a tile alone.
template <class T>
void pack(const Kernels<T>& kernels, const Tile& tile, const T* kernel, std::vector<int64_t>& order, T* out, int64_t pitch = 0) {
  using S = Simd<T>;
  constexpr int L = S::LANES;
  const int64_t width = tile.vectors * L, taps = kernels.taps;
  const int64_t runs = rows_run(kernels) ? 1 : tile.rows, length = tile.rows * taps / runs;
  if (pitch == 0) pitch = width;
  order_of(tile, length / taps, taps, pitch, order);
  kernel += tile.first_row * kernels.row_step + tile.first_lane * kernels.lane_step;
  for (int64_t lane = 0; lane < width; lane += L) {
    const int64_t valid = std::clamp<int64_t>(tile.lanes - lane, 0, L);
    for (int64_t run = 0; run < runs; ++run) {
      const T* in = kernel + run * kernels.row_step + lane * kernels.lane_step;
      T* to = out + run * pitch + lane;
      int64_t e = 0;
      if (valid == L && kernels.lane_step == 1) S::store(to + order[e++], S::load(in));  // 1x1, one row
      const int64_t ahead = length > 2 * L ? 2 * L : L * kernels.lane_step;  // a run is read on, a short one is left
      for (; valid == L && e + L <= length; e += L) {
        typename S::Vec v[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          v[i] = S::load(in + i * kernels.lane_step + e);
          __builtin_prefetch(in + i * kernels.lane_step + e + ahead);  // lanes lie too far apart for the hardware to guess
        }
        transpose<T>(v);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) S::store(to + order[e + i], v[i]);
      }
      for (; e < length; ++e) {
        for (int64_t i = 0; i < valid; ++i) to[order[e] + i] = in[i * kernels.lane_step + e];
        for (int64_t i = valid; i < L; ++i) to[order[e] + i] = 0;
      }
    }
  }
}

// The reverse for a gradient: out[lane][row][tap] = in[tap][row][lane], for kernels whose rows run.
template <class T>
void unpack(const T* in, const Tile& tile, const Kernels<T>& kernels, std::vector<int64_t>& order, T* out, int64_t pitch = 0) {
  using S = Simd<T>;
  constexpr int L = S::LANES;
  const int64_t length = tile.rows * kernels.taps;
  order_of(tile, tile.rows, kernels.taps, pitch == 0 ? tile.vectors * L : pitch, order);
  out += tile.first_row * kernels.row_step + tile.first_lane * kernels.lane_step;
  for (int64_t lane = 0; lane < tile.lanes; lane += L) {
    const int64_t valid = std::min<int64_t>(tile.lanes - lane, L);
    int64_t e = 0;
    for (; valid == L && e + L <= length; e += L) {
      typename S::Vec v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) v[i] = S::load(in + order[e + i] + lane);
      transpose<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) S::store(out + (lane + i) * kernels.lane_step + e, v[i]);
    }
    for (; e < length; ++e)
      for (int64_t i = 0; i < valid; ++i) out[(lane + i) * kernels.lane_step + e] = in[order[e] + lane + i];
  }
}

// What a blended kernel of one tap is multiplied by: (rows) and, from the first of its lanes on, (lanes); null counts as ones.
template <class T>
struct Factors {
  const T *rows = nullptr, *lanes = nullptr;
  T tap = 1;
};

// Call body with n, as a constant where it is one of the usual numbers of kernels, so that what loops over them is unrolled. Sums
// over kernels begin at zero: of two products the compiler could round either one, here and there in another way.
template <class F>
void with_count(int64_t n, F body) {
  switch (n) {
    case 1: return body(std::integral_constant<int64_t, 1>());
    case 2: return body(std::integral_constant<int64_t, 2>());
    case 4: return body(std::integral_constant<int64_t, 4>());
    case 8: return body(std::integral_constant<int64_t, 8>());
    default: return body(n);
  }
}

// sum_i shares[i] * kernel[i] for a block of lanes and all rows, shares or one kernel as it is: one kernel that is read as n were, but
// from the cache. It streams through memory in the order of the weight, at the speed of the memory.
template <class T>
Kernels<T> blend(const Kernels<T>& kernels, const Span& lanes, const T* shares, Buffer<T>& buffer, const Factors<T>& factors = {}) {
  using S = Simd<T>;
  Kernels<T> out = kernels;
  const bool by_lane = rows_run(kernels);  // a run is a lane, or a row
  const int64_t runs = by_lane ? lanes.count : kernels.rows, step = by_lane ? kernels.lane_step : kernels.row_step;
  const int64_t length = (by_lane ? kernels.rows : lanes.count) * kernels.taps, pitch = length + 2 * S::LANES;
  const T *of_runs = by_lane ? factors.lanes : factors.rows, *within = by_lane ? factors.rows : factors.lanes;
  T* sums = buffer.get(runs * pitch);
  const T one = 1;
  if (!shares) shares = &one;
  with_count(kernels.n, [&](auto n) {
    for (int64_t run = 0; run < runs; ++run) {
      const T* in = kernels.data + lanes.first * kernels.lane_step + run * step;
      const T scale = (of_runs ? of_runs[run] : T(1)) * factors.tap;
      T* to = sums + run * pitch;
      int64_t e = 0;
      for (; e + S::LANES <= length; e += S::LANES) {
        typename S::Vec sum = {};
#pragma GCC unroll 8
        for (int64_t i = 0; i < n; ++i) sum += shares[i] * S::load(in + i * kernels.size + e);
        if (within) sum *= S::load(within + e);
        S::store(to + e, sum * scale);
      }
      for (; e < length; ++e) {
        T sum = 0;
        for (int64_t i = 0; i < n; ++i) sum += shares[i] * in[i * kernels.size + e];
        to[e] = sum * (within ? within[e] : T(1)) * scale;
      }
    }
  });
  (by_lane ? out.lane_step : out.row_step) = pitch;
  out.data = sums - lanes.first * out.lane_step;
  return out;
}

// The attentions of one sample and group, as far as a tile needs them; null counts as ones.
template <class T>
struct Scales {
  const T *shares, *taps, *rows;
  alignas(64) T lanes[VECTORS * Simd<T>::LANES];
};

// out[row][tap] = lanes * taps * rows * sum_i shares[i] * packed[i][tap][row]
template <class T>
void mix(const T* packed, int64_t n, int64_t taps, const Tile& tile, const Scales<T>& scales, T* out) {
  using S = Simd<T>;
  const int64_t width = tile.vectors * S::LANES, size = taps * tile.rows * width;
  const T one = 1, *shares = scales.shares ? scales.shares : &one;
  with_count(n, [&](auto count) {
    for (int64_t t = 0; t < taps; ++t)
      for (int64_t r = 0; r < tile.rows; ++r) {
        const T* in = packed + (t * tile.rows + r) * width;
        T* to = out + (r * taps + t) * width;
        const T scale = (scales.taps ? scales.taps[t] : T(1)) * (scales.rows ? scales.rows[r] : T(1));
        for (int64_t l = 0; l < width; l += S::LANES) {
          typename S::Vec sum = {};
#pragma GCC unroll 8
          for (int64_t i = 0; i < count; ++i) sum += shares[i] * S::load(in + i * size + l);
          S::store(to + l, sum * S::load(scales.lanes + l) * scale);
        }
      }
  });
}

// A cell as a kernel of one tap, and where in it a tile lies.
template <class T>
std::pair<Kernels<T>, Tile> cell_of(const Kernels<T>& kernels, const Tile& tile) {
  std::pair<Kernels<T>, Tile> out = {kernels, tile};
  out.first.taps = 1;
  out.second.first_row %= kernels.cells->rows;
  out.second.first_lane %= kernels.cells->lanes;
  return out;
}

// A tile of each of n cells, as [row][cell][lane].
template <class T>
void pack_cells(const Kernels<T>& kernels, const Tile& tile, std::vector<int64_t>& order, T* out) {
  const int64_t width = tile.vectors * Simd<T>::LANES;
  const auto [cell, within] = cell_of(kernels, tile);
  for (int64_t i = 0; i < kernels.n; ++i)
    pack<T>(cell, within, kernels.data + i * kernels.size, order, out + i * width, kernels.n * width);
}

// out[row][tap] = sum_i shares[piece of the tap][i] * packed[row][i], of one sample's kernel.
template <class T>
void mix_cells(const T* packed, const Kernels<T>& kernels, const Tile& tile, int64_t sample, T* out) {
  const Cells<T>& cells = *kernels.cells;
  const int64_t n = kernels.n, taps = kernels.taps, width = tile.vectors * Simd<T>::LANES;
  thread_local std::vector<const T*> shares;
  thread_local std::vector<Step> steps;
  shares.clear();
  for (int64_t t = 0; t < taps; ++t) shares.push_back(cells.shares + (sample * taps * cells.blocks + cells.piece(tile, t)) * n);
  steps.clear();
  for (int64_t i = 0; i < n; ++i) steps.push_back({i, i * width});
  for (int64_t r = 0; r < tile.rows; ++r)
    multiply<T>(shares.data(), taps, tile.vectors, packed + r * n * width, steps.data(), n, out + r * taps * width, false);
}

}  // namespace odconv
