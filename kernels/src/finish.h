// Applies an epilogue to a part of a result while that is in the cache. Included by files that are compiled for an
// instruction set.
#pragma once

#include "epilogue.h"
#include "vectors.h"

namespace lepton::VARIANT {

inline Floats smaller_of(Floats a, Floats b) { return a < b ? a : b; }
inline Floats larger_of(Floats a, Floats b) { return a > b ? a : b; }
inline Floats magnitude(Floats x) { return (Floats)((Ints)x & 0x7fffffff); }
inline Floats with_sign_of(Floats size, Floats x) { return (Floats)((Ints)size | ((Ints)x & INT32_MIN)); }

// erf and tanh as quotients of polynomials of float32's precision, as Eigen and XLA compute them; exactly 1 far from
// zero, so that a huge negative input has the activation zero. NaN stays NaN.
inline Floats erf(Floats x) {
  const Floats one = Floats{} + 1.0f, limit = Floats{} + 3.832506856900711f;
  const Floats at = larger_of(smaller_of(x, limit), -limit), square = at * at;
  Floats top = square * 0.00022905065861350646f + 0.0034082910107109506f;
  top = top * square + 0.050955695062380861f;
  top = top * square + 0.18520832239976145f;
  top = top * square + 1.128379143519084f;
  Floats bottom = square * -1.1791602954361697e-7f + 0.000023547966471313185f;
  bottom = bottom * square + 0.0010179625278914885f;
  bottom = bottom * square + 0.014070470171167667f;
  bottom = bottom * square + 0.11098505178285362f;
  bottom = bottom * square + 0.49746925110067538f;
  bottom = bottom * square + 1.0f;
  const Floats value = at * top / bottom;
  return magnitude(x) >= limit ? with_sign_of(one, x) : x == x ? value : x;
}

inline Floats tanh(Floats x) {
  const Floats one = Floats{} + 1.0f, limit = Floats{} + 7.90531110763549805f;
  const Floats at = larger_of(smaller_of(x, limit), -limit), square = at * at;
  Floats top = square * -2.76076847742355e-16f + 2.00018790482477e-13f;
  top = top * square + -8.60467152213735e-11f;
  top = top * square + 5.12229709037114e-08f;
  top = top * square + 1.48572235717979e-05f;
  top = top * square + 6.37261928875436e-04f;
  top = top * square + 4.89352455891786e-03f;
  Floats bottom = square * 1.19825839466702e-06f + 1.18534705686654e-04f;
  bottom = bottom * square + 2.26843463243900e-03f;
  bottom = bottom * square + 4.89352518554385e-03f;
  const Floats value = at * top / bottom;
  return magnitude(x) >= limit ? with_sign_of(one, x) : x == x ? value : x;
}

template <Activation kind>
inline Floats activate(Floats x) {
  if constexpr (kind == Activation::kReLU) return x < 0.0f ? Floats{} : x;  // NaN stays
  if constexpr (kind == Activation::kSiLU) return x * (0.5f + 0.5f * tanh(0.5f * x));
  if constexpr (kind == Activation::kGELU) return x * (0.5f + 0.5f * erf(x * 0.70710678118654752f));
  if constexpr (kind == Activation::kGELUTanh)
    return x * (0.5f + 0.5f * tanh(0.79788456080286536f * x * (1.0f + 0.044715f * (x * x))));
  return x;
}

// Stops the compiler from making one instruction of a product and a sum in one place and not in another.
inline Floats rounded(Floats value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__AVX2__)
  asm("" : "+x"(value));
#endif
  return value;
}

template <Activation kind>
inline void finish_as(const Epilogue& e, float* y, int64_t n, int64_t row, int64_t row_end, int64_t column,
                      int64_t column_end) {
  for (; row < row_end; ++row) {
    float* to = y + row * n;
    const float* added = e.residual == nullptr ? nullptr : e.residual + row * n;
    int64_t at = column;
    for (; at + kLanes <= column_end; at += kLanes) {
      Floats values = load(to + at);
      if (e.bias != nullptr) values += load(e.bias + at);
      values = rounded(activate<kind>(values));
      if (added != nullptr) values += load(added + at);
      store(to + at, values);
    }
    if (at == column_end) continue;
    Floats values = {};
    const int left = static_cast<int>(column_end - at);
    for (int lane = 0; lane < left; ++lane) values[lane] = to[at + lane] + (e.bias == nullptr ? 0.0f : e.bias[at + lane]);
    values = rounded(activate<kind>(values));
    for (int lane = 0; lane < left; ++lane) to[at + lane] = values[lane] + (added == nullptr ? 0.0f : added[at + lane]);
  }
}

// Rows [row, row_end) and columns [column, column_end) of y, which has n columns.
inline void finish(const Epilogue& e, float* y, int64_t n, int64_t row, int64_t row_end, int64_t column,
                   int64_t column_end) {
  if (e.empty()) return;
  switch (e.activation) {
    case Activation::kNone: finish_as<Activation::kNone>(e, y, n, row, row_end, column, column_end); break;
    case Activation::kReLU: finish_as<Activation::kReLU>(e, y, n, row, row_end, column, column_end); break;
    case Activation::kSiLU: finish_as<Activation::kSiLU>(e, y, n, row, row_end, column, column_end); break;
    case Activation::kGELU: finish_as<Activation::kGELU>(e, y, n, row, row_end, column, column_end); break;
    case Activation::kGELUTanh: finish_as<Activation::kGELUTanh>(e, y, n, row, row_end, column, column_end); break;
  }
}

}  // namespace lepton::VARIANT
