// Products of several rows with linear codes, in integers: included by weight_only.cc.
//
// A processor with VNNI adds 32 products of 16-bit integers in the time of 16 products of floats. So the activations of a
// block are rounded to 16 bits, each row by its own largest magnitude there, which is some hundred times finer than the
// weight's rounding; codes are unpacked once for all rows, to pairs as the instruction takes them; sums are exact.
#pragma once

#include <cstdint>

#include "vectors.h"
#include "weight_only.h"

namespace lepton::VARIANT {
namespace {

float widened(uint16_t bfloat16) {
  const uint32_t bits = static_cast<uint32_t>(bfloat16) << 16;
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}

float scale_at(const WeightOnly& p, int64_t index) {
  if (p.narrow_scale) return widened(static_cast<const uint16_t*>(p.scale)[index]);
  return static_cast<const float*>(p.scale)[index];
}

#if defined(__AVX512VNNI__)

constexpr int kPairs = 64;         // pairs of rows of codes that a panel holds
constexpr int kPanel = 4;          // vectors of columns of a panel
constexpr int kRoundedRows = 64;   // rows of activations at most
constexpr int kRoundedTile = 4;    // of them in a tile
constexpr int kFewestRounded = 4;  // with fewer rows, unpacking takes longer than products of floats

// Activations of a block, rounded. Those that belong to the high halves of bytes begin at half of a row.
struct Rounded {
  alignas(64) int16_t codes[kRoundedRows][2 * kPairs];
  float scale[2][kRoundedRows];
  int32_t start[2][kRoundedRows];  // of sums: takes back what makes codes of weights positive
  bool fits[kRoundedRows];         // whether the row's numbers can be rounded
};

// Rounds `count` numbers of row `row`; false if one is no number, too large or too small.
inline bool round_row(const float* x, int count, int part, int parts, int offset, int row, Rounded& to) {
  const __m512i clear = _mm512_set1_epi32(0x7fffffff);
  __m512 most = _mm512_setzero_ps();
  __mmask16 strange = 0;
  for (int at = 0; at < count; at += 16) {
    const __mmask16 there = count - at >= 16 ? 0xffff : (1 << (count - at)) - 1;
    const __m512 size = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(_mm512_maskz_loadu_ps(there, x + at)), clear));
    strange |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(1e30f), _CMP_NLT_UQ);
    most = _mm512_max_ps(most, size);
  }
  const float largest = _mm512_reduce_max_ps(most);
  if (strange != 0 || (largest < 1e-30f && largest != 0.0f)) return false;
  to.scale[part][row] = largest * (1.0f / 32767);
  const __m512 inverse = _mm512_set1_ps(largest == 0.0f ? 0.0f : 32767 / largest);
  int16_t* codes = to.codes[row] + part * (2 * kPairs / parts);
  __m512i sum = _mm512_setzero_si512();
  for (int at = 0; at < 2 * kPairs / parts; at += 16) {
    const int left = count - at;
    const __mmask16 there = left >= 16 ? 0xffff : left > 0 ? (1 << left) - 1 : 0;
    const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_maskz_loadu_ps(there, x + at), inverse));
    sum = _mm512_add_epi32(sum, code);
    _mm256_store_si256(reinterpret_cast<__m256i*>(codes + at), _mm512_cvtepi32_epi16(code));
  }
  to.start[part][row] = -offset * _mm512_reduce_add_epi32(sum);
  return true;
}

// Codes of a block in pairs of 16 bits: of rows 2i and 2i + 1, [parts][pairs][64 columns][2].
template <int kParts>
using Panel = __m512i[kParts][kPairs / kParts][kPanel];

// Unpacks `count` rows of up to 64 columns; adds what makes them positive.
template <int kParts>
inline void unpack(const uint8_t* codes, int64_t stride, int count, __mmask64 columns, Panel<kParts>& to) {
  // So that unpacking, which goes by lanes of 128 bits, leaves columns in their order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i flip = _mm512_set1_epi8(kParts == 1 ? -128 : -120), low = _mm512_set1_epi8(15), zero = _mm512_setzero_si512();
  for (int row = 0; row < count; row += 2) {
    __m512i two[2];
    for (int i = 0; i < 2; ++i) {
      const uint8_t* from = codes + (row + i < count ? row + i : row) * stride;  // the factor of what is not there is zero
      two[i] = _mm512_xor_si512(_mm512_permutexvar_epi32(order, _mm512_maskz_loadu_epi8(columns, from)), flip);
    }
    const __m512i bytes[2] = {_mm512_unpacklo_epi8(two[0], two[1]), _mm512_unpackhi_epi8(two[0], two[1])};
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        __m512i each = part == 0 ? bytes[half] : _mm512_srli_epi16(bytes[half], 4);
        if (kParts == 2) each = _mm512_and_si512(each, low);
        to[part][row / 2][2 * half] = _mm512_unpacklo_epi8(each, zero);
        to[part][row / 2][2 * half + 1] = _mm512_unpackhi_epi8(each, zero);
      }
    }
  }
}

inline __m512 panel_scales(const WeightOnly& p, int64_t group, int64_t column, __mmask16 there) {
  if (p.one_scale) return _mm512_set1_ps(scale_at(p, group));
  const int64_t at = group * p.n + column;
  if (!p.narrow_scale) return _mm512_maskz_loadu_ps(there, static_cast<const float*>(p.scale) + at);
  const __m256i narrow = _mm256_maskz_loadu_epi16(there, static_cast<const uint16_t*>(p.scale) + at);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

// Adds the products of `MR` rows with a panel to y, or stores them; fetches a row of `next` with each pair, if any.
template <int kParts, int MR>
inline void rounded_tile(const Rounded& x, int row, const Panel<kParts>& panel, int pairs, int parts,
                         const __m512 (&scales)[kParts][kPanel], __mmask64 columns, bool first, float* y, int64_t stride,
                         const uint8_t* next, int64_t next_stride) {
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    if (part >= parts) break;
    const int16_t* codes = x.codes[row] + part * (2 * kPairs / kParts);
    __m512i sums[MR][kPanel];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < kPanel; ++j) sums[i][j] = _mm512_set1_epi32(x.start[part][row + i]);
    for (int pair = 0; pair < pairs; ++pair) {
      if (next != nullptr && part == 0) {
        __builtin_prefetch(next + 2 * pair * next_stride, 0, 2);
        __builtin_prefetch(next + (2 * pair + 1) * next_stride, 0, 2);
      }
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        int32_t two;
        __builtin_memcpy(&two, codes + i * 2 * kPairs + 2 * pair, 4);
        const __m512i factor = _mm512_set1_epi32(two);
#pragma GCC unroll 4
        for (int j = 0; j < kPanel; ++j) sums[i][j] = _mm512_dpwssd_epi32(sums[i][j], panel[part][pair][j], factor);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) {
      const __m512 scale = _mm512_set1_ps(x.scale[part][row + i]);
#pragma GCC unroll 4
      for (int j = 0; j < kPanel; ++j) {
        const __mmask16 there = static_cast<__mmask16>(columns >> (16 * j));
        float* to = y + i * stride + j * kLanes;
        const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[i][j]), scale);
        const __m512 before = first && part == 0 ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(there, to);
        _mm512_mask_storeu_ps(to, there, _mm512_fmadd_ps(value, scales[part][j], before));
      }
    }
  }
}

#endif

}  // namespace
}  // namespace lepton::VARIANT
