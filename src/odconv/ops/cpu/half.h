// Convolution in bfloat16 or float16 on matrix units (AMX), by oneDNN's microkernel, with float32 sums.
//
// One product, out[position][filter] += a[position][:] * b[:][filter], takes a row of taps at once: the map is channels-last,
// so that the channels under the taps of a row follow each other. Kernels are mixed in float32, rounded once, and written as
// the microkernel wants them: [tap][channel / 2][filter][2].
#pragma once

#include <cstring>

#include "convolve.h"

// oneDNN's microkernel as PyTorch exports it, which is no part of the stable ABI: where there is none of that name, it is null.
namespace at::native::cpublas {
__attribute__((weak)) bool could_pack(c10::ScalarType dtype);
__attribute__((weak)) void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C, const c10::BFloat16* A,
                                  const c10::BFloat16* B, float* C, bool is_vnni = true);
__attribute__((weak)) void brgemm(int64_t M, int64_t N, int64_t K, int64_t ld_a, int64_t ld_b, int64_t ld_c, bool add_C, const c10::Half* A,
                                  const c10::Half* B, float* C, bool is_vnni = true);
__attribute__((weak)) void brgemm_release(bool is_vnni = true);
}  // namespace at::native::cpublas

namespace odconv {

// Whether matrix units multiply in a dtype.
inline bool has_matrix_units(ScalarType dtype) {
  using at::native::cpublas::brgemm;
  void (*by_bfloat16)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const c10::BFloat16*, const c10::BFloat16*, float*, bool) = &brgemm;
  void (*by_half)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const c10::Half*, const c10::Half*, float*, bool) = &brgemm;
  return by_bfloat16 && by_half && at::native::cpublas::could_pack && at::native::cpublas::brgemm_release && at::native::cpublas::could_pack(dtype);
}

constexpr int64_t POSITIONS = 256;        // of one product: their sums stay in the cache
constexpr int64_t FEW = 32;               // a rest of fewer positions is a product of its own, so that few kinds are generated
constexpr int64_t FILTERS = Lanes<float>::MOST;  // of one product
constexpr int64_t BLOCK_BYTES = 1 << 20;  // of the n kernels of these filters, which stay in the cache from sample to sample
constexpr int64_t CHUNK = 256;            // numbers of a filter that are packed at a time, or two channels' taps
constexpr int64_t PADDED_BYTES = 1 << 25; // of padded maps at a time, or one sample's

// A channels-last map with zeros around it, taken apart by its coordinates modulo the stride: [sample][remainder][position]
// [channel]. Then each tap reads consecutive positions, `from` its own first one, if the ends of lines are read as well.
struct Padding {
  Axes extent;             // of one remainder
  int64_t channels, part;  // with the zero that makes channels even; positions of one remainder
  int64_t wide;            // positions from the first output to the last, ends of lines included
  bool copied;             // whether it is not the map itself
  std::vector<int64_t> from;
};

inline Padding padding_of(const Axes& size, int64_t channels, const Phase& phase) {
  Padding out;
  const Axes& stride = phase.jump;
  out.copied = channels % 2 != 0;
  for (int a = 0; a < 3; ++a) {
    out.extent[a] = ceil_div((phase.count[a] - 1) * stride[a] + phase.high[a] + 1 - phase.low[a], stride[a]);
    out.copied = out.copied || stride[a] > 1 || phase.low[a] != 0 || out.extent[a] != size[a];
  }
  out.channels = channels + channels % 2;
  out.part = out.extent[0] * out.extent[1] * out.extent[2];
  out.wide = ((phase.count[0] - 1) * out.extent[1] + phase.count[1] - 1) * out.extent[2] + phase.count[2];
  for (const Tap& tap : phase.taps) {
    int64_t remainder = 0, position = 0;
    for (int a = 0; a < 3; ++a) {
      const int64_t offset = tap.offset[a] - phase.low[a];
      remainder = remainder * stride[a] + offset % stride[a];
      position = position * out.extent[a] + offset / stride[a];
    }
    out.from.push_back(remainder * out.part + position);
  }
  return out;
}

// Copy one sample, [position][channel], into its padded form.
template <class T>
void pad(const T* x, const Axes& size, int64_t channels, const Phase& phase, const Padding& padding, T* out) {
  const Axes& stride = phase.jump;
  const int64_t line = padding.extent[2] * padding.channels;
  each(stride, [&](const Axes& remainder) {
    Axes first;
    for (int a = 0; a < 3; ++a) first[a] = phase.low[a] + remainder[a];
    for (int64_t i = 0; i < padding.extent[0]; ++i)
      for (int64_t j = 0; j < padding.extent[1]; ++j, out += line) {
        const int64_t y = first[0] + i * stride[0], z = first[1] + j * stride[1];
        const bool inside = y >= 0 && y < size[0] && z >= 0 && z < size[1];
        const int64_t begin = std::clamp<int64_t>(inside ? ceil_div(std::max<int64_t>(-first[2], 0), stride[2]) : padding.extent[2], 0, padding.extent[2]);
        const int64_t end = std::clamp<int64_t>(ceil_div(size[2] - first[2], stride[2]), begin, padding.extent[2]);
        std::memset(static_cast<void*>(out), 0, begin * padding.channels * sizeof(T));
        const T* in = x + ((y * size[1] + z) * size[2] + first[2] + begin * stride[2]) * channels;
        if (stride[2] == 1 && channels == padding.channels)
          std::memcpy(static_cast<void*>(out + begin * channels), in, (end - begin) * channels * sizeof(T));
        else
          for (int64_t k = begin; k < end; ++k, in += stride[2] * channels) {
            T* to = out + k * padding.channels;
            std::memcpy(static_cast<void*>(to), in, channels * sizeof(T));
            if (channels < padding.channels) to[channels] = T(0);
          }
        std::memset(static_cast<void*>(out + end * padding.channels), 0, (padding.extent[2] - end) * padding.channels * sizeof(T));
      }
  });
}

// A block of filters of some kernels: their numbers, [filter][channel][tap], and the width of vectors that they fill.
struct Block {
  Span filters;
  int64_t width, channels, taps;
  int64_t pairs() const { return ceil_div(channels, 2); }
  int64_t length() const { return channels * taps; }
  int64_t packed() const { return taps * pairs() * width * 2; }
};

// Pack a kernel, whose filters are `step` apart, as [tap][channel / 2][filter][2], with zeros beyond its filters and channels.
template <class T>
void pack_pairs(const T* in, int64_t step, const Block& block, Buffer<float>& buffer, T* out) {
  using S = Simd<float>;
  using H = Stored<T>;
  constexpr int L = S::LANES;
  const int64_t taps = block.taps, chunk = std::max<int64_t>(1, CHUNK / 2 / taps) * 2, pitch = ceil_div(chunk / 2 * taps, L) * L + L;
  float* paired = buffer.get(L * pitch);  // [filter][channel / 2, tap]
  for (int64_t lane = 0; lane < block.width; lane += L) {
    const int64_t valid = std::clamp<int64_t>(block.filters.count - lane, 0, L);
    std::fill_n(paired, L * pitch, 0.0f);
    for (int64_t c = 0; c < block.channels; c += chunk) {
      const int64_t channels = std::min(chunk, block.channels - c), count = ceil_div(channels, 2) * taps;
      for (int64_t l = 0; l < valid; ++l) {
        const T* from = in + (lane + l) * step + c * taps;
        float* to = paired + l * pitch;
        const int64_t last = block.channels * taps - c * taps;  // numbers up to the filter's end
        if (taps == 1)
          std::memcpy(static_cast<void*>(to), from, channels * sizeof(T));
        for (int64_t r = 0; taps > 1 && r < channels; r += 2)
          for (int64_t t = 0; t < taps; t += L) {  // what a vector has beyond the taps is written over by the next pair
            const int64_t at = r * taps + t;
            if (at + taps + L <= last)
              *reinterpret_cast<typename H::LooseBits*>(to + r / 2 * taps + t) =
                  __builtin_convertvector(H::read(from + at), typename H::Bits) |
                  __builtin_convertvector(H::read(from + at + taps), typename H::Bits) << 16;
            else
              for (int64_t i = t; i < std::min(t + L, taps); ++i) {
                T* pair = reinterpret_cast<T*>(to + r / 2 * taps + i);
                pair[0] = from[r * taps + i];
                pair[1] = r + 1 < channels ? from[(r + 1) * taps + i] : T(0);
              }
          }
      }
      for (int64_t e = 0, pair = c / 2, t = 0; e < count; e += L) {
        typename S::Vec v[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) v[i] = S::load(paired + i * pitch + e);
        transpose<float>(v);
        for (int i = 0; i < L && e + i < count; ++i) {
          S::store(reinterpret_cast<float*>(out) + (t * block.pairs() + pair) * block.width + lane, v[i]);
          if (++t == taps) t = 0, ++pair;
        }
      }
    }
  }
}

// Mix n packed kernels into one: factors has what the attentions of tap and channel multiply, [tap][channel], pairs complete.
template <class T, int N>
void mix_packed(const T* packed, int64_t n, const Block& block, const float* shares, const float* factors, T* out) {
  using H = Stored<T>;
  const int64_t size = block.packed(), kernels = N > 0 ? N : n;
  for (int64_t row = 0; row < block.taps * block.pairs(); ++row)
    for (int64_t l = 0; l < block.width; l += Simd<float>::LANES) {
      const int64_t at = (row * block.width + l) * 2;
      typename H::Vec low = {}, high = {};
      for (int64_t i = 0; i < kernels; ++i) {
        const typename H::Bits pairs = *reinterpret_cast<const typename H::Bits*>(packed + i * size + at);
        low += shares[i] * H::low(pairs);
        high += shares[i] * H::high(pairs);
      }
      *reinterpret_cast<typename H::Bits*>(out + at) = H::pairs(low * factors[2 * row], high * factors[2 * row + 1]);
    }
}

// Mix n kernels in the order of memory, where that costs less than packing each of them: out is [filter][channel][tap].
template <class T, int N>
void mix_filters(const Kernels<T>& kernels, const Block& block, const float* shares, const float* factors, T* out) {
  constexpr int L = Simd<float>::LANES;
  const int64_t n = N > 0 ? N : kernels.n, length = block.length();
  for (int64_t l = 0; l < block.filters.count; ++l, out += length) {
    const T* in = kernels.data + (block.filters.first + l) * kernels.lane_step;
    int64_t e = 0;
    for (; e + L <= length; e += L) {
      typename Stored<T>::Vec sum = shares[0] * Stored<T>::load(in + e);
      for (int64_t i = 1; i < n; ++i) sum += shares[i] * Stored<T>::load(in + i * kernels.size + e);
      Stored<T>::store(out + e, sum * Simd<float>::load(factors + e));
    }
    for (; e < length; ++e) {
      float sum = shares[0] * float(in[e]);
      for (int64_t i = 1; i < n; ++i) sum += shares[i] * float(in[i * kernels.size + e]);
      out[e] = T(sum * factors[e]);
    }
  }
}

// One sample's kernel, packed: mixed of packed ones, or mixed in the order of memory and then packed.
template <class T>
void mix_half(const Kernels<T>& kernels, const Block& block, const Gates<float>& gates, int64_t sample, int64_t own, bool packs_first,
              const T* packed, Scratch<float>& scratch, T* out) {
  const float one = 1, *shares = gates.shares ? gates.shares + sample * kernels.n : &one;
  const int64_t taps = block.taps, channels = block.channels, even = 2 * block.pairs();
  float* factors = scratch.grad.get(taps * even);
  for (int64_t r = 0; r < channels; ++r)
    for (int64_t t = 0; t < taps; ++t)
      factors[packs_first ? t * even + r : r * taps + t] = (gates.rows ? gates.rows[own * channels + r] : one) *
                                                         (gates.taps ? gates.taps[sample * taps + t] : one);
  if (packs_first) {
    for (int64_t t = 0; t < taps && even > channels; ++t) factors[t * even + channels] = 0;
    (kernels.n == 1 ? mix_packed<T, 1> : kernels.n == 4 ? mix_packed<T, 4> : mix_packed<T, 0>)(packed, kernels.n, block, shares, factors, out);
  } else {
    T* filters = reinterpret_cast<T*>(scratch.window.get(ceil_div(block.filters.count * block.length(), 2)));
    (kernels.n == 1 ? mix_filters<T, 1> : kernels.n == 4 ? mix_filters<T, 4> : mix_filters<T, 0>)(kernels, block, shares, factors, filters);
    pack_pairs<T>(filters, block.length(), block, scratch.blend, out);
  }
}

// How many filters a block has at most.
inline int64_t block_width(int64_t n, int64_t channels, int64_t taps) {
  return n * FILTERS * channels * taps * 2 > BLOCK_BYTES ? FILTERS / 2 : FILTERS;
}

// Kernels packed once for many calls: those of a group after those of the one before, in blocks of so many filters, of each the n
// kernels.
struct Packed {
  std::vector<Span> blocks;
  std::vector<int64_t> from;  // where the kernels of a block begin, and where the last ones end
};

inline Packed packed_of(int64_t n, int64_t lanes, int64_t channels, int64_t taps) {
  constexpr int L = Simd<float>::LANES;
  Packed out = {split(lanes, ceil_div(lanes, block_width(n, channels, taps)), L), {0}};
  for (const Span& filters : out.blocks)
    out.from.push_back(out.from.back() + n * Block{filters, ceil_div(filters.count, L) * L, channels, taps}.packed());
  return out;
}

// Pack the n kernels of a block one after the other.
template <class T>
void pack_block(const Kernels<T>& kernels, const Block& block, Buffer<float>& buffer, T* out) {
  const T* in = kernels.data + block.filters.first * kernels.lane_step;
  for (int64_t i = 0; i < kernels.n; ++i) pack_pairs<T>(in + i * kernels.size, kernels.lane_step, block, buffer, out + i * block.packed());
}

template <class T>
void pack_half(const Kernels<T>& kernels, int64_t groups, T* out) {
  constexpr int L = Simd<float>::LANES;
  const Packed packed = packed_of(kernels.n, kernels.lanes, kernels.rows, kernels.taps);
  const int64_t blocks = packed.blocks.size();
  parallel_for(0, groups * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const Span& filters = packed.blocks[task % blocks];
      const Block block = {filters, ceil_div(filters.count, L) * L, kernels.rows, kernels.taps};
      T* to = out + task / blocks * packed.from.back() + packed.from[task % blocks];
      pack_block<T>(kernels.of_group(task / blocks), block, Scratch<float>::mine().blend, to);
    }
  });
}

// Convolve every sample of a channels-last map, [sample][position][channel], with its own mixed kernel. The kernels
// may come packed, see pack_half.
template <class T>
void convolve_half(const T* x, const Axes& size, const Kernels<T>& kernels, const T* packed_before, int64_t groups, const Gates<float>& gates,
                   const Epilogue<float>& epilogue, int64_t batch, const Phase& phase, T* y) {
  constexpr int L = Simd<float>::LANES;
  const int64_t channels = groups * kernels.rows, filters = groups * kernels.lanes, taps = kernels.taps;
  const int64_t positions = size[0] * size[1] * size[2], outputs = phase.count[0] * phase.count[1] * phase.count[2];
  const auto write = with_activation(epilogue.activation, [](auto activate) { return &write_positions<T, decltype(activate)>; });
  const Padding padding = padding_of(size, channels, phase);
  const int64_t padded = padding.part * phase.jump[0] * phase.jump[1] * phase.jump[2] * padding.channels;

  struct Run {
    int64_t from, tap, taps;
  };
  std::vector<Run> runs;  // taps whose channels follow each other are one product
  const bool joined = groups == 1;
  for (int64_t t = 0; t < taps; ++t)
    if (joined && t > 0 && padding.from[t] == padding.from[t - 1] + 1)
      ++runs.back().taps;
    else
      runs.push_back({padding.from[t], t, 1});

  const int64_t threads = int64_t(get_num_threads()), n = kernels.n;
  const bool few = batch * groups * ceil_div(kernels.lanes, FILTERS) < threads;  // tasks, of whole blocks
  const int64_t wide = few ? FILTERS / 2 : block_width(n, kernels.rows, taps);
  const T* given = few ? nullptr : packed_before;
  const Packed before = given ? packed_of(n, kernels.lanes, kernels.rows, taps) : Packed{};
  const std::vector<Span> blocks = given ? before.blocks : split(kernels.lanes, ceil_div(kernels.lanes, wide), L);
  const int64_t at_once = std::clamp<int64_t>(PADDED_BYTES / (padded * sizeof(T)), 1, batch);
  const bool packs_first = given || (!kernels.per_sample() && at_once >= std::max<int64_t>(n, 2));  // n kernels once, not one a sample
  const Tensor buffer = empty({padding.copied ? at_once * padded : 0}, torch::headeronly::CppTypeToScalarType<T>::value);

  for (int64_t start = 0; start < batch; start += at_once) {
    const int64_t samples = std::min(at_once, batch - start);
    const T* maps = x + start * positions * channels;
    if (padding.copied) {
      T* copies = buffer.mutable_data_ptr<T>();
      parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) pad<T>(maps + b * positions * channels, size, channels, phase, padding, copies + b * padded);
      });
      maps = copies;
    }
    parallel_for(0, groups * blocks.size() * samples, 1, [&](int64_t begin, int64_t end) {
      Scratch<float>& scratch = Scratch<float>::mine();
      for (int64_t task = begin; task < end; ++task) {  // samples of one block follow each other
        const int64_t sample = start + task % samples, group = task / samples / int64_t(blocks.size()), own = sample * groups + group;
        const int64_t at = task / samples % blocks.size();
        const Span& lanes = blocks[at];
        const Block block = {lanes, ceil_div(lanes.count, L) * L, kernels.rows, taps};
        const Kernels<T> here = kernels.of_sample(sample).of_group(group);
        T* packs = given ? nullptr : reinterpret_cast<T*>(scratch.packed.get((packs_first ? n : 1) * block.packed() / 2));
        const T* packed = given ? given + group * before.from.back() + before.from[at] : packs;
        T* mixed = reinterpret_cast<T*>(scratch.mixed.get(block.packed() / 2));
        float* sums = scratch.out.get(POSITIONS * block.width);
        if (packs && packs_first && (task == begin || task % samples == 0)) pack_block<T>(here, block, scratch.blend, packs);
        mix_half<T>(here, block, gates, sample, own, packs_first, packed, scratch, mixed);
        const int64_t first = group * kernels.lanes + lanes.first;
        Lanes<float> per(epilogue, gates.lanes ? gates.lanes + own * kernels.lanes + lanes.first : nullptr, sample, first, lanes.count);
        const T* map = maps + task % samples * padded + group * kernels.rows;
        T* to = y + sample * outputs * filters + first;
        for (int64_t p = 0; p < padding.wide;) {
          const int64_t rest = padding.wide - p, rows = rest < FEW ? rest : std::min(POSITIONS, rest / FEW * FEW);
          for (const Run& run : runs)
            at::native::cpublas::brgemm(rows, block.width, run.taps * block.pairs() * 2, padding.channels, block.width, block.width,
                                        &run != runs.data(), map + (run.from + p) * padding.channels,
                                        mixed + run.tap * block.pairs() * block.width * 2, sums);
          for (int64_t r = 0; r < rows;) {  // the rest of a line at a time
            const int64_t i = (p + r) / padding.extent[2] / padding.extent[1], j = (p + r) / padding.extent[2] % padding.extent[1],
                          k = (p + r) % padding.extent[2], line = i * phase.count[1] + j;
            const int64_t within = std::min(rows - r, padding.extent[2] - k), positions = std::min(within, phase.count[2] - k);
            if (j < phase.count[1] && positions > 0) {
              write(sums + r * block.width, block.width, positions, lanes.count, per, to + (line * phase.count[2] + k) * filters, filters);
              if (k + positions == phase.count[2]) {
                float* whole = epilogue.line(sample, line);
                per.end_line(whole ? whole + first : nullptr, lanes.count);
              }
            }
            r += within;
          }
          p += rows;
        }
      }
      at::native::cpublas::brgemm_release();
    });
  }
}

}  // namespace odconv
