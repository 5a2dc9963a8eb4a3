// Dynamic convolution on the CPU: kernels are mixed a tile at a time and multiplied while the tile is in the cache.
//
// The three products of a training step (output, gradient of the input, gradient of the kernels) are one microkernel,
//
//     out[m][:] += sum_j a[m][steps[j].a] * b[steps[j].b][:]
//
// whose rows m are positions (or taps), whose vectors run over filters (or channels), and whose reduction j runs over taps
// and channels (or positions). The vectors of b are a tile of one sample's mixed kernel, stored [tap][channel][filter]; a
// points into the map, or into a zero-padded copy of the part of it that the tile needs, so nothing is ever unfolded.
//
// Results do not depend on the number of threads, nor a sample's output on the rest of its batch: every sum has one order.

#include <ATen/Parallel.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/narrow.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/reshape.h>
#include <ATen/ops/select.h>
#include <ATen/ops/sigmoid.h>
#include <ATen/ops/softmax.h>
#include <ATen/ops/sum.h>
#include <ATen/ops/unsqueeze.h>
#include <ATen/ops/view.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using Optional = std::optional<Tensor>;
using Axes = std::array<int64_t, 3>;

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, VECTORS = 4;
constexpr int ROWS[] = {12, 12, 8, 6};  // most rows for 1, 2, 3 and 4 vectors: the sums and their factors fill 32 registers
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, VECTORS = 2;
constexpr int ROWS[] = {6, 6};
#else
constexpr int VECTOR_BYTES = 16, VECTORS = 2;
constexpr int ROWS[] = {6, 6};
#endif

constexpr int64_t TILE_ROWS = 128;            // taps * channels of a tile: mixed kernels of 32 KiB, in float32
constexpr int64_t COLUMNS = 4;                // tiles side by side that read the same piece of a map
constexpr int64_t PART_POSITIONS = 1024;      // outputs of a part of a map
constexpr int64_t MAP_NUMBERS = 512 * 1024;   // outputs of a task

template <class T>
struct Simd {
  typedef T Vec __attribute__((vector_size(VECTOR_BYTES)));
  typedef T Loose __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  static constexpr int LANES = VECTOR_BYTES / sizeof(T);
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Mask __attribute__((vector_size(VECTOR_BYTES)));
  static Vec shuffle(Vec a, Vec b, Mask mask) { return __builtin_shuffle(a, b, mask); }
  static Vec load(const T* p) { return *reinterpret_cast<const Loose*>(p); }
  static void store(T* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }
};

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- the microkernel ----------------------------------------------------------------------------------------------

struct Step {
  int64_t a, b;
};

template <class T, int M, int N>
void multiply_tile(const T* const* a, const T* b, const Step* steps, int64_t count, T* out, bool add) {
  using S = Simd<T>;
  typename S::Vec sums[M][N];
  const int width = N * S::LANES;
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sums[m][v] = add ? S::load(out + m * width + v * S::LANES) : typename S::Vec{};
  for (int64_t j = 0; j < count; ++j) {
    const T* row = b + steps[j].b;
    const int64_t at = steps[j].a;
    typename S::Vec w[N];
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) w[v] = S::load(row + v * S::LANES);
#pragma GCC unroll 16
    for (int m = 0; m < M; ++m) {
      const T value = a[m][at];
#pragma GCC unroll 4
      for (int v = 0; v < N; ++v) sums[m][v] += value * w[v];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) S::store(out + m * width + v * S::LANES, sums[m][v]);
}

template <class T>
using Multiply = void (*)(const T* const*, const T*, const Step*, int64_t, T*, bool);

template <class T, int N, int... M>
constexpr Multiply<T> pick(int64_t rows, std::integer_sequence<int, M...>) {
  constexpr Multiply<T> table[] = {multiply_tile<T, M + 1, N>...};
  return table[rows - 1];
}

template <class T, int N>
constexpr Multiply<T> pick(int64_t rows) {
  return pick<T, N>(rows, std::make_integer_sequence<int, ROWS[N - 1]>{});
}

// out[row] (+)= the sum over steps, for `rows` rows that start at a[row]; out is `vectors` vectors wide.
template <class T>
void multiply(const T* const* a, int64_t rows, int vectors, const T* b, const std::vector<Step>& steps, T* out, bool add) {
  const int64_t tiles = ceil_div(rows, ROWS[vectors - 1]), width = vectors * Simd<T>::LANES;
  for (int64_t tile = 0; tile < tiles; ++tile) {  // of nearly equal height: a tile of a single row would be slow
    const int64_t first = rows * tile / tiles, count = rows * (tile + 1) / tiles - first;
    Multiply<T> run = vectors == 1 ? pick<T, 1>(count) : pick<T, 2>(count);
#if defined(__AVX512F__)
    if (vectors > 2) run = vectors == 3 ? pick<T, 3>(count) : pick<T, 4>(count);
#endif
    run(a + first, b, steps.data(), steps.size(), out + first * width, add);
  }
}

// ---- moving numbers ------------------------------------------------------------------------------------------------

// A working space of one thread, kept for the next call.
template <class T>
class Buffer {
 public:
  T* get(int64_t numbers) {
    if (numbers > size_) {
      std::free(data_);
      size_ = ceil_div(numbers * sizeof(T), 4096) * 4096 / sizeof(T);
      data_ = static_cast<T*>(std::aligned_alloc(4096, size_ * sizeof(T)));
      TORCH_CHECK(data_ != nullptr, "odconv: out of memory for a working space of ", size_ * sizeof(T), " bytes");
    }
    return data_;
  }
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }

 private:
  T* data_ = nullptr;
  int64_t size_ = 0;
};

template <class T>
struct Scratch {
  Buffer<T> blend, packed, mixed, window, out, grad, back;
  static Scratch& mine() {
    static thread_local Scratch scratch;
    return scratch;
  }
};

// Swap the H x H blocks off the diagonal of each 2H x 2H square; H = 1, 2, 4 ... together transpose the rows.
template <class T, int H>
void transpose_step(typename Simd<T>::Vec* rows) {
  using S = Simd<T>;
  typename S::Mask low, high;
#pragma GCC unroll 16
  for (int l = 0; l < S::LANES; ++l) {
    low[l] = l & H ? S::LANES + l - H : l;
    high[l] = l & H ? S::LANES + l : l + H;
  }
#pragma GCC unroll 16
  for (int i = 0; i < S::LANES; ++i)
    if (!(i & H)) {
      const typename S::Vec a = rows[i], b = rows[i + H];
      rows[i] = S::shuffle(a, b, low);
      rows[i + H] = S::shuffle(a, b, high);
    }
}

template <class T>
void transpose(typename Simd<T>::Vec* rows) {
  constexpr int L = Simd<T>::LANES;
  transpose_step<T, 1>(rows);
  if constexpr (L > 2) transpose_step<T, 2>(rows);
  if constexpr (L > 4) transpose_step<T, 4>(rows);
  if constexpr (L > 8) transpose_step<T, 8>(rows);
}

// out[c * out_step + r] = in[r * in_step + c]
template <class T>
void transpose_block(const T* in, int64_t in_step, int64_t rows, int64_t columns, T* out, int64_t out_step) {
  using S = Simd<T>;
  constexpr int L = S::LANES;
  auto square = [&](int64_t r, int64_t c) {
    typename S::Vec v[L];
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) v[i] = S::load(in + (r + i) * in_step + c);
    transpose<T>(v);
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) S::store(out + (c + i) * out_step + r, v[i]);
  };
  const int64_t whole_rows = rows / L * L, whole_columns = columns / L * L;
  if (in_step > out_step)  // along the longer step, so that L pages are touched at a time and not all of them
    for (int64_t r = 0; r < whole_rows; r += L)
      for (int64_t c = 0; c < whole_columns; c += L) square(r, c);
  else
    for (int64_t c = 0; c < whole_columns; c += L)
      for (int64_t r = 0; r < whole_rows; r += L) square(r, c);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) out[c * out_step + r] = in[r * in_step + c];
}

// ---- tiles of kernels ----------------------------------------------------------------------------------------------

// n kernels seen as [row][lane][tap]: lanes are what the vectors run over, rows what is summed over besides the taps.
template <class T>
struct Kernels {
  const T* data;
  int64_t n, size, rows, lanes, taps, row_step, lane_step;
  Kernels of_group(int64_t group) const {
    Kernels out = *this;
    out.data += group * rows * lanes * taps;
    return out;
  }
};

struct Span {
  int64_t first, count;
};

struct Tile {
  int64_t first_row, rows, first_lane, lanes;
  int vectors;
};

// Kernels whose taps and rows are one run a lane, as in a convolution's weight, or whose taps and lanes are one run a
// row, as in the same weight seen from its gradient.
template <class T>
bool rows_run(const Kernels<T>& kernels) {
  return kernels.row_step == kernels.taps;
}

// Where in a tile, [tap][row][lane], the elements of a run [row][tap] lie.
void places_of(const Tile& tile, int64_t rows, int64_t taps, int64_t width, std::vector<int64_t>& out) {
  out.clear();
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t t = 0; t < taps; ++t) out.push_back((t * tile.rows + r) * width);
}

// One kernel's tile as [tap][row][lane], missing lanes zero.
template <class T>
void pack(const Kernels<T>& kernels, const Tile& tile, const T* kernel, std::vector<int64_t>& places, T* out) {
  using S = Simd<T>;
  constexpr int L = S::LANES;
  const int64_t width = tile.vectors * L, taps = kernels.taps;
  const int64_t runs = rows_run(kernels) ? 1 : tile.rows, length = tile.rows * taps / runs;
  places_of(tile, length / taps, taps, width, places);
  kernel += tile.first_row * kernels.row_step + tile.first_lane * kernels.lane_step;
  for (int64_t lane = 0; lane < width; lane += L) {
    const int64_t valid = std::clamp<int64_t>(tile.lanes - lane, 0, L);
    for (int64_t run = 0; run < runs; ++run) {
      const T* in = kernel + run * kernels.row_step + lane * kernels.lane_step;
      T* to = out + run * width + lane;
      int64_t e = 0;
      if (valid == L && kernels.lane_step == 1) S::store(to + places[e++], S::load(in));  // 1x1, one row
      for (; valid == L && e + L <= length; e += L) {
        typename S::Vec v[L];
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) {
          v[i] = S::load(in + i * kernels.lane_step + e);
          __builtin_prefetch(in + i * kernels.lane_step + e + 2 * L);  // lanes lie too far apart for the hardware to guess
        }
        transpose<T>(v);
#pragma GCC unroll 16
        for (int i = 0; i < L; ++i) S::store(to + places[e + i], v[i]);
      }
      for (; e < length; ++e) {
        for (int64_t i = 0; i < valid; ++i) to[places[e] + i] = in[i * kernels.lane_step + e];
        for (int64_t i = valid; i < L; ++i) to[places[e] + i] = 0;
      }
    }
  }
}

// The reverse for a gradient: out[lane][row][tap] = in[tap][row][lane], for kernels whose rows run.
template <class T>
void unpack(const T* in, const Tile& tile, const Kernels<T>& kernels, std::vector<int64_t>& places, T* out) {
  using S = Simd<T>;
  constexpr int L = S::LANES;
  const int64_t width = tile.vectors * L, length = tile.rows * kernels.taps;
  places_of(tile, tile.rows, kernels.taps, width, places);
  out += tile.first_row * kernels.row_step + tile.first_lane * kernels.lane_step;
  for (int64_t lane = 0; lane < tile.lanes; lane += L) {
    const int64_t valid = std::min<int64_t>(tile.lanes - lane, L);
    int64_t e = 0;
    for (; valid == L && e + L <= length; e += L) {
      typename S::Vec v[L];
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) v[i] = S::load(in + places[e + i] + lane);
      transpose<T>(v);
#pragma GCC unroll 16
      for (int i = 0; i < L; ++i) S::store(out + (lane + i) * kernels.lane_step + e, v[i]);
    }
    for (; e < length; ++e)
      for (int64_t i = 0; i < valid; ++i) out[(lane + i) * kernels.lane_step + e] = in[places[e] + lane + i];
  }
}

// sum_i shares[i] * kernel[i] for a block of lanes and all rows: one kernel that is read as n were, but from the cache.
// It streams through memory in the order of the weight, at the speed of the memory.
template <class T>
Kernels<T> blend(const Kernels<T>& kernels, const Span& lanes, const T* shares, Buffer<T>& buffer) {
  using S = Simd<T>;
  Kernels<T> out = kernels;
  const int64_t runs = rows_run(kernels) ? lanes.count : kernels.rows, step = rows_run(kernels) ? kernels.lane_step : kernels.row_step;
  const int64_t length = (rows_run(kernels) ? kernels.rows : lanes.count) * kernels.taps, pitch = length + 2 * S::LANES;
  T* sums = buffer.get(runs * pitch);
  for (int64_t run = 0; run < runs; ++run) {
    const T* in = kernels.data + lanes.first * kernels.lane_step + run * step;
    T* to = sums + run * pitch;
    int64_t e = 0;
    for (; e + S::LANES <= length; e += S::LANES) {
      typename S::Vec sum = shares[0] * S::load(in + e);
      for (int64_t i = 1; i < kernels.n; ++i) sum += shares[i] * S::load(in + i * kernels.size + e);
      S::store(to + e, sum);
    }
    for (; e < length; ++e) {
      to[e] = shares[0] * in[e];
      for (int64_t i = 1; i < kernels.n; ++i) to[e] += shares[i] * in[i * kernels.size + e];
    }
  }
  (rows_run(kernels) ? out.lane_step : out.row_step) = pitch;
  out.data = sums - lanes.first * out.lane_step;
  return out;
}

// The attentions of one sample and group, as far as a tile needs them; null counts as ones.
template <class T>
struct Scales {
  const T *shares, *taps, *rows;
  alignas(64) T lanes[VECTORS * Simd<T>::LANES];
};

// out = lanes * taps * rows * sum_i shares[i] * packed[i]
template <class T>
void mix(const T* packed, int64_t n, int64_t taps, const Tile& tile, const Scales<T>& scales, T* out) {
  using S = Simd<T>;
  const int64_t width = tile.vectors * S::LANES, size = taps * tile.rows * width;
  for (int64_t t = 0; t < taps; ++t)
    for (int64_t r = 0; r < tile.rows; ++r) {
      const T scale = (scales.taps ? scales.taps[t] : T(1)) * (scales.rows ? scales.rows[r] : T(1));
      for (int v = 0; v < tile.vectors; ++v) {
        const T* in = packed + (t * tile.rows + r) * width + v * S::LANES;
        typename S::Vec sum = S::load(in);
        if (scales.shares) sum *= scales.shares[0];
        for (int64_t i = 1; i < n; ++i) sum += scales.shares[i] * S::load(in + i * size);
        S::store(out + (t * tile.rows + r) * width + v * S::LANES, sum * S::load(scales.lanes + v * S::LANES) * scale);
      }
    }
}

// ---- maps ----------------------------------------------------------------------------------------------------------

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

// A part of one sample's outputs: those of a phase whose first coordinate lies in [first, last).
struct Part {
  int64_t sample;
  const Phase* phase;
  int64_t first, last;
  int64_t positions() const { return (last - first) * phase->count[1] * phase->count[2]; }
};

std::vector<Part> parts_of(const std::vector<Phase>& phases, int64_t batch, int64_t least) {
  std::vector<Part> parts;
  for (int64_t b = 0; b < batch; ++b)
    for (const Phase& phase : phases) {
      const int64_t lines = phase.count[0], line = phase.count[1] * phase.count[2];
      const int64_t count = std::min(lines, std::max(least, ceil_div(lines * line, PART_POSITIONS)));
      for (int64_t i = 0; i < count; ++i) parts.push_back({b, &phase, lines * i / count, lines * (i + 1) / count});
    }
  return parts;
}

// What a part reads: a piece of the map itself, or a copy with zeros around.
template <class T>
struct Window {
  const T* data;
  int64_t channel_step;
  Axes step;
};

template <class T>
Window<T> view(const Map<const T>& map, int64_t channel, int64_t channels, const Part& part, Buffer<T>& buffer) {
  const Phase& phase = *part.phase;
  const Axes first = {part.first, 0, 0}, last = {part.last, phase.count[1], phase.count[2]};
  const T* data = map.data + part.sample * map.batch_step + channel * map.channel_step;
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

// Where in a map (or window) each position of a part lies, from the part's first.
void offsets_of(const Part& part, const Axes& stride, const Axes& step, std::vector<int64_t>& out) {
  const Axes& count = part.phase->count;
  out.clear();
  for (int64_t i = 0; i < part.last - part.first; ++i)
    for (int64_t j = 0; j < count[1]; ++j)
      for (int64_t k = 0; k < count[2]; ++k)
        out.push_back(i * stride[0] * step[0] + j * stride[1] * step[1] + k * stride[2] * step[2]);
}

bool is_run(const std::vector<int64_t>& offsets) {
  for (size_t i = 0; i < offsets.size(); ++i)
    if (offsets[i] != int64_t(i)) return false;
  return true;
}

int64_t tap_offset(const Phase& phase, const Tap& tap, const Axes& step) {
  int64_t offset = 0;
  for (int a = 0; a < 3; ++a) offset += (tap.offset[a] - phase.low[a]) * step[a];
  return offset;
}

// ---- splitting the work --------------------------------------------------------------------------------------------

std::vector<Span> split(int64_t size, int64_t count, int64_t unit = 1) {
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

// Convolve every sample of `source` with its own mixed kernel, into `out`.
template <class T>
void convolve(const Map<const T>& source, const Map<T>& out, const Kernels<T>& kernels, int64_t groups,
              const Weights<T>& weights, int64_t batch, const std::vector<Phase>& phases) {
  constexpr int L = Simd<T>::LANES;
  const std::vector<Span> rows = rows_of(kernels, 1), columns = columns_of(kernels);
  const int64_t threads = at::get_num_threads(), n = kernels.n, taps = kernels.taps, wide = columns.size();
  const std::vector<Part> parts = parts_of(phases, batch, ceil_div(threads, batch * wide * groups));
  if (parts.empty()) return;  // a gradient that nothing reaches
  int64_t outputs = 0;
  for (const Part& part : parts) outputs += part.positions();

  // A task has a few columns, which share what is read of the map, and a bundle of parts, which share packed kernels.
  // Where samples are too few, or too large, for n packed kernels to pay, each has bundles of its own and its kernel is
  // blended first.
  int64_t stacks = std::min(wide, std::max(ceil_div(wide, COLUMNS), ceil_div(threads, groups * int64_t(parts.size()))));
  int64_t bundles = ceil_div(outputs * kernels.lanes, stacks * MAP_NUMBERS);
  const bool blended = n > 1 && (batch < n || bundles >= batch);
  if (blended) {
    stacks = wide;
    bundles = ceil_div(bundles, batch) * batch;
  }
  while (bundles * stacks * groups < 8 * threads && bundles * stacks * groups % threads) bundles += blended ? batch : 1;
  bundles = std::min<int64_t>(bundles, parts.size());
  const std::vector<Span> by_stack = split(wide, stacks), by_bundle = split(parts.size(), bundles);

  at::parallel_for(0, groups * stacks * bundles, 1, [&](int64_t begin, int64_t end) {
    Scratch<T>& scratch = Scratch<T>::mine();
    std::vector<Step> steps;
    std::vector<int64_t> offsets;
    std::vector<const T*> starts;
    std::vector<int64_t> places;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t group = task / (stacks * bundles);
      const Span stack = by_stack[task / bundles % stacks], bundle = by_bundle[task % bundles];
      const Part *first = parts.data() + bundle.first, *last = first + bundle.count;
      Kernels<T> here = kernels.of_group(group);
      const int64_t packs = blended ? 1 : n;
      if (blended)
        here = blend<T>(here, columns[stack.first], weights.shares + first->sample * n, scratch.blend);
      int64_t positions = 0;
      for (const Part* part = first; part < last; ++part) positions += part->positions();
      T* sums = scratch.out.get(positions * stack.count * VECTORS * L);

      for (const Span& span : rows) {
        const int64_t most = taps * span.count * VECTORS * L;  // numbers of a tile
        T* packed = scratch.packed.get(most * packs * stack.count);
        T* mixed = scratch.mixed.get(most * stack.count);
        for (int64_t c = 0; c < stack.count; ++c) {
          const Tile tile = tile_of<T>(span, columns[stack.first + c]);
          for (int64_t i = 0; i < packs; ++i)
            pack<T>(here, tile, here.data + i * here.size, places, packed + c * packs * most + i * taps * tile.rows * tile.vectors * L);
        }
        int64_t done = 0;
        for (const Part* part = first; part < last; ++part) {
          const Phase& phase = *part->phase;
          const Window<T> window = view<T>(source, group * kernels.rows + span.first, span.count, *part, scratch.window);
          offsets_of(*part, phase.jump, window.step, offsets);
          starts.clear();
          for (int64_t offset : offsets) starts.push_back(window.data + offset);
          for (int64_t c = 0; c < stack.count; ++c) {
            const Tile tile = tile_of<T>(span, columns[stack.first + c]);
            T *here_packed = packed + c * packs * most, *here_mixed = mixed + c * most;
            if (part == first || part->sample != (part - 1)->sample) {
              Scales<T> scales = scales_of(weights, kernels, groups, group, part->sample, tile);
              if (blended) scales.shares = nullptr;
              mix<T>(here_packed, packs, taps, tile, scales, here_mixed);
            }
            steps.clear();
            for (const Tap& tap : phase.taps) {
              const int64_t from = tap_offset(phase, tap, window.step);
              for (int64_t i = 0; i < tile.rows; ++i)
                steps.push_back({from + i * window.channel_step, (tap.index * tile.rows + i) * tile.vectors * L});
            }
            T* to = sums + c * positions * VECTORS * L + done * tile.vectors * L;
            multiply<T>(starts.data(), starts.size(), tile.vectors, here_mixed, steps, to, span.first > 0);
          }
          done += part->positions();
        }
      }

      for (int64_t c = 0; c < stack.count; ++c) {
        const Tile tile = tile_of<T>(rows[0], columns[stack.first + c]);
        const T* from = sums + c * positions * VECTORS * L;
        for (const Part* part = first; part < last; ++part) {
          T* to = out.data + part->sample * out.batch_step + (group * kernels.lanes + tile.first_lane) * out.channel_step;
          for (int a = 0; a < 3; ++a)
            to += (part->phase->origin[a] + (a == 0 ? part->first * part->phase->stride[0] : 0)) * out.step[a];
          offsets_of(*part, part->phase->stride, out.step, offsets);
          if (out.channel_step != 1 && is_run(offsets))
            transpose_block<T>(from, tile.vectors * L, part->positions(), tile.lanes, to, out.channel_step);
          else
            for (int64_t p = 0; p < part->positions(); ++p)
              for (int64_t l = 0; l < tile.lanes; ++l)
                to[offsets[p] + l * out.channel_step] = from[p * tile.vectors * L + l];
          from += part->positions() * tile.vectors * L;
        }
      }
    }
  });
}

// The sums that the gradients of the attentions are made of, one slice for each block of tiles that shares them.
struct Partial {
  Tensor shares, taps, rows, lanes;  // (tiles, B, n), (tiles, B, taps), (wide, B, C), (high, B, O)
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
      for (int64_t i = 0; i < n; ++i) pack<T>(here, tile, here.data + i * here.size, places, packed + i * size);
      std::fill_n(packed_grad, size * n, T(0));

      for (const Part& part : parts) {
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
      }
      for (int64_t i = 0; i < n; ++i)
        unpack<T>(packed_grad + i * size, tile, kernels, places, weight_grad + (here.data - kernels.data) + i * kernels.size);
    }
  });
}

// ---- depth-wise ----------------------------------------------------------------------------------------------------

// One filter a channel, on contiguous maps of one or two axes: vectors run over positions. A plane is copied with zeros
// around it and taken apart by its coordinates modulo the stride, so that each tap reads it in one run.
template <class T>
void convolve_planes(const T* x, const Axes& size, const T* kernels, int64_t n, int64_t channels, const Weights<T>& weights,
                     int64_t batch, const Phase& phase, const Axes& stride, T* y) {
  using S = Simd<T>;
  constexpr int L = S::LANES, BLOCK = 4;
  const int64_t taps = phase.taps.size(), plane = size[0] * size[2], outputs = phase.count[0] * phase.count[2];
  auto extent = [&](int a) { return ceil_div((phase.count[a] - 1) * stride[a] + phase.high[a] + 1 - phase.low[a], stride[a]); };
  const int64_t pitch = extent(2), part = extent(0) * pitch, wide = phase.count[0] * pitch;
  std::vector<int64_t> from;  // where each tap begins to read
  for (const Tap& tap : phase.taps) {
    const int64_t i = tap.offset[0] - phase.low[0], j = tap.offset[2] - phase.low[2];
    from.push_back((i % stride[0] * stride[2] + j % stride[2]) * part + i / stride[0] * pitch + j / stride[2]);
  }
  std::vector<int64_t> row_at;  // where each row of a plane goes; -1 for one that no output meets
  for (int64_t i = 0; i < size[0]; ++i) {
    const int64_t row = i - phase.low[0];
    const bool met = row >= 0 && row < extent(0) * stride[0];
    row_at.push_back(met ? row % stride[0] * stride[2] * part + row / stride[0] * pitch : -1);
  }
  struct Run {
    int64_t first, last, shift;
  };
  std::vector<Run> columns;  // columns p, p + stride, ... of a padded row: number k comes from k * stride + shift
  for (int64_t p = 0; p < stride[2]; ++p) {
    const int64_t shift = p + phase.low[2];
    columns.push_back({std::max<int64_t>(0, ceil_div(-shift, stride[2])),
                       std::min(pitch, ceil_div(size[2] - shift, stride[2])), shift});
  }
  at::parallel_for(0, batch * channels, std::max<int64_t>(1, 32768 / (plane + outputs * taps)), [&](int64_t begin, int64_t end) {
    Scratch<T>& scratch = Scratch<T>::mine();
    const int64_t numbers = stride[0] * stride[2] * part;
    const int64_t reach = numbers + pitch + BLOCK * L;  // the last block reads beyond, for sums that are not used
    T* padded = scratch.window.get(reach);
    T* sums = scratch.out.get(wide + BLOCK * L);
    std::vector<T> base(channels * taps), kernel(taps);
    std::fill_n(padded, reach, T(0));  // the same places stay zero for every plane
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / channels, c = task % channels;
      if (task == begin || c == 0) {  // another sample: mix its kernels
        const int64_t last = std::min(channels, c + end - task) * taps;
        std::fill(base.begin(), base.end(), T(0));
        for (int64_t i = 0; i < n; ++i) {
          const T share = weights.shares ? weights.shares[b * n + i] : T(1);
          const T* one = kernels + i * channels * taps;
          for (int64_t e = c * taps; e < last; ++e) base[e] += share * one[e];
        }
      }
      const T scale = (weights.rows ? weights.rows[task] : T(1)) * (weights.lanes ? weights.lanes[task] : T(1));
      for (int64_t t = 0; t < taps; ++t)
        kernel[t] = base[c * taps + t] * scale * (weights.taps ? weights.taps[b * taps + t] : T(1));
      for (int64_t i = 0; i < size[0]; ++i)
        for (int64_t p = 0; p < stride[2] && row_at[i] >= 0; ++p) {
          const Run& run = columns[p];
          const T* in = x + task * plane + i * size[2] + run.shift;
          T* to = padded + row_at[i] + p * part;
          if (stride[2] == 1)
            for (int64_t k = run.first; k < run.last; ++k) to[k] = in[k];
          else
            for (int64_t k = run.first; k < run.last; ++k) to[k] = in[k * stride[2]];
        }
      for (int64_t q = 0; q < wide; q += BLOCK * L) {
        typename S::Vec block[BLOCK] = {};
        for (int64_t t = 0; t < taps; ++t)
          for (int v = 0; v < BLOCK; ++v) block[v] += kernel[t] * S::load(padded + from[t] + q + v * L);
        for (int v = 0; v < BLOCK; ++v) S::store(sums + q + v * L, block[v]);
      }
      for (int64_t i = 0; i < phase.count[0]; ++i)
        std::copy_n(sums + i * pitch, phase.count[2], y + task * outputs + i * phase.count[2]);
    }
  });
}

// ---- tensors -------------------------------------------------------------------------------------------------------

// The spatial axes of a shape: a map of one, two or three axes as one of three, the first of them first.
Axes three(at::IntArrayRef values, int64_t fill) {
  Axes out = {fill, fill, fill};
  out[0] = values[0];
  if (values.size() > 1) out[2] = values[values.size() - 1];
  if (values.size() == 3) out[1] = values[1];
  return out;
}

template <class T, class U>
Map<T> map_of(const Tensor& x, U* data) {
  return {data, x.stride(0), x.stride(1), three(x.sizes().slice(2), 1), three(x.strides().slice(2), 0)};
}

struct Geometry {
  Axes kernel, stride, padding, dilation;
  int64_t groups;
};

void finish(Phase& phase) {
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

Phase forward_phase(const Geometry& g, const Axes& out_size) {
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
std::vector<Phase> backward_phases(const Geometry& g, const Axes& in_size) {
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

template <class T>
const T* numbers(const Optional& tensor) {
  return tensor ? tensor->const_data_ptr<T>() : nullptr;
}

Geometry geometry_of(const Tensor& weight, at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation,
                     int64_t groups) {
  return {three(weight.sizes().slice(3), 1), three(stride, 1), three(padding, 0), three(dilation, 1), groups};
}

bool by_plane(const Tensor& x, const Tensor& weight, int64_t groups) {
  return weight.size(1) == groups && weight.size(2) == 1 && x.dim() < 5 && x.is_contiguous();
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A depth-wise layer's kernels are small: they are mixed whole, and PyTorch's convolution does the rest.
Gradients depthwise_backward(const Tensor& grad, const Tensor& x, const Tensor& weight, const Optional& kernel,
                             const Optional& spatial, const Optional& channel, const Optional& filter,
                             at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool to_x,
                             bool to_weights) {
  const int64_t n = weight.size(0), batch = x.size(0), channels = weight.size(1), taps = weight[0][0].numel();
  const Tensor ones = at::ones({1, 1}, x.options());
  const Tensor by_tap = (spatial ? spatial->reshape({batch, taps}) : ones).unsqueeze(1);  // (B or 1, 1, taps)
  const Tensor rows = (channel ? *channel : ones).unsqueeze(2), lanes = (filter ? *filter : ones).unsqueeze(2);
  const Tensor kernels = weight.reshape({n, channels * taps});
  const Tensor base = kernel ? kernel->mm(kernels).view({batch, channels, taps}) : kernels.view({1, channels, taps});
  std::vector<int64_t> shape = {batch * channels, 1}, all = {1, batch * channels}, out = all;
  for (int64_t size : weight.sizes().slice(3)) shape.push_back(size);
  for (int64_t size : x.sizes().slice(2)) all.push_back(size);
  for (int64_t size : grad.sizes().slice(2)) out.push_back(size);
  const Tensor mixed = (base * by_tap * rows * lanes).expand({batch, channels, taps}).reshape(shape);
  const auto found = at::convolution_backward(grad.reshape(out), x.reshape(all), mixed, c10::nullopt, stride, padding,
                                              dilation, false, std::vector<int64_t>(stride.size(), 0), batch * channels,
                                              {to_x, to_weights, false});
  auto none = [&] { return at::empty({0}, x.options()); };
  const Tensor x_grad = to_x ? std::get<0>(found).view(x.sizes()) : none();
  if (!to_weights) return {x_grad, none(), none(), none(), none(), none()};
  const Tensor d = std::get<1>(found).view({batch, channels, taps}), to_base = (d * by_tap * rows * lanes).flatten(1);
  const Tensor to_gates = d * base, to_rows = (to_gates * by_tap).sum(2);
  std::vector<int64_t> spatial_shape = {batch};
  for (int64_t size : weight.sizes().slice(3)) spatial_shape.push_back(size);
  return {x_grad,
          (kernel ? kernel->t().mm(to_base) : to_base.sum(0)).view(weight.sizes()),
          to_base.mm(kernels.t()),
          (to_gates * rows * lanes).sum(1).view(spatial_shape),
          to_rows * lanes.squeeze(2),
          to_rows * rows.squeeze(2)};
}

// The arguments were checked in Python: shapes that fit, one dtype, weight and attentions contiguous.
Tensor conv(const Tensor& x, const Tensor& weight, const Optional& kernel, const Optional& spatial,
            const Optional& channel, const Optional& filter, at::IntArrayRef stride, at::IntArrayRef padding,
            at::IntArrayRef dilation, int64_t groups) {
  const Geometry g = geometry_of(weight, stride, padding, dilation, groups);
  std::vector<int64_t> size = {x.size(0), weight.size(1)};
  for (int64_t a = 0; a < int64_t(stride.size()); ++a)
    size.push_back((x.size(a + 2) + 2 * padding[a] - dilation[a] * (weight.size(a + 3) - 1) - 1) / stride[a] + 1);
  Tensor y = at::empty(size, x.options().memory_format(x.suggest_memory_format()));
  const int64_t filters = weight.size(1) / groups, channels = weight.size(2);
  const int64_t taps = g.kernel[0] * g.kernel[1] * g.kernel[2], one = weight.numel() / weight.size(0);
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* data = weight.const_data_ptr<T>();
    const Kernels<T> kernels = {data, weight.size(0), one, channels, filters, taps, taps, channels * taps};
    const Weights<T> weights = {numbers<T>(kernel), numbers<T>(spatial), numbers<T>(channel), numbers<T>(filter)};
    const auto out = map_of<T>(y, y.mutable_data_ptr<T>());
    if (by_plane(x, weight, groups))
      return convolve_planes<T>(x.const_data_ptr<T>(), three(x.sizes().slice(2), 1), data, weight.size(0), groups, weights,
                                x.size(0), forward_phase(g, out.size), g.stride, y.mutable_data_ptr<T>());
    convolve<T>(map_of<const T>(x, x.const_data_ptr<T>()), out, kernels, groups, weights,
                x.size(0), {forward_phase(g, out.size)});
  };
  x.scalar_type() == at::kDouble ? run(double()) : run(float());
  return y;
}

Gradients conv_backward(
    const Tensor& grad, const Tensor& x, const Tensor& weight, const Optional& kernel, const Optional& spatial,
    const Optional& channel, const Optional& filter, at::IntArrayRef stride, at::IntArrayRef padding,
    at::IntArrayRef dilation, int64_t groups, bool to_x, bool to_weights) {
  if (weight.size(1) == groups && weight.size(2) == 1)
    return depthwise_backward(grad, x, weight, kernel, spatial, channel, filter, stride, padding, dilation, to_x, to_weights);
  const Geometry g = geometry_of(weight, stride, padding, dilation, groups);
  const int64_t n = weight.size(0), batch = x.size(0), filters = weight.size(1) / groups, channels = weight.size(2);
  const int64_t taps = g.kernel[0] * g.kernel[1] * g.kernel[2], one = weight.numel() / n;
  auto none = [&] { return at::empty({0}, x.options()); };
  Tensor x_grad = none(), weight_grad = none(), kernel_grad = none(), spatial_grad = none(), channel_grad = none(),
         filter_grad = none();
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* data = weight.const_data_ptr<T>();
    const auto upstream = map_of<const T>(grad, grad.const_data_ptr<T>());
    if (to_x) {
      const std::vector<Phase> phases = backward_phases(g, three(x.sizes().slice(2), 1));
      int64_t met = 0;  // inputs that some output reads; a stride beyond the kernel leaves others
      for (const Phase& phase : phases) met += phase.count[0] * phase.count[1] * phase.count[2];
      x_grad = met * batch * x.size(1) == x.numel() ? at::empty_like(x) : at::zeros_like(x);
      const auto out = map_of<T>(x_grad, x_grad.mutable_data_ptr<T>());
      const Kernels<T> kernels = {data, n, one, filters, channels, taps, channels * taps, taps};
      const Weights<T> weights = {numbers<T>(kernel), numbers<T>(spatial), numbers<T>(filter), numbers<T>(channel)};
      convolve<T>(upstream, out, kernels, groups, weights, batch, phases);
    }
    if (to_weights) {
      weight_grad = at::empty_like(weight);
      const Kernels<T> kernels = {data, n, one, channels, filters, taps, taps, channels * taps};
      const Weights<T> weights = {numbers<T>(kernel), numbers<T>(spatial), numbers<T>(channel), numbers<T>(filter)};
      const std::vector<Span> columns = columns_of(kernels);
      const int64_t wide = columns.size();
      const std::vector<Span> rows = rows_of(kernels, ceil_div(4 * at::get_num_threads(), wide * groups));
      const int64_t high = rows.size(), count = groups * wide * high;
      Partial partial = {at::zeros({count, batch, n}, x.options()), at::zeros({count, batch, taps}, x.options()),
                            at::zeros({wide, batch, groups * channels}, x.options()),
                            at::zeros({high, batch, groups * filters}, x.options())};
      gradients<T>(map_of<const T>(x, x.const_data_ptr<T>()), upstream, kernels, groups, weights,
                   batch, forward_phase(g, upstream.size), rows, columns, weight_grad.mutable_data_ptr<T>(), partial);
      kernel_grad = partial.shares.sum(0);
      std::vector<int64_t> shape = {batch};
      for (int64_t size : weight.sizes().slice(3)) shape.push_back(size);
      spatial_grad = partial.taps.sum(0).view(shape);
      channel_grad = partial.rows.sum(0);
      filter_grad = partial.lanes.sum(0);
    }
  };
  x.scalar_type() == at::kDouble ? run(double()) : run(float());
  return {x_grad, weight_grad, kernel_grad, spatial_grad, channel_grad, filter_grad};
}

// ---- the attention, without gradients ----------------------------------------------------------------------------------

// out = matrix x + bias, for a matrix of `rows` rows of `count` numbers; four rows at a time, to hide each other's latency.
template <class T>
void apply(const T* matrix, int64_t rows, int64_t count, const T* x, const T* bias, T* out) {
  using S = Simd<T>;
  for (int64_t row = 0; row < rows; row += 4) {
    const T* at[4];
    for (int64_t i = 0; i < 4; ++i) at[i] = matrix + std::min(row + i, rows - 1) * count;
    typename S::Vec sums[4] = {};
    T ends[4] = {};
    int64_t j = 0;
    for (; j + S::LANES <= count; j += S::LANES)
      for (int i = 0; i < 4; ++i) sums[i] += S::load(at[i] + j) * S::load(x + j);
    for (; j < count; ++j)
      for (int i = 0; i < 4; ++i) ends[i] += at[i][j] * x[j];
    for (int64_t i = 0; i < 4 && row + i < rows; ++i) {
      T sum = ends[i];
      for (int l = 0; l < S::LANES; ++l) sum += sums[i][l];
      out[row + i] = bias ? sum + bias[row + i] : sum;
    }
  }
}

// fc -> batch norm by its running statistics -> ReLU -> heads -> gates, for pooled inputs (B, C). `norm` holds mean,
// variance, weight and bias, or nothing. A head is a weight (O, h), its bias, and its sigmoid's gain, or 0 for a softmax.
std::vector<Tensor> attend(const Tensor& pooled, const Optional& fc, const std::vector<Tensor>& norm, double eps,
                           const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                           at::ArrayRef<double> gains, const Optional& temperature) {
  const int64_t batch = pooled.size(0), channels = pooled.size(1), hidden = fc ? fc->size(0) : channels;
  const double divisor = temperature ? *temperature->const_data_ptr<float>() : 1;
  int64_t outputs = 0;
  for (const Tensor& weight : weights) outputs += weight.size(0);
  const int64_t work = hidden * (outputs + (fc ? channels : 0));
  Tensor logits = at::empty({batch * outputs}, pooled.options());  // those of a head lie together, to be its gates
  std::vector<Tensor> gates;
  auto run = [&](auto zero) {
    using T = decltype(zero);
    const T* x = pooled.const_data_ptr<T>();
    T* out = logits.mutable_data_ptr<T>();
    at::parallel_for(0, batch, std::max<int64_t>(1, 65536 / work), [&](int64_t begin, int64_t end) {
      std::vector<T> z(hidden);
      for (int64_t b = begin; b < end; ++b) {
        const T* in = x + b * channels;
        if (fc) {
          apply<T>(fc->const_data_ptr<T>(), hidden, channels, in, nullptr, z.data());
          for (int64_t h = 0; h < hidden; ++h) {
            if (!norm.empty()) {
              const T scale = norm[2].const_data_ptr<T>()[h] / std::sqrt(norm[1].const_data_ptr<T>()[h] + T(eps));
              z[h] = (z[h] - norm[0].const_data_ptr<T>()[h]) * scale + norm[3].const_data_ptr<T>()[h];
            }
            z[h] = z[h] < 0 ? T(0) : z[h];  // as torch's ReLU, a NaN stays
          }
          in = z.data();
        }
        T* to = out;
        for (size_t i = 0; i < weights.size(); ++i) {
          const int64_t size = weights[i].size(0);
          T* row = to + b * size;
          apply<T>(weights[i].const_data_ptr<T>(), size, hidden, in, biases[i].const_data_ptr<T>(), row);
          for (int64_t o = 0; o < size; ++o) row[o] /= T(divisor);
          to += batch * size;
        }
      }
    });
  };
  pooled.scalar_type() == at::kDouble ? run(double()) : run(float());
  int64_t first = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int64_t size = weights[i].size(0);
    Tensor gate = logits.narrow(0, first, batch * size).view({batch, size});
    gate = gains[i] == 0 ? gate.softmax(1) : gate.sigmoid_();
    gates.push_back(gains[i] == 0 || gains[i] == 1 ? gate : gate.mul_(gains[i]));
    first += batch * size;
  }
  return gates;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(odconv, library) {
  library.def(
      "conv(Tensor x, Tensor weight, Tensor? kernel, Tensor? spatial, Tensor? channel, Tensor? filter, int[] stride, "
      "int[] padding, int[] dilation, int groups) -> Tensor");
  library.def(
      "conv_backward(Tensor grad, Tensor x, Tensor weight, Tensor? kernel, Tensor? spatial, Tensor? channel, Tensor? "
      "filter, int[] stride, int[] padding, int[] dilation, int groups, bool to_x, bool to_weights) -> (Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "attend(Tensor pooled, Tensor? fc, Tensor[] norm, float eps, Tensor[] weights, Tensor[] biases, float[] gains, "
      "Tensor? temperature) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(odconv, CPU, library) {
  library.impl("conv", conv);
  library.impl("conv_backward", conv_backward);
  library.impl("attend", attend);
}
