// Vectors, the microkernel, and moving numbers about.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

#include <algorithm>
#include <array>
#include <cstdlib>
#include <type_traits>
#include <utility>
#include <vector>

#include "tensor.h"

namespace odconv {

using Axes = std::array<int64_t, 3>;

// How many vectors a tile of the microkernel has at most, and most rows for 1, 2, 3 and 4 of them: the sums and their factors fill
// the registers, of which AVX2 has 16, AVX-512 and NEON 32. On NEON each row's own factor takes one as well.
#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, VECTORS = 4, ROWS[] = {12, 12, 8, 6};
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, VECTORS = 2, ROWS[] = {6, 6, 4, 3};
#else
constexpr int VECTOR_BYTES = 16, VECTORS = 4, ROWS[] = {12, 10, 7, 5};
#endif

// Write a vector to memory past the caches, at a multiple of its size; others may read it after a fence.
template <class V>
void stream(void* to, V v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(static_cast<__m512i*>(to), __m512i(v));
#elif defined(__AVX2__)
  _mm256_stream_si256(static_cast<__m256i*>(to), __m256i(v));
#else
  *static_cast<V*>(to) = v;
#endif
}

inline void fence_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// These lanes of a and then b, counted through both.
template <int... L, class V>
[[gnu::always_inline]] inline V shuffle(V a, V b) {
#if defined(__clang__)  // GCC has it too, but only from 12 on
  return __builtin_shufflevector(a, b, L...);
#else
  return __builtin_shuffle(a, b, decltype(a < b){L...});
#endif
}

template <class T>
struct Simd {
  typedef T Vec __attribute__((vector_size(VECTOR_BYTES)));
  typedef T Loose __attribute__((vector_size(VECTOR_BYTES), aligned(sizeof(T)), may_alias));
  static constexpr int LANES = VECTOR_BYTES / sizeof(T);
  typedef std::conditional_t<sizeof(T) == 4, int32_t, int64_t> Mask __attribute__((vector_size(VECTOR_BYTES)));
  static Vec load(const T* p) { return *reinterpret_cast<const Loose*>(p); }
  static void store(T* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }
};

// How numbers lie in memory: those of 16 bits are computed with in float32.
template <class T>
struct Stored {
  using Sum = T;
  using Vec = typename Simd<T>::Vec;
  static Vec load(const T* p) { return Simd<T>::load(p); }
  static void store(T* p, Vec v) { Simd<T>::store(p, v); }
};

template <class T>
struct Half {
  using Sum = float;
  using Vec = Simd<float>::Vec;
  typedef uint32_t Bits __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint32_t LooseBits __attribute__((vector_size(VECTOR_BYTES), aligned(2), may_alias));
  typedef uint16_t Short __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef uint16_t Loose __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));
  static Short read(const T* p) { return *reinterpret_cast<const Loose*>(p); }
  static void write(T* p, Short v) { *reinterpret_cast<Loose*>(p) = v; }
  static Bits widen_bits(Short v) {  // as one instruction, which GCC does not make of a conversion of 64 bytes
#if defined(__AVX512F__)
    return Bits(_mm512_cvtepu16_epi32(__m256i(v)));
#else
    return __builtin_convertvector(v, Bits);
#endif
  }
  static Bits join(Short low, Short high) { return widen_bits(low) | widen_bits(high) << 16; }
};

template <>
struct Stored<c10::BFloat16> : Half<c10::BFloat16> {
  static Vec load(const c10::BFloat16* p) { return Vec(widen_bits(read(p)) << 16); }
  static Vec low(Bits pairs) { return Vec(pairs << 16); }
  static Vec high(Bits pairs) { return Vec(pairs & 0xffff0000); }
#if defined(__AVX512BF16__)
  static void store(c10::BFloat16* p, Vec v) { write(p, Short(_mm512_cvtneps_pbh(__m512(v)))); }
  static Bits pairs(Vec low, Vec high) {
    typedef uint16_t Both __attribute__((vector_size(VECTOR_BYTES)));
    const Both both = Both(_mm512_cvtne2ps_pbh(__m512(high), __m512(low)));
    return Bits(shuffle<0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31>(both, both));
  }
#else
  static Bits bits(Vec v) {  // rounded to the nearest, of two to the even one; a NaN stays one
    const Bits word = Bits(v), nan = Bits(v != v);
    return ((word + 0x7fff + (word >> 16 & 1)) >> 16 & ~nan) | (nan & 0x7fc0);
  }
  static void store(c10::BFloat16* p, Vec v) { write(p, __builtin_convertvector(bits(v), Short)); }
  static Bits pairs(Vec low, Vec high) { return bits(low) | bits(high) << 16; }
#endif
};

template <>
struct Stored<c10::Half> : Half<c10::Half> {
#if defined(__AVX512F__)
  static Vec widen(Short v) { return Vec(_mm512_cvtph_ps(__m256i(v))); }
  static Short shorts(Vec v) { return Short(_mm512_cvtps_ph(__m512(v), _MM_FROUND_TO_NEAREST_INT)); }
#elif defined(__AVX2__)
  static Vec widen(Short v) { return Vec(_mm256_cvtph_ps(__m128i(v))); }
  static Short shorts(Vec v) { return Short(_mm256_cvtps_ph(__m256(v), _MM_FROUND_TO_NEAREST_INT)); }
#else
  static Vec widen(Short v) { return Vec(vcvt_f32_f16(float16x4_t(v))); }
  static Short shorts(Vec v) { return Short(vcvt_f16_f32(float32x4_t(v))); }
#endif
  static Vec load(const c10::Half* p) { return widen(read(p)); }
  static Vec low(Bits pairs) { return widen(__builtin_convertvector(pairs, Short)); }
  static Vec high(Bits pairs) { return widen(__builtin_convertvector(pairs >> 16, Short)); }
  static Bits pairs(Vec low, Vec high) { return join(shorts(low), shorts(high)); }
  static void store(c10::Half* p, Vec v) { write(p, shorts(v)); }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- the microkernel ----------------------------------------------------------------------------------------------

struct Step {
  int64_t a, b;
};

template <class T, int M, int N>
void multiply_tile(const T* const* a, const T* b, const Step* steps, int64_t count, T* out, bool accumulate) {
  using S = Simd<T>;
  typename S::Vec sums[M][N];
  const int width = N * S::LANES;
#pragma GCC unroll 16
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int v = 0; v < N; ++v) sums[m][v] = accumulate ? S::load(out + m * width + v * S::LANES) : typename S::Vec{};
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
Multiply<T> pick(int64_t rows, std::integer_sequence<int, M...>) {
  static constexpr Multiply<T> table[] = {multiply_tile<T, M + 1, N>...};
  return table[rows - 1];
}

template <class T>
Multiply<T> pick(int64_t rows, int vectors) {
  if (vectors == 1) return pick<T, 1>(rows, std::make_integer_sequence<int, ROWS[0]>());
  if constexpr (VECTORS > 2) {
    if (vectors == 3) return pick<T, 3>(rows, std::make_integer_sequence<int, ROWS[2]>());
    if (vectors == 4) return pick<T, 4>(rows, std::make_integer_sequence<int, ROWS[3]>());
  }
  return pick<T, 2>(rows, std::make_integer_sequence<int, ROWS[1]>());
}

constexpr int64_t TILES_AHEAD = 3;  // that are read next: rows lie too far apart for the hardware to guess

// out[row] (+)= the sum over `length` steps, for `rows` rows that start at a[row]; out is `vectors` vectors wide. Where the steps of a
// row follow each other, `apart` is how far apart rows are, and the next ones are read ahead.
template <class T>
void multiply(const T* const* a, int64_t rows, int vectors, const T* b, const Step* steps, int64_t length, T* out, bool accumulate,
              int64_t apart = 0) {
  const int most = ROWS[vectors - 1], tiles = (int(rows) + most - 1) / most, width = vectors * Simd<T>::LANES;
  const int least = int(rows) / tiles, higher = int(rows) % tiles;  // of nearly equal height: a tile of a single row would be slow
  auto run = [&](int count, int height) {
    const Multiply<T> one = count > 0 ? pick<T>(height, vectors) : nullptr;
    const int64_t ahead = steps->a + TILES_AHEAD * height * apart;
    for (int tile = 0; tile < count; ++tile, a += height, out += height * width) {
      for (int row = 0; row < height && apart; ++row)
        for (int64_t i = 0; i < length; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(a[row] + ahead + i);
      one(a, b, steps, length, out, accumulate);
    }
  };
  run(higher, least + 1);
  run(tiles - higher, least);
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
      require(data_ != nullptr, "out of memory for a working space of ", size_ * sizeof(T), " bytes");
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
  Buffer<T> blend, packed, mixed, window, columns, out, grad, back;
  static Scratch& mine() {
    static thread_local Scratch scratch;
    return scratch;
  }
};

// Copy `count` numbers into some vectors, with zeros beyond them; what follows is read next.
template <class T>
void copy_run(const T* in, int64_t count, int64_t vectors, T* out) {
  using S = Simd<T>;
  for (int64_t v = 0; v < vectors; ++v, in += S::LANES, out += S::LANES, count -= S::LANES) {
    __builtin_prefetch(in + VECTORS * S::LANES);  // runs lie too far apart for the hardware to guess
    if (count >= S::LANES)
      S::store(out, S::load(in));
    else
      for (int64_t l = 0; l < S::LANES; ++l) out[l] = l < count ? in[l] : T(0);
  }
}

// Swap the H x H blocks off the diagonal of each 2H x 2H square; H = 1, 2, 4 ... together transpose the rows.
template <class T, int H, int... L>
[[gnu::always_inline]] inline void transpose_step(typename Simd<T>::Vec* rows, std::integer_sequence<int, L...>) {
  using S = Simd<T>;
#pragma GCC unroll 16
  for (int i = 0; i < S::LANES; ++i)
    if (!(i & H)) {
      const typename S::Vec a = rows[i], b = rows[i + H];
      rows[i] = shuffle<(L & H ? S::LANES + L - H : L)...>(a, b);
      rows[i + H] = shuffle<(L & H ? S::LANES + L : L + H)...>(a, b);
    }
}

template <class T>
[[gnu::always_inline]] inline void transpose(typename Simd<T>::Vec* rows) {
  constexpr int L = Simd<T>::LANES;
  constexpr std::make_integer_sequence<int, L> lanes{};
  transpose_step<T, 1>(rows, lanes);
  if constexpr (L > 2) transpose_step<T, 2>(rows, lanes);
  if constexpr (L > 4) transpose_step<T, 4>(rows, lanes);
  if constexpr (L > 8) transpose_step<T, 8>(rows, lanes);
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

}  // namespace odconv
