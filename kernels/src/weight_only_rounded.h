// Products with codes in integers: included by weight_only.cc.
//
// A processor with VNNI adds 64 products of bytes in the time of 16 products of floats. So the activations of a block are
// rounded to 16 bits, each row by its own largest magnitude there, which is some hundred times finer than the weight's
// rounding, and each is taken apart into an upper and a lower byte. Codes of four rows are brought side by side, as the
// instruction takes them, and multiplied with both; sums are exact.
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

constexpr int kDepth = 128;               // activations of a block, of all parts
constexpr int kPanel = 4;                 // vectors of columns of a panel
constexpr int kRoundedRows = 64;          // rows of activations at most
constexpr int kRoundedTile = 4;           // of them in a tile
constexpr int kMost = 127 * 256 + 127;    // that two signed bytes hold

// Whether numbers are rounded whose largest magnitude is this: zero, or not so small or large that the product of the steps
// of two such is none.
inline bool can_be_rounded(float largest) { return largest == 0.0f || (largest >= 1e-15f && largest < 1e15f); }

// Activations of a block, rounded to 256 * upper + lower steps. Those of part 1 begin at half of a row.
struct Rounded {
  alignas(64) int8_t upper[kRoundedRows][kDepth], lower[kRoundedRows][kDepth];
  float step[2][kRoundedRows];  // of each part
  int32_t upper_sum[2][kRoundedRows], lower_sum[2][kRoundedRows];
  bool fits[kRoundedRows];  // whether the row's numbers can be rounded

  // Rounds the `count` numbers of a part of a row; false if one is no number, too large or too small.
  bool round(const float* x, int count, int part, int parts, int row) {
    const __m512i clear = _mm512_set1_epi32(0x7fffffff);
    __m512 most = _mm512_setzero_ps();
    __mmask16 strange = 0;
    for (int at = 0; at < count; at += 16) {
      const __m512 given = _mm512_maskz_loadu_ps(first_lanes(count - at), x + at);
      const __m512 size = _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(given), clear));
      strange |= _mm512_cmp_ps_mask(size, size, _CMP_UNORD_Q);  // which a maximum does not show
      most = _mm512_max_ps(most, size);
    }
    const float largest = _mm512_reduce_max_ps(most);
    if (strange != 0 || !can_be_rounded(largest)) return false;
    step[part][row] = largest * (1.0f / kMost);
    const __m512 inverse = _mm512_set1_ps(largest == 0.0f ? 0.0f : kMost / largest);
    const int depth = kDepth / parts;
    __m512i sum = _mm512_setzero_si512(), uppers = sum;
    for (int at = 0; at < depth; at += 16) {
      const __m512 given = _mm512_maskz_loadu_ps(first_lanes(count - at), x + at);
      const __m512i code = _mm512_cvtps_epi32(_mm512_mul_ps(given, inverse));
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(code, _mm512_set1_epi32(128)), 8);
      sum = _mm512_add_epi32(sum, code);
      uppers = _mm512_add_epi32(uppers, high);
      _mm_store_si128(reinterpret_cast<__m128i*>(upper[row] + part * depth + at), _mm512_cvtepi32_epi8(high));
      _mm_store_si128(reinterpret_cast<__m128i*>(lower[row] + part * depth + at), _mm512_cvtepi32_epi8(code));
    }
    upper_sum[part][row] = _mm512_reduce_add_epi32(uppers);
    lower_sum[part][row] = _mm512_reduce_add_epi32(sum) - 256 * upper_sum[part][row];
    return true;
  }

  static __mmask16 first_lanes(int count) { return count >= 16 ? 0xffff : count > 0 ? (1 << count) - 1 : 0; }
};

// How bytes of a weight become the unsigned bytes that are multiplied: `upper` of each part, from which `offset` is to be
// taken, times `unit`. Of codes that are looked up, `lower` are more digits, behind the point of `upper`.
struct SignedBytes {
  static constexpr int kParts = 1;
  static constexpr bool kHasLower = false;
  static constexpr int32_t offset(int) { return 128; }
  static constexpr float unit(int) { return 1.0f; }
  static __m512i upper(__m512i bytes, int) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(-128)); }
  static __m512i lower(__m512i bytes, int) { return bytes; }
};

// High halves stay where they are, which makes them 16 times as large.
struct SignedHalves {
  static constexpr int kParts = 2;
  static constexpr bool kHasLower = false;
  static constexpr int32_t offset(int part) { return part == 0 ? 8 : 128; }
  static constexpr float unit(int part) { return part == 0 ? 1.0f : 1.0f / 16; }
  static __m512i upper(__m512i bytes, int part) {
    const __m512i flip = _mm512_set1_epi8(-120), half = _mm512_set1_epi8(part == 0 ? 15 : -16);
    return _mm512_ternarylogic_epi32(bytes, flip, half, 0x28);  // (bytes ^ flip) & half
  }
  static __m512i lower(__m512i bytes, int) { return bytes; }
};

// Values of codes, rounded to 16 bits by the largest of them. Products of two lower bytes are left out: each is less than
// 1 / 32639 of the product of the largest activation and the largest value.
struct LookedUpHalves {
  static constexpr int kParts = 2;
  static constexpr bool kHasLower = true;
  __m512i uppers, lowers;
  float step;
  bool fits = true;

  explicit LookedUpHalves(const float* levels) {
    float largest = 0;
    for (int code = 0; code < 16; ++code) {
      const float size = __builtin_fabsf(levels[code]);
      if (!(size <= largest)) largest = size;  // NaN too
      if (size != size) fits = false;
    }
    fits = fits && can_be_rounded(largest);
    step = largest * (256.0f / kMost);
    alignas(16) uint8_t bytes[2][16];
    for (int code = 0; code < 16 && fits; ++code) {
      const float steps = largest == 0.0f ? 0.0f : levels[code] / largest * kMost;
      const int32_t rounded = 32768 + _mm_cvtss_si32(_mm_set_ss(steps));
      bytes[0][code] = static_cast<uint8_t>(rounded >> 8);
      bytes[1][code] = static_cast<uint8_t>(rounded);
    }
    uppers = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[0])));
    lowers = _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes[1])));
  }
  static constexpr int32_t offset(int) { return 128; }
  float unit(int) const { return step; }
  __m512i upper(__m512i bytes, int part) const { return _mm512_shuffle_epi8(uppers, index(bytes, part)); }
  __m512i lower(__m512i bytes, int part) const { return _mm512_shuffle_epi8(lowers, index(bytes, part)); }
  static __m512i index(__m512i bytes, int part) {
    return _mm512_and_si512(part == 0 ? bytes : _mm512_srli_epi16(bytes, 4), _mm512_set1_epi8(15));
  }
};

// Bytes of four rows from `row` on, of up to 64 columns: [64 columns][4 rows].
inline void side_by_side(const uint8_t* codes, int64_t stride, int row, int count, __mmask64 columns,
                         __m512i (&to)[kPanel]) {
  // So that unpacking, which goes by lanes of 128 bits, leaves columns in their order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i rows[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const uint8_t* from = codes + (row + i < count ? row + i : row) * stride;  // the factor of what is not there is zero
    rows[i] = _mm512_permutexvar_epi32(order, _mm512_maskz_loadu_epi8(columns, from));
  }
  const __m512i low[2] = {_mm512_unpacklo_epi8(rows[0], rows[1]), _mm512_unpacklo_epi8(rows[2], rows[3])};
  const __m512i high[2] = {_mm512_unpackhi_epi8(rows[0], rows[1]), _mm512_unpackhi_epi8(rows[2], rows[3])};
  to[0] = _mm512_unpacklo_epi16(low[0], low[1]);
  to[1] = _mm512_unpackhi_epi16(low[0], low[1]);
  to[2] = _mm512_unpacklo_epi16(high[0], high[1]);
  to[3] = _mm512_unpackhi_epi16(high[0], high[1]);
}

inline __m512i four_of(const int8_t* from) {
  int32_t four;
  __builtin_memcpy(&four, from, 4);
  return _mm512_set1_epi32(four);
}

inline __m512 panel_scales(const WeightOnly& p, int64_t group, int64_t column, __mmask16 there) {
  if (p.one_scale) return _mm512_set1_ps(scale_at(p, group));
  const int64_t at = group * p.n + column;
  if (!p.narrow_scale) return _mm512_maskz_loadu_ps(there, static_cast<const float*>(p.scale) + at);
  const __m256i narrow = _mm256_maskz_loadu_epi16(there, static_cast<const uint16_t*>(p.scale) + at);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
}

// Where the products of a block with up to 64 columns go.
template <int kParts>
struct Target {
  int parts;  // that count
  __m512 scales[kParts][kPanel];
  __mmask64 columns;
  bool first;  // stores instead of adding

  void add(const __m512i (&sums)[kPanel], int part, float step, float* y) const {
#pragma GCC unroll 4
    for (int j = 0; j < kPanel; ++j) {
      const __mmask16 there = static_cast<__mmask16>(columns >> (16 * j));
      float* to = y + j * kLanes;
      const __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sums[j]), _mm512_set1_ps(step));
      const __m512 before = first && part == 0 ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(there, to);
      _mm512_mask_storeu_ps(to, there, _mm512_fmadd_ps(value, scales[part][j], before));
    }
  }
};

// The product of one row with `count` rows of codes, which are unpacked in registers.
template <class Codes>
void multiply_row(const Codes& of, const Rounded& x, int row, const uint8_t* codes, int64_t stride, int count,
                  const Target<Codes::kParts>& target, float* y, Ahead& fetched) {
  Ahead ahead = fetched;
  constexpr int kParts = Codes::kParts, kHalf = kDepth / kParts;
  __m512i upper[kParts][kPanel], lower[kParts][kPanel];
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part)
#pragma GCC unroll 4
    for (int j = 0; j < kPanel; ++j) {
      const bool counts = part < target.parts;  // if not, its sums were never made, nor are its products written
      upper[part][j] = _mm512_set1_epi32(counts ? -of.offset(part) * x.upper_sum[part][row] : 0);
      lower[part][j] = _mm512_set1_epi32(counts ? -of.offset(part) * x.lower_sum[part][row] : 0);
    }
  for (int at = 0; at < count; at += 4) {
    ahead.fetch(4);
    __m512i four[kPanel];
    side_by_side(codes, stride, at, count, target.columns, four);
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
      const __m512i by_upper = four_of(x.upper[row] + part * kHalf + at), by_lower = four_of(x.lower[row] + part * kHalf + at);
#pragma GCC unroll 4
      for (int j = 0; j < kPanel; ++j) {
        const __m512i bytes = of.upper(four[j], part);
        upper[part][j] = _mm512_dpbusd_epi32(upper[part][j], bytes, by_upper);
        lower[part][j] = _mm512_dpbusd_epi32(lower[part][j], bytes, by_lower);
        if (Codes::kHasLower) lower[part][j] = _mm512_dpbusd_epi32(lower[part][j], of.lower(four[j], part), by_upper);
      }
    }
  }
  fetched = ahead;
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    if (part >= target.parts) break;
#pragma GCC unroll 4
    for (int j = 0; j < kPanel; ++j)
      lower[part][j] = _mm512_add_epi32(lower[part][j], _mm512_slli_epi32(upper[part][j], 8));
    target.add(lower[part], part, x.step[part][row] * of.unit(part), y);
  }
}

// Unpacked codes of a block: [fours of rows][parts][64 columns][4 rows].
template <int kParts>
using Panel = __m512i[kDepth / kParts / 4][kParts][kPanel];

template <class Codes>
void unpack(const Codes& of, const uint8_t* codes, int64_t stride, int count, __mmask64 columns,
            Panel<Codes::kParts>& to, Ahead& fetched) {
  Ahead ahead = fetched;
  for (int at = 0; at < count; at += 4) {
    ahead.fetch(4);
    __m512i four[kPanel];
    side_by_side(codes, stride, at, count, columns, four);
#pragma GCC unroll 2
    for (int part = 0; part < Codes::kParts; ++part)
#pragma GCC unroll 4
      for (int j = 0; j < kPanel; ++j) to[at / 4][part][j] = of.upper(four[j], part);
  }
  fetched = ahead;
}

// The products of `MR` rows with a panel.
template <class Codes, int MR>
void multiply_rows(const Codes& of, const Rounded& x, int row, const Panel<Codes::kParts>& panel, int count,
                   const Target<Codes::kParts>& target, float* y, int64_t stride) {
  constexpr int kParts = Codes::kParts;
#pragma GCC unroll 2
  for (int part = 0; part < kParts; ++part) {
    if (part >= target.parts) break;
    __m512i sums[MR][kPanel];
#pragma GCC unroll 2
    for (int byte = 0; byte < 2; ++byte) {  // the upper ones, then the lower ones
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) {
        const int32_t sum = byte == 0 ? x.upper_sum[part][row + i] : x.lower_sum[part][row + i];
        const __m512i start = _mm512_set1_epi32(-of.offset(part) * sum);
#pragma GCC unroll 4
        for (int j = 0; j < kPanel; ++j)
          sums[i][j] = byte == 0 ? start : _mm512_add_epi32(start, _mm512_slli_epi32(sums[i][j], 8));
      }
      const int8_t* factors = (byte == 0 ? x.upper : x.lower)[row] + part * (kDepth / kParts);
      for (int at = 0; at < count; at += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < MR; ++i) {
          const __m512i factor = four_of(factors + i * kDepth + at);
#pragma GCC unroll 4
          for (int j = 0; j < kPanel; ++j) sums[i][j] = _mm512_dpbusd_epi32(sums[i][j], panel[at / 4][part][j], factor);
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) target.add(sums[i], part, x.step[part][row + i] * of.unit(part), y + i * stride);
  }
}

#endif

}  // namespace
}  // namespace lepton::VARIANT
