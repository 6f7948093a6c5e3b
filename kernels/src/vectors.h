// Vectors of floats as wide as the registers of the instruction set that a file is compiled for.
//
// Files that include this are compiled once for each instruction set, in a namespace of its own (VARIANT). They must not
// call inline functions of the standard library: the linker keeps one copy of each, which may be the one with
// instructions that the machine lacks.
#pragma once

#include <cstdint>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace lepton::VARIANT {

#if defined(__AVX512F__)
constexpr int kLanes = 16, kRegisters = 32;
#else
constexpr int kLanes = 8, kRegisters = 16;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
typedef int8_t Bytes __attribute__((vector_size(kLanes), aligned(1), may_alias));
typedef uint8_t Unsigned __attribute__((vector_size(kLanes), aligned(1), may_alias));

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline void store(float* to, Floats values) { *reinterpret_cast<Floats*>(to) = values; }

// Codes as integers of 32 bits. GCC 12 converts vectors of bytes one by one, hence the intrinsics.
inline Ints widen_signed(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  return __builtin_convertvector(*reinterpret_cast<const Bytes*>(from), Ints);
#endif
}

inline Ints widen_unsigned(const uint8_t* from) {
#if defined(__AVX512F__)
  return (Ints)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(__AVX2__)
  return (Ints)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  return __builtin_convertvector(*reinterpret_cast<const Unsigned*>(from), Ints);
#endif
}

// Floats of 16 bits, the upper halves of those of 32.
inline Floats widen_bfloat16(const uint16_t* from) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return (Floats)_mm512_slli_epi32(wide, 16);
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  return (Floats)_mm256_slli_epi32(wide, 16);
#else
  Ints wide;
  for (int lane = 0; lane < kLanes; ++lane) wide[lane] = static_cast<int32_t>(static_cast<uint32_t>(from[lane]) << 16);
  return (Floats)wide;
#endif
}

inline Floats as_floats(Ints values) {
#if defined(__AVX512F__)
  return (Floats)_mm512_cvtepi32_ps((__m512i)values);
#else
  return __builtin_convertvector(values, Floats);
#endif
}

inline float largest_of(Floats values) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)values);
#else
  float found = values[0];
  for (int lane = 1; lane < kLanes; ++lane) found = values[lane] > found ? values[lane] : found;
  return found;
#endif
}

inline float sum_of(Floats values) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)values);
#else
  float found = values[0];
  for (int lane = 1; lane < kLanes; ++lane) found += values[lane];
  return found;
#endif
}

// The 16 values that codes of 4 bits stand for, in registers.
struct Table {
#if defined(__AVX512F__)
  __m512 values;
  explicit Table(const float* levels) : values(_mm512_loadu_ps(levels)) {}
  // Only the four low bits of an index count.
  Floats at(Ints index) const { return (Floats)_mm512_permutexvar_ps((__m512i)index, values); }
#elif defined(__AVX2__)
  __m256 low, high;
  explicit Table(const float* levels) : low(_mm256_loadu_ps(levels)), high(_mm256_loadu_ps(levels + 8)) {}
  Floats at(Ints index) const {
    const __m256i at = (__m256i)index;  // the permutations look at three bits, the blend at the sign
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));
    return (Floats)_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, at), _mm256_permutevar8x32_ps(high, at), upper);
  }
#else
  const float* levels;
  explicit Table(const float* levels) : levels(levels) {}
  Floats at(Ints index) const {
    Floats found;
    for (int lane = 0; lane < kLanes; ++lane) found[lane] = levels[index[lane] & 15];
    return found;
  }
#endif
};

// e^x for x within ln(2) / 2 of zero, to float32's precision (Cephes' expf).
inline Floats exp_near_zero(Floats x) {
  Floats value = x * 1.9875691500e-4f + 1.3981999507e-3f;
  value = value * x + 8.3334519073e-3f;
  value = value * x + 4.1665795894e-2f;
  value = value * x + 1.6666665459e-1f;
  value = value * x + 5.0000001201e-1f;
  return value * (x * x) + x + 1.0f;
}

}  // namespace lepton::VARIANT
