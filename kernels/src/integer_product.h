// A float32 matrix, rounded to eight bits with one scale a row, times a matrix of int8 codes.
#pragma once

#include <cstdint>

namespace lepton {

// y[M, N] = scale of row * scale of column * (codes of x[M, K] @ codes[N, K]^T), summed in int32.
struct IntegerProduct {
  const float* x;
  const int8_t* codes;        // a row is a column of the weight
  const float* scale;         // [N], or [1] if `one_scale`
  const float* static_scale;  // the scale of all rows of x; null: each row's largest magnitude becomes 127
  float* y;
  int64_t m, k, n;
  bool one_scale;
  // Scratch.
  uint8_t* rounded;   // [M, padded_depth()]
  float* row_scale;   // [M]

  int64_t padded_depth() const { return (k + 63) / 64 * 64; }
};

using IntegerRangePart = void(const IntegerProduct&, int64_t begin, int64_t end);
using IntegerPart = void(const IntegerProduct&, int64_t row, int64_t row_end, int64_t column, int64_t column_end);

namespace portable { IntegerRangePart round_rows; IntegerPart integer_product; }
namespace avx2 { IntegerRangePart round_rows; IntegerPart integer_product; }
namespace avx512 { IntegerRangePart round_rows; IntegerPart integer_product; }

}  // namespace lepton
