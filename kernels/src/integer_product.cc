// Rounds rows to eight bits, multiplies them by int8 codes, and scales the sums: see integer_product.h. Compiled once per
// instruction set.
//
// Both operands are contracted over their last axes, so a tile of rows and columns reads both in order and adds up
// vectors of partial sums, which are reduced at its end. AVX-512's instruction takes unsigned by signed bytes: 128 is
// added to the codes of x, and 128 times the sum of a column of codes is subtracted from its results.
#include "integer_product.h"

#include "finish.h"
#include "rounding.h"
#include "scale.h"

namespace lepton::VARIANT {
namespace {

constexpr int kRows = kRegisters == 32 ? 4 : 2, kColumns = 4;
// Codes are added up in steps of this many.
constexpr int kStep = 64;

#if defined(__AVX512VNNI__)
constexpr int kOffset = 128;
struct Sum {
  __m512i total = _mm512_setzero_si512();
};
using Codes = __m512i;
inline Codes load_codes(const void* from) { return _mm512_loadu_si512(from); }
// Not `_mm512_dpbusd_epi32`, around which GCC 12 copies every sum in each step.
inline void add(Sum& sum, const Codes& x, const Codes& w) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum.total) : "v"(x), "v"(w));
}
inline Codes ones() { return _mm512_set1_epi8(1); }
inline void reduce(const Sum* sums, int32_t* to) {  // four at a time
  const __m512i a = sums[0].total, b = sums[1].total, c = sums[2].total, d = sums[3].total;
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1)));
}
#elif defined(__AVX2__)
constexpr int kOffset = 0;
struct Sum {
  __m256i total = _mm256_setzero_si256();
};
struct Codes {
  __m256i parts[4];  // as 16 bits, whose products of pairs fit into 32
};
inline Codes load_codes(const void* from) {
  Codes codes;
  for (int part = 0; part < 4; ++part)
    codes.parts[part] = _mm256_cvtepi8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(from) + part));
  return codes;
}
inline void add(Sum& sum, const Codes& x, const Codes& w) {
  for (int part = 0; part < 4; ++part)
    sum.total = _mm256_add_epi32(sum.total, _mm256_madd_epi16(x.parts[part], w.parts[part]));
}
inline Codes ones() { return {}; }
inline void reduce(const Sum* sums, int32_t* to) {
  const __m256i ab = _mm256_hadd_epi32(sums[0].total, sums[1].total);
  const __m256i cd = _mm256_hadd_epi32(sums[2].total, sums[3].total);
  const __m256i all = _mm256_hadd_epi32(ab, cd);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
}
#else
constexpr int kOffset = 0;
struct Sum {
  int32_t total = 0;
};
using Codes = const int8_t*;
inline Codes load_codes(const void* from) { return static_cast<const int8_t*>(from); }
inline void add(Sum& sum, const Codes& x, const Codes& w) {
  int32_t total = 0;
  for (int k = 0; k < kStep; ++k) total += static_cast<int32_t>(x[k]) * w[k];
  sum.total += total;
}
inline Codes ones() { return nullptr; }
inline void reduce(const Sum* sums, int32_t* to) {
  for (int i = 0; i < 4; ++i) to[i] = sums[i].total;
}
#endif

template <bool factors>
void round_values(const float* x, const float* factor, int64_t k, float scale, uint8_t* to) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + kLanes <= k; i += kLanes) {
    const __m128i codes = codes_of(factors ? load(x + i) * load(factor + i) : load(x + i), scale);
#if defined(__AVX512F__)
    const __m128i shifted = _mm_xor_si128(codes, _mm_set1_epi8(static_cast<char>(kOffset)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), shifted);
#else
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + i), _mm_packs_epi16(codes, codes));
#endif
  }
#endif
  for (; i < k; ++i) to[i] = static_cast<uint8_t>(code(factors ? x[i] * factor[i] : x[i], scale) + kOffset);
}

#if defined(__AVX512VNNI__)
// The codes of a row whose largest magnitude is 127 scales, by products with the inverse of its scale, in a third of a
// quotient's time: 256 + 128.5 are added, so the code with its offset is in the eight bits above the last 15. All that is
// rounded on the way is less than one unit of those. So one more is added, and the code is right unless less than two are
// left over somewhere; then the result is false.
template <bool factors>
bool round_briefly(const float* x, const float* factor, int64_t k, float inverse, uint8_t* to) {
  const __m512 by = _mm512_set1_ps(inverse), added = _mm512_set1_ps(256.0f + 128.5f + 0x1p-15f);
  __m512i least = _mm512_set1_epi32(2);
  const auto codes = [&](__m512 values) {
    const __m512i bits = _mm512_castps_si512(_mm512_fmadd_ps(values, by, added));
    least = _mm512_min_epu32(least, _mm512_and_si512(bits, _mm512_set1_epi32(0x7ffe)));
    return _mm512_srli_epi32(bits, 15);
  };
  const auto read = [&](int64_t at) {
    return codes((__m512)(factors ? load(x + at) * load(factor + at) : load(x + at)));
  };
  // Four vectors become one of bytes, whose order the last step restores: others go by lanes of 128 bits.
  const __m512i byte = _mm512_set1_epi16(255);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  int64_t i = 0;
  for (; i + 4 * kLanes <= k; i += 4 * kLanes) {
    const __m512i low = _mm512_packus_epi32(read(i), read(i + kLanes));
    const __m512i high = _mm512_packus_epi32(read(i + 2 * kLanes), read(i + 3 * kLanes));
    const __m512i bytes = _mm512_packus_epi16(_mm512_and_si512(low, byte), _mm512_and_si512(high, byte));
    _mm512_storeu_si512(to + i, _mm512_permutexvar_epi32(order, bytes));
  }
  for (; i + kLanes <= k; i += kLanes)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(read(i)));
  if (i < k) {
    const __mmask16 inside = (1 << (k - i)) - 1;
    __m512 values = _mm512_maskz_loadu_ps(inside, x + i);
    if (factors) values = _mm512_mul_ps(values, _mm512_maskz_loadu_ps(inside, factor + i));
    _mm512_mask_cvtepi32_storeu_epi8(to + i, inside, codes(values));
  }
  return _mm512_testn_epi32_mask(least, least) == 0;
}
#endif

// Rounds a row; its largest magnitude is 127 scales if the scale is not `fixed`.
template <bool factors>
void round_row(const float* x, const float* factor, int64_t k, float scale, bool fixed, uint8_t* to) {
#if defined(__AVX512VNNI__)
  const float inverse = fixed ? 0.0f : code_scale(scale).inverse;
  if (inverse != 0.0f && round_briefly<factors>(x, factor, k, inverse, to)) return;
#endif
  round_values<factors>(x, factor, k, scale, to);
}

// A few columns of codes: their full steps, and a copy of what is left, filled up with zeros.
template <int NR>
struct Columns {
  const int8_t* codes[NR];
  int8_t rest[NR][kStep];
  int32_t offset[4] = {};  // what kOffset adds to each result
  int64_t full;

  void set(const IntegerProduct& p, int64_t column) {
    full = p.k / kStep * kStep;
    for (int j = 0; j < NR; ++j) {
      codes[j] = p.codes + (column + j) * p.k;
      for (int64_t k = 0; k < kStep; ++k) rest[j][k] = full + k < p.k ? codes[j][full + k] : 0;
    }
    if (kOffset == 0) return;
    Sum sums[4];
    for (int64_t k = 0; k < full; k += kStep)
      for (int j = 0; j < NR; ++j) add(sums[j], ones(), load_codes(codes[j] + k));
    for (int j = 0; j < NR; ++j) add(sums[j], ones(), load_codes(rest[j]));
    reduce(sums, offset);
    for (int j = 0; j < NR; ++j) offset[j] = static_cast<int32_t>(kOffset * static_cast<uint32_t>(offset[j]));
  }
};

template <int MR, int NR>
void tile(const IntegerProduct& p, const Columns<NR>& columns, int64_t row, int64_t column) {
  Sum sums[MR][4];
  const int64_t depth = p.padded_depth();
  const uint8_t* x = p.rounded + row * depth;
  for (int64_t k = 0; k < columns.full; k += kStep) {
    Codes w[NR];
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) w[j] = load_codes(columns.codes[j] + k);
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const Codes left = load_codes(x + i * depth + k);
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) add(sums[i][j], left, w[j]);
    }
  }
  if (columns.full < p.k) {
#pragma GCC unroll 6
    for (int i = 0; i < MR; ++i) {
      const Codes left = load_codes(x + i * depth + columns.full);
#pragma GCC unroll 4
      for (int j = 0; j < NR; ++j) add(sums[i][j], left, load_codes(columns.rest[j]));
    }
  }
#pragma GCC unroll 6
  for (int i = 0; i < MR; ++i) {
    int32_t totals[4];
    reduce(sums[i], totals);
    const float scale = p.row_scale[row + i];
    float* y = p.y + (row + i) * p.n + column;
#pragma GCC unroll 4
    for (int j = 0; j < NR; ++j) {
      const int32_t total = static_cast<int32_t>(static_cast<uint32_t>(totals[j]) - static_cast<uint32_t>(columns.offset[j]));
      y[j] = static_cast<float>(total) * (scale * p.scale[p.one_scale ? 0 : column + j]);
    }
  }
}

template <int NR>
void rows_of(const IntegerProduct& p, const Columns<NR>& columns, int64_t row, int64_t row_end, int64_t column) {
  switch (row_end - row) {
    case 1: tile<1, NR>(p, columns, row, column); break;
#if defined(__AVX512F__)
    case 2: tile<2, NR>(p, columns, row, column); break;
    case 3: tile<3, NR>(p, columns, row, column); break;
#endif
    default: tile<kRows, NR>(p, columns, row, column);
  }
}

// Columns beside each other are done for some rows before other rows, so that whole cache lines of y are written.
template <int NR, int kTiles>
void block(const IntegerProduct& p, int64_t row, int64_t row_end, int64_t column, int tiles) {
  Columns<NR> columns[kTiles];
  for (int at = 0; at < tiles; ++at) columns[at].set(p, column + at * NR);
  for (; row < row_end; row += kRows)
    for (int at = 0; at < tiles; ++at)
      rows_of<NR>(p, columns[at], row, row + kRows < row_end ? row + kRows : row_end, column + at * NR);
}

}  // namespace

void round_rows(const IntegerProduct& p, int64_t row, int64_t row_end) {
  const int64_t depth = p.padded_depth();
  for (; row < row_end; ++row) {
    const float* from = p.x + row * p.k;
    const bool factors = p.factor != nullptr;
    const auto largest = [&] {
      return factors ? largest_bits<true>(from, p.factor, p.k) : largest_bits<false>(from, nullptr, p.k);
    };
    const float scale = p.static_scale != nullptr ? *p.static_scale : int8_scale(largest());
    p.row_scale[row] = scale;
    uint8_t* to = p.rounded + row * depth;
    const bool fixed = p.static_scale != nullptr;
    if (factors)
      round_row<true>(from, p.factor, p.k, scale, fixed, to);
    else
      round_row<false>(from, nullptr, p.k, scale, fixed, to);
    for (int64_t k = p.k; k < depth; ++k) to[k] = kOffset;
  }
}

void integer_product(const IntegerProduct& p, int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
  const int64_t first = column;
  while (column + kColumns <= column_end) {
    const int64_t left = (column_end - column) / kColumns;
    const int tiles = left < 4 ? static_cast<int>(left) : 4;
    block<kColumns, 4>(p, row, row_end, column, tiles);
    column += tiles * kColumns;
  }
  for (; column < column_end; ++column) block<1, 1>(p, row, row_end, column, 1);
  finish(p.epilogue, p.y, p.n, row, row_end, first, column_end);
}

}  // namespace lepton::VARIANT
