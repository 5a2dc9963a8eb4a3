// Maps of few positions, without groups: vectors run over samples, which all meet the same kernels, so that no kernel is mixed.
//
// A pair is an output position and an input that a tap of its leads to; what meets padding is none. With maps as
// [position][channel][sample], and the shares of a sample's taps, its kernel attention times its spatial one:
//
//   outputs      out[to][filter][:] = sum over kernels, pairs and channels of weight x (shares[:] * in[from][channel][:])
//                in blocks of channels, whose scaled maps lie in the first-level cache
//   gradient     found[channel][:] = sum over filters of weight x grad[to][filter][:], for each kernel and pair;
//   of inputs    shares * found is that of the input, and found * in that of the shares
//   gradient     sum over pairs and samples of (shares * grad[to][filter]) x in[from][:], for each kernel and tap: here vectors
//   of kernels   run over channels
//
// All by the microkernel. n kernels cost n products, on few positions less than mixing a kernel for each sample.
#pragma once

#include "convolve.h"

namespace odconv {

constexpr int64_t SHARED_CHANNELS = 16;  // of a task of the inputs' gradient: all of their kernels' filters lie in the second-level cache
constexpr int64_t SHARED_FILTERS = 24;   // of one of the kernels' gradient

struct Pair {
  int64_t tap, from, to;
};

// The pairs of a convolution, in the order of outputs.
inline std::vector<Pair> pairs_of(const Geometry& g, const Axes& in, const Axes& out) {
  std::vector<Pair> pairs;
  int64_t to = 0;
  each(out, [&](const Axes& at) {
    int64_t tap = 0;
    each(g.kernel, [&](const Axes& k) {
      Axes from;
      bool inside = true;
      for (int a = 0; a < 3; ++a) {
        from[a] = at[a] * g.stride[a] + k[a] * g.dilation[a] - g.padding[a];
        inside = inside && from[a] >= 0 && from[a] < in[a];
      }
      if (inside) pairs.push_back({tap, (from[0] * in[1] + from[1]) * in[2] + from[2], to});
      ++tap;
    });
    ++to;
  });
  return pairs;
}

// A batch of maps, its positions and channels, and kernels [kernel][filter][channel][tap] with each sample's shares.
template <class T>
struct Batch {
  const T *weight, *shares;  // shares: (samples, n * taps)
  int64_t samples, n, filters, channels, taps, inputs, outputs;
  std::vector<Pair> pairs;
  int64_t kernel_size() const { return filters * channels * taps; }
  const T* kernel(int64_t i) const { return weight + i * kernel_size(); }
};

// Samples that fill the vectors of the microkernel, or nearly.
template <class T>
std::vector<Span> panels_of_samples(int64_t samples) {
  constexpr int L = Simd<T>::LANES;
  return split(samples, ceil_div(samples, VECTORS * L), L);
}

// out[number][sample] of some samples, in[sample][number], in whole vectors: zeros beyond them.
template <class T>
void samples_last(const T* in, int64_t numbers, const Span& samples, int64_t width, T* out) {
  transpose_block<T>(in + samples.first * numbers, numbers, samples.count, numbers, out, width);
  for (int64_t i = 0; i < numbers && samples.count < width; ++i) std::fill(out + i * width + samples.count, out + (i + 1) * width, T(0));
}

// out = scale * in, of some whole vectors.
template <class T>
void scale_run(const T* in, const T* scale, int64_t width, T* out) {
  using S = Simd<T>;
  for (int64_t l = 0; l < width; l += S::LANES) S::store(out + l, S::load(scale + l) * S::load(in + l));
}

// out[tap][lane] = in[lane][tap], with `apart` between taps; what lies behind `in` may be read, up to `end`.
template <class T>
void part_taps(const T* in, int64_t lanes, int64_t taps, const T* end, T* out, int64_t apart) {
  using S = Simd<T>;
  constexpr int L = S::LANES;
  int64_t lane = 0;
  for (; lane + L <= lanes && in + (lane + L) * taps + L <= end; lane += L)
    for (int64_t tap = 0; tap < taps; tap += L) {
      typename S::Vec v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) v[i] = S::load(in + (lane + i) * taps + tap);
      transpose<T>(v);
      for (int i = 0; i < L && tap + i < taps; ++i) S::store(out + (tap + i) * apart + lane, v[i]);
    }
  for (; lane < lanes; ++lane)
    for (int64_t tap = 0; tap < taps; ++tap) out[tap * apart + lane] = in[lane * taps + tap];
}

// The reverse: out[lane][tap] = in[tap][lane].
template <class T>
void join_taps(const T* in, int64_t apart, int64_t lanes, int64_t taps, T* out) {
  using S = Simd<T>;
  constexpr int L = S::LANES;
  int64_t lane = 0;
  for (; taps <= L && lane + L + L <= lanes; lane += L) {  // each run writes beyond itself, what the next one writes again
    typename S::Vec v[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) v[i] = i < taps ? S::load(in + i * apart + lane) : typename S::Vec{};
    transpose<T>(v);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) S::store(out + (lane + i) * taps, v[i]);
  }
  for (; lane < lanes; ++lane)
    for (int64_t tap = 0; tap < taps; ++tap) out[lane * taps + tap] = in[tap * apart + lane];
}

// x: (samples, inputs, channels), y: (samples, outputs, filters).
template <class T>
void convolve_samples(const Batch<T>& batch, const T* x, T* y) {
  constexpr int L = Simd<T>::LANES;
  const int64_t count = batch.pairs.size(), taps = batch.taps, row = batch.channels * taps, threads = int64_t(get_num_threads());
  const std::vector<Span> panels = panels_of_samples<T>(batch.samples);
  const std::vector<Span> sides = split(batch.filters, std::min(batch.filters, ceil_div(threads, int64_t(panels.size()))));
  const int64_t most = std::max<int64_t>(1, TILE_ROWS * batch.outputs / (batch.n * std::max<int64_t>(1, count)));
  const std::vector<Span> blocks = split(batch.channels, ceil_div(batch.channels, most));
  parallel_for(0, sides.size() * panels.size(), 1, [&](int64_t begin, int64_t end) {
    Scratch<T>& scratch = Scratch<T>::mine();
    std::vector<const T*> rows;
    std::vector<Step> steps;
    for (int64_t task = begin; task < end; ++task) {
      const Span &samples = panels[task % panels.size()], &side = sides[task / panels.size()];
      const int vectors = int(ceil_div(samples.count, L));
      const int64_t width = vectors * L;
      T* in = scratch.window.get(batch.inputs * batch.channels * width);
      T* shares = scratch.mixed.get(batch.n * taps * width);
      T* scaled = scratch.columns.get(batch.n * taps * most * width);
      T* out = scratch.out.get(batch.outputs * side.count * width);
      samples_last<T>(x, batch.inputs * batch.channels, samples, width, in);
      samples_last<T>(batch.shares, batch.n * taps, samples, width, shares);
      rows.resize(side.count);
      for (int64_t f = 0; f < side.count; ++f) rows[f] = batch.weight + (side.first + f) * row;
      std::fill_n(out, batch.outputs * side.count * width, T(0));
      for (const Span& block : blocks) {
        for (size_t first = 0, last = 0; first < batch.pairs.size(); first = last) {
          const int64_t output = batch.pairs[first].to;
          T* to = scaled;
          steps.clear();
          for (; last < batch.pairs.size() && batch.pairs[last].to == output; ++last)
            for (int64_t i = 0; i < batch.n; ++i)
              for (int64_t c = block.first; c < block.first + block.count; ++c, to += width) {
                const Pair& pair = batch.pairs[last];
                scale_run<T>(in + (pair.from * batch.channels + c) * width, shares + (i * taps + pair.tap) * width, width, to);
                steps.push_back({i * batch.kernel_size() + c * taps + pair.tap, to - scaled});
              }
          multiply<T>(rows.data(), side.count, vectors, scaled, steps.data(), steps.size(), out + output * side.count * width, true);
        }
      }
      for (int64_t p = 0; p < batch.outputs; ++p)
        transpose_block<T>(out + p * side.count * width, width, side.count, samples.count,
                           y + (samples.first * batch.outputs + p) * batch.filters + side.first, batch.outputs * batch.filters);
    }
  });
}

// The gradients of x, and of the shares, of which each block of channels gives a part, (blocks, samples, n * taps).
template <class T>
void differentiate_samples(const Batch<T>& batch, const T* grad, const T* x, const std::vector<Span>& blocks, T* x_grad, T* parts) {
  using S = Simd<T>;
  constexpr int L = S::LANES;
  const int64_t taps = batch.taps, channels = batch.channels, filters = batch.filters, shares_count = batch.n * taps;
  const std::vector<Span> panels = panels_of_samples<T>(batch.samples);
  parallel_for(0, blocks.size() * panels.size(), 1, [&](int64_t begin, int64_t end) {
    Scratch<T>& scratch = Scratch<T>::mine();
    std::vector<const T*> rows;
    std::vector<Step> steps(filters);
    int64_t held = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / blocks.size(), at = task % blocks.size();
      const Span &samples = panels[panel], &block = blocks[at];
      const int vectors = int(ceil_div(samples.count, L));
      const int64_t width = vectors * L, lanes = ceil_div(block.count, L) * L;
      T* out_grad = scratch.grad.get(batch.outputs * filters * width);
      T* shares = scratch.mixed.get(2 * shares_count * width);
      T *shares_grad = shares + shares_count * width;
      T* in = scratch.window.get(2 * batch.inputs * block.count * width);
      T *in_grad = in + batch.inputs * block.count * width, *packed = scratch.packed.get(filters * taps * lanes), *found = scratch.out.get(block.count * width);
      if (held != panel) {
        samples_last<T>(grad, batch.outputs * filters, samples, width, out_grad);
        samples_last<T>(batch.shares, shares_count, samples, width, shares);
        held = panel;
      }
      std::fill_n(shares_grad, shares_count * width, T(0));
      std::fill_n(in, 2 * batch.inputs * block.count * width, T(0));
      for (int64_t q = 0; q < batch.inputs; ++q)
        transpose_block<T>(x + (samples.first * batch.inputs + q) * channels + block.first, batch.inputs * channels, samples.count, block.count,
                           in + q * block.count * width, width);
      rows.resize(block.count);
      for (int64_t f = 0; f < filters; ++f) steps[f] = {f * taps * lanes, f * width};
      for (int64_t i = 0; i < batch.n; ++i) {
        for (int64_t f = 0; f < filters; ++f)
          part_taps<T>(batch.kernel(i) + (f * channels + block.first) * taps, block.count, taps, batch.kernel(batch.n), packed + f * taps * lanes, lanes);
        for (const Pair& pair : batch.pairs) {
          for (int64_t c = 0; c < block.count; ++c) rows[c] = packed + pair.tap * lanes + c;
          multiply<T>(rows.data(), block.count, vectors, out_grad + pair.to * filters * width, steps.data(), filters, found, false);
          const T *share = shares + (i * taps + pair.tap) * width, *input = in + pair.from * block.count * width;
          T *to_share = shares_grad + (i * taps + pair.tap) * width, *to_input = in_grad + pair.from * block.count * width;
          for (int64_t l = 0; l < width; l += L) {
            const auto scale = S::load(share + l);
            auto sum = S::load(to_share + l);
            for (int64_t c = l; c < l + block.count * width; c += width) {
              const auto value = S::load(found + c);
              S::store(to_input + c, S::load(to_input + c) + scale * value);
              sum += value * S::load(input + c);
            }
            S::store(to_share + l, sum);
          }
        }
      }
      for (int64_t q = 0; q < batch.inputs; ++q)
        transpose_block<T>(in_grad + q * block.count * width, width, block.count, samples.count,
                           x_grad + (samples.first * batch.inputs + q) * channels + block.first, batch.inputs * channels);
      transpose_block<T>(shares_grad, width, shares_count, samples.count, parts + (at * batch.samples + samples.first) * shares_count, shares_count);
    }
  });
}

// The gradient of the kernels.
template <class T>
void kernel_gradients_of_samples(const Batch<T>& batch, const T* grad, const T* x, T* weight_grad) {
  constexpr int L = Simd<T>::LANES;
  const int64_t taps = batch.taps, samples = ceil_div(batch.samples, L) * L, shares_count = batch.n * taps;
  const std::vector<Span> lanes = split(batch.channels, ceil_div(batch.channels, VECTORS * L), L),
                          sides = split(batch.filters, ceil_div(batch.filters, SHARED_FILTERS));
  std::vector<Pair> pairs = batch.pairs;
  std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& one, const Pair& other) { return one.tap < other.tap; });
  const int64_t most = batch.outputs * samples;  // of a tap's pairs and their samples
  parallel_for(0, lanes.size() * sides.size(), 1, [&](int64_t begin, int64_t end) {
    Scratch<T>& scratch = Scratch<T>::mine();
    std::vector<const T*> rows;
    std::vector<Step> steps;
    int64_t held = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t at = task / sides.size();
      const Span &block = lanes[at], &side = sides[task % sides.size()];
      const int vectors = int(ceil_div(block.count, L));
      const int64_t width = vectors * L;
      T* in = scratch.window.get(batch.samples * batch.inputs * width);
      T* shares = scratch.mixed.get(shares_count * samples);
      T* out_grad = scratch.grad.get(batch.outputs * side.count * samples);
      T* scaled = scratch.columns.get(side.count * most);
      T* sums = scratch.out.get(taps * side.count * width);
      for (int64_t row = 0; row < batch.samples * batch.inputs && held != at; ++row)
        copy_run<T>(x + row * batch.channels + block.first, block.count, vectors, in + row * width);
      held = at;
      samples_last<T>(batch.shares, shares_count, {0, batch.samples}, samples, shares);
      for (int64_t p = 0; p < batch.outputs; ++p)
        transpose_block<T>(grad + p * batch.filters + side.first, batch.outputs * batch.filters, batch.samples, side.count,
                           out_grad + p * side.count * samples, samples);
      rows.resize(side.count);
      for (int64_t f = 0; f < side.count; ++f) rows[f] = scaled + f * most;
      for (int64_t i = 0; i < batch.n; ++i) {
        std::fill_n(sums, taps * side.count * width, T(0));
        for (size_t first = 0, last = 0; first < pairs.size(); first = last) {
          const int64_t tap = pairs[first].tap;
          steps.clear();
          for (; last < pairs.size() && pairs[last].tap == tap; ++last) {
            const int64_t place = (last - first) * samples;
            for (int64_t f = 0; f < side.count; ++f)
              scale_run<T>(out_grad + (pairs[last].to * side.count + f) * samples, shares + (i * taps + tap) * samples, samples, scaled + f * most + place);
            for (int64_t b = 0; b < batch.samples; ++b) steps.push_back({place + b, (b * batch.inputs + pairs[last].from) * width});
          }
          multiply<T>(rows.data(), side.count, vectors, in, steps.data(), steps.size(), sums + tap * side.count * width, false);
        }
        for (int64_t f = 0; f < side.count; ++f)
          join_taps<T>(sums + f * width, side.count * width, block.count, taps,
                       weight_grad + i * batch.kernel_size() + ((side.first + f) * batch.channels + block.first) * taps);
      }
    }
  });
}

}  // namespace odconv
