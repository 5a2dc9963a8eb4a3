// The gradients of cells and of the shares by which samples' kernels are put together of them; words as in convolve.h.
//
//   for each tile of a cell                                     (in parallel: no two tasks write the same sum)
//     pack the n cells' tiles with the cells as lanes           -> by_cell[lane, row][cell]
//     for each block of the kernels that is made of cells, for some samples
//       for each panel: accumulate window^T x gradient          -> mixed_grad[sample][tap, row][lane]
//       mixed_grad x by_cell                                    -> shares_grad[sample, tap][cell], a part of the sum
//       shares^T x mixed_grad                                   -> packed_grad[row][cell][lane]
//     unpack packed_grad into the cells' gradient
//
// So no sample's kernel, nor its gradient, is ever in memory.
#pragma once

#include "convolve.h"

namespace odconv {

// Tiles of a cell.
template <class T>
std::vector<Tile> cell_tiles(const Kernels<T>& kernels) {
  Kernels<T> cell = kernels;
  cell.rows = kernels.cells->rows;
  cell.lanes = kernels.cells->lanes;
  std::vector<Tile> tiles;
  for (const Span& lanes : lane_blocks(cell))
    for (const Span& rows : row_blocks(cell, 1)) tiles.push_back(tile_of<T>(rows, lanes));
  return tiles;
}

// A tile of each of some cells, [lane][row][cell]; cells beyond the last one are zero.
template <class T>
void pack_by_cell(const Kernels<T>& kernels, const Tile& tile, const Span& some, std::vector<int64_t>& order, T* out) {
  const Kernels<T> numbers = {kernels.data, 1, kernels.size, kernels.size, kernels.n, 1, 1, kernels.size, 0};  // rows, and cells as lanes
  Tile line = tile_of<T>({0, tile.rows}, some);
  for (int64_t l = 0; l < tile.lanes; ++l) {
    line.first_row = (tile.first_lane + l) * kernels.lane_step + tile.first_row;
    pack<T>(numbers, line, kernels.data, order, out + l * tile.rows * line.vectors * Simd<T>::LANES);
  }
}

// What a task multiplies with the gradients of some samples' kernels, of one tile and block.
template <class T>
class CellProducts {
 public:
  CellProducts(const Kernels<T>& kernels, const Tile& tile) : kernels_(kernels), tile_(tile), width_(tile.vectors * Simd<T>::LANES) {
    std::vector<int64_t> order;
    const int64_t most = VECTORS * Simd<T>::LANES;
    T* out = scratch_.packed.get(tile.lanes * tile.rows * ceil_div(kernels.n, Simd<T>::LANES) * Simd<T>::LANES);
    for (const Span& some : split(kernels.n, ceil_div(kernels.n, most), Simd<T>::LANES)) {
      pack_by_cell<T>(kernels, tile, some, order, out);
      cells_.push_back({some, out});
      out += tile.lanes * tile.rows * ceil_div(some.count, Simd<T>::LANES) * Simd<T>::LANES;
    }
  }

  // mixed_grad x by_cell, for samples first .. first + count - 1; out is (B, pieces, n).
  void to_shares(const T* mixed_grad, const Tile& tile, int64_t first, int64_t count, T* out) {
    const int64_t taps = kernels_.taps, n = kernels_.n, pieces = taps * kernels_.cells->blocks;
    rows_.clear();
    for (int64_t i = 0; i < count * taps; ++i) rows_.push_back(mixed_grad + i * tile.rows * width_);
    for (const auto& [some, by_cell] : cells_) {
      const int vectors = ceil_div(some.count, Simd<T>::LANES);
      const int64_t width = vectors * Simd<T>::LANES;
      steps_.clear();
      for (int64_t l = 0; l < tile.lanes; ++l)
        for (int64_t r = 0; r < tile.rows; ++r) steps_.push_back({r * width_ + l, (l * tile.rows + r) * width});
      T* sums = scratch_.out.get(count * taps * width);
      multiply<T>(rows_.data(), rows_.size(), vectors, by_cell, steps_.data(), steps_.size(), sums, false);
      for (int64_t b = 0; b < count; ++b)
        for (int64_t t = 0; t < taps; ++t)
          std::copy_n(sums + (b * taps + t) * width, some.count,
                      out + ((first + b) * pieces + kernels_.cells->piece(tile, t)) * n + some.first);
    }
  }

  // shares^T x mixed_grad, added to packed_grad or, at first, in its place.
  void to_cells(const T* mixed_grad, const Tile& tile, int64_t first, int64_t count, T* packed_grad, bool accumulate) {
    const int64_t taps = kernels_.taps, n = kernels_.n, pieces = taps * kernels_.cells->blocks;
    rows_.clear();
    for (int64_t i = 0; i < n; ++i) rows_.push_back(kernels_.cells->shares + first * pieces * n + i);
    steps_.clear();
    for (int64_t b = 0; b < count; ++b)
      for (int64_t t = 0; t < taps; ++t)
        steps_.push_back({(b * pieces + kernels_.cells->piece(tile, t)) * n, (b * taps + t) * tile.rows * width_});
    for (int64_t r = 0; r < tile.rows; ++r)
      multiply<T>(rows_.data(), n, tile.vectors, mixed_grad + r * width_, steps_.data(), steps_.size(), packed_grad + r * n * width_, accumulate);
  }

 private:
  const Kernels<T>& kernels_;
  const Tile tile_;
  const int64_t width_;
  Scratch<T>& scratch_ = Scratch<T>::mine();
  std::vector<std::pair<Span, const T*>> cells_;
  std::vector<const T*> rows_;
  std::vector<Step> steps_;
};

// Gradients of cells, and of shares a part for each tile, (tiles, B, pieces, n); what belongs together is summed in a fixed order.
template <class T>
void cell_gradients(const Map<const T>& source, const Map<const T>& grad, const Kernels<T>& kernels, int64_t batch, const Phase& phase,
                    const std::vector<Tile>& tiles, T* cells_grad, T* shares_grad) {
  const std::vector<Phase> phases = {phase};
  const std::vector<Panel> panels = panels_of(phases, batch, 1, PANEL_POSITIONS);
  const Cells<T>& cells = *kernels.cells;
  const int64_t n = kernels.n, taps = kernels.taps, parts = batch * taps * cells.blocks * n;

  parallel_for(0, tiles.size(), 1, [&](int64_t begin, int64_t end) {
    Scratch<T>& scratch = Scratch<T>::mine();
    TileGradient<T> gradient(source, grad, phase);
    std::vector<int64_t> order;
    for (int64_t task = begin; task < end; ++task) {
      const Tile& within = tiles[task];
      const int64_t width = within.vectors * Simd<T>::LANES, size = taps * within.rows * width;
      const int64_t some = std::clamp<int64_t>(HELD_NUMBERS / size, 1, batch);  // samples at a time
      CellProducts<T> products(kernels, within);
      T *mixed_grad = scratch.mixed.get(some * size), *packed_grad = scratch.back.get(within.rows * n * width);
      bool begun = false;
      for (int64_t row = 0; row < kernels.rows; row += cells.rows)
        for (int64_t lane = 0; lane < kernels.lanes; lane += cells.lanes) {
          Tile tile = within;
          tile.first_row += row;
          tile.first_lane += lane;
          for (const Panel& panel : panels) {
            const int64_t b = panel.sample, held = b % some;
            gradient.add(tile, tile.first_row, tile.first_lane, panel, mixed_grad + held * size);
            if (panel.last < phase.count[0] || (held < some - 1 && b < batch - 1)) continue;  // there is more to come
            products.to_shares(mixed_grad, tile, b - held, held + 1, shares_grad + task * parts);
            products.to_cells(mixed_grad, tile, b - held, held + 1, packed_grad, begun);
            begun = true;
          }
        }
      const Kernels<T> cell = cell_of(kernels, within).first;
      for (int64_t i = 0; i < n; ++i)
        unpack<T>(packed_grad + i * width, within, cell, order, cells_grad + i * kernels.size, n * width);
    }
  });
}

}  // namespace odconv
