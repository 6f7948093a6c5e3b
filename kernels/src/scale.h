// The scale of int8 codes. Functions are static, because the linker would keep one copy of an inline one, which may have
// instructions that the machine lacks.
#pragma once

#include <cstdint>

namespace lepton {

// As `absmax_scale` computes it, of the largest magnitude, given as the bits of a float: never zero nor subnormal, and NaN
// stays NaN.
static inline float int8_scale(int32_t largest_bits) {
  float largest;
  __builtin_memcpy(&largest, &largest_bits, 4);
  const float scale = largest * static_cast<float>(1.0 / 127);
  constexpr float kTiny = 0x1p-126f;
  return scale == 0.0f ? 1.0f : scale < kTiny ? kTiny : scale;
}

// A scale, and 1 / scale; that is 0 if it is too large or small to compute with.
struct CodeScale {
  float scale, inverse;
};

static inline CodeScale code_scale(float scale) {
  return {scale, scale > 0x1p-96f && scale < 0x1p96f ? 1.0f / scale : 0.0f};
}

}  // namespace lepton
