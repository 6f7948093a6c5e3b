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

#if defined(__AVX512F__)
// The area under the normal density between zero and a size, as polynomials of the distance to the nearest of 16 points
// that are 5.2 / 14.5 apart, off by 1.1e-7 at most (least squares, weighted until the largest errors are equal); beyond it
// is one half.
constexpr float kHalves[5][16] = {
    {0.0f, 0.140060559f, 0.263387412f, 0.359005511f, 0.42428273f, 0.463521808f, 0.484290451f, 0.493969321f,
     0.497940928f, 0.49937579f, 0.499832243f, 0.499960065f, 0.499991596f, 0.49999842f, 0.499999732f, 0.5f},
    {0.143067807f, 0.134157747f, 0.110620864f, 0.0802056566f, 0.0511350408f, 0.0286666006f, 0.0141310906f,
     0.00612511905f, 0.00233447715f, 0.000782343443f, 0.00023053342f, 5.97302569e-05f, 1.3607354e-05f,
     2.72562465e-06f, 4.80026415e-07f, 0.0f},
    {0.0f, -0.00862671062f, -0.0142265139f, -0.0154724512f, -0.0131526934f, -0.00921694096f, -0.00545222312f,
     -0.00275719375f, -0.00120100495f, -0.000452812528f, -0.000148261752f, -4.2257434e-05f, -1.05025947e-05f,
     -2.27919963e-06f, -4.32318615e-07f, 0.0f},
    {-0.00304824463f, -0.00249290257f, -0.00115051342f, 0.000261790497f, 0.00114812399f, 0.00135380693f,
     0.00109743513f, 0.00069736538f, 0.000363990752f, 0.000159593881f, 5.95320053e-05f, 1.90434057e-05f,
     5.25192172e-06f, 1.25346764e-06f, 2.59620009e-07f, 0.0f},
    {0.0f, 0.000263117254f, 0.000376187789f, 0.000304059533f, 0.000133171969f, -2.00038994e-05f, -9.41622275e-05f,
     -9.7106371e-05f, -6.73398972e-05f, -3.61726379e-05f, -1.58247785e-05f, -5.77681294e-06f, -1.7842591e-06f,
     -4.7039822e-07f, -1.06490226e-07f, 0.0f},
};

// x times the area below it, in half of the time that erf takes: off by 6e-7 at most, exactly zero far below zero.
inline Floats gelu(Floats x) {
  constexpr float kScale = 14.5f / 5.2f, kMagic = 12582912.0f;  // adding it rounds to an integer, in the last bits
  const Floats size = magnitude(x);
  const Floats inside = (Floats)_mm512_min_ps(_mm512_set1_ps(15 / kScale), (__m512)size);  // in this order NaN stays
  const Floats point = inside * kScale + kMagic, distance = inside * kScale - (point - kMagic);
  Floats half = Table(kHalves[4]).at((Ints)point);
#pragma GCC unroll 4
  for (int power = 3; power >= 0; --power) half = half * distance + Table(kHalves[power]).at((Ints)point);
  return size * half + 0.5f * x;
}
#else
inline Floats gelu(Floats x) { return x * (0.5f + 0.5f * erf(x * 0.70710678118654752f)); }
#endif

template <Activation kind>
inline Floats activate(Floats x) {
  if constexpr (kind == Activation::kReLU) return x < 0.0f ? Floats{} : x;  // NaN stays
  if constexpr (kind == Activation::kSiLU) return x * (0.5f + 0.5f * tanh(0.5f * x));
  if constexpr (kind == Activation::kGELU) return gelu(x);
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
