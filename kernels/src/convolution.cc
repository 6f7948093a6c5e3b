// Dense and depthwise convolutions of images with their channels last: see convolution.h. Compiled once per instruction
// set.
//
// A dense convolution is a product of matrices whose left one is not written down: its rows are the windows of the
// image, which lie in memory as a few runs. A tile of kRows pixels and a few vectors of channels keeps its sums in
// registers; each step broadcasts 32 bits of each pixel, one float or as many codes as fit.
#include "convolution.h"

#include "convolution_finish.h"

namespace lepton::VARIANT {
namespace {

constexpr int kRows = kRegisters == 32 ? 8 : 4, kColumns = kRegisters == 32 ? 3 : 2;
// What one thread multiplies in some 40 microseconds.
#if defined(__AVX512VNNI__)
constexpr double kFloatProducts = 1 << 22, kCodeProducts = 1 << 23;
#elif defined(__AVX2__)
constexpr double kFloatProducts = 1 << 21, kCodeProducts = 1 << 21;
#else
constexpr double kFloatProducts = 1 << 19, kCodeProducts = 1 << 18;
#endif
// Weights that stay in the second-level cache while all pixels pass by.
constexpr int64_t kWeightsBytes = 192 << 10;

struct InFloat {
  static constexpr bool kOfCodes = false;
  static constexpr int kBytes = 4;  // of an element of x
  using Sum = Floats;
  using Weights = Floats;
  static Weights load_weights(const void* from) { return load(static_cast<const float*>(from)); }
  static void add(Sum& sum, const uint8_t* x, const Weights& w) {
    float factor;
    __builtin_memcpy(&factor, x, 4);
    sum += w * factor;
  }
  static Floats factor(const Convolution&, int64_t, int64_t) { return Floats{}; }
  static Sum first(const Convolution& p, int64_t column) { return bias_at(p.epilogue, column); }
  static Floats value(const Sum& sum, Floats, Floats) { return sum; }
};

#if defined(__AVX512VNNI__)
// The instruction takes unsigned by signed bytes: codes of x have 128 added, which `offset` takes away again.
constexpr CodesLayout kCodes = {kLanes, 4, 1, 128};
struct OfCodes {
  static constexpr bool kOfCodes = true;
  static constexpr int kBytes = kCodes.bytes;
  using Sum = Ints;  // a vector and no struct, of which GCC 12 keeps arrays in memory
  using Weights = __m512i;
  static Weights load_weights(const void* from) { return _mm512_loadu_si512(from); }
  static void add(Sum& sum, const uint8_t* x, const Weights& w) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    const __m512i factors = _mm512_set1_epi32(four);
    // Not `_mm512_dpbusd_epi32`, around which GCC 12 copies every sum in each step.
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(factors), "v"(w));
  }
#else
// Pairs of 16 bits, whose products fit into 32.
constexpr CodesLayout kCodes = {kLanes, 2, 2, 0};
struct OfCodes {
  static constexpr bool kOfCodes = true;
  static constexpr int kBytes = kCodes.bytes;
  using Sum = Ints;
  using Weights = Ints;
  static Weights load_weights(const void* from) { return *static_cast<const Ints*>(from); }
  static void add(Sum& sum, const uint8_t* x, const Weights& w) {
#if defined(__AVX2__)
    int32_t pair;
    __builtin_memcpy(&pair, x, 4);
    sum += (Ints)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(pair));
#else
    int16_t pair[2];
    __builtin_memcpy(pair, x, 4);
    const Ints low = (Ints)((Ints)w << 16) >> 16, high = w >> 16;
    sum += low * pair[0] + high * pair[1];
#endif
  }
#endif
  static Floats factor(const Convolution& p, int64_t example, int64_t column) {
    return p.row_scale[example] * load(p.scale + column);
  }
  // What a sum begins with; it may wrap on the way.
  static Sum first(const Convolution& p, int64_t column) {
    typedef uint32_t Unsigned32 __attribute__((vector_size(4 * kLanes)));
    return (Sum)(-(Unsigned32)*reinterpret_cast<const Ints*>(p.offset + column));
  }
  static Floats value(const Sum& sum, Floats factor, Floats bias) { return as_floats(sum) * factor + bias; }
};

// The windows of some pixels in x, which are `kRows` further each time.
template <class Op>
struct Rows {
  const uint8_t* x[kRows];
  int64_t example[kRows];
  int64_t column, row, image;

  Rows(const Convolution& p, int64_t pixel)
      : column(pixel % p.window.out_w),
        row(pixel / p.window.out_w % p.window.out_h),
        image(pixel / p.window.out_w / p.window.out_h) {}

  void next(const Convolution& p, int count) {
    const Window& w = p.window;
    for (int i = 0; i < count; ++i) {
      const int64_t at = (image * w.padded_h() + row * w.stride_h) * w.padded_w() + column * w.stride_w;
      example[i] = image;
      x[i] = static_cast<const uint8_t*>(p.x) + at * w.c * Op::kBytes;
      if (++column < w.out_w) continue;
      column = 0;
      if (++row == w.out_h) row = 0, ++image;
    }
  }
};

// Finishes the sums from the AT-th on. Not a loop, since GCC keeps all sums in memory if it does not unroll one.
template <class Op, int MR, int NR, int AT>
__attribute__((always_inline)) inline void write(const Convolution& p, const Finish& finish, const Rows<Op>& rows,
                                                 const typename Op::Sum (&sums)[MR][NR], int64_t pixel,
                                                 int64_t column) {
  constexpr int i = AT % MR, j = AT / MR;
  const int64_t at = column + j * kLanes, left = p.window.o - at;
  const Floats bias = bias_at(finish.e, at);
  const Floats value = Op::value(sums[i][j], Op::factor(p, rows.example[i], at), bias);
  finish(value, (pixel + i) * p.window.o + at, static_cast<int>(left < kLanes ? left : kLanes));
  if constexpr (AT + 1 < MR * NR) write<Op, MR, NR, AT + 1>(p, finish, rows, sums, pixel, column);
}

// The same, briefly, of any examples, which have one scale; the last vector has `left` channels. `factor` and `bias` are
// those of the AT-th sum's column: read again for each, since what is written might be there for all that a compiler knows,
// they would take as long. `pitch` is from one pixel to the next.
template <class Op, int MR, int NR, int AT>
__attribute__((always_inline)) inline void write_brief(const Convolution& p, Brief brief,
                                                       const typename Op::Sum (&sums)[MR][NR], int64_t to, int64_t pitch,
                                                       int64_t column, int left, Floats factor, Floats bias) {
  constexpr int i = AT % MR, j = AT / MR;
  if constexpr (i == 0) {
    factor = load(p.code_factor + column + j * kLanes);
    bias = load(p.code_bias + column + j * kLanes);
  }
  brief(Op::value(sums[i][j], factor, bias), to + i * pitch + j * kLanes, j + 1 < NR ? kLanes : left);
  if constexpr (AT + 1 < MR * NR)
    write_brief<Op, MR, NR, AT + 1>(p, brief, sums, to, pitch, column, left, factor, bias);
}

// Writes the sums from the AT-th on to memory, from where a loop reads them: a SiLU is too long to be there for each.
// Their type is Op's, not one that is deduced: that would have lost its alignment, and memory on the stack has no more.
template <class Op, int MR, int NR, int AT>
__attribute__((always_inline)) inline void hold(const typename Op::Sum (&sums)[MR][NR],
                                                typename Op::Sum (&held)[MR * NR]) {
  held[AT] = sums[AT % MR][AT / MR];
  if constexpr (AT + 1 < MR * NR) hold<Op, MR, NR, AT + 1>(sums, held);
}

// Codes of SiLUs, with one scale for all examples.
template <class Op, int MR, int NR>
void write_silu(const Convolution& p, const SiluCodes silu_codes, const typename Op::Sum (&held)[MR * NR], int64_t pixel,
                int64_t column) {
  for (int j = 0; j < NR; ++j) {
    const int64_t at = column + j * kLanes, left = p.window.o - at;
    const int count = static_cast<int>(left < kLanes ? left : kLanes);
    const Floats factor = Op::factor(p, 0, at);
    const Floats bias = bias_at(p.epilogue, at);
    for (int i = 0; i < MR; ++i)
      silu_codes(Op::value(held[j * MR + i], factor, bias), (pixel + i) * p.window.o + at, count);
  }
}

// SiLUs in float, of one example and whole vectors.
template <class Op, int MR, int NR>
void write_silu_floats(const Convolution& p, int64_t example, const typename Op::Sum (&held)[MR * NR], int64_t pixel,
                       int64_t column) {
  for (int j = 0; j < NR; ++j) {
    const int64_t at = column + j * kLanes;
    const Floats factor = Op::factor(p, example, at);
    const Floats bias = bias_at(p.epilogue, at);
    for (int i = 0; i < MR; ++i) store(p.y + (pixel + i) * p.window.o + at, silu(Op::value(held[j * MR + i], factor, bias)));
  }
}

// Results in float, where only bounds are left to be applied.
template <class Op, int MR, int NR, int AT>
__attribute__((always_inline)) inline void write_bounded(const Convolution& p, const Bounds& bounds,
                                                         const Rows<Op>& rows, const typename Op::Sum (&sums)[MR][NR],
                                                         int64_t pixel, int64_t column) {
  constexpr int i = AT % MR, j = AT / MR;
  const int64_t at = column + j * kLanes, left = p.window.o - at;
  const Floats bias = bias_at(p.epilogue, at);
  const Floats value = bounds(Op::value(sums[i][j], Op::factor(p, rows.example[i], at), bias));
  float* const to = p.y + (pixel + i) * p.window.o + at;
  if (left >= kLanes)
    store(to, value);
  else
    store_some(to, value, static_cast<int>(left));
  if constexpr (AT + 1 < MR * NR) write_bounded<Op, MR, NR, AT + 1>(p, bounds, rows, sums, pixel, column);
}

template <class Op, int MR, int NR>
void tile(const Convolution& p, const Rows<Op>& rows, int64_t pixel, int64_t column) {
  typename Op::Sum sums[MR][NR];
#pragma GCC unroll 4
  for (int j = 0; j < NR; ++j) {
    const typename Op::Sum first = Op::first(p, column + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) sums[i][j] = first;
  }
  const Window& window = p.window;
  const uint8_t* weights = static_cast<const uint8_t*>(p.weights) + 4 * column;
  const int64_t row_bytes = window.dilation_h * window.padded_w() * window.c * Op::kBytes;
  const int64_t column_bytes = window.dilation_w * window.c * Op::kBytes, runs_of_row = window.joins() ? 1 : window.k_w;
  for (int64_t kh = 0; kh < window.k_h; ++kh) {
    for (int64_t kw = 0; kw < runs_of_row; ++kw) {
      const uint8_t* x[MR];
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) x[i] = rows.x[i] + kh * row_bytes + kw * column_bytes;
      for (int64_t step = 0; step < p.steps; ++step) {
        typename Op::Weights w[NR];
#pragma GCC unroll 4
        for (int j = 0; j < NR; ++j) w[j] = Op::load_weights(weights + 4 * j * kLanes);
#pragma GCC unroll 8
        for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
          for (int j = 0; j < NR; ++j) Op::add(sums[i][j], x[i] + 4 * step, w[j]);
        }
        weights += 4 * p.stride;
      }
    }
  }
  if (Bounds::suffice(p)) return write_bounded<Op, MR, NR, 0>(p, Bounds(p.epilogue), rows, sums, pixel, column);
  if constexpr (Op::kOfCodes) {
    if (p.code_factor != nullptr) {
      const int64_t last = window.o - column - (NR - 1) * kLanes;
      return write_brief<Op, MR, NR, 0>(p, Brief(p), sums, pixel * window.o + column, window.o, column,
                                        static_cast<int>(last < kLanes ? last : kLanes), Floats{}, Floats{});
    }
  }
  const Finish finish(p);
  const bool whole = column + NR * kLanes <= window.o, together = rows.example[0] == rows.example[MR - 1];
  const bool of_codes = finish.is_silu();
  if (!of_codes && !(finish.gives_silus() && whole && together))
    return write<Op, MR, NR, 0>(p, finish, rows, sums, pixel, column);
  typename Op::Sum held[MR * NR];
  hold<Op, MR, NR, 0>(sums, held);
  if (of_codes) return write_silu<Op, MR, NR>(p, finish.silu_codes(), held, pixel, column);
  write_silu_floats<Op, MR, NR>(p, rows.example[0], held, pixel, column);
}

template <class Op, int NR>
void rows_of(const Convolution& p, const Rows<Op>& rows, int count, int64_t pixel, int64_t column) {
  switch (count) {
    case 1: tile<Op, 1, NR>(p, rows, pixel, column); break;
    case 2: tile<Op, 2, NR>(p, rows, pixel, column); break;
    case 3: tile<Op, 3, NR>(p, rows, pixel, column); break;
#if defined(__AVX512F__)
    case 4: tile<Op, 4, NR>(p, rows, pixel, column); break;
    case 5: tile<Op, 5, NR>(p, rows, pixel, column); break;
    case 6: tile<Op, 6, NR>(p, rows, pixel, column); break;
    case 7: tile<Op, 7, NR>(p, rows, pixel, column); break;
#endif
    default: tile<Op, kRows, NR>(p, rows, pixel, column);
  }
}

template <class Op>
void convolve(const Convolution& p, int64_t pixel, int64_t pixel_end, int64_t column, int64_t column_end) {
  if (pixel >= pixel_end) return;  // an image without pixels has no width to divide by
  const int64_t depth = p.window.runs() * p.steps * 4;
  int64_t vectors = (column_end - column + kLanes - 1) / kLanes;
  while (vectors > 0) {
    // No more columns than the cache holds the weights of, in blocks of about one width, and they in tiles of about one.
    const int64_t fit = kWeightsBytes / (depth * kLanes), most = fit < kColumns ? kColumns : fit;
    const int64_t blocks = (vectors + most - 1) / most, some = (vectors + blocks - 1) / blocks;
    const int64_t tiles = (some + kColumns - 1) / kColumns;
    Rows<Op> rows(p, pixel);
    int count;
    for (int64_t row = pixel; row < pixel_end; row += count) {
      const int64_t left = pixel_end - row, turns = (left + kRows - 1) / kRows;
      count = static_cast<int>((left + turns - 1) / turns);
      rows.next(p, count);
      int64_t at = column;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t width = (some - (at - column) / kLanes + tiles - tile - 1) / (tiles - tile);
        switch (width) {
          case 1: rows_of<Op, 1>(p, rows, count, row, at); break;
#if defined(__AVX512F__)
          case 2: rows_of<Op, 2>(p, rows, count, row, at); break;
#endif
          default: rows_of<Op, kColumns>(p, rows, count, row, at);
        }
        at += width * kLanes;
      }
    }
    column += some * kLanes;
    vectors -= some;
  }
}

void in_float(const Convolution& p, int64_t pixel, int64_t pixel_end, int64_t column, int64_t column_end) {
  convolve<InFloat>(p, pixel, pixel_end, column, column_end);
}

void of_codes(const Convolution& p, int64_t pixel, int64_t pixel_end, int64_t column, int64_t column_end) {
  convolve<OfCodes>(p, pixel, pixel_end, column, column_end);
}

#if defined(__AVX512VNNI__)
using Code = uint8_t;
#else
using Code = int16_t;
#endif

template <bool kFactors>
void round_some(const float* x, int64_t count, float scale, const float* factors, Code* codes) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + kLanes <= count; i += kLanes) {
    const auto found = codes_of(kFactors ? load(x + i) * load(factors + i) : load(x + i), scale);
#if defined(__AVX512F__)
    const __m128i shifted = _mm_xor_si128(found, _mm_set1_epi8(static_cast<char>(kCodes.zero)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), shifted);
#else
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), found);
#endif
  }
#endif
  for (; i < count; ++i)
    codes[i] = static_cast<Code>(code(kFactors ? x[i] * factors[i] : x[i], scale) + kCodes.zero);
}

void round(const float* x, int64_t count, float scale, const float* factors, int64_t channels, void* to) {
  Code* const codes = static_cast<Code*>(to);
  if (factors == nullptr) return round_some<false>(x, count, scale, nullptr, codes);
  for (int64_t i = 0; i < count; i += channels)
    round_some<true>(x + i, count - i < channels ? count - i : channels, scale, factors, codes + i);
}

void gate(const float* x, int64_t count, const float* factors, int64_t channels, float* to) {
  for (int64_t first = 0; first < count; first += channels) {
    int64_t i = 0;
    for (; i + kLanes <= channels; i += kLanes) store(to + first + i, load(x + first + i) * load(factors + i));
    for (; i < channels; ++i) to[first + i] = x[first + i] * factors[i];
  }
}

void widen(const uint8_t* x, int64_t count, void* to) {
  Code* codes = static_cast<Code*>(to);
  int64_t i = 0;
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
  for (; i + 16 <= count; i += 16) {
    const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x + i)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + i), _mm256_sub_epi16(words, _mm256_set1_epi16(128)));
  }
#endif
  for (; i < count; ++i) codes[i] = static_cast<Code>(x[i] - 128 + kCodes.zero);
}

#if defined(__AVX512VNNI__)
using WeightCode = int8_t;
#else
using WeightCode = int16_t;
#endif

void pack(const Window& w, const int8_t* codes, void* weights, int64_t stride, int32_t* offset, int64_t column,
          int64_t column_end) {
  constexpr int kTerms = kCodes.terms;
  const int64_t length = w.run_length(), steps = (length + kTerms - 1) / kTerms;
  for (int64_t at = column; at < column_end; ++at) offset[at] = 0;
  for (int64_t row = 0; row < w.runs() * steps; ++row) {
    const int64_t run = row / steps, first = row % steps * kTerms;
    WeightCode* to = static_cast<WeightCode*>(weights) + row * stride * kTerms;
    const int8_t* from = codes + (run * length + first) * w.o;
    int64_t at = column;
#if defined(__AVX512VNNI__)
    const __m512i zeros = _mm512_set1_epi8(static_cast<char>(kCodes.zero));
    if (first + kTerms <= length) {
      for (; at + 16 <= column_end && at + 16 <= w.o; at += 16) {
        const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + at));
        const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + w.o + at));
        const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * w.o + at));
        const __m128i d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 3 * w.o + at));
        const __m128i ab = _mm_unpacklo_epi8(a, b), cd = _mm_unpacklo_epi8(c, d);
        const __m128i ef = _mm_unpackhi_epi8(a, b), gh = _mm_unpackhi_epi8(c, d);
        const __m256i low = _mm256_set_m128i(_mm_unpackhi_epi16(ab, cd), _mm_unpacklo_epi16(ab, cd));
        const __m256i high = _mm256_set_m128i(_mm_unpackhi_epi16(ef, gh), _mm_unpacklo_epi16(ef, gh));
        const __m512i all = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
        _mm512_storeu_si512(to + 4 * at, all);
        __m512i sum = _mm512_loadu_si512(offset + at);
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(zeros), "v"(all));
        _mm512_storeu_si512(offset + at, sum);
      }
    }
#endif
    for (; at < column_end; ++at) {
      for (int term = 0; term < kTerms; ++term) {
        const int code = at < w.o && first + term < length ? from[term * w.o + at] : 0;
        to[at * kTerms + term] = static_cast<WeightCode>(code);
        offset[at] = static_cast<int32_t>(static_cast<uint32_t>(offset[at]) + static_cast<uint32_t>(kCodes.zero * code));
      }
    }
  }
}

#define LEPTON_TEXT_OF(name) #name
#define LEPTON_TEXT(name) LEPTON_TEXT_OF(name)

}  // namespace

extern const ConvolutionVariant convolution = {
    LEPTON_TEXT(VARIANT), kCodes, kColumns, kFloatProducts, kCodeProducts, in_float, of_codes, depthwise_floats,
    largest_bits, round, gate, widen, pack, &depthwise_codes};

}  // namespace lepton::VARIANT
