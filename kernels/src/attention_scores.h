// What both ways to compute attention share. Included by files that are compiled for an instruction set.
#pragma once

#include "attention.h"
#include "vectors.h"

namespace lepton::VARIANT {

inline Floats larger_of(Floats a, Floats b) { return a > b ? a : b; }

// Elements of operands, as floats.
inline Floats read(const float* from) { return load(from); }
inline Floats read(const uint16_t* from) { return widen_bfloat16(from); }
inline float read_one(const float* from) { return *from; }
inline float read_one(const uint16_t* from) {
  const uint32_t wide = static_cast<uint32_t>(*from) << 16;
  float value;
  __builtin_memcpy(&value, &wide, sizeof value);
  return value;
}

// Up to `count` of them, and zeros.
template <typename Element>
inline Floats read_some(const Element* from, int64_t count) {
  if (count >= kLanes) return read(from);
  Floats found = {};
  for (int lane = 0; lane < count; ++lane) found[lane] = read_one(from + lane);
  return found;
}

// Copies a row of `count` elements as floats, with zeros behind them up to `padded`.
template <typename Element>
inline void copy_row(const Element* from, int64_t count, int64_t padded, float* to) {
  for (int64_t at = 0; at < padded; at += kLanes) store(to + at, read_some(from + at, count - at));
}

// Fetches rows of `size` elements that are `step` apart.
template <typename Element>
inline void fetch(const Element* from, int64_t step, int64_t size, int rows) {
  for (int row = 0; row < rows; ++row)
    for (int64_t at = 0; at < size; at += 64 / sizeof(Element)) __builtin_prefetch(from + row * step + at, 0, 2);
}

// Writes up to `count` numbers of a result, from element `at` on, rounded to nearest if it has 16 bits.
inline void write_some(const Attention& a, int64_t at, Floats values, int64_t count) {
  if (a.narrow_y) {
    const Ints bits = (Ints)values;
    const Ints rounded = values == values ? bits + 0x7fff + ((bits >> 16) & 1) : bits | 0x400000;
    auto* to = static_cast<uint16_t*>(a.y) + at;
    for (int lane = 0; lane < kLanes && lane < count; ++lane)
      to[lane] = static_cast<uint16_t>(static_cast<uint32_t>(rounded[lane]) >> 16);
    return;
  }
  auto* to = static_cast<float*>(a.y) + at;
  if (count >= kLanes) {
    store(to, values);
  } else {
    for (int lane = 0; lane < count; ++lane) to[lane] = values[lane];
  }
}

// The bias of keys from `key` on, of which `left` are there; zeros behind them.
inline Floats read_bias(const Attention& a, const float* bias, int64_t key, int64_t left) {
  return a.bias_key == 0 ? Floats{} + *bias : read_some(bias + key, left);
}

// Scores of a query with the bias of the query, if any; minus infinity where there is no key.
inline Floats finish_scores(const Attention& a, const float* bias, int64_t key, Floats value) {
  const int64_t left = a.keys - key;
  if (bias != nullptr) {
    const Floats added = read_bias(a, bias, key, left);
    value = !a.masks ? value + added : added == 0.0f ? value : added;
  }
  if (left < kLanes)
    for (int lane = 0; lane < kLanes; ++lane) value[lane] = lane < left ? value[lane] : -__builtin_inff();
  return value;
}

// e^x for x up to zero, to float32's precision; 0 where it would be smaller than a normal float, and NaN of NaN.
inline Floats exp(Floats x) {
#if defined(__AVX512F__)
  // As a power of two, and a polynomial of what is left, within ln(2) / 2 of zero: off by 1e-7 of it.
  const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps((__m512)x, _mm512_set1_ps(1.44269504088896341f)), 8);
  const __m512 rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693147180559945309f), (__m512)x);
  __m512 value = _mm512_fmadd_ps(rest, _mm512_set1_ps(8.2902722e-3f), _mm512_set1_ps(4.18981612e-2f));
  value = _mm512_fmadd_ps(value, rest, _mm512_set1_ps(0.166676387f));
  value = _mm512_fmadd_ps(value, rest, _mm512_set1_ps(0.499991477f));
  value = _mm512_fmadd_ps(value, rest, _mm512_set1_ps(0.999999702f));
  value = _mm512_fmadd_ps(value, rest, _mm512_set1_ps(1.0f));
  // Not less than, so that NaN stays.
  const __mmask16 counts = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  return (Floats)_mm512_maskz_scalef_ps(counts, value, power);
#else
  const Floats magic = Floats{} + 12582912.0f;  // adding it rounds to an integer, in the last bits
  const Floats at = larger_of(x, Floats{} - 87.0f);
  const Floats shifted = at * 1.44269504088896341f + magic, count = shifted - magic;
  const Floats rest = (at - count * 0.693359375f) + count * 2.12194440e-4f;
  const Ints power = ((Ints)shifted - 0x4b400000 + 127) << 23;
  Floats value = exp_near_zero(rest) * (Floats)power;
  value = x < -87.0f ? Floats{} : value;
  return x == x ? value : x;
#endif
}

// Makes scores exponentials, and returns their sum.
inline float exponentials(int64_t count, float largest, float* scores) {
  Floats total[2] = {};
  for (int64_t key = 0; key < count; key += 2 * kLanes) {
    for (int half = 0; half < 2; ++half) {
      float* at = scores + key + half * kLanes;
      const Floats value = exp(load(at) - largest);
      store(at, value);
      total[half] += value;
    }
  }
  return sum_of(total[0] + total[1]);
}

}  // namespace lepton::VARIANT
