// Convolution in bfloat16 or float16 by oneDNN's microkernel, with float32 sums: on matrix units (AMX), or in bfloat16 by
// AVX-512's products of pairs.
//
// One product, out[position][lane] += a[position][:] * b[:][lane], takes a line of taps at once: the map is channels-last, so that
// the channels under the taps of a line follow each other. Rows and lanes are those of convolve.h. Kernels are mixed in float32,
// rounded once, and written as the microkernel wants them: [tap][row / 2][lane][2].
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

// Whether the microkernel adds up one pair of products for each filter. It raises where oneDNN is switched off.
inline bool adds_pairs() {
  constexpr int64_t L = Simd<float>::LANES;
  const c10::BFloat16 a[] = {2, 3};
  c10::BFloat16 b[2 * L];
  float sums[L];
  for (int64_t l = 0; l < L; ++l) b[2 * l] = c10::BFloat16(1), b[2 * l + 1] = c10::BFloat16(float(l));
  try {
    at::native::cpublas::brgemm(1, L, 2, 2, L, L, false, a, b, sums);
  } catch (...) {
    return false;
  }
  for (int64_t l = 0; l < L; ++l)
    if (sums[l] != 2 + 3 * l) return false;
  return true;
}

// Whether the microkernel multiplies pairs in a dtype. PyTorch says so of matrix units alone: AVX-512's products are tried.
inline bool multiplies_pairs(ScalarType dtype) {
  using at::native::cpublas::brgemm;
  void (*by_bfloat16)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const c10::BFloat16*, const c10::BFloat16*, float*, bool) = &brgemm;
  void (*by_half)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, bool, const c10::Half*, const c10::Half*, float*, bool) = &brgemm;
  if (!by_bfloat16 || !by_half || !at::native::cpublas::could_pack || !at::native::cpublas::brgemm_release) return false;
  if (at::native::cpublas::could_pack(dtype)) return true;
#if defined(__AVX512BF16__)
  return dtype == ScalarType::BFloat16 && adds_pairs();
#else
  return false;
#endif
}

constexpr int64_t POSITIONS = 256;        // of one product: their sums stay in the cache
constexpr int64_t FEW = 32;               // a rest of fewer positions is a product of its own, so that few kinds are generated
constexpr int64_t LANES_MOST = Lanes<float>::MOST;  // of one product
constexpr int64_t BLOCK_BYTES = 1 << 20;  // of the n kernels of these lanes, which stay in the cache from sample to sample
constexpr int64_t ENDS = 100;             // products with the ends of lines, for each number of a line, that cost more than copying it
constexpr int64_t MIXED_BYTES = 640 * 1024;  // of mixed kernels of some samples
constexpr int64_t MIXED_SAMPLES = 4;         // that are mixed at a time, so that kernels are read from the cache less often
constexpr int64_t CHUNK = 256;            // numbers of a lane that are packed at a time, or two rows' taps
constexpr int64_t PADDED_BYTES = 1 << 25; // of padded maps at a time, or one sample's

// A channels-last map with zeros around it, taken apart by its coordinates modulo the stride: [sample][remainder][position]
// [channel]. Then each tap reads consecutive positions, `from` its own first one, if the ends of lines are read as well. Where these
// would cost more, there are copies of lines instead, one for each place of a tap along the last axis, without ends.
struct Padding {
  Axes extent;              // of one remainder
  int64_t channels, part;   // with the zero that makes channels even; positions of one remainder
  int64_t wide;             // positions from the first output to the last, ends of lines included
  int64_t numbers;          // of a sample
  bool copied;              // whether it is not the map itself
  std::vector<int64_t> places, from;  // along the last axis, where lines are copied
};

inline Padding padding_of(const Axes& size, int64_t channels, const Phase& phase, bool by_line = false) {
  Padding out;
  const Axes& stride = phase.jump;
  out.copied = by_line || channels % 2 != 0;
  for (int a = 0; a < 3; ++a) {
    out.extent[a] = ceil_div((phase.count[a] - 1) * stride[a] + phase.high[a] + 1 - phase.low[a], stride[a]);
    out.copied = out.copied || stride[a] > 1 || phase.low[a] != 0 || out.extent[a] != size[a];
  }
  if (by_line) {
    out.extent[2] = phase.count[2];
    for (const Tap& tap : phase.taps)
      if (std::count(out.places.begin(), out.places.end(), tap.offset[2]) == 0) out.places.push_back(tap.offset[2]);
  }
  const int64_t last = by_line ? out.places.size() : stride[2];
  out.channels = channels + channels % 2;
  out.part = out.extent[0] * out.extent[1] * out.extent[2];
  out.wide = ((phase.count[0] - 1) * out.extent[1] + phase.count[1] - 1) * out.extent[2] + phase.count[2];
  out.numbers = stride[0] * stride[1] * last * out.part * out.channels;
  for (const Tap& tap : phase.taps) {
    int64_t remainder = 0, position = 0;
    for (int a = 0; a < 2; ++a) {
      const int64_t offset = tap.offset[a] - phase.low[a];
      remainder = remainder * stride[a] + offset % stride[a];
      position = position * out.extent[a] + offset / stride[a];
    }
    const int64_t offset = tap.offset[2] - phase.low[2];
    const int64_t place = std::find(out.places.begin(), out.places.end(), tap.offset[2]) - out.places.begin();
    out.from.push_back((remainder * last + (by_line ? place : offset % stride[2])) * out.part + position * out.extent[2] +
                       (by_line ? 0 : offset / stride[2]));
  }
  return out;
}

// Copy one sample, [position][channel], into its padded form.
template <class T>
void pad(const T* x, const Axes& size, int64_t channels, const Phase& phase, const Padding& padding, T* out) {
  const Axes& stride = phase.jump;
  const int64_t line = padding.extent[2] * padding.channels;
  each({stride[0], stride[1], padding.places.empty() ? stride[2] : int64_t(padding.places.size())}, [&](const Axes& remainder) {
    Axes first;
    for (int a = 0; a < 3; ++a) first[a] = phase.low[a] + remainder[a];
    if (!padding.places.empty()) first[2] = padding.places[remainder[2]];
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

// A block of lanes of some kernels, the width of vectors that they fill, and rows and taps; see Kernels.
struct Block {
  Span lanes;
  int64_t width, rows, taps;
  int64_t pairs() const { return ceil_div(rows, 2); }
  int64_t length() const { return rows * taps; }
  int64_t packed() const { return taps * pairs() * width * 2; }
};

template <class T>
Block block_of(const Kernels<T>& kernels, const Span& lanes) {
  constexpr int L = Simd<float>::LANES;
  return {lanes, ceil_div(lanes.count, L) * L, kernels.rows, kernels.taps};
}

// Pack a kernel whose rows run, of lanes that are `step` apart, as [tap][row / 2][lane][2], with zeros beyond its lanes and rows.
template <class T>
void pack_rows(const T* in, int64_t step, const Block& block, Buffer<float>& buffer, T* out) {
  using S = Simd<float>;
  using H = Stored<T>;
  constexpr int L = S::LANES;
  const int64_t taps = block.taps, chunk = std::max<int64_t>(1, CHUNK / 2 / taps) * 2, pitch = ceil_div(chunk / 2 * taps, L) * L + L;
  float* paired = buffer.get(L * pitch);  // [lane][row / 2, tap]
  for (int64_t lane = 0; lane < block.width; lane += L) {
    const int64_t valid = std::clamp<int64_t>(block.lanes.count - lane, 0, L);
    std::fill_n(paired, L * pitch, 0.0f);
    for (int64_t c = 0; c < block.rows; c += chunk) {
      const int64_t rows = std::min(chunk, block.rows - c), count = ceil_div(rows, 2) * taps;
      for (int64_t l = 0; l < valid; ++l) {
        const T* from = in + (lane + l) * step + c * taps;
        float* to = paired + l * pitch;
        const int64_t last = block.rows * taps - c * taps;  // numbers up to the lane's end
        for (int64_t i = rows * taps; i < 2 * rows * taps; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(from + i);  // too far apart to be guessed
        if (taps == 1)
          std::memcpy(static_cast<void*>(to), from, rows * sizeof(T));
        for (int64_t r = 0; taps > 1 && r < rows; r += 2)
          for (int64_t t = 0; t < taps; t += L) {  // what a vector has beyond the taps is written over by the next pair
            const int64_t at = r * taps + t;
            if (at + taps + L <= last)
              *reinterpret_cast<typename H::LooseBits*>(to + r / 2 * taps + t) = H::join(H::read(from + at), H::read(from + at + taps));
            else
              for (int64_t i = t; i < std::min(t + L, taps); ++i) {
                T* pair = reinterpret_cast<T*>(to + r / 2 * taps + i);
                pair[0] = from[r * taps + i];
                pair[1] = r + 1 < rows ? from[(r + 1) * taps + i] : T(0);
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

// The same of a kernel whose lanes run, of rows that are `step` apart.
template <class T>
void pack_lanes(const T* in, int64_t step, const Block& block, Buffer<float>& buffer, T* out) {
  using S = Simd<float>;
  using H = Stored<T>;
  constexpr int L = S::LANES;
  const int64_t taps = block.taps, length = block.lanes.count * taps;
  float* paired = buffer.get(block.width * taps + L);  // [lane][tap]
  std::fill_n(paired, block.width * taps + L, 0.0f);
  for (int64_t pair = 0; pair < block.pairs(); ++pair, in += 2 * step) {
    const bool whole = 2 * pair + 1 < block.rows;
    int64_t e = 0;
    for (; whole && e + L <= length; e += L) *reinterpret_cast<typename H::LooseBits*>(paired + e) = H::join(H::read(in + e), H::read(in + step + e));
    for (; e < length; ++e) {
      T* both = reinterpret_cast<T*>(paired + e);
      both[0] = in[e];
      both[1] = whole ? in[step + e] : T(0);
    }
    for (int64_t lane = 0; lane < block.width; lane += L)
      for (int64_t t = 0; t < taps; t += L) {
        float* to = reinterpret_cast<float*>(out) + (t * block.pairs() + pair) * block.width + lane;
        typename S::Vec v[L];
        if (taps == 1) {
          S::store(to, S::load(paired + lane));
          continue;
        }
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) v[i] = S::load(paired + (lane + i) * taps + t);
        transpose<float>(v);
        for (int i = 0; i < L && t + i < taps; ++i) S::store(to + i * block.pairs() * block.width, v[i]);
      }
  }
}

// What one sample's kernel is mixed by, and where to: factors has what the attentions of tap and row multiply, pairs complete.
template <class T>
struct Mixture {
  const float *shares, *factors;
  T* out;
};

// Mix the taps of a phase of n packed kernels into one for each of some samples, which read a kernel's numbers together. The factors
// are [tap][row].
template <class T, int N>
void mix_packed(const T* packed, int64_t n, const Block& block, const std::vector<Tap>& taps, const std::vector<Mixture<T>>& samples) {
  using H = Stored<T>;
  constexpr int L = Simd<float>::LANES;
  const int64_t size = block.packed(), kernels = N > 0 ? N : n;
  int64_t row = 0, at = 0;
  for (const Tap& tap : taps)
    for (int64_t pair = 0; pair < block.pairs(); ++pair, row += 2)
      for (int64_t l = 0; l < block.width; l += L, at += 2 * L) {
        const T* in = packed + ((tap.index * block.pairs() + pair) * block.width + l) * 2;
        typename H::Vec lows[N + 1], highs[N + 1];
        for (int i = 0; i < N; ++i) {
          const typename H::Bits pairs = *reinterpret_cast<const typename H::Bits*>(in + i * size);
          lows[i] = H::low(pairs), highs[i] = H::high(pairs);
        }
        for (const Mixture<T>& sample : samples) {
          typename H::Vec low = {}, high = {};
          for (int64_t i = 0; i < kernels; ++i) {
            if (N == 0) {
              const typename H::Bits pairs = *reinterpret_cast<const typename H::Bits*>(in + i * size);
              lows[0] = H::low(pairs), highs[0] = H::high(pairs);
            }
            low += sample.shares[i] * lows[N > 0 ? i : 0];
            high += sample.shares[i] * highs[N > 0 ? i : 0];
          }
          *reinterpret_cast<typename H::Bits*>(sample.out + at) = H::pairs(low * sample.factors[row], high * sample.factors[row + 1]);
        }
      }
}

// Mix n kernels in the order of memory, where that costs less than packing each of them: out is [lane][row][tap], as the factors.
template <class T, int N>
void mix_rows(const Kernels<T>& kernels, const Block& block, const Mixture<T>& sample, T* out) {
  constexpr int L = Simd<float>::LANES;
  const int64_t n = N > 0 ? N : kernels.n, length = block.length();
  const float *shares = sample.shares, *factors = sample.factors;
  for (int64_t l = 0; l < block.lanes.count; ++l, out += length) {
    const T* in = kernels.data + (block.lanes.first + l) * kernels.lane_step;
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

// The kernels of `count` samples from the first on, `apart` numbers apart, the taps of a phase packed: mixed of packed ones, or, where
// there are none, all taps are mixed in the order of memory and then packed.
template <class T>
void mix_half(const Kernels<T>& kernels, const Block& block, const std::vector<Tap>& taps, const Gates<float>& gates, int64_t groups, int64_t group,
              const Span& samples, const T* packed, Scratch<float>& scratch, T* out, int64_t apart) {
  static const float one = 1;
  const int64_t count = taps.size(), rows = block.rows, even = 2 * block.pairs();
  float* factors = scratch.grad.get(samples.count * count * even);
  std::vector<Mixture<T>> mixtures;
  for (int64_t b = samples.first; b < samples.first + samples.count; ++b, factors += count * even, out += apart) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t t = 0; t < count; ++t)
        factors[packed ? t * even + r : r * count + t] = (gates.rows ? gates.rows[(b * groups + group) * rows + r] : one) *
                                                         (gates.taps ? gates.taps[b * block.taps + taps[t].index] : one);
    for (int64_t t = 0; t < count && packed && even > rows; ++t) factors[t * even + rows] = 0;
    mixtures.push_back({gates.shares ? gates.shares + b * kernels.n : &one, factors, out});
  }
  if (packed) {
    (kernels.n == 1 ? mix_packed<T, 1> : kernels.n == 4 ? mix_packed<T, 4> : mix_packed<T, 0>)(packed, kernels.n, block, taps, mixtures);
    return;
  }
  T* lanes = reinterpret_cast<T*>(scratch.window.get(ceil_div(block.lanes.count * block.length(), 2)));
  for (const Mixture<T>& sample : mixtures) {
    (kernels.n == 1 ? mix_rows<T, 1> : kernels.n == 4 ? mix_rows<T, 4> : mix_rows<T, 0>)(kernels, block, sample, lanes);
    pack_rows<T>(lanes, block.length(), block, scratch.blend, sample.out);
  }
}

// How many lanes a block has at most.
inline int64_t block_width(int64_t n, int64_t rows, int64_t taps) {
  return n * LANES_MOST * rows * taps * 2 > BLOCK_BYTES ? LANES_MOST / 2 : LANES_MOST;
}

// Kernels packed once for many calls: those of a group after those of the one before, in blocks of so many lanes, of each the n
// kernels.
struct Packed {
  std::vector<Span> blocks;
  std::vector<int64_t> from;  // where the kernels of a block begin, and where the last ones end
};

template <class T>
Packed packed_of(const Kernels<T>& kernels) {
  Packed out = {split(kernels.lanes, ceil_div(kernels.lanes, block_width(kernels.n, kernels.rows, kernels.taps)), Simd<float>::LANES), {0}};
  for (const Span& lanes : out.blocks) out.from.push_back(out.from.back() + kernels.n * block_of(kernels, lanes).packed());
  return out;
}

// Pack the n kernels of a block one after the other.
template <class T>
void pack_block(const Kernels<T>& kernels, const Block& block, Buffer<float>& buffer, T* out) {
  const T* in = kernels.data + block.lanes.first * kernels.lane_step;
  for (int64_t i = 0; i < kernels.n; ++i, in += kernels.size, out += block.packed())
    if (rows_run(kernels))
      pack_rows<T>(in, kernels.lane_step, block, buffer, out);
    else
      pack_lanes<T>(in, kernels.row_step, block, buffer, out);
}

template <class T>
void pack_half(const Kernels<T>& kernels, int64_t groups, T* out) {
  const Packed packed = packed_of(kernels);
  const int64_t blocks = packed.blocks.size();
  parallel_for(0, groups * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      T* to = out + task / blocks * packed.from.back() + packed.from[task % blocks];
      pack_block<T>(kernels.of_group(task / blocks), block_of(kernels, packed.blocks[task % blocks]), Scratch<float>::mine().blend, to);
    }
  });
}

// Blocks that a task computes side by side, as many as leave their n kernels, of `numbers` each, in the cache: the map is read
// once for all of them, and lines of memory are written as a whole. There are so many tasks for each of the spans.
inline std::vector<Span> sides_of(int64_t blocks, int64_t numbers, int64_t tasks) {
  const int64_t threads = int64_t(get_num_threads());
  int64_t sides = std::min(blocks, std::max(ceil_div(blocks * numbers * 2, BLOCK_BYTES), ceil_div(threads, tasks)));
  while (sides < blocks && sides * tasks < 8 * threads && sides * tasks % threads) ++sides;
  return split(blocks, sides);
}

// Where the outputs of a phase lie in a channels-last map: those of a sample and block from `to` on, positions `step` apart.
template <class T>
struct Outputs {
  const Phase& phase;
  Axes size;  // of the map
  int64_t step;
  T* to;
  T* at(int64_t i, int64_t j, int64_t k) const {
    const Axes &first = phase.origin, &apart = phase.stride;
    return to + (((first[0] + i * apart[0]) * size[1] + first[1] + j * apart[1]) * size[2] + first[2] + k * apart[2]) * step;
  }
};

// Write the sums of `count` positions of a padded map from `p` on, [position][lane], where they are outputs.
template <class T, class W>
void write_padded(const float* sums, const Block& block, int64_t count, int64_t p, const Axes& extent, const Outputs<T>& out, W write,
                  const Epilogue<float>& epilogue, int64_t sample, int64_t first, Lanes<float>& per) {
  const Phase& phase = out.phase;
  for (int64_t r = 0; r < count;) {  // the rest of a line at a time
    const int64_t i = (p + r) / extent[2] / extent[1], j = (p + r) / extent[2] % extent[1], k = (p + r) % extent[2];
    const int64_t within = std::min(count - r, extent[2] - k), positions = std::min(within, phase.count[2] - k);
    if (j < phase.count[1] && positions > 0) {
      write(sums + r * block.width, block.width, positions, block.lanes.count, per, out.at(i, j, k), phase.stride[2] * out.step);
      if (k + positions == phase.count[2]) {
        float* whole = epilogue.line(sample, i * phase.count[1] + j);
        per.end_line(whole ? whole + first : nullptr, block.lanes.count);
      }
    }
    r += within;
  }
}

// Taps whose rows follow each other in the padded map are one product.
struct Run {
  int64_t from, tap, taps;
};

inline std::vector<Run> runs_of_taps(const Padding& padding, bool joined) {
  std::vector<Run> runs;
  for (int64_t t = 0; t < int64_t(padding.from.size()); ++t)
    if (joined && t > 0 && padding.from[t] == padding.from[t - 1] + 1)
      ++runs.back().taps;
    else
      runs.push_back({padding.from[t], t, 1});
  return runs;
}

// Convolve every sample of a channels-last map, [sample][position][row], with its own mixed kernel, at the outputs of a phase of another
// one, [sample][position][lane]. The kernels may come packed, see pack_half.
template <class T>
void convolve_half(const T* x, const Axes& size, const Kernels<T>& kernels, const T* packed_before, int64_t groups, const Gates<float>& gates,
                   const Epilogue<float>& epilogue, int64_t batch, Phase phase, const Axes& out_size, T* y) {
  const int64_t rows = groups * kernels.rows, lanes = groups * kernels.lanes;
  const int64_t positions = size[0] * size[1] * size[2], outputs = out_size[0] * out_size[1] * out_size[2];
  const auto write = with_activation(epilogue.activation, [](auto activate) { return &write_positions<T, decltype(activate)>; });
  order_taps(phase);
  Padding padding = padding_of(size, rows, phase);
  if ((padding.extent[2] - phase.count[2]) * kernels.taps * kernels.lanes > ENDS * padding.extent[2]) padding = padding_of(size, rows, phase, true);
  const int64_t padded = padding.numbers;
  const std::vector<Run> runs = runs_of_taps(padding, groups == 1);

  const int64_t threads = int64_t(get_num_threads()), n = kernels.n;
  const bool few = batch * groups * ceil_div(kernels.lanes, LANES_MOST) < threads;  // tasks, of whole blocks
  const int64_t wide = few ? LANES_MOST / 2 : block_width(n, kernels.rows, kernels.taps);
  const T* given = few ? nullptr : packed_before;
  const Packed before = given ? packed_of(kernels) : Packed{};
  const std::vector<Span> blocks = given ? before.blocks : split(kernels.lanes, ceil_div(kernels.lanes, wide), Simd<float>::LANES);
  const int64_t at_once = std::clamp<int64_t>(PADDED_BYTES / (padded * sizeof(T)), 1, batch);
  bool in_order = rows_run(kernels) && int64_t(phase.taps.size()) == kernels.taps;  // whether taps are wanted as they lie in memory
  for (int64_t t = 0; t < int64_t(phase.taps.size()); ++t) in_order = in_order && phase.taps[t].index == t;
  // n kernels once, not one a sample
  const bool packs_first = given || !in_order || (!kernels.per_sample() && at_once >= std::max<int64_t>(n, 2));
  const int64_t numbers = Block{{0, wide}, wide, kernels.rows, kernels.taps}.packed();  // of a kernel, at most
  const std::vector<Span> sides = sides_of(blocks.size(), n * numbers, groups * at_once);
  const Tensor buffer = empty({padding.copied ? at_once * padded : 0}, torch::headeronly::CppTypeToScalarType<T>::value);

  // samples of a task, whose mixed kernels stay in the cache
  const int64_t most = packs_first && n > 1 ? std::clamp<int64_t>(MIXED_BYTES / (sides[0].count * numbers * 2), 1, MIXED_SAMPLES) : 1;
  const int64_t together = std::clamp<int64_t>(groups * sides.size() * at_once / threads, 1, most);

  for (int64_t start = 0; start < batch; start += at_once) {
    const int64_t samples = std::min(at_once, batch - start);
    const T* maps = x + start * positions * rows;
    if (padding.copied) {
      T* copies = buffer.mutable_data_ptr<T>();
      parallel_for(0, samples, 1, [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) pad<T>(maps + b * positions * rows, size, rows, phase, padding, copies + b * padded);
      });
      maps = copies;
    }
    const std::vector<Span> shares = split(samples, ceil_div(samples, together));
    const int64_t parts = shares.size();
    parallel_for(0, groups * sides.size() * parts, 1, [&](int64_t begin, int64_t end) {
      Scratch<float>& scratch = Scratch<float>::mine();
      std::vector<Lanes<float>> lanes_of;
      for (int64_t task = begin; task < end; ++task) {  // samples of the same blocks follow each other
        const int64_t group = task / parts / int64_t(sides.size());
        const Span &share = shares[task % parts], &side = sides[task / parts % sides.size()], some = {start + share.first, share.count};
        const Kernels<T> here = kernels.of_sample(some.first).of_group(group);
        T* packs = given || !packs_first ? nullptr : reinterpret_cast<T*>(scratch.packed.get(side.count * n * numbers / 2));
        T* mixed = reinterpret_cast<T*>(scratch.mixed.get(some.count * side.count * numbers / 2));
        float* sums = scratch.out.get(POSITIONS * wide);
        for (int64_t i = 0; i < side.count; ++i) {
          const int64_t at = side.first + i;
          const Block block = block_of(kernels, blocks[at]);
          if (packs && (kernels.per_sample() || task == begin || task % parts == 0)) pack_block<T>(here, block, scratch.blend, packs + i * n * numbers);
          const T* packed = given ? given + group * before.from.back() + before.from[at] : packs ? packs + i * n * numbers : nullptr;
          mix_half<T>(here, block, phase.taps, gates, groups, group, some, packed, scratch, mixed + i * numbers, side.count * numbers);
        }
        for (int64_t b = some.first; b < some.first + some.count; ++b, mixed += side.count * numbers) {
          lanes_of.clear();
          for (int64_t i = 0; i < side.count; ++i) {
            const Span& span = blocks[side.first + i];
            const float* factors = gates.lanes ? gates.lanes + b * lanes + group * kernels.lanes + span.first : nullptr;
            lanes_of.emplace_back(epilogue, factors, b, group * kernels.lanes + span.first, span.count);
          }
          const T* map = maps + (b - start) * padded + group * kernels.rows;
          for (int64_t p = 0; p < padding.wide;) {
            const int64_t rest = padding.wide - p, count = rest < FEW ? rest : std::min(POSITIONS, rest / FEW * FEW);
            for (int64_t i = 0; i < side.count; ++i) {
              const Block block = block_of(kernels, blocks[side.first + i]);
              for (const Run& run : runs)
                at::native::cpublas::brgemm(count, block.width, run.taps * block.pairs() * 2, padding.channels, block.width, block.width,
                                            &run != runs.data(), map + (run.from + p) * padding.channels,
                                            mixed + i * numbers + run.tap * block.pairs() * block.width * 2, sums);
              const int64_t first = group * kernels.lanes + block.lanes.first;
              const Outputs<T> out = {phase, out_size, lanes, y + b * outputs * lanes + first};
              write_padded<T>(sums, block, count, p, padding.extent, out, write, epilogue, b, first, lanes_of[i]);
            }
            p += count;
          }
        }
      }
      at::native::cpublas::brgemm_release();
    });
  }
}

}  // namespace odconv
