// The operator in float32 and float64: convolving each sample with its own mixed kernel, and the gradients of kernels and
// attentions.
//
// Both are matrix products without unfolding, in the way of GotoBLAS and BLIS: operands are packed into the cache and met by
// one microkernel (multiply, simd.h), which accumulates a few rows of a product in registers. In words:
//
//   row      what a product sums over besides the taps: input channels, forward (output channels in the gradient of x)
//   lane     what the vectors run over: output channels, forward
//   tile     rows x lanes of the kernels, with all taps, as large as the first-level cache takes mixed: [row][tap][lane]
//   panel    some lines of one sample's outputs: its positions are the rows m of out[m][:] (maps.h)
//   window   what a panel reads of the map: the map itself, or a copy with zeros around it (maps.h)
//   packed   a tile of each of the n kernels, [tap][row][lane]; mixing adds them up by a sample's shares, times its gates
//   cells    of n cells, [row][cell][lane], mixing makes each piece of a sample's kernel, by a row of shares for each
//
// convolve, forward and for the gradient of x:
//
//   for each task = some tiles side by side x some panels     (in parallel; blocks of lanes x panels that share packed tiles)
//     for each run of rows that the second-level cache holds, of one tap mostly all of them
//       pack the n kernels' (or cells') tiles                   -> packed, or one tile where the sample's kernel was blended
//       for each panel, for each tile
//         if the panel begins a sample: mix packed              -> mixed, but for a lone kernel on a small map: its window and
//                                                                  sums are scaled instead
//         for each block of rows that the first-level cache holds: accumulate window x mixed -> sums[position][lane]
//     apply the epilogue (epilogue.h) and write the sums into the map: a few positions at a time where one run holds all rows,
//     else when all were accumulated
//
// gradients, of kernels and attentions: the product is transposed, positions are what is summed over.
//
//   for each tile                                               (in parallel: no two tasks write the same sum)
//     pack the n kernels' tiles                                 -> packed
//     for each panel
//       accumulate window^T x gradient of the output            -> mixed_grad[tap, row][lane]
//       if the panel ends a sample: distribute mixed_grad over packed_grad and the sample's attentions
//     unpack packed_grad into the kernels' gradient
//   where each sample has a kernel of its own and no attention scales it, mixed_grad is unpacked
//
// cell_gradients, of cells and shares (cells.h): a tile is one of the cells', and mixed_grad of all pieces that it is part of is
// multiplied with the shares, which gives packed_grad, and with the packed cells, which gives a part of the shares' gradient.
//
// The number of threads decides only which task computes what, never the order of a sum of outputs; to split differently,
// change Plan. To change a block's size, change the constants below; to change an order in memory, pack and unpack.
#pragma once

#include "epilogue.h"
#include "kernels.h"
#include "maps.h"

namespace odconv {

constexpr int64_t TILE_ROWS = 128;           // taps * rows of a tile: a mixed one has 32 KiB in float32
constexpr int64_t TILES = 4;                 // tiles side by side that read the same window
constexpr int64_t WRITTEN_POSITIONS = 32;    // about as many are written at a time where their sums are whole: those stay in the first-level cache
constexpr int64_t TASK_OUTPUTS = 512 * 1024; // of a task: packed tiles serve as many samples as that takes
constexpr int64_t HELD_NUMBERS = 256 * 1024; // of packed and mixed tiles: half of the second-level cache in float32; cells alone fill it
constexpr int64_t RUN_BLOCKS = 4;            // of rows that are packed at a time: what lies together in memory is read together

// ---- blocks --------------------------------------------------------------------------------------------------------

inline std::vector<Span> split(int64_t size, int64_t count, int64_t unit = 1) {
  std::vector<Span> spans;
  const int64_t units = ceil_div(size, unit);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = units * i / count * unit;
    spans.push_back({first, std::min(units * (i + 1) / count * unit, size) - first});
  }
  return spans;
}

// The same of every cell's part of a size.
inline std::vector<Span> split_cells(int64_t size, int64_t cell, int64_t count, int64_t unit) {
  std::vector<Span> spans;
  for (int64_t first = 0; first < size; first += cell)
    for (const Span& span : split(cell, count, unit)) spans.push_back({first + span.first, span.count});
  return spans;
}

// Blocks of lanes, each of up to VECTORS vectors, nearly equal.
template <class T>
std::vector<Span> lane_blocks(const Kernels<T>& kernels) {
  constexpr int L = Simd<T>::LANES;
  const int64_t cell = kernels.cells ? kernels.cells->lanes : kernels.lanes;
  return split_cells(kernels.lanes, cell, ceil_div(cell, VECTORS * L), L);
}

// Blocks of rows that hold at most TILE_ROWS numbers a lane, counting the taps; at least `least` if rows allow. Those of cells
// are whole vectors, which are packed by transposition.
template <class T>
std::vector<Span> row_blocks(const Kernels<T>& kernels, int64_t least) {
  constexpr int L = Simd<T>::LANES;
  const int64_t most = std::max<int64_t>(1, TILE_ROWS / kernels.taps);
  if (kernels.cells) return split_cells(kernels.rows, kernels.cells->rows, ceil_div(kernels.cells->rows, std::max<int64_t>(L, most / L * L)), L);
  return split(kernels.rows, std::max(ceil_div(kernels.rows, most), std::min(least, ceil_div(kernels.rows, 8))));
}

// Runs of up to `count` blocks, none beyond a cell of `cell` rows.
inline std::vector<Span> runs_of(const std::vector<Span>& blocks, int64_t count, int64_t cell) {
  std::vector<Span> runs;
  for (size_t i = 0; i < blocks.size(); ++i) {
    if (runs.empty() || runs.back().count == count || blocks[i].first % cell == 0) runs.push_back({int64_t(i), 0});
    ++runs.back().count;
  }
  return runs;
}

template <class T>
Tile tile_of(const Span& rows, const Span& lanes) {
  return {rows.first, rows.count, lanes.first, lanes.count, int(ceil_div(lanes.count, Simd<T>::LANES))};
}

// ---- operands ------------------------------------------------------------------------------------------------------

// The attentions as the vectors see them: rows are channels and lanes filters, or the other way round.
template <class T>
struct Gates {
  const T *shares, *taps, *rows, *lanes;  // (B, n), (B, taps), (B, groups * rows), (B, groups * lanes)
};

template <class T>
Scales<T> scales_of(const Gates<T>& gates, const Kernels<T>& kernels, int64_t groups, int64_t group, int64_t sample,
                    const Tile& tile) {
  Scales<T> out;
  out.shares = gates.shares ? gates.shares + sample * kernels.n : nullptr;
  out.taps = gates.taps ? gates.taps + sample * kernels.taps : nullptr;
  out.rows = gates.rows ? gates.rows + (sample * groups + group) * kernels.rows + tile.first_row : nullptr;
  std::fill_n(out.lanes, VECTORS * Simd<T>::LANES, T(1));
  if (gates.lanes)
    std::copy_n(gates.lanes + (sample * groups + group) * kernels.lanes + tile.first_lane, tile.lanes, out.lanes);
  return out;
}

// What the microkernel reads for one panel: a pointer for each position, and a step for each tap and row.
template <class T>
struct Operands {
  std::vector<int64_t> offsets, outputs, tap_offsets;
  std::vector<const T*> positions;
  std::vector<Step> steps;
  int64_t channel_step, apart;  // how far apart positions are, where each is read once, channel after channel; else 0

  void read_positions(const Panel& panel, const Window<T>& window) {
    offsets_of(panel, panel.phase->jump, window.step, offsets);
    positions.resize(offsets.size());
    for (size_t i = 0; i < offsets.size(); ++i) positions[i] = window.data + offsets[i];
    channel_step = window.channel_step;
    apart = channel_step == 1 && panel.phase->taps.size() == 1 && offsets.size() > 1 ? offsets[1] - offsets[0] : 0;
    tap_offsets.clear();
    for (const Tap& tap : panel.phase->taps) tap_offsets.push_back(tap_offset(*panel.phase, tap, window.step));
  }

  // The same of columns: what each row and tap reads at the positions, times the sample's attentions, [row][tap][position].
  void scale_columns(const Phase& phase, int64_t rows, const T* by_tap, const T* by_row, Buffer<T>& buffer) {
    const int64_t count = positions.size(), taps = phase.taps.size();
    T* columns = buffer.get(rows * taps * count);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t t = 0; t < taps; ++t) {
        const T scale = (by_tap ? by_tap[phase.taps[t].index] : T(1)) * (by_row ? by_row[i] : T(1));
        const T* from = positions[0] - offsets[0] + tap_offsets[t] + i * channel_step;
        T* to = columns + (i * taps + t) * count;
        for (int64_t p = 0; p < count; ++p) to[p] = scale * from[offsets[p]];
      }
    for (int64_t p = 0; p < count; ++p) positions[p] = columns + p;
    for (int64_t t = 0; t < taps; ++t) tap_offsets[t] = t * count;
    channel_step = taps * count;
    apart = 0;
  }

  void read_outputs(const Panel& panel, const Map<T>& out) { offsets_of(panel, panel.phase->stride, out.step, outputs); }

  // Of one block of a tile's rows after the other; the tile is mixed, or packed.
  void read_taps(const Phase& phase, const Tile& tile, int64_t taps, const Span* blocks, int64_t count, bool packed) {
    const int64_t width = tile.vectors * Simd<T>::LANES;
    const int64_t row_step = packed ? width : taps * width, tap_step = packed ? tile.rows * width : width;
    steps.clear();
    for (const Span* block = blocks; block < blocks + count; ++block)
      for (size_t t = 0; t < phase.taps.size(); ++t)
        for (int64_t i = block->first - tile.first_row; i < block->first - tile.first_row + block->count; ++i)
          steps.push_back({tap_offsets[t] + i * channel_step, i * row_step + phase.taps[t].index * tap_step});
  }
};

// ---- outputs -------------------------------------------------------------------------------------------------------

// How a panel's outputs follow each other: a map of one axis is one line.
struct PanelLines {
  int64_t count, length;
  int axis;
  explicit PanelLines(const Panel& panel) {
    const Axes& size = panel.phase->count;
    axis = size[1] * size[2] > 1 ? 2 : 0;
    length = axis == 2 ? size[2] : panel.positions();
    count = panel.positions() / length;
  }
};

// Write the sums of some of a panel's lines, [position][lane], to their places in a map, which lie at offsets from the panel's first,
// from channel `filter` on, after the epilogue. Channels that lie apart get them by a transposition.
template <class T, class W>
void store(T* sums, const Tile& tile, const Panel& panel, const Span& span, const Map<T>& out, const Epilogue<T>& epilogue, W write,
           int64_t filter, const std::vector<int64_t>& offsets) {
  const Phase& phase = *panel.phase;
  const PanelLines lines(panel);
  const int64_t width = tile.vectors * Simd<T>::LANES, positions = span.count * lines.length, step = phase.stride[lines.axis] * out.step[lines.axis];
  const int64_t* at = offsets.data() + span.first * lines.length;
  const bool last = out.channel_step == 1;
  T* to = out.data + panel.sample * out.batch_step + filter * out.channel_step + panel.first * phase.stride[0] * out.step[0];
  for (int a = 0; a < 3; ++a) to += phase.origin[a] * out.step[a];
  if (last || !epilogue.is_empty()) {
    Lanes<T> lanes(epilogue, nullptr, panel.sample, filter, tile.lanes);
    const int64_t first = panel.first * phase.count[1] + span.first;
    for (int64_t i = 0; i < span.count; ++i) {
      T* line = sums + i * lines.length * width;
      if (last)
        write(line, width, lines.length, tile.lanes, lanes, to + at[i * lines.length], step);
      else
        write(line, width, lines.length, width, lanes, line, width);
      T* whole = epilogue.line(panel.sample, first + i);
      lanes.end_line(whole ? whole + filter : nullptr, tile.lanes);
    }
  }
  if (!last && is_run(offsets))
    transpose_block<T>(sums, width, positions, tile.lanes, to + at[0], out.channel_step);
  else if (!last)
    for (int64_t p = 0; p < positions; ++p)
      for (int64_t l = 0; l < tile.lanes; ++l) to[at[p] + l * out.channel_step] = sums[p * width + l];
}

// Multiply sums, [position][lane], by a factor for each lane.
template <class T>
void scale_lanes(T* sums, int64_t positions, const Tile& tile, const T* lanes) {
  using S = Simd<T>;
  const int64_t width = tile.vectors * S::LANES;
  for (int64_t p = 0; p < positions; ++p)
    for (int64_t l = 0; l < width; l += S::LANES) S::store(sums + p * width + l, S::load(sums + p * width + l) * S::load(lanes + l));
}

// How a convolution is cut into tasks: each has some blocks of lanes, side by side, whose tiles share what is read of the map,
// and some panels, which share packed tiles. Where samples are too few, or too large, for n packed kernels to pay, the panels
// of a task are of one sample, whose kernel is blended first; so they are where samples have kernels of their own.
struct Plan {
  bool blended;
  std::vector<Span> lanes, panels;
};

template <class T>
Plan plan_of(const Kernels<T>& kernels, const std::vector<Panel>& panels, int64_t groups, int64_t batch, int64_t blocks, int64_t tiles) {
  const int64_t threads = int64_t(get_num_threads()), count = panels.size();
  int64_t outputs = 0;
  for (const Panel& panel : panels) outputs += panel.positions();
  int64_t sides = std::min(blocks, std::max(ceil_div(blocks, tiles), ceil_div(threads, groups * count)));
  int64_t pieces = ceil_div(outputs * kernels.lanes, sides * TASK_OUTPUTS);
  const bool blended = kernels.n > 1 && !kernels.cells && (batch < kernels.n || pieces >= batch), alone = blended || kernels.per_sample();
  if (alone) {
    sides = blocks;
    pieces = ceil_div(pieces, batch) * batch;
  }
  while (pieces * sides * groups < 8 * threads && pieces * sides * groups % threads) pieces += alone ? batch : 1;
  return {blended, split(blocks, sides), split(count, std::min(pieces, count))};
}

// Convolve every sample of `source` with its own mixed kernel, into `out`.
template <class T>
void convolve(const Map<const T>& source, const Map<T>& out, const Kernels<T>& kernels, int64_t groups, const Gates<T>& gates,
              const Epilogue<T>& epilogue, int64_t batch, const std::vector<Phase>& phases) {
  constexpr int L = Simd<T>::LANES;
  const std::vector<Span> rows = row_blocks(kernels, 1), lanes = lane_blocks(kernels);
  const int64_t n = kernels.n, taps = kernels.taps, blocks = lanes.size(), threads = int64_t(get_num_threads());
  const int64_t size = (kernels.cells ? n : (n + 1) * taps) * rows[0].count * VECTORS * L;  // numbers of a block, packed and mixed
  const bool fits = taps == 1 && !kernels.cells && size * int64_t(rows.size()) <= HELD_NUMBERS;  // of more taps, what is mixed would be read too often
  const int64_t deep = fits ? rows.size() : RUN_BLOCKS;
  const std::vector<Span> runs = runs_of(rows, std::clamp<int64_t>(HELD_NUMBERS / size, 1, deep), kernels.cells ? kernels.cells->rows : kernels.rows);
  const bool whole = runs.size() == 1;  // every sum is complete at once, and is written while it lies in the cache
  const int64_t most = whole && taps == 1 ? FEW_POSITIONS : std::clamp(PANEL_NUMBERS / (runs[0].count * rows[0].count), FEW_POSITIONS, PANEL_POSITIONS);
  const std::vector<Panel> panels = panels_of(phases, batch, ceil_div(threads, batch * blocks * groups), most);
  if (panels.empty()) return;  // a gradient that nothing reaches
  // One kernel need not be mixed: the attentions of lanes scale the sums, and the others what is read, where that costs less, a number
  // for each position in the place of vectors of the lanes that read it.
  int64_t largest = 0;
  for (const Phase& phase : phases) largest = std::max(largest, phase.count[0] * phase.count[1] * phase.count[2]);
  const bool scaled = gates.taps || gates.rows, small = 4 * largest <= std::min<int64_t>(kernels.lanes, TILES * VECTORS * L);
  const bool unmixed = n == 1 && !gates.shares && !kernels.cells && (small || !scaled);
  const Plan plan = plan_of(kernels, panels, groups, batch, blocks, std::clamp<int64_t>(HELD_NUMBERS / (size * runs[0].count), 1, TILES));
  const int64_t sides = plan.lanes.size(), pieces = plan.panels.size(), packs = plan.blended ? 1 : n;

  const auto write = with_activation(epilogue.activation, [](auto activate) { return &write_positions<T, decltype(activate)>; });
  parallel_for(0, groups * sides * pieces, 1, [&](int64_t begin, int64_t end) {
    Scratch<T>& scratch = Scratch<T>::mine();
    Operands<T> operands;
    std::vector<int64_t> order;
    auto finish = [&](const Tile& tile, const Panel& panel, const Span& lines, int64_t group, T* from) {
      if (unmixed && gates.lanes)
        scale_lanes<T>(from, lines.count * PanelLines(panel).length, tile, scales_of(gates, kernels, groups, group, panel.sample, tile).lanes);
      store<T>(from, tile, panel, lines, out, epilogue, write, group * kernels.lanes + tile.first_lane, operands.outputs);
    };
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / (sides * pieces);
      const Span side = plan.lanes[task / pieces % sides], piece = plan.panels[task % pieces];
      const Panel *first = panels.data() + piece.first, *last = first + piece.count;
      Kernels<T> here = kernels.of_sample(first->sample).of_group(group);
      if (plan.blended) here = blend<T>(here, lanes[side.first], gates.shares + first->sample * n, scratch.blend);
      int64_t positions = 0;
      for (const Panel* panel = first; panel < last; ++panel) positions = whole ? std::max(positions, panel->positions()) : positions + panel->positions();
      T* sums = scratch.out.get(positions * side.count * VECTORS * L);  // [tile][position][lane]

      for (const Span& run : runs) {
        const Span* block = rows.data() + run.first;
        const Span span = {block->first, block[run.count - 1].first + block[run.count - 1].count - block->first};
        const int64_t all = packs * (kernels.cells ? 1 : taps) * span.count * VECTORS * L, one = taps * span.count * VECTORS * L;
        T* packed = scratch.packed.get(all * side.count);
        T* mixed = scratch.mixed.get(one * side.count);
        for (int64_t c = 0; c < side.count; ++c) {
          const Tile tile = tile_of<T>(span, lanes[side.first + c]);
          T* to = packed + c * all;
          if (kernels.cells)
            pack_cells<T>(here, tile, order, to);
          else
            for (int64_t k = 0; k < packs; ++k, to += taps * tile.rows * tile.vectors * L) pack<T>(here, tile, here.data + k * here.size, order, to);
        }
        int64_t done = 0;
        for (const Panel* panel = first; panel < last; done += panel->positions(), ++panel) {
          const Window<T> window = window_of<T>(source, group * kernels.rows + span.first, span.count, *panel, scratch.window);
          operands.read_positions(*panel, window);
          if (unmixed && scaled) {
            const Scales<T> scales = scales_of(gates, kernels, groups, group, panel->sample, tile_of<T>(span, lanes[side.first]));
            operands.scale_columns(*panel->phase, span.count, scales.taps, scales.rows, scratch.columns);
          }
          if (whole) operands.read_outputs(*panel, out);
          const PanelLines lines(*panel);
          const int64_t at_once = whole && out.channel_step == 1 ? std::max<int64_t>(1, WRITTEN_POSITIONS / lines.length) : lines.count;
          for (int64_t c = 0; c < side.count; ++c) {
            const Tile tile = tile_of<T>(span, lanes[side.first + c]);
            if (!unmixed && (panel == first || panel->sample != (panel - 1)->sample)) {
              Scales<T> scales = scales_of(gates, kernels, groups, group, panel->sample, tile);
              if (plan.blended) scales.shares = nullptr;
              if (kernels.cells)
                mix_cells<T>(packed + c * all, kernels, tile, panel->sample, mixed + c * one);
              else
                mix<T>(packed + c * all, packs, taps, tile, scales, mixed + c * one);
            }
            operands.read_taps(*panel->phase, tile, taps, block, run.count, unmixed);
            const T* factors = unmixed ? packed + c * all : mixed + c * one;
            T* to = whole ? sums : sums + c * positions * VECTORS * L + done * tile.vectors * L;
            for (int64_t line = 0; line < lines.count; line += at_once) {
              const Span some = {line, std::min(at_once, lines.count - line)};
              const Step* step = operands.steps.data();
              for (int64_t i = 0; i < run.count; ++i) {
                const int64_t steps = block[i].count * panel->phase->taps.size();
                multiply<T>(operands.positions.data() + line * lines.length, some.count * lines.length, tile.vectors, factors, step,
                            steps, to, block[i].first > 0, c == 0 ? operands.apart : 0);
                step += steps;
              }
              if (whole) finish(tile, *panel, some, group, to);
            }
          }
        }
      }

      for (int64_t c = 0; c < side.count && !whole; ++c) {
        const Tile tile = tile_of<T>(rows[0], lanes[side.first + c]);
        T* from = sums + c * positions * VECTORS * L;
        for (const Panel* panel = first; panel < last; from += panel->positions() * tile.vectors * L, ++panel) {
          operands.read_outputs(*panel, out);
          finish(tile, *panel, {0, PanelLines(*panel).count}, group, from);
        }
      }
    }
    if (epilogue.streamed) fence_streams();
  });
}

// ---- gradients -----------------------------------------------------------------------------------------------------

// The sums that the gradients of the attentions are made of, one slice for each block of tiles that shares them.
struct Partial {
  Tensor shares, taps, rows, lanes;  // (tiles, B, n), (tiles, B, taps), (blocks of lanes, B, C), (blocks of rows, B, O)
};

// Where one tile and sample add to those sums.
template <class T>
struct Sums {
  T *shares, *taps, *rows, *lanes;
};

// Distribute the gradient of one sample's mixed tile over the n kernels' packed ones and the sample's attentions, N of the kernels
// from the first on: their part of what the attentions get is added to what is there.
template <class T, int N>
void distribute_some(const T* mixed_grad, const T* packed, const Tile& tile, const Scales<T>& scales, int64_t taps, const T* shares, T* packed_grad,
                     const Sums<T>& to, T* to_shares) {
  using S = Simd<T>;
  constexpr int L = S::LANES;
  const int64_t width = tile.vectors * L, size = taps * tile.rows * width;
  auto sum_of = [](const typename S::Vec& vector) {
    T sum = 0;
    for (int l = 0; l < L; ++l) sum += vector[l];
    return sum;
  };
  typename S::Vec share_sums[N] = {}, lane_sums[VECTORS] = {}, row_sums[TILE_ROWS];
  std::fill_n(row_sums, tile.rows, typename S::Vec{});
  for (int64_t t = 0; t < taps; ++t) {
    typename S::Vec tap_sum = {};
    for (int64_t r = 0; r < tile.rows; ++r) {
      const T tap = scales.taps ? scales.taps[t] : T(1), row = scales.rows ? scales.rows[r] : T(1);
      typename S::Vec both = {};
      for (int v = 0; v < tile.vectors; ++v) {
        const int64_t at = (t * tile.rows + r) * width + v * L;
        const typename S::Vec grad = S::load(mixed_grad + at), by_lane = grad * S::load(scales.lanes + v * L), d = by_lane * (tap * row);
        typename S::Vec mixed = {};
#pragma GCC unroll 8
        for (int i = 0; i < N; ++i) {
          const typename S::Vec kernel = S::load(packed + i * size + at);
          mixed += shares[i] * kernel;
          share_sums[i] += d * kernel;
          S::store(packed_grad + i * size + at, S::load(packed_grad + i * size + at) + shares[i] * d);
        }
        lane_sums[v] += grad * mixed * (tap * row);
        both += by_lane * mixed;
      }
      tap_sum += row * both;
      row_sums[r] += tap * both;
    }
    to.taps[t] += sum_of(tap_sum);
  }
  for (int64_t r = 0; r < tile.rows; ++r) to.rows[r] += sum_of(row_sums[r]);
  for (int i = 0; i < N; ++i) to_shares[i] += sum_of(share_sums[i]);
  for (int64_t l = 0; l < tile.lanes; ++l) to.lanes[l] += lane_sums[l / L][l % L];
}

template <class T>
void distribute(const T* mixed_grad, const T* packed, const Tile& tile, const Scales<T>& scales, int64_t n, int64_t taps,
                T* packed_grad, const Sums<T>& to) {
  const int64_t size = taps * tile.rows * tile.vectors * Simd<T>::LANES;
  const T one = 1;
  int64_t first = 0;
  auto some = [&](auto count) {  // known when this is compiled, so that their sums stay in registers
    distribute_some<T, count()>(mixed_grad, packed + first * size, tile, scales, taps, scales.shares ? scales.shares + first : &one,
                                packed_grad + first * size, to, to.shares + first);
    first += count();
  };
  while (first + 4 <= n) some(std::integral_constant<int, 4>());
  if (first + 2 <= n) some(std::integral_constant<int, 2>());
  if (first < n) some(std::integral_constant<int, 1>());
}

// Read the gradient of the output over a panel and a tile's lanes, [position][lane], missing lanes zero.
template <class T>
const T* read_gradient(const Map<const T>& grad, int64_t channel, const Tile& tile, const Panel& panel, int64_t positions,
                       std::vector<int64_t>& offsets, Buffer<T>& buffer) {
  const int64_t width = tile.vectors * Simd<T>::LANES;
  const T* from = grad.data + panel.sample * grad.batch_step + panel.first * grad.step[0] + channel * grad.channel_step;
  T* out = buffer.get(positions * width);
  if (tile.lanes < width) std::fill_n(out, positions * width, T(0));
  offsets_of(panel, panel.phase->stride, grad.step, offsets);
  if (grad.channel_step != 1 && is_run(offsets))
    transpose_block<T>(from, grad.channel_step, tile.lanes, positions, out, width);
  else if (grad.channel_step == 1)
    for (int64_t p = 0; p < positions; ++p) std::copy_n(from + offsets[p], tile.lanes, out + p * width);
  else
    for (int64_t p = 0; p < positions; ++p)
      for (int64_t l = 0; l < tile.lanes; ++l) out[p * width + l] = from[offsets[p] + l * grad.channel_step];
  return out;
}

// Accumulates the gradient of a tile's mixed kernel, [tap][row][lane]: a panel's window, transposed, times the gradient of its outputs.
template <class T>
class TileGradient {
 public:
  TileGradient(const Map<const T>& source, const Map<const T>& grad, const Phase& phase) : source_(source), grad_(grad), phase_(phase) {}

  // Rows and lanes of a group's tile begin at these channels of the two maps; the first panel of a sample begins the sum.
  void add(const Tile& tile, int64_t first_channel, int64_t first_filter, const Panel& panel, T* mixed_grad) {
    Scratch<T>& scratch = Scratch<T>::mine();
    const Window<T> window = window_of<T>(source_, first_channel, tile.rows, panel, scratch.window);
    offsets_of(panel, phase_.jump, window.step, offsets_);
    const int64_t positions = offsets_.size(), width = tile.vectors * Simd<T>::LANES;
    const T* by_position = read_gradient<T>(grad_, first_filter, tile, panel, positions, grad_offsets_, scratch.grad);
    steps_.clear();
    for (int64_t p = 0; p < positions; ++p) steps_.push_back({offsets_[p], p * width});
    taps_and_rows_.clear();
    for (const Tap& tap : phase_.taps)
      for (int64_t i = 0; i < tile.rows; ++i)
        taps_and_rows_.push_back(window.data + tap_offset(phase_, tap, window.step) + i * window.channel_step);
    multiply<T>(taps_and_rows_.data(), taps_and_rows_.size(), tile.vectors, by_position, steps_.data(), steps_.size(), mixed_grad, panel.first > 0);
  }

 private:
  const Map<const T>&source_, &grad_;
  const Phase& phase_;
  std::vector<Step> steps_;
  std::vector<int64_t> offsets_, grad_offsets_;
  std::vector<const T*> taps_and_rows_;
};

// Gradients of the kernels and all attentions; each tile owns a piece of every sum, so the order of sums is fixed. What `make` returns
// accumulates the gradient of a tile's mixed kernel, panel by panel.
template <class T, class Make>
void gradients(Make make, const Kernels<T>& kernels, int64_t groups, const Gates<T>& gates, int64_t batch, const Phase& phase,
               const std::vector<Panel>& panels, const std::vector<Span>& rows, const std::vector<Span>& lanes, T* weight_grad, Partial& partial) {
  const int64_t n = kernels.n, taps = kernels.taps, high = rows.size(), count = high * lanes.size();
  const int64_t channels = groups * kernels.rows, filters = groups * kernels.lanes;
  const bool plain = kernels.per_sample() && !gates.taps && !gates.rows && !gates.lanes;
  const Sums<T> all = plain ? Sums<T>{} : Sums<T>{partial.shares.template mutable_data_ptr<T>(), partial.taps.template mutable_data_ptr<T>(),
                       partial.rows.template mutable_data_ptr<T>(), partial.lanes.template mutable_data_ptr<T>()};

  parallel_for(0, groups * count, 1, [&](int64_t begin, int64_t end) {
    Scratch<T>& scratch = Scratch<T>::mine();
    auto gradient = make();
    std::vector<int64_t> order;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / count, block = task % count / high;
      const Tile tile = tile_of<T>(rows[task % high], lanes[block]);
      const int64_t first_channel = group * kernels.rows + tile.first_row, first_filter = group * kernels.lanes + tile.first_lane;
      const int64_t size = taps * tile.rows * tile.vectors * Simd<T>::LANES;
      const Kernels<T> here = kernels.of_group(group);
      T* packed = plain ? nullptr : scratch.packed.get(size * n);
      T* packed_grad = plain ? nullptr : scratch.back.get(size * n);
      T* mixed_grad = scratch.mixed.get(size);
      auto begin_kernels = [&](int64_t sample) {
        const T* data = here.of_sample(sample).data;
        for (int64_t i = 0; i < n; ++i) pack<T>(here, tile, data + i * here.size, order, packed + i * size);
        std::fill_n(packed_grad, size * n, T(0));
      };
      auto end_kernels = [&](int64_t sample) {
        T* to = weight_grad + (here.of_sample(sample).data - kernels.data);
        for (int64_t i = 0; i < n; ++i) unpack<T>(packed_grad + i * size, tile, kernels, order, to + i * kernels.size);
      };

      if (!plain && !kernels.per_sample()) begin_kernels(0);
      for (const Panel& panel : panels) {
        const int64_t b = panel.sample;
        if (!plain && kernels.per_sample() && panel.first == 0) begin_kernels(b);
        gradient.add(tile, first_channel, first_filter, panel, mixed_grad);
        if (panel.last < phase.count[0]) continue;  // the sample goes on
        if (plain) {
          unpack<T>(mixed_grad, tile, kernels, order, weight_grad + (here.of_sample(b).data - kernels.data));
          continue;
        }
        const Sums<T> sums = {all.shares + (task * batch + b) * n, all.taps + (task * batch + b) * taps,
                              all.rows + (block * batch + b) * channels + first_channel,
                              all.lanes + (task % high * batch + b) * filters + first_filter};
        distribute<T>(mixed_grad, packed, tile, scales_of(gates, kernels, groups, group, b, tile), n, taps, packed_grad, sums);
        if (kernels.per_sample()) end_kernels(b);
      }
      if (!plain && !kernels.per_sample()) end_kernels(0);
    }
  });
}

}  // namespace odconv
