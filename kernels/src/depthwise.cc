// Depthwise convolutions of codes of images with their channels last: see convolution.h. Compiled once per instruction set.
//
// A few pixels beside each other share the weights that are loaded, and those columns of the image that several of their
// windows have. Where an instruction multiplies four bytes, they are of four rows of the window, which are brought beside
// each other for 64 channels at once, in another order than in memory. What is outside of the
// image is read from a row of zeros, so that the sum of a channel's weights, times 128, is what bytes with 128 added give
// too much everywhere.
#include "convolution_finish.h"

namespace lepton::VARIANT {
namespace {

typedef uint32_t Unsigned32 __attribute__((vector_size(4 * kLanes)));  // sums may wrap on the way

constexpr int kPixels = 4, kVectors = 2;
constexpr int64_t kMostPositions = 64;  // whose places are held at once
#if defined(__AVX512VNNI__)
constexpr int kRowsOfLane = 4;
#else
constexpr int kRowsOfLane = 1;
#endif

// The weights of a row of the window, of lanes with those of several.
inline Ints weights_of(Ints lanes, int64_t row) {
  if constexpr (kRowsOfLane == 1) return lanes;
  return lanes << static_cast<int>(24 - 8 * (row % kRowsOfLane)) >> 24;
}

// Adds products of bytes that were widened to 32 bits and of weights; both fit into 16.
inline Ints add_products(Ints sum, Ints x, Ints w) {
#if defined(__AVX512VNNI__)
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "vm"(w));  // around the intrinsic GCC 12 copies sums
  return sum;
#elif defined(__AVX2__)
  return (Ints)((Unsigned32)sum + (Unsigned32)_mm256_madd_epi16((__m256i)x, (__m256i)w));
#else
  return (Ints)((Unsigned32)sum + (Unsigned32)(x * w));
#endif
}

inline Ints widen_some(const uint8_t* from, int count) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(static_cast<__mmask16>((1u << count) - 1), from));
#else
  Ints found = {};
  for (int lane = 0; lane < count; ++lane) found[lane] = from[lane];
  return found;
#endif
}

// Where the positions of the windows of some pixels are.
struct Places {
  const uint8_t* at[kMostPositions][kPixels];
};

// Vectors of channels from `c` on of P pixels; `first` is the first position of the window, `count` how many there are.
// Of the last vector not all channels may be there.
template <int P, int V, bool kWhole>
inline void add(Ints (&sums)[P][V], const Convolution& p, const Places& places, int64_t first, int64_t count, int64_t c) {
  const int64_t k_w = p.window.k_w;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t kh = (first + k) / k_w, kw = (first + k) % k_w;
    const int32_t* weights = static_cast<const int32_t*>(p.weights) + (kh / kRowsOfLane * k_w + kw) * p.stride + c;
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const Ints w = weights_of(*reinterpret_cast<const Ints*>(weights + v * kLanes), kh);
#pragma GCC unroll 4
      for (int i = 0; i < P; ++i) {
        const uint8_t* from = places.at[k][i] + c + v * kLanes;
        sums[i][v] = add_products(
            sums[i][v], kWhole ? widen_unsigned(from) : widen_some(from, static_cast<int>(p.window.c - c)), w);
      }
    }
  }
}

// Finds the places of positions [first, first + count) of the windows of P pixels.
template <int P>
inline void find(const Window& w, const uint8_t* x, const uint8_t* zeros, int64_t row, int64_t column, int64_t first,
                 int64_t count, Places& places) {
  int64_t kh = first / w.k_w, kw = first % w.k_w;
  for (int64_t k = 0; k < count; ++k) {
    const int64_t y = row * w.stride_h - w.top + kh * w.dilation_h;
    int64_t at = column * w.stride_w - w.left + kw * w.dilation_w;
    const bool inside = y >= 0 && y < w.h;
    for (int i = 0; i < P; ++i, at += w.stride_w)
      places.at[k][i] = inside && at >= 0 && at < w.w ? x + (y * w.w + at) * w.c : zeros;
    if (++kw == w.k_w) kw = 0, ++kh;
  }
}

// The columns of the image that the windows of some pixels beside each other have, for each row of the windows.
constexpr int kMostColumns = 11, kMostRows = 7;
struct Columns {
  const uint8_t* at[kMostRows][kMostColumns];

  Columns(const Window& w, const uint8_t* x, const uint8_t* zeros, int64_t row, int64_t column, int count) {
    const int64_t left = column * w.stride_w - w.left;
    const bool whole = left >= 0 && left + count <= w.w;
    for (int64_t kh = 0; kh < w.k_h; ++kh) {
      const int64_t y = row * w.stride_h - w.top + kh * w.dilation_h;
      const bool inside = y >= 0 && y < w.h;
      const uint8_t* const first = x + (y * w.w + left) * w.c;
      for (int j = 0; j < count; ++j)
        at[kh][j] = inside && (whole || (left + j >= 0 && left + j < w.w)) ? first + j * w.c : zeros;
    }
  }
};

#if defined(__AVX512VNNI__)
constexpr int kBlock = 4 * kLanes;

// Four vectors of channels of a column of R rows of the window from `kh` on: the bytes of a channel beside each other, where
// those that the window lacks meet weights of zero. In the v-th vector are four channels of each 16, from 4 v on.
template <int R>
inline void block_of(const Columns& columns, int64_t kh, int j, int64_t c, __mmask64 some, Ints (&to)[4]) {
  static_assert(R <= kRowsOfLane);
  const auto row = [&](int r) { return _mm512_maskz_loadu_epi8(some, columns.at[kh + (r < R ? r : R - 1)][j] + c); };
  const __m512i first = row(0), second = row(1);
  const __m512i low = _mm512_unpacklo_epi8(first, second), high = _mm512_unpackhi_epi8(first, second);
  __m512i lower = low, higher = high;
  if constexpr (R > 2) {
    const __m512i third = row(2), fourth = row(3);
    lower = _mm512_unpacklo_epi8(third, fourth), higher = _mm512_unpackhi_epi8(third, fourth);
  }
  to[0] = (Ints)_mm512_unpacklo_epi16(low, lower);
  to[1] = (Ints)_mm512_unpackhi_epi16(low, lower);
  to[2] = (Ints)_mm512_unpacklo_epi16(high, higher);
  to[3] = (Ints)_mm512_unpackhi_epi16(high, higher);
}

// Adds R rows from `kh` on of windows of KW columns, S between two: each column is read once for all pixels.
template <int P, int KW, int S, int R>
inline void add_rows(Ints (&sums)[P][4], const Convolution& p, const Columns& columns, int64_t kh, int64_t c,
                     __mmask64 some) {
  constexpr int kColumns = (P - 1) * S + KW;
  static_assert(kColumns <= kMostColumns);
  const int32_t* weights = static_cast<const int32_t*>(p.weights) + kh / kRowsOfLane * KW * p.stride + c;
#pragma GCC unroll 11
  for (int j = 0; j < kColumns; ++j) {
    Ints x[4];
    block_of<R>(columns, kh, j, c, some, x);
#pragma GCC unroll 4
    for (int i = 0; i < P; ++i) {
      if (j - i * S < 0 || j - i * S >= KW) continue;
      const auto* const w = reinterpret_cast<const Ints*>(weights + (j - i * S) * p.stride);
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v)  // the intrinsic: around an instruction in `asm` GCC 12 keeps so many sums in memory
        sums[i][v] = (Ints)_mm512_dpbusd_epi32((__m512i)sums[i][v], (__m512i)x[v], (__m512i)w[v]);
    }
  }
}

template <int P, int KW, int S>
inline void add_columns(Ints (&sums)[P][4], const Convolution& p, const Columns& columns, int64_t c, __mmask64 some) {
  int64_t kh = 0;
  for (; kh + 4 <= p.window.k_h; kh += 4) add_rows<P, KW, S, 4>(sums, p, columns, kh, c, some);
  const int64_t rows = p.window.k_h - kh;
  if (rows == 3) add_rows<P, KW, S, 3>(sums, p, columns, kh, c, some);
  if (rows == 2) add_rows<P, KW, S, 2>(sums, p, columns, kh, c, some);
  if (rows == 1) add_rows<P, KW, S, 1>(sums, p, columns, kh, c, some);
}

// Brings sums of a block into the order of its channels.
inline void in_order(Ints (&sums)[4]) {
  const auto pairs = [&](int from, bool upper) {
    const __m512i a = (__m512i)sums[from], b = (__m512i)sums[from + 1];
    return upper ? _mm512_shuffle_i32x4(a, b, 0xee) : _mm512_shuffle_i32x4(a, b, 0x44);
  };
  const __m512i low = pairs(0, false), high = pairs(0, true), lower = pairs(2, false), higher = pairs(2, true);
  sums[0] = (Ints)_mm512_shuffle_i32x4(low, lower, 0x88);
  sums[1] = (Ints)_mm512_shuffle_i32x4(low, lower, 0xdd);
  sums[2] = (Ints)_mm512_shuffle_i32x4(high, higher, 0x88);
  sums[3] = (Ints)_mm512_shuffle_i32x4(high, higher, 0xdd);
}
#else
constexpr int kBlock = 1;

// Adds a row of windows of KW columns, S between two: each column is read once for all pixels.
template <int P, int V, int KW, int S>
inline void add_row(Ints (&sums)[P][V], const Convolution& p, const Columns& columns, int64_t kh, int64_t c) {
  constexpr int kColumns = (P - 1) * S + KW;
  static_assert(kColumns <= kMostColumns);
  const int32_t* weights = static_cast<const int32_t*>(p.weights) + kh * KW * p.stride + c;
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    Ints w[KW];
#pragma GCC unroll 5
    for (int k = 0; k < KW; ++k) w[k] = *reinterpret_cast<const Ints*>(weights + k * p.stride + v * kLanes);
#pragma GCC unroll 11
    for (int j = 0; j < kColumns; ++j) {
      const Ints x = widen_unsigned(columns.at[kh][j] + c + v * kLanes);
#pragma GCC unroll 4
      for (int i = 0; i < P; ++i)
        if (j - i * S >= 0 && j - i * S < KW) sums[i][v] = add_products(sums[i][v], x, w[j - i * S]);
    }
  }
}
#endif

template <int P, int V>
inline void begin(Ints (&sums)[P][V], const Convolution& p, int64_t c) {
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const Ints first = (Ints)(-(Unsigned32)*reinterpret_cast<const Ints*>(p.offset + c + v * kLanes));
#pragma GCC unroll 4
    for (int i = 0; i < P; ++i) sums[i][v] = first;
  }
}

template <int P, int V, bool kWhole>
inline void write(const Convolution& p, const Finish& finish, const Ints (&sums)[P][V], int64_t pixel, float row_scale,
                  int64_t c) {
  const int64_t apart = p.window.c;
  const Brief brief(p);
  const SiluCodes silu_codes = finish.silu_codes();
  const bool is_silu = finish.is_silu(), gives_silus = finish.gives_silus();
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const int64_t at = c + v * kLanes, left = apart - at;
    if (!kWhole && left <= 0) return;
    const int count = kWhole || left >= kLanes ? kLanes : static_cast<int>(left);
    if (p.code_factor != nullptr) {
      const Floats factor = load(p.code_factor + at), bias = load(p.code_bias + at);
#pragma GCC unroll 4
      for (int i = 0; i < P; ++i) brief(as_floats(sums[i][v]) * factor + bias, (pixel + i) * apart + at, count);
      continue;
    }
    const Floats factor = row_scale * load(p.scale + at);
    const Floats bias = bias_at(finish.e, at);
    Floats values[P];
#pragma GCC unroll 4
    for (int i = 0; i < P; ++i) values[i] = as_floats(sums[i][v]) * factor + bias;
    if (is_silu || (gives_silus && count == kLanes)) {  // too long to be there for each
      Floats held[P];
#pragma GCC unroll 4
      for (int i = 0; i < P; ++i) held[i] = values[i];
#pragma GCC unroll 1
      for (int i = 0; i < P; ++i) {
        const int64_t to = (pixel + i) * apart + at;
        if (is_silu)
          silu_codes(held[i], to, count);
        else
          store(finish.y + to, silu(held[i]));
      }
      continue;
    }
#pragma GCC unroll 4
    for (int i = 0; i < P; ++i) finish(values[i], (pixel + i) * apart + at, count);
  }
}

template <int P, int V, bool kWhole>
inline void some_channels(const Convolution& p, const Finish& finish, const Places* found, Places& places,
                          const uint8_t* x, const uint8_t* zeros, int64_t row, int64_t column, int64_t pixel,
                          float row_scale, int64_t c) {
  const int64_t positions = p.window.k_h * p.window.k_w;
  Ints sums[P][V];
  begin(sums, p, c);
  if (found != nullptr) {
    add<P, V, kWhole>(sums, p, *found, 0, positions, c);
  } else {
    for (int64_t first = 0; first < positions; first += kMostPositions) {
      const int64_t count = positions - first < kMostPositions ? positions - first : kMostPositions;
      find<P>(p.window, x, zeros, row, column, first, count, places);
      add<P, V, kWhole>(sums, p, places, first, count, c);
    }
  }
  write<P, V, kWhole>(p, finish, sums, pixel, row_scale, c);
}

template <int P>
void pixels(const Convolution& p, const Finish& finish, const uint8_t* x, const uint8_t* zeros, int64_t row,
            int64_t column, int64_t pixel, float row_scale, int64_t c = 0) {
  const Window& w = p.window;
  const int64_t channels = w.c, positions = w.k_h * w.k_w;
  Places places;
  const Places* found = positions <= kMostPositions ? &places : nullptr;
  if (found != nullptr) find<P>(w, x, zeros, row, column, 0, positions, places);
  for (; c + kVectors * kLanes <= channels; c += kVectors * kLanes)
    some_channels<P, kVectors, true>(p, finish, found, places, x, zeros, row, column, pixel, row_scale, c);
  for (; c + kLanes <= channels; c += kLanes)
    some_channels<P, 1, true>(p, finish, found, places, x, zeros, row, column, pixel, row_scale, c);
  if (c < channels) some_channels<P, 1, false>(p, finish, found, places, x, zeros, row, column, pixel, row_scale, c);
}

// Channels [0, end) of kPixels pixels: all of them where they are in blocks, else whole vectors.
using Beside = void(const Convolution& p, const Finish& finish, const uint8_t* x, const uint8_t* zeros, int64_t row,
                    int64_t column, int64_t pixel, float row_scale, int64_t end);

template <int KW, int S>
void beside(const Convolution& p, const Finish& finish, const uint8_t* x, const uint8_t* zeros, int64_t row,
            int64_t column, int64_t pixel, float row_scale, int64_t end) {
  const Columns columns(p.window, x, zeros, row, column, (kPixels - 1) * S + KW);
  int64_t c = 0;
#if defined(__AVX512VNNI__)
  for (; c < end; c += kBlock) {
    const bool whole = c + kBlock <= end;
    Ints sums[kPixels][4];
    begin(sums, p, c);
    add_columns<kPixels, KW, S>(sums, p, columns, c, whole ? ~__mmask64{0} : (__mmask64{1} << (end - c)) - 1);
#pragma GCC unroll 4
    for (int i = 0; i < kPixels; ++i) in_order(sums[i]);
    if (whole)
      write<kPixels, 4, true>(p, finish, sums, pixel, row_scale, c);
    else
      write<kPixels, 4, false>(p, finish, sums, pixel, row_scale, c);
  }
#else
  for (; c + kVectors * kLanes <= end; c += kVectors * kLanes) {
    Ints sums[kPixels][kVectors];
    begin(sums, p, c);
    for (int64_t kh = 0; kh < p.window.k_h; ++kh) add_row<kPixels, kVectors, KW, S>(sums, p, columns, kh, c);
    write<kPixels, kVectors, true>(p, finish, sums, pixel, row_scale, c);
  }
  for (; c < end; c += kLanes) {
    Ints sums[kPixels][1];
    begin(sums, p, c);
    for (int64_t kh = 0; kh < p.window.k_h; ++kh) add_row<kPixels, 1, KW, S>(sums, p, columns, kh, c);
    write<kPixels, 1, true>(p, finish, sums, pixel, row_scale, c);
  }
#endif
}

// For windows that many networks have; null for others.
Beside* beside_of(const Window& w) {
  if (w.dilation_w != 1 || w.k_h > kMostRows || w.out_w < kPixels) return nullptr;
  if (w.k_w == 3) return w.stride_w == 1 ? beside<3, 1> : w.stride_w == 2 ? beside<3, 2> : nullptr;
  if (w.k_w == 5) return w.stride_w == 1 ? beside<5, 1> : w.stride_w == 2 ? beside<5, 2> : nullptr;
  return nullptr;
}

int block(const Window& w) { return beside_of(w) == nullptr ? 1 : kBlock; }

void rows(const Convolution& p, const uint8_t* zeros, int64_t row, int64_t row_end) {
  const Window& w = p.window;
  const Finish finish(p);
  Beside* const together = beside_of(w);
  const int64_t whole = together == nullptr ? 0 : kBlock > 1 ? w.c : w.c / kLanes * kLanes;
  for (; row < row_end; ++row) {
    const int64_t image = row / w.out_h, line = row * w.out_w;
    const uint8_t* x = static_cast<const uint8_t*>(p.x) + image * w.h * w.w * w.c;
    const float row_scale = p.row_scale[image];
    if (whole > 0) {
      for (int64_t column = 0; column < w.out_w; column += kPixels) {
        // The last ones may be computed twice, which takes less time than each for itself.
        const int64_t from = column + kPixels <= w.out_w ? column : w.out_w - kPixels;
        together(p, finish, x, zeros, row % w.out_h, from, line + from, row_scale, whole);
      }
    }
    if (whole == w.c) continue;
    int64_t column = 0;
    for (; column + kPixels <= w.out_w; column += kPixels)
      pixels<kPixels>(p, finish, x, zeros, row % w.out_h, column, line + column, row_scale, whole);
    for (; column < w.out_w; ++column)
      pixels<1>(p, finish, x, zeros, row % w.out_h, column, line + column, row_scale, whole);
  }
}

void round(const float* x, int64_t count, CodeScale scale, uint8_t* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_codes(to + i, codes_of_values(scale, load(x + i)), kLanes);
  if (i < count)
    store_codes(to + i, codes_of_values(scale, load_some(x + i, static_cast<int>(count - i))),
                static_cast<int>(count - i));
}

}  // namespace

extern const DepthwiseVariant depthwise_codes = {kRowsOfLane, block, rows, round};

}  // namespace lepton::VARIANT
