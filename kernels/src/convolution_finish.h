// What becomes of the sums of a convolution: bias, activation, residual, and the rounding that what reads the result would
// do. Included by files that are compiled for an instruction set.
#pragma once

#include "convolution.h"
#include "rounding.h"

namespace lepton::VARIANT {

// The bias of the vector of columns from `column` on; zeros if there is none.
__attribute__((always_inline)) inline Floats bias_at(const ConvolutionEpilogue& epilogue, int64_t column) {
  return epilogue.bias != nullptr ? load(epilogue.bias + column) : Floats{};
}

// 1 / (1 + e^-x), off by at most some 3e-7 + |x| * 7e-8 of itself, and 0 below -87.
#if defined(__AVX512F__)
inline Floats logistic(Floats v) {
  const __m512 x = (__m512)v;
  // e^-x is 2^(whole + part) with a part in [0, 1), of which the power is a polynomial (Fonseca, 2008). No bounds are
  // needed: of a huge number the part is 0, and the power 0 or infinite.
  const __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(-1.44269504088896341f));
  const __m512 part = _mm512_reduce_ps(power, 0x09);
  __m512 e = _mm512_fmadd_ps(_mm512_set1_ps(1.8775767e-3f), part, _mm512_set1_ps(8.9893397e-3f));
  e = _mm512_fmadd_ps(e, part, _mm512_set1_ps(5.5826318e-2f));
  e = _mm512_fmadd_ps(e, part, _mm512_set1_ps(2.4015361e-1f));
  e = _mm512_fmadd_ps(e, part, _mm512_set1_ps(6.9315308e-1f));
  e = _mm512_fmadd_ps(e, part, _mm512_set1_ps(9.9999994e-1f));
  const __m512 sum = _mm512_add_ps(_mm512_set1_ps(1.0f), _mm512_scalef_ps(e, power));
  // An approximate reciprocal and a step of Newton's method take a third of a division's time. Below -87 the sum is too
  // large for them; NaN stays NaN.
  const __mmask16 is_some = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  const __m512 near = _mm512_rcp14_ps(sum);
  const __m512 error = _mm512_fnmadd_ps(sum, near, _mm512_set1_ps(1.0f));
  return (Floats)_mm512_maskz_fmadd_ps(is_some, near, error, near);
}
#else
inline Floats logistic(Floats v) {
  const Floats high = Floats{} + 88.72283f, low = Floats{} - 87.33654f, given = -v;
  Floats x = given > high ? high : given;
  x = x < low ? low : x;
  const Floats shifted = x * 1.44269504088896341f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer
  const Ints power = (Ints)shifted - (Ints)(Floats{} + 12582912.0f);
  const Floats whole = shifted - 12582912.0f;
  x = x - whole * 0.693359375f;
  x = x + whole * 2.12194440e-4f;
  // In two factors, since 2^128 is not a float.
  const Ints half = power >> 1;
  Floats e = exp_near_zero(x) * (Floats)((half + 127) << 23) * (Floats)((power - half + 127) << 23);
  e = given > high ? Floats{} + __builtin_inff() : e;
  e = given < low ? Floats{} : e;
  return 1.0f / (1.0f + (given == given ? e : given));
}
#endif

inline Floats silu(Floats v) { return v * logistic(v); }

inline Floats load_some(const float* from, int count) {
#if defined(__AVX512F__)
  return (Floats)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#else
  Floats found = {};
  for (int lane = 0; lane < count; ++lane) found[lane] = from[lane];
  return found;
#endif
}

inline void store_some(float* to, Floats values, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), (__m512)values);
#else
  for (int lane = 0; lane < count; ++lane) to[lane] = values[lane];
#endif
}

inline Floats activated(const ConvolutionEpilogue& e, Floats v) {
  if (e.activation == ConvolutionActivation::kClamp) {
    v = v < e.low ? Floats{} + e.low : v;  // NaN stays NaN
    return v > e.high ? Floats{} + e.high : v;
  }
  if (e.activation == ConvolutionActivation::kSilu) return silu(v);
  return v;
}

// Values between two bounds. The operands are in the order in which the instructions give NaN back.
inline Floats bounded(Floats v, Floats low, Floats high) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)v));
#elif defined(__AVX2__)
  return (Floats)_mm256_min_ps((__m256)high, _mm256_max_ps((__m256)low, (__m256)v));
#else
  v = v < low ? low : v;
  return v > high ? high : v;
#endif
}

// Codes of values, and zero of NaN: the quotient by the scale as a division rounds it, then to the nearest integer. Two
// steps of Newton's method take a fourth of a division's time: the first one is off by less than the last bit, and from
// there the second one is right (Markstein, 1990).
#if defined(__AVX512F__)
constexpr bool kHasQuotients = true;
inline Ints quotients(Floats v, Floats scale, Floats inverse) {
  const __mmask16 number = _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_ORD_Q);
  const __m512 x = (__m512)bounded(v, -127.0f * scale, 127.0f * scale);
  __m512 q = _mm512_mul_ps(x, (__m512)inverse);
  q = _mm512_fmadd_ps(_mm512_fnmadd_ps(q, (__m512)scale, x), (__m512)inverse, q);
  q = _mm512_fmadd_ps(_mm512_fnmadd_ps(q, (__m512)scale, x), (__m512)inverse, q);
  return (Ints)_mm512_maskz_cvtps_epi32(number, q);
}
#elif defined(__AVX2__)
constexpr bool kHasQuotients = true;
inline Ints quotients(Floats v, Floats scale, Floats inverse) {
  const __m256 number = _mm256_cmp_ps((__m256)v, (__m256)v, _CMP_ORD_Q);
  const __m256 x = (__m256)bounded(v, -127.0f * scale, 127.0f * scale);
  __m256 q = _mm256_mul_ps(x, (__m256)inverse);
  q = _mm256_fmadd_ps(_mm256_fnmadd_ps(q, (__m256)scale, x), (__m256)inverse, q);
  q = _mm256_fmadd_ps(_mm256_fnmadd_ps(q, (__m256)scale, x), (__m256)inverse, q);
  return (Ints)_mm256_cvtps_epi32(_mm256_and_ps(q, number));
}
#else
constexpr bool kHasQuotients = false;  // without fused multiply-adds they would not be exact
inline Ints quotients(Floats, Floats, Floats) { return Ints{}; }
#endif

inline Ints codes_of_values(CodeScale s, Floats v) {
  if (kHasQuotients && s.inverse != 0.0f) return quotients(v, Floats{} + s.scale, Floats{} + s.inverse);
  Ints codes;
  for (int lane = 0; lane < kLanes; ++lane) codes[lane] = code(v[lane], s.scale);
  return codes;
}

// Writes the lowest 8 bits of each lane.
inline void store_bytes(uint8_t* to, Ints values, int count) {
#if defined(__AVX512F__)
  if (count >= kLanes)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8((__m512i)values));
  else
    _mm512_mask_cvtepi32_storeu_epi8(to, static_cast<__mmask16>((1u << count) - 1), (__m512i)values);
#else
#if defined(__AVX2__)
  if (count >= kLanes) {
    const __m256i bytes = (__m256i)(values & 255);
    const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
    return _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(words, words));
  }
#endif
  for (int lane = 0; lane < (count < kLanes ? count : kLanes); ++lane) to[lane] = static_cast<uint8_t>(values[lane]);
#endif
}

// Writes codes as bytes with 128 added.
inline void store_codes(uint8_t* to, Ints codes, int count) { store_bytes(to, codes + 128, count); }

// Writes codes of sums that were multiplied by `code_factor`, and `code_bias` added. A sum with 2^23 is rounded to an integer,
// and has the code with 128 added in its lowest bits. Passed by value, so that it is in registers: what is written might be
// there, for all that a compiler knows.
struct Brief {
  uint8_t* codes;
  Floats low, high;

  explicit Brief(const Convolution& p)
      : codes(p.codes),
        low(Floats{} + (p.epilogue.low_code + 128.0f)),
        high(Floats{} + (p.epilogue.high_code + 128.0f)) {}

  __attribute__((always_inline)) void operator()(Floats v, int64_t at, int count) const {
    store_bytes(codes + at, (Ints)(bounded(v, low, high) + 0x1p23f), count);
  }
};

// Writes codes of SiLUs, of sums that are finite. A SiLU is rounded itself, so a product by the inverse of the scale will do.
struct SiluCodes {
  uint8_t* codes;
  Floats inverse;

  static constexpr float kAdded = 0x1p23f;

  __attribute__((always_inline)) void operator()(Floats v, int64_t at, int count) const {
    const Floats shifted = silu(v) * inverse + (kAdded + 128.0f);
    store_bytes(codes + at, (Ints)bounded(shifted, Floats{} + (kAdded + 1.0f), Floats{} + (kAdded + 255.0f)), count);
  }
};

// Writes channels. Holds copies, since what is written might be what a pointer to them points at, for all that a compiler
// knows.
struct Finish {
  ConvolutionEpilogue e;
  float* y;
  uint8_t* codes;
  bool numbers;

  explicit Finish(const Convolution& p) : e(p.epilogue), y(p.y), codes(p.codes), numbers(p.numbers) {}

  // Whether codes of SiLUs are written by `silu_codes`: if so, all are, since others may be rounded otherwise.
  bool is_silu() const {
    return kHasQuotients && numbers && codes != nullptr && e.residual == nullptr && e.code_scale.inverse != 0.0f &&
           e.activation == ConvolutionActivation::kSilu;
  }
  // Whether nothing but a SiLU becomes of results in float.
  bool gives_silus() const {
    return codes == nullptr && e.residual == nullptr && e.activation == ConvolutionActivation::kSilu;
  }
  SiluCodes silu_codes() const { return {codes, Floats{} + e.code_scale.inverse}; }

  // `v` has its bias already; `count` channels from a position of the result on.
  void operator()(Floats v, int64_t at, int count) const {
    const bool whole = count >= kLanes;
    Floats other = {};
    if (e.residual != nullptr) other = whole ? load(e.residual + at) : load_some(e.residual + at, count);
    if (e.residual != nullptr && e.add_first) v += other;
    v = activated(e, v);
    if (e.residual != nullptr && !e.add_first) v += other;
    if (codes != nullptr)
      store_codes(codes + at, codes_of_values(e.code_scale, v), count);
    else if (whole)
      store(y + at, v);
    else
      store_some(y + at, v, count);
  }
};

// Bounds, where nothing else becomes of results in float: two instructions. NaN stays NaN.
struct Bounds {
  Floats low, high;

  explicit Bounds(const ConvolutionEpilogue& e) {
    const bool clamps = e.activation == ConvolutionActivation::kClamp;
    low = Floats{} + (clamps ? e.low : -__builtin_inff());
    high = Floats{} + (clamps ? e.high : __builtin_inff());
  }
  static bool suffice(const Convolution& p) {
    return p.codes == nullptr && p.epilogue.residual == nullptr &&
           p.epilogue.activation != ConvolutionActivation::kSilu;
  }
  Floats operator()(Floats v) const { return bounded(v, low, high); }
};

}  // namespace lepton::VARIANT
