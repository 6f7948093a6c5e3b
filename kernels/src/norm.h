// Layer norm and RMS norm of rows.
#pragma once

#include <cstdint>

namespace lepton {

// y[M, K] = (x - mean) / sqrt(mean of squares of that + epsilon) * gain + shift; the mean counts only if `centered`.
struct Norm {
  const float* x;
  const float* gain;   // [K], or null
  const float* shift;  // [K], or null
  float* y;
  int64_t k;
  float epsilon;
  bool centered;
};

using NormPart = void(const Norm&, int64_t row, int64_t row_end);

namespace portable { NormPart norm; }
namespace avx2 { NormPart norm; }
namespace avx512 { NormPart norm; }

}  // namespace lepton
