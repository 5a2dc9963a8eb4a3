// Maps: which inputs meet which taps at which outputs, a panel of a sample at a time.
#pragma once

#include "simd.h"

namespace odconv {

template <class T>
struct Map {
  T* data;
  int64_t batch_step, channel_step;
  Axes size, step;
};

struct Tap {
  int64_t index;
  Axes offset;
};

// Outputs at origin + stride * j, for j below count, read inputs at jump * j + offset for each of their taps. A
// convolution is one phase; the gradient of a strided one has a phase for every position modulo the stride.
struct Phase {
  Axes origin, stride, count, jump, low, high;  // low and high: least and largest offset
  std::vector<Tap> taps;
};

// A panel of one sample's outputs: those of a phase whose first coordinate lies in [first, last).
struct Panel {
  int64_t sample;
  const Phase* phase;
  int64_t first, last;
  int64_t positions() const { return (last - first) * phase->count[1] * phase->count[2]; }
};

constexpr int64_t PANEL_POSITIONS = 1024;  // outputs of a panel: what it reads, and its sums, stay in the second-level cache
constexpr int64_t FEW_POSITIONS = 128;     // or in the first, where a panel reads nothing that another one does
constexpr int64_t PANEL_NUMBERS = 64 * 1024;  // that a panel reads, about

inline std::vector<Panel> panels_of(const std::vector<Phase>& phases, int64_t batch, int64_t least, int64_t positions) {
  std::vector<Panel> panels;
  for (int64_t b = 0; b < batch; ++b)
    for (const Phase& phase : phases) {
      const int64_t lines = phase.count[0], line = phase.count[1] * phase.count[2];
      const int64_t count = std::min(lines, std::max(least, ceil_div(lines * line, positions)));
      for (int64_t i = 0; i < count; ++i) panels.push_back({b, &phase, lines * i / count, lines * (i + 1) / count});
    }
  return panels;
}

// What a panel reads: a piece of the map itself, or a copy with zeros around.
template <class T>
struct Window {
  const T* data;
  int64_t channel_step;
  Axes step;
};

template <class T>
Window<T> window_of(const Map<const T>& map, int64_t channel, int64_t channels, const Panel& panel, Buffer<T>& buffer) {
  const Phase& phase = *panel.phase;
  const Axes first = {panel.first, 0, 0}, last = {panel.last, phase.count[1], phase.count[2]};
  const T* data = map.data + panel.sample * map.batch_step + channel * map.channel_step;
  Axes low, extent, from, to;
  bool inside = true;
  for (int a = 0; a < 3; ++a) {
    low[a] = first[a] * phase.jump[a] + phase.low[a];
    extent[a] = (last[a] - 1) * phase.jump[a] + phase.high[a] + 1 - low[a];
    from[a] = std::clamp<int64_t>(-low[a], 0, extent[a]);
    to[a] = std::clamp<int64_t>(map.size[a] - low[a], from[a], extent[a]);
    inside = inside && from[a] == 0 && to[a] == extent[a];
    data += low[a] * map.step[a];
  }
  if (inside) return {data, map.channel_step, map.step};

  const int64_t numbers = extent[0] * extent[1] * extent[2];
  T* copy = buffer.get(numbers * channels);
  std::fill_n(copy, numbers * channels, T(0));
  const bool last_channels = map.channel_step == 1;
  const int64_t unit = last_channels ? channels : 1, channel_step = last_channels ? 1 : numbers;
  const Axes step = {extent[1] * extent[2] * unit, extent[2] * unit, unit};
  const int inner = extent[2] > 1 ? 2 : 0, outer = 2 - inner;  // a 1-d map has only its first axis
  for (int64_t c = 0; c < (last_channels ? 1 : channels); ++c)
    for (int64_t i = from[outer]; i < to[outer]; ++i)
      for (int64_t j = from[1]; j < to[1]; ++j) {
        const T* in = data + c * map.channel_step + i * map.step[outer] + j * map.step[1];
        T* out = copy + c * numbers + i * step[outer] + j * step[1];
        for (int64_t k = from[inner]; k < to[inner]; ++k)
          if (last_channels)
            std::copy_n(in + k * map.step[inner], channels, out + k * step[inner]);
          else
            out[k * step[inner]] = in[k * map.step[inner]];
      }
  return {copy, channel_step, step};
}

// Where in a map (or window) each position of a panel lies, from the panel's first.
inline void offsets_of(const Panel& panel, const Axes& stride, const Axes& step, std::vector<int64_t>& out) {
  const Axes count = panel.phase->count, apart = {stride[0] * step[0], stride[1] * step[1], stride[2] * step[2]};  // copies: what is written cannot be they
  out.resize(panel.positions());
  int64_t* line = out.data();
  for (int64_t i = 0; i < panel.last - panel.first; ++i)
    for (int64_t j = 0; j < count[1]; ++j, line += count[2])
      for (int64_t k = 0; k < count[2]; ++k) line[k] = i * apart[0] + j * apart[1] + k * apart[2];
}

inline bool is_run(const std::vector<int64_t>& offsets) {
  for (size_t i = 0; i < offsets.size(); ++i)
    if (offsets[i] != int64_t(i)) return false;
  return true;
}

inline int64_t tap_offset(const Phase& phase, const Tap& tap, const Axes& step) {
  int64_t offset = 0;
  for (int a = 0; a < 3; ++a) offset += (tap.offset[a] - phase.low[a]) * step[a];
  return offset;
}

struct Geometry {
  Axes kernel, stride, padding, dilation;
  int64_t groups;
};

inline void finish(Phase& phase) {
  phase.low = phase.high = phase.taps[0].offset;
  for (const Tap& tap : phase.taps)
    for (int a = 0; a < 3; ++a) {
      phase.low[a] = std::min(phase.low[a], tap.offset[a]);
      phase.high[a] = std::max(phase.high[a], tap.offset[a]);
    }
}

template <class F>
void each(const Axes& size, F body) {
  Axes at;
  for (at[0] = 0; at[0] < size[0]; ++at[0])
    for (at[1] = 0; at[1] < size[1]; ++at[1])
      for (at[2] = 0; at[2] < size[2]; ++at[2]) body(at);
}

// Put taps in the order in which they lie in a map.
inline void order_taps(Phase& phase) {
  std::sort(phase.taps.begin(), phase.taps.end(), [](const Tap& one, const Tap& other) { return one.offset < other.offset; });
}

inline Phase forward_phase(const Geometry& g, const Axes& out_size) {
  Phase phase = {{0, 0, 0}, {1, 1, 1}, out_size, g.stride, {}, {}, {}};
  int64_t index = 0;
  each(g.kernel, [&](const Axes& tap) {
    Axes offset;
    for (int a = 0; a < 3; ++a) offset[a] = g.dilation[a] * tap[a] - g.padding[a];
    phase.taps.push_back({index++, offset});
  });
  finish(phase);
  return phase;
}

// The phases of the gradient of an input: the inputs at one position modulo the stride meet the same taps.
inline std::vector<Phase> backward_phases(const Geometry& g, const Axes& in_size) {
  std::vector<Phase> phases;
  each(g.stride, [&](const Axes& origin) {
    Phase phase = {origin, g.stride, {}, {1, 1, 1}, {}, {}, {}};
    bool empty = false;
    for (int a = 0; a < 3; ++a) {
      phase.count[a] = ceil_div(in_size[a] - origin[a], g.stride[a]);
      empty = empty || origin[a] >= in_size[a];
    }
    int64_t index = 0;
    each(g.kernel, [&](const Axes& tap) {
      Axes offset;
      bool meets = true;
      for (int a = 0; a < 3; ++a) {
        const int64_t distance = origin[a] + g.padding[a] - g.dilation[a] * tap[a];
        meets = meets && distance % g.stride[a] == 0;
        offset[a] = distance / g.stride[a];
      }
      if (meets) phase.taps.push_back({index, offset});
      ++index;
    });
    if (empty || phase.taps.empty()) return;
    finish(phase);
    phases.push_back(phase);
  });
  return phases;
}

}  // namespace odconv
