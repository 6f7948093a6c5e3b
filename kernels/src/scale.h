// The scale of int8 codes, as `absmax_scale` computes it.
#pragma once

#include <cstdint>

namespace lepton {

// Of the largest magnitude, given as the bits of a float: never zero nor subnormal, and NaN stays NaN. Static, because
// the linker would keep one copy of an inline function, which may have instructions that the machine lacks.
static inline float int8_scale(int32_t largest_bits) {
  float largest;
  __builtin_memcpy(&largest, &largest_bits, 4);
  const float scale = largest * static_cast<float>(1.0 / 127);
  constexpr float kTiny = 0x1p-126f;
  return scale == 0.0f ? 1.0f : scale < kTiny ? kTiny : scale;
}

}  // namespace lepton
