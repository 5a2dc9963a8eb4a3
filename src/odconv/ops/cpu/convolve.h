// The operator: convolving each sample with its own mixed kernel, and the gradients of the kernels and attentions.
#pragma once

#include "kernels.h"
#include "maps.h"

namespace odconv {

constexpr int64_t TILE_ROWS = 128;           // taps * channels of a tile: a mixed kernel of 32 KiB in float32
constexpr int64_t COLUMNS = 4;               // tiles side by side that read the same piece of a map
constexpr int64_t MAP_NUMBERS = 512 * 1024;  // outputs of a task: packed kernels serve as many samples



inline std::vector<Span> split(int64_t size, int64_t count, int64_t unit = 1) {
  std::vector<Span> spans;
  const int64_t units = ceil_div(size, unit);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t first = units * i / count * unit;
    spans.push_back({first, std::min(units * (i + 1) / count * unit, size) - first});
  }
  return spans;
}

// Blocks of lanes, each of up to VECTORS vectors, nearly equal.
template <class T>
std::vector<Span> columns_of(const Kernels<T>& kernels) {
  constexpr int L = Simd<T>::LANES;
  return split(kernels.lanes, ceil_div(ceil_div(kernels.lanes, L), VECTORS), L);
}

// Blocks of rows that hold at most TILE_ROWS numbers a lane, counting the taps; at least `least` if rows allow.
template <class T>
std::vector<Span> rows_of(const Kernels<T>& kernels, int64_t least) {
  const int64_t most = std::max<int64_t>(1, TILE_ROWS / kernels.taps);
  return split(kernels.rows, std::max(ceil_div(kernels.rows, most), std::min(least, ceil_div(kernels.rows, 8))));
}

template <class T>
Tile tile_of(const Span& rows, const Span& lanes) {
  return {rows.first, rows.count, lanes.first, lanes.count, int(ceil_div(lanes.count, Simd<T>::LANES))};
}

// ---- the operator --------------------------------------------------------------------------------------------------

// The attentions as the vectors see them: rows are channels and lanes filters, or the other way round.
template <class T>
struct Weights {
  const T *shares, *taps, *rows, *lanes;  // (B, n), (B, taps), (B, groups * rows), (B, groups * lanes)
};

// What is added to each filter, of all samples or one of each.
template <class T>
struct Bias {
  const T* data;
  int64_t sample_step;
  const T* of_sample(int64_t sample) const { return data ? data + sample * sample_step : nullptr; }
};

template <class T>
Scales<T> scales_of(const Weights<T>& weights, const Kernels<T>& kernels, int64_t groups, int64_t group, int64_t sample,
                    const Tile& tile) {
  Scales<T> out;
  out.shares = weights.shares ? weights.shares + sample * kernels.n : nullptr;
  out.taps = weights.taps ? weights.taps + sample * kernels.taps : nullptr;
  out.rows = weights.rows ? weights.rows + (sample * groups + group) * kernels.rows + tile.first_row : nullptr;
  std::fill_n(out.lanes, VECTORS * Simd<T>::LANES, T(1));
  if (weights.lanes)
    std::copy_n(weights.lanes + (sample * groups + group) * kernels.lanes + tile.first_lane, tile.lanes, out.lanes);
  return out;
}

// What the microkernel reads for one part: a pointer for each position, and a step for each tap and row.
template <class T>
struct Reading {
  std::vector<int64_t> offsets;
  std::vector<const T*> starts;
  std::vector<Step> steps;

  void positions(const Part& part, const Window<T>& window) {
    offsets_of(part, part.phase->jump, window.step, offsets);
    starts.clear();
    for (int64_t offset : offsets) starts.push_back(window.data + offset);
  }

  void taps(const Phase& phase, const Window<T>& window, const Tile& tile) {
    const int64_t width = tile.vectors * Simd<T>::LANES;
    steps.clear();
    for (const Tap& tap : phase.taps) {
      const int64_t from = tap_offset(phase, tap, window.step);
      for (int64_t i = 0; i < tile.rows; ++i)
        steps.push_back({from + i * window.channel_step, (tap.index * tile.rows + i) * width});
    }
  }
};

// Write the sums of a part, [position][lane], to its places in a map, from `channel` on.
template <class T>
void store(const T* sums, const Tile& tile, const Part& part, const Map<T>& out, int64_t channel, std::vector<int64_t>& offsets) {
  const int64_t width = tile.vectors * Simd<T>::LANES, positions = part.positions();
  const Phase& phase = *part.phase;
  T* to = out.data + part.sample * out.batch_step + channel * out.channel_step + part.first * phase.stride[0] * out.step[0];
  for (int a = 0; a < 3; ++a) to += phase.origin[a] * out.step[a];
  offsets_of(part, phase.stride, out.step, offsets);
  if (out.channel_step != 1 && is_run(offsets))
    transpose_block<T>(sums, width, positions, tile.lanes, to, out.channel_step);
  else
    for (int64_t p = 0; p < positions; ++p)
      for (int64_t l = 0; l < tile.lanes; ++l) to[offsets[p] + l * out.channel_step] = sums[p * width + l];
}

// Convolve every sample of `source` with its own mixed kernel, into `out`.
template <class T>
void convolve(const Map<const T>& source, const Map<T>& out, const Kernels<T>& kernels, int64_t groups,
              const Weights<T>& weights, const Bias<T>& bias, int64_t batch, const std::vector<Phase>& phases) {
  constexpr int L = Simd<T>::LANES;
  const std::vector<Span> rows = rows_of(kernels, 1), columns = columns_of(kernels);
  const int64_t threads = at::get_num_threads(), n = kernels.n, taps = kernels.taps, wide = columns.size();
  const std::vector<Part> parts = parts_of(phases, batch, ceil_div(threads, batch * wide * groups));
  if (parts.empty()) return;  // a gradient that nothing reaches
  int64_t outputs = 0;
  for (const Part& part : parts) outputs += part.positions();

  // A task has a stack of columns, which share what is read of the map, and a bundle of parts, which share packed
  // kernels. Where samples are too few, or too large, for n packed kernels to pay, each sample has bundles of its own
  // and its kernel is blended first; so it is where samples have kernels of their own, which need no blending.
  int64_t stacks = std::min(wide, std::max(ceil_div(wide, COLUMNS), ceil_div(threads, groups * int64_t(parts.size()))));
  int64_t bundles = ceil_div(outputs * kernels.lanes, stacks * MAP_NUMBERS);
  const bool blended = n > 1 && (batch < n || bundles >= batch), alone = blended || kernels.per_sample();
  if (alone) {
    stacks = wide;
    bundles = ceil_div(bundles, batch) * batch;
  }
  while (bundles * stacks * groups < 8 * threads && bundles * stacks * groups % threads) bundles += alone ? batch : 1;
  bundles = std::min<int64_t>(bundles, parts.size());
  const std::vector<Span> by_stack = split(wide, stacks), by_bundle = split(parts.size(), bundles);

  at::parallel_for(0, groups * stacks * bundles, 1, [&](int64_t begin, int64_t end) {
    Scratch<T>& scratch = Scratch<T>::mine();
    Reading<T> reading;
    std::vector<int64_t> places;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / (stacks * bundles);
      const Span stack = by_stack[task / bundles % stacks], bundle = by_bundle[task % bundles];
      const Part *first = parts.data() + bundle.first, *last = first + bundle.count;
      Kernels<T> here = kernels.of_sample(first->sample).of_group(group);
      if (blended) here = blend<T>(here, columns[stack.first], weights.shares + first->sample * n, scratch.blend);
      const int64_t packs = blended ? 1 : n;
      int64_t positions = 0;
      for (const Part* part = first; part < last; ++part) positions += part->positions();
      T* sums = scratch.out.get(positions * stack.count * VECTORS * L);  // [column][position][lane]

      for (const Span& span : rows) {
        const int64_t most = taps * span.count * VECTORS * L;  // numbers of a tile
        T* packed = scratch.packed.get(most * packs * stack.count);
        T* mixed = scratch.mixed.get(most * stack.count);
        for (int64_t c = 0; c < stack.count; ++c) {
          const Tile tile = tile_of<T>(span, columns[stack.first + c]);
          for (int64_t i = 0; i < packs; ++i) {
            T* to = packed + c * packs * most + i * taps * tile.rows * tile.vectors * L;
            pack<T>(here, tile, here.data + i * here.size, places, to);
          }
        }
        int64_t done = 0;
        for (const Part* part = first; part < last; done += part->positions(), ++part) {
          const Window<T> window = view<T>(source, group * kernels.rows + span.first, span.count, *part, scratch.window);
          reading.positions(*part, window);
          for (int64_t c = 0; c < stack.count; ++c) {
            const Tile tile = tile_of<T>(span, columns[stack.first + c]);
            if (part == first || part->sample != (part - 1)->sample) {
              Scales<T> scales = scales_of(weights, kernels, groups, group, part->sample, tile);
              if (blended) scales.shares = nullptr;
              mix<T>(packed + c * packs * most, packs, taps, tile, scales, mixed + c * most);
            }
            reading.taps(*part->phase, window, tile);
            T* to = sums + c * positions * VECTORS * L + done * tile.vectors * L;
            multiply<T>(reading.starts.data(), reading.starts.size(), tile.vectors, mixed + c * most, reading.steps, to,
                        span.first > 0);
          }
        }
      }

      for (int64_t c = 0; c < stack.count; ++c) {
        const Tile tile = tile_of<T>(rows[0], columns[stack.first + c]);
        T* from = sums + c * positions * VECTORS * L;
        for (const Part* part = first; part < last; from += part->positions() * tile.vectors * L, ++part) {
          if (bias.data) {
            const T* add = bias.of_sample(part->sample) + group * kernels.lanes + tile.first_lane;
            for (int64_t p = 0; p < part->positions(); ++p)
              for (int64_t l = 0; l < tile.lanes; ++l) from[p * tile.vectors * L + l] += add[l];
          }
          store<T>(from, tile, *part, out, group * kernels.lanes + tile.first_lane, reading.offsets);
        }
      }
    }
  });
}

// The sums that the gradients of the attentions are made of, one slice for each block of tiles that shares them.
struct Partial {
  at::Tensor shares, taps, rows, lanes;  // (tiles, B, n), (tiles, B, taps), (wide, B, C), (high, B, O)
};

// Gradients of the kernels and all attentions; each tile owns a piece of every sum, so the order of sums is fixed.
template <class T>
void gradients(const Map<const T>& source, const Map<const T>& grad, const Kernels<T>& kernels, int64_t groups,
               const Weights<T>& weights, int64_t batch, const Phase& phase, const std::vector<Span>& by_row,
               const std::vector<Span>& columns, T* weight_grad, Partial& partial) {
  using S = Simd<T>;
  constexpr int L = S::LANES;
  const std::vector<Phase> phases = {phase};
  const std::vector<Part> parts = parts_of(phases, batch, 1);
  const int64_t n = kernels.n, taps = kernels.taps, high = by_row.size(), count = high * columns.size();
  const int64_t channels = groups * kernels.rows, filters = groups * kernels.lanes;
  T* shares_grad = partial.shares.template mutable_data_ptr<T>();
  T* taps_grad = partial.taps.template mutable_data_ptr<T>();
  T* rows_grad = partial.rows.template mutable_data_ptr<T>();
  T* lanes_grad = partial.lanes.template mutable_data_ptr<T>();

  at::parallel_for(0, groups * count, 1, [&](int64_t begin, int64_t end) {
    Scratch<T>& scratch = Scratch<T>::mine();
    std::vector<Step> steps;
    std::vector<int64_t> offsets, grad_offsets;
    std::vector<const T*> rows;
    std::vector<int64_t> places;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / count, column = task % count / high;
      const Tile tile = tile_of<T>(by_row[task % high], columns[column]);
      const int64_t width = tile.vectors * L, size = taps * tile.rows * width;
      const Kernels<T> here = kernels.of_group(group);
      T* packed = scratch.packed.get(size * n);
      T* packed_grad = scratch.back.get(size * n);
      T* mixed_grad = scratch.mixed.get(size);
      auto begin_kernels = [&](int64_t sample) {
        const T* data = here.of_sample(sample).data;
        for (int64_t i = 0; i < n; ++i) pack<T>(here, tile, data + i * here.size, places, packed + i * size);
        std::fill_n(packed_grad, size * n, T(0));
      };
      auto end_kernels = [&](int64_t sample) {
        T* to = weight_grad + (here.of_sample(sample).data - kernels.data);
        for (int64_t i = 0; i < n; ++i) unpack<T>(packed_grad + i * size, tile, kernels, places, to + i * kernels.size);
      };
      if (!kernels.per_sample()) begin_kernels(0);

      for (const Part& part : parts) {
        if (kernels.per_sample() && part.first == 0) begin_kernels(part.sample);
        const Window<T> window = view<T>(source, group * kernels.rows + tile.first_row, tile.rows, part, scratch.window);
        offsets_of(part, phase.jump, window.step, offsets);
        const int64_t positions = offsets.size();
        const T* from = grad.data + part.sample * grad.batch_step + part.first * grad.step[0] +
                        (group * kernels.lanes + tile.first_lane) * grad.channel_step;
        T* by_position = scratch.grad.get(positions * width);
        if (tile.lanes < width) std::fill_n(by_position, positions * width, T(0));
        offsets_of(part, phase.stride, grad.step, grad_offsets);
        if (grad.channel_step != 1 && is_run(grad_offsets))
          transpose_block<T>(from, grad.channel_step, tile.lanes, positions, by_position, width);
        else
          for (int64_t p = 0; p < positions; ++p)
            for (int64_t l = 0; l < tile.lanes; ++l)
              by_position[p * width + l] = from[grad_offsets[p] + l * grad.channel_step];
        steps.clear();
        for (int64_t p = 0; p < positions; ++p) steps.push_back({offsets[p], p * width});
        rows.clear();
        for (const Tap& tap : phase.taps)
          for (int64_t i = 0; i < tile.rows; ++i)
            rows.push_back(window.data + tap_offset(phase, tap, window.step) + i * window.channel_step);
        multiply<T>(rows.data(), rows.size(), tile.vectors, by_position, steps, mixed_grad, part.first > 0);
        if (part.last < phase.count[0]) continue;

        // The gradient of this sample's mixed kernel is complete: hand it to the kernels and the attentions.
        const int64_t b = part.sample;
        const Scales<T> scales = scales_of(weights, kernels, groups, group, b, tile);
        std::vector<typename S::Vec> to_shares(n, typename S::Vec{});
        typename S::Vec to_lanes[VECTORS] = {};
        T* to_taps = taps_grad + (task * batch + b) * taps;
        T* to_rows = rows_grad + (column * batch + b) * channels + group * kernels.rows + tile.first_row;
        for (int64_t t = 0; t < taps; ++t)
          for (int64_t r = 0; r < tile.rows; ++r) {
            const T tap = scales.taps ? scales.taps[t] : T(1), row = scales.rows ? scales.rows[r] : T(1);
            typename S::Vec to_both = {};
            for (int v = 0; v < tile.vectors; ++v) {
              const int64_t at = (t * tile.rows + r) * width + v * L;
              const typename S::Vec filter = S::load(scales.lanes + v * L), d = S::load(mixed_grad + at) * (tap * row);
              typename S::Vec mixed = {};
              for (int64_t i = 0; i < n; ++i) {
                const typename S::Vec kernel = S::load(packed + i * size + at);
                const T share = scales.shares ? scales.shares[i] : T(1);
                mixed += share * kernel;
                to_shares[i] += d * filter * kernel;
                S::store(packed_grad + i * size + at, S::load(packed_grad + i * size + at) + share * (d * filter));
              }
              to_lanes[v] += d * mixed;
              to_both += S::load(mixed_grad + at) * filter * mixed;
            }
            T both = 0;
            for (int l = 0; l < L; ++l) both += to_both[l];
            to_taps[t] += row * both;
            to_rows[r] += tap * both;
          }
        for (int64_t i = 0; i < n; ++i)
          for (int l = 0; l < L; ++l) shares_grad[(task * batch + b) * n + i] += to_shares[i][l];
        T* to_filters = lanes_grad + (task % high * batch + b) * filters + group * kernels.lanes + tile.first_lane;
        for (int64_t l = 0; l < tile.lanes; ++l) to_filters[l] = to_lanes[l / L][l % L];
        if (kernels.per_sample()) end_kernels(b);
      }
      if (!kernels.per_sample()) end_kernels(0);
    }
  });
}

}  // namespace odconv
