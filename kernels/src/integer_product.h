// A float32 matrix, rounded to eight bits with one scale a row, times a matrix of int8 codes, and what follows.
#pragma once

#include <cstdint>

#include "epilogue.h"
#include "kept.h"

namespace lepton {

// y[M, N] = epilogue(scale of row * scale of column * (codes of (x[M, K] * factor[K]) @ codes[N, K]^T)), summed in
// int32.
struct IntegerProduct {
  static constexpr int64_t kPanelColumns = 64;
  const float* x;
  const int8_t* codes;        // a row is a column of the weight
  const float* scale;         // [N], or [1] if `one_scale`
  const float* static_scale;  // the scale of all rows of x; null: each row's largest magnitude becomes 127
  const float* factor;        // [K], or null
  float* y;
  int64_t m, k, n;
  bool one_scale;
  Epilogue epilogue;
  // Scratch.
  uint8_t* rounded;   // [M, padded_depth()]
  float* row_scale;   // [M]
  KeptPanels* kept;   // packed panels that stay from call to call; null: they are packed on each
  int64_t code_bytes;  // of a code in a panel

  int64_t padded_depth() const { return (k + 63) / 64 * 64; }
  int64_t panels() const { return (n + kPanelColumns - 1) / kPanelColumns; }
  // Bytes of a panel: its codes, and a number for each column.
  int64_t panel_bytes() const { return ((k + 3) / 4 * 4 * code_bytes + 4) * kPanelColumns; }
  // Bytes that `integer_panel` needs: a panel, and a few rows of x.
  int64_t panel_scratch() const { return panel_bytes() + padded_depth() * 8; }
};

using IntegerRangePart = void(const IntegerProduct&, int64_t begin, int64_t end);
using IntegerPart = void(const IntegerProduct&, int64_t row, int64_t row_end, int64_t column, int64_t column_end);
// From `column`, a multiple of `kPanelColumns`, in panels of as many; `scratch` has `panel_scratch`, aligned to 64.
using IntegerPanel = void(const IntegerProduct&, int64_t row, int64_t row_end, int64_t column, int64_t column_end,
                          int8_t* scratch);

namespace portable { IntegerRangePart round_rows; IntegerPart integer_product; }
namespace avx2 { IntegerRangePart round_rows; IntegerPart integer_product; IntegerPanel integer_panel; }
namespace dotprod { IntegerRangePart round_rows; IntegerPart integer_product; IntegerPanel integer_panel; }
namespace avx512 { IntegerRangePart round_rows; IntegerPart integer_product; IntegerPanel integer_panel; }

}  // namespace lepton
