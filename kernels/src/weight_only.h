// A float32 matrix times a matrix of codes, which are unpacked in registers, and what follows.
#pragma once

#include <cstdint>

#include "epilogue.h"

namespace lepton {

// y[M, N] = epilogue(x[M, K] @ (value(codes)[K, N] * scale)), row-major.
struct WeightOnly {
  const float* x;
  const uint8_t* codes;  // 8 bits: int8 [K, N]. 4 bits: [R, N], R = ceil(K / 2); a byte of row r holds rows r and r + R.
  const float* levels;   // 4 bits: the values of the 16 codes. 8 bits: unused, a code is its own value.
  const void* scale;     // [groups, N], or [groups, 1] if `one_scale`; bfloat16 if `narrow_scale`, else float32.
  float* y;
  int64_t m, k, n, groups;  // `groups` divides K
  bool one_scale, narrow_scale;
  Epilogue epilogue;

  int64_t packed_rows(int bits) const { return bits == 8 ? k : (k + 1) / 2; }
};

// Computes rows [row, row_end) and columns [column, column_end) of y. Each element of y is summed in the same order
// wherever the ranges end, so the result does not depend on the number of threads.
using WeightOnlyPart = void(const WeightOnly&, int64_t row, int64_t row_end, int64_t column, int64_t column_end);

namespace portable { WeightOnlyPart weight_only_8, weight_only_4; }
namespace avx2 { WeightOnlyPart weight_only_8, weight_only_4; }
namespace avx512 { WeightOnlyPart weight_only_8, weight_only_4; }

}  // namespace lepton
