// Rounding of floats to int8 codes. Included by files that are compiled for an instruction set.
#pragma once

#include "vectors.h"

namespace lepton::VARIANT {

// The largest magnitude of x, multiplied by a factor each if there are any, as the bits of a float: as integers, floats
// without sign are in order, and NaN is the largest.
template <bool factors>
inline int32_t largest_bits(const float* x, const float* factor, int64_t count) {
  Ints most[4] = {};
  int64_t i = 0;
  const auto take = [&](int into) {
    const Floats values = factors ? load(x + i) * load(factor + i) : load(x + i);
    const Ints bits = (Ints)values & 0x7fffffff;
    most[into] = bits > most[into] ? bits : most[into];
    i += kLanes;
  };
  while (i + 4 * kLanes <= count)
    for (int j = 0; j < 4; ++j) take(j);
  while (i + kLanes <= count) take(0);
  for (int j = 1; j < 4; ++j) most[0] = most[j] > most[0] ? most[j] : most[0];
#if defined(__AVX512F__)
  int32_t found = _mm512_reduce_max_epi32((__m512i)most[0]);
#else
  int32_t found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found = most[0][lane] > found ? most[0][lane] : found;
#endif
  for (; i < count; ++i) {
    const float value = factors ? x[i] * factor[i] : x[i];
    int32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    bits &= 0x7fffffff;
    found = bits > found ? bits : found;
  }
  return found;
}

inline int32_t largest_bits(const float* x, int64_t count) { return largest_bits<false>(x, nullptr, count); }

// The code of a value, by the one rounding rule: nearest, ties to even, saturating, and zero for NaN.
inline int32_t code(float value, float scale) {
  float scaled = value / scale;
  scaled = scaled == scaled ? scaled : 0.0f;
  scaled = scaled > 127.0f ? 127.0f : scaled < -127.0f ? -127.0f : scaled;
  return static_cast<int32_t>(__builtin_rintf(scaled));
}

#if defined(__AVX512F__)
// The codes of 16 values.
inline __m128i codes_of(Floats x, float scale) {
  const __m512 scaled = _mm512_div_ps((__m512)x, _mm512_set1_ps(scale));
  const __mmask16 number = _mm512_cmp_ps_mask(scaled, scaled, _CMP_ORD_Q);
  const __m512 inside = _mm512_min_ps(_mm512_max_ps(scaled, _mm512_set1_ps(-127)), _mm512_set1_ps(127));
  return _mm512_cvtepi32_epi8(_mm512_maskz_cvtps_epi32(number, inside));
}
#elif defined(__AVX2__)
// The codes of 8 values, as 16 bits.
inline __m128i codes_of(Floats x, float scale) {
  const __m256 scaled = _mm256_div_ps((__m256)x, _mm256_set1_ps(scale));
  const __m256 number = _mm256_and_ps(scaled, _mm256_cmp_ps(scaled, scaled, _CMP_ORD_Q));
  const __m256 inside = _mm256_min_ps(_mm256_max_ps(number, _mm256_set1_ps(-127)), _mm256_set1_ps(127));
  const __m256i rounded = _mm256_cvtps_epi32(inside);
  return _mm_packs_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
#endif

}  // namespace lepton::VARIANT
