// The product of many rows of codes: see integer_product.h. For AVX-512 VNNI, AVX2 and ARM's dot products.
//
// A panel of 64 columns is packed: a few codes of each of several columns fill a register, so that no sum is spread over
// lanes. A weight that is kept is packed by the first call, any other by each, which costs a pass over it.
#include "integer_product.h"

#include "finish.h"
#include "transpose.h"

#if defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#if defined(__AVX512VNNI__) || defined(__AVX2__) || defined(__ARM_FEATURE_DOTPROD)
namespace lepton::VARIANT {
namespace {

// The packed panel that begins at a column: that which is kept, or a new one in `scratch`.
template <typename Pack>
int8_t* packed_panel(const IntegerProduct& p, int64_t column, int8_t* scratch, const Pack& pack) {
  const int64_t index = column / IntegerProduct::kPanelColumns;
  bool fill = false;
  int8_t* const kept = p.kept == nullptr ? nullptr : p.kept->panel(index, fill);
  int8_t* const panel = kept == nullptr ? scratch : kept;
  if (kept == nullptr || fill) pack(p, column, panel);
  if (fill) p.kept->filled(index);
  return panel;
}

}  // namespace
}  // namespace lepton::VARIANT
#endif

#if defined(__AVX512VNNI__)
namespace lepton::VARIANT {
namespace {

constexpr int kVectors = IntegerProduct::kPanelColumns / kLanes, kRows = 6, kStep = 4;

// Not `_mm512_dpbusd_epi32`, around which GCC 12 copies every sum in each step.
inline void add(__m512i& sum, const __m512i& x, const __m512i& w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));
}

// Packs columns as [K / 4, 64 columns, 4], zeros where there are none, and behind them what the 128 that is added to each
// code of x adds to their sums.
void pack(const IntegerProduct& p, int64_t column, int8_t* to) {
  const int64_t steps = (p.k + kStep - 1) / kStep;
  const __m512i ones = _mm512_set1_epi8(1);
  for (int v = 0; v < kVectors; ++v) {
    __m512i total = _mm512_setzero_si512();
    const int64_t first = column + v * kLanes;
    for (int64_t k = 0; k < p.k; k += 64) {
      const __mmask64 inside = p.k - k >= 64 ? ~0ull : (1ull << (p.k - k)) - 1;
      __m512i block[16];
#pragma GCC unroll 16
      for (int j = 0; j < 16; ++j)
        block[j] = first + j < p.n ? _mm512_maskz_loadu_epi8(inside, p.codes + (first + j) * p.k + k)
                                   : _mm512_setzero_si512();
      transpose(block);
      const int64_t count = steps - k / kStep < 16 ? steps - k / kStep : 16;
      int8_t* at = to + (k / kStep) * IntegerProduct::kPanelColumns * kStep + v * 64;
      for (int64_t j = 0; j < count; ++j) {
        add(total, ones, block[j]);
        _mm512_store_si512(at + j * IntegerProduct::kPanelColumns * kStep, block[j]);
      }
    }
    _mm512_store_si512(to + steps * IntegerProduct::kPanelColumns * kStep + v * 64, _mm512_slli_epi32(total, 7));
  }
}

struct Columns {
  __m512i offset[kVectors];
  __m512 scale[kVectors];
  __mmask16 inside[kVectors];
};

// Writes a tile from its sums, with what follows the product: read again from y it would wait until it is written.
template <int MR, bool plain, Activation kind>
inline void write_tile(const IntegerProduct& p, const Columns& columns, const __m512i (&sums)[MR][kVectors],
                       int64_t row, int64_t column) {
  const float* const bias = plain || p.epilogue.bias == nullptr ? nullptr : p.epilogue.bias + column;
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) {
    const __m512 scale = _mm512_set1_ps(p.row_scale[row + i]);
    const int64_t at = (row + i) * p.n + column;
    const float* const added = plain || p.epilogue.residual == nullptr ? nullptr : p.epilogue.residual + at;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const __mmask16 inside = columns.inside[v];
      const __m512 total = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums[i][v], columns.offset[v]));
      Floats value = (Floats)_mm512_mul_ps(total, _mm512_mul_ps(scale, columns.scale[v]));
      if constexpr (!plain) {
        value = rounded(value);
        if (bias != nullptr) value += (Floats)_mm512_maskz_loadu_ps(inside, bias + v * kLanes);
        value = rounded(activate<kind>(value));
        if (added != nullptr) value += (Floats)_mm512_maskz_loadu_ps(inside, added + v * kLanes);
      }
      // Where all lanes count without a mask, which takes longer.
      if (inside == 0xffff)
        _mm512_storeu_ps(p.y + at + v * kLanes, (__m512)value);
      else
        _mm512_mask_storeu_ps(p.y + at + v * kLanes, inside, (__m512)value);
    }
  }
}

// Meanwhile fetches a few lines of `next` in each step.
template <int MR, bool plain, Activation kind>
void tile(const IntegerProduct& p, const Columns& columns, const int8_t* w, int64_t row, int64_t column,
          const int8_t* next, int lines) {
  __m512i sums[MR][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[i][v] = _mm512_setzero_si512();
  const int64_t depth = p.padded_depth();
  const uint8_t* x = p.rounded + row * depth;
  for (int64_t k = 0; k < p.k; k += kStep, w += kVectors * 64) {
    for (int line = 0; line < lines; ++line, next += 64) __builtin_prefetch(next);
    __m512i codes[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) codes[v] = _mm512_load_si512(w + v * 64);
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      int32_t four;
      __builtin_memcpy(&four, x + i * depth + k, 4);
      const __m512i left = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) add(sums[i][v], left, codes[v]);
    }
  }
  write_tile<MR, plain, kind>(p, columns, sums, row, column);
}

// One panel. While its first tiles are computed, the next one is fetched: weights are seldom in a cache that is near, and
// the columns of one that is to be packed are too many streams for the processor to foresee. Panels that are kept lie
// behind each other, so where there are few tiles, which take no longer than reading does, it is left to the processor.
template <bool plain, Activation kind>
void panel(const IntegerProduct& p, int64_t row, int64_t row_end, int64_t column, bool last, int8_t* scratch) {
  const int64_t steps = (p.k + kStep - 1) / kStep;
  const int8_t* const packed = packed_panel(p, column, scratch, pack);
  Columns columns;
  for (int v = 0; v < kVectors; ++v) {
    columns.offset[v] = _mm512_load_si512(packed + (steps * kVectors + v) * 64);
    const int64_t left = p.n - column - v * kLanes;
    columns.inside[v] = left >= kLanes ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
    columns.scale[v] = p.one_scale ? _mm512_set1_ps(p.scale[0])
                                   : _mm512_maskz_loadu_ps(columns.inside[v], p.scale + column + v * kLanes);
  }
  constexpr int64_t kColumns = IntegerProduct::kPanelColumns;
  const int64_t column_end = column + kColumns < p.n ? column + kColumns : p.n;
  // A step of a tile reads kStep codes of each column, so all lines are fetched in as many tiles as this at one a step.
  const int64_t tiles = (row_end - row + kRows - 1) / kRows;
  const int share = static_cast<int>(tiles < kStep ? (kStep + tiles - 1) / tiles : 1);
  const int8_t* next = packed == scratch ? p.codes + column_end * p.k : packed + p.panel_bytes();
  const bool foreseen = packed != scratch && tiles < kStep;
  int64_t missing = last || foreseen ? 0 : (p.n - column_end < kColumns ? p.n - column_end : kColumns) * p.k / 64;
  for (; row < row_end; row += kRows) {
    const int64_t rows = row_end - row < kRows ? row_end - row : kRows;
    const int lines = missing > 0 ? share : 0;
    switch (rows) {
      case 1: tile<1, plain, kind>(p, columns, packed, row, column, next, lines); break;
      case 2: tile<2, plain, kind>(p, columns, packed, row, column, next, lines); break;
      case 3: tile<3, plain, kind>(p, columns, packed, row, column, next, lines); break;
      case 4: tile<4, plain, kind>(p, columns, packed, row, column, next, lines); break;
      case 5: tile<5, plain, kind>(p, columns, packed, row, column, next, lines); break;
      default: tile<kRows, plain, kind>(p, columns, packed, row, column, next, lines);
    }
    next += lines * steps * 64;
    missing -= lines * steps;
  }
}

using Panel = decltype(panel<true, Activation::kNone>);

Panel* panel_with(const Epilogue& e) {
  if (e.empty()) return panel<true, Activation::kNone>;
  switch (e.activation) {
    case Activation::kReLU: return panel<false, Activation::kReLU>;
    case Activation::kSiLU: return panel<false, Activation::kSiLU>;
    case Activation::kGELU: return panel<false, Activation::kGELU>;
    case Activation::kGELUTanh: return panel<false, Activation::kGELUTanh>;
    default: return panel<false, Activation::kNone>;
  }
}

}  // namespace

void integer_panel(const IntegerProduct& p, int64_t row, int64_t row_end, int64_t column, int64_t column_end,
                   int8_t* scratch) {
  Panel* const panel = panel_with(p.epilogue);
  for (; column < column_end; column += IntegerProduct::kPanelColumns)
    panel(p, row, row_end, column, column + IntegerProduct::kPanelColumns >= column_end, scratch);
}

}  // namespace lepton::VARIANT
#elif defined(__AVX2__)
namespace lepton::VARIANT {
namespace {

// Codes are widened to 16 bits, whose products of pairs fit into 32.
constexpr int kRows = 4, kStep = 2, kGroup = 2 * kLanes;

// Packs columns as [4 groups, K / 2, 16 columns, 2], zeros where there are none.
void pack(const IntegerProduct& p, int64_t column, int8_t* panel) {
  auto* const to = reinterpret_cast<int16_t*>(panel);
  const int64_t steps = (p.k + kStep - 1) / kStep;
  for (int64_t c = 0; c < IntegerProduct::kPanelColumns; c += kLanes) {
    for (int64_t k = 0; k < p.k; k += 16) {
      __m256i block[8];
      for (int j = 0; j < 8; ++j) {
        const int64_t at = column + c + j;
        int8_t rest[16] = {};
        const int8_t* from = p.codes + at * p.k + k;
        if (at >= p.n || p.k - k < 16) {
          for (int64_t i = 0; at < p.n && i < p.k - k; ++i) rest[i] = from[i];
          from = rest;
        }
        block[j] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      }
      transpose(block);
      int16_t* at = to + ((c / kGroup) * steps + k / kStep) * kGroup * kStep + c % kGroup * kStep;
      for (int64_t j = 0; j < 8 && k / kStep + j < steps; ++j)
        _mm256_store_si256(reinterpret_cast<__m256i*>(at + j * kGroup * kStep), block[j]);
    }
  }
}

template <int MR>
void tile(const IntegerProduct& p, const int16_t* x, const int16_t* w, int64_t row, int64_t column) {
  const int64_t depth = p.padded_depth();
  __m256i sums[MR][2];
#pragma GCC unroll 4
  for (int i = 0; i < MR; ++i) sums[i][0] = sums[i][1] = _mm256_setzero_si256();
  for (int64_t k = 0; k < p.k; k += kStep, w += kGroup * kStep) {
    const __m256i first = _mm256_load_si256(reinterpret_cast<const __m256i*>(w));
    const __m256i second = _mm256_load_si256(reinterpret_cast<const __m256i*>(w) + 1);
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
      int32_t pair;
      __builtin_memcpy(&pair, x + i * depth + k, 4);
      const __m256i left = _mm256_set1_epi32(pair);
      sums[i][0] = _mm256_add_epi32(sums[i][0], _mm256_madd_epi16(left, first));
      sums[i][1] = _mm256_add_epi32(sums[i][1], _mm256_madd_epi16(left, second));
    }
  }
  for (int half = 0; half < 2; ++half) {
    const int64_t at = column + half * kLanes;
    const int count = p.n - at < kLanes ? static_cast<int>(p.n - at) : kLanes;
    for (int i = 0; i < MR && count > 0; ++i) {
      float* y = p.y + (row + i) * p.n + at;
      const Floats total = as_floats((Ints)sums[i][half]);
      const float scale = p.row_scale[row + i];
      if (count == kLanes && !p.one_scale) {
        store(y, total * (scale * load(p.scale + at)));
      } else {
        for (int lane = 0; lane < count; ++lane) y[lane] = total[lane] * (scale * p.scale[p.one_scale ? 0 : at + lane]);
      }
    }
  }
}

void panel(const IntegerProduct& p, int64_t row, int64_t row_end, int64_t column, int8_t* scratch) {
  const auto* const w = reinterpret_cast<const int16_t*>(packed_panel(p, column, scratch, pack));
  const int64_t depth = p.padded_depth(), steps = (p.k + kStep - 1) / kStep;
  auto* const x = reinterpret_cast<int16_t*>(scratch + p.panel_bytes());
  const int64_t column_end = column + IntegerProduct::kPanelColumns < p.n ? column + IntegerProduct::kPanelColumns : p.n;
  for (; row < row_end; row += kRows) {
    const int64_t rows = row_end - row < kRows ? row_end - row : kRows;
    const auto* codes = reinterpret_cast<const __m128i*>(p.rounded + row * depth);
    for (int64_t i = 0; i < rows * depth / 16; ++i)
      _mm256_store_si256(reinterpret_cast<__m256i*>(x) + i, _mm256_cvtepi8_epi16(_mm_loadu_si128(codes + i)));
    for (int64_t at = column; at < column_end; at += kGroup) {
      const int16_t* group = w + (at - column) * steps * kStep;
      switch (rows) {
        case 1: tile<1>(p, x, group, row, at); break;
        case 2: tile<2>(p, x, group, row, at); break;
        case 3: tile<3>(p, x, group, row, at); break;
        default: tile<kRows>(p, x, group, row, at);
      }
    }
    finish(p.epilogue, p.y, p.n, row, row + rows, column, column_end);
  }
}

}  // namespace

void integer_panel(const IntegerProduct& p, int64_t row, int64_t row_end, int64_t column, int64_t column_end,
                   int8_t* scratch) {
  for (; column < column_end; column += IntegerProduct::kPanelColumns)
    panel(p, row, row_end, column, scratch);
}

}  // namespace lepton::VARIANT
#elif defined(__ARM_FEATURE_DOTPROD)
namespace lepton::VARIANT {
namespace {

constexpr int kRows = 6, kStep = 4, kVectors = 4, kGroup = 16;

// Packs columns as [4 groups, K / 4, 16 columns, 4], zeros where there are none.
void pack(const IntegerProduct& p, int64_t column, int8_t* to) {
  for (int64_t first = column; first < column + IntegerProduct::kPanelColumns; first += kGroup)
    for (int64_t k = 0; k < p.k; k += kStep)
      for (int64_t at = first; at < first + kGroup; ++at)
        for (int64_t i = k; i < k + kStep; ++i) *to++ = at < p.n && i < p.k ? p.codes[at * p.k + i] : 0;
}

template <int MR>
void tile(const IntegerProduct& p, const int8_t* w, int64_t row, int64_t column) {
  const int64_t depth = p.padded_depth();
  const uint8_t* x = p.rounded + row * depth;
  int32x4_t sums[MR][kVectors];
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[i][v] = vdupq_n_s32(0);
  for (int64_t k = 0; k < p.k; k += kStep, w += kGroup * kStep) {
    int8x16_t codes[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) codes[v] = vld1q_s8(w + v * 16);
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      int32_t four;
      __builtin_memcpy(&four, x + i * depth + k, 4);
      const int8x16_t left = vreinterpretq_s8_s32(vdupq_n_s32(four));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[i][v] = vdotq_s32(sums[i][v], codes[v], left);
    }
  }
  const int64_t count = p.n - column < kGroup ? p.n - column : kGroup;
  for (int i = 0; i < MR; ++i) {
    int32_t totals[kGroup];
    for (int v = 0; v < kVectors; ++v) vst1q_s32(totals + 4 * v, sums[i][v]);
    float* y = p.y + (row + i) * p.n + column;
    const float scale = p.row_scale[row + i];
    for (int64_t at = 0; at < count; ++at)
      y[at] = static_cast<float>(totals[at]) * (scale * p.scale[p.one_scale ? 0 : column + at]);
  }
}

void panel(const IntegerProduct& p, int64_t row, int64_t row_end, int64_t column, int8_t* scratch) {
  const int8_t* const w = packed_panel(p, column, scratch, pack);
  const int64_t steps = (p.k + kStep - 1) / kStep;
  const int64_t column_end = column + IntegerProduct::kPanelColumns < p.n ? column + IntegerProduct::kPanelColumns : p.n;
  for (; row < row_end; row += kRows) {
    const int64_t rows = row_end - row < kRows ? row_end - row : kRows;
    for (int64_t at = column; at < column_end; at += kGroup) {
      const int8_t* group = w + (at - column) * steps * kStep;
      switch (rows) {
        case 1: tile<1>(p, group, row, at); break;
        case 2: tile<2>(p, group, row, at); break;
        case 3: tile<3>(p, group, row, at); break;
        case 4: tile<4>(p, group, row, at); break;
        case 5: tile<5>(p, group, row, at); break;
        default: tile<kRows>(p, group, row, at);
      }
    }
    finish(p.epilogue, p.y, p.n, row, row + rows, column, column_end);
  }
}

}  // namespace

void integer_panel(const IntegerProduct& p, int64_t row, int64_t row_end, int64_t column, int64_t column_end,
                   int8_t* scratch) {
  for (; column < column_end; column += IntegerProduct::kPanelColumns)
    panel(p, row, row_end, column, scratch);
}

}  // namespace lepton::VARIANT
#endif
