// Squeeze-excite: see excitation.h. Compiled once per instruction set.
#include "excitation.h"

#include "convolution_finish.h"

namespace lepton::VARIANT {
namespace {

constexpr int kColumns = 4;  // vectors whose sums are in registers

inline Floats load_upto(const float* from, int64_t count) {
  return count >= kLanes ? load(from) : load_some(from, static_cast<int>(count));
}

inline void store_upto(float* to, Floats values, int64_t count) {
  if (count >= kLanes)
    store(to, values);
  else
    store_some(to, values, static_cast<int>(count));
}

template <int V>
void sum_vectors(const float* x, int64_t pixels, int64_t c, float* to) {
  Floats sums[V] = {};
  for (int64_t pixel = 0; pixel < pixels; ++pixel, x += c)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[v] += load(x + v * kLanes);
  for (int v = 0; v < V; ++v) store(to + v * kLanes, sums[v]);
}

void sum(const float* x, int64_t pixels, int64_t c, float* to) {
  int64_t at = 0;
  for (; at + kColumns * kLanes <= c; at += kColumns * kLanes) sum_vectors<kColumns>(x + at, pixels, c, to + at);
  for (; at + kLanes <= c; at += kLanes) sum_vectors<1>(x + at, pixels, c, to + at);
  if (at == c) return;
  const int count = static_cast<int>(c - at);
  Floats some = {};
  for (int64_t pixel = 0; pixel < pixels; ++pixel) some += load_some(x + pixel * c + at, count);
  store_some(to + at, some, count);
}

struct InFloat {
  using Value = float;
  using Sum = Floats;
  static Sum weights(const void* from, int64_t at) { return load(static_cast<const float*>(from) + at); }
  static Sum some_weights(const void* from, int64_t at, int64_t count) {
    return load_some(static_cast<const float*>(from) + at, static_cast<int>(count));
  }
  static Floats value(const ExcitationStep&, Sum sum, int64_t, int) { return sum; }
};

struct OfCodes {
  using Value = int32_t;
  using Sum = Ints;
  static Sum weights(const void* from, int64_t at) { return widen_signed(static_cast<const uint8_t*>(from) + at); }
  static Sum some_weights(const void* from, int64_t at, int64_t count) {
    Sum found = {};
    for (int64_t lane = 0; lane < count; ++lane) found[lane] = static_cast<const int8_t*>(from)[at + lane];
    return found;
  }
  static Floats value(const ExcitationStep& s, Sum sum, int64_t at, int count) {
    const Floats scale = s.one_scale ? Floats{} + *s.scale : load_upto(s.scale + at, count);
    return as_floats(sum) * (*s.static_scale * scale);
  }
};

// Columns from `at` on, V vectors, of which the last may lack some.
template <class Op, int V, typename End>
void some_columns(const ExcitationStep& s, const typename Op::Value* x, float* y, int64_t at, const End& end) {
  using Sum = typename Op::Sum;
  Sum even[V] = {}, odd[V] = {};
  const auto add = [&](Sum(&sums)[V], int64_t row) __attribute__((always_inline)) {
    const Sum factor = Sum{} + x[row];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[v] += Op::weights(s.weights, row * s.columns + at + v * kLanes) * factor;
  };
  int64_t row = 0;
  const int64_t all = s.rows * s.columns;
  // What is read beyond a row's end belongs to the next one, and its sums are not used.
  for (; (row + 1) * s.columns + at + V * kLanes <= all; row += 2) add(even, row), add(odd, row + 1);
  for (; row < s.rows; ++row)
    for (int v = 0; v < V; ++v) {
      const int64_t from = row * s.columns + at + v * kLanes, left = all - from;
      const Sum weights = left >= kLanes ? Op::weights(s.weights, from) : Op::some_weights(s.weights, from, left);
      even[v] += weights * (Sum{} + x[row]);
    }
  for (int v = 0; v < V; ++v) {
    const int64_t column = at + v * kLanes, left = s.columns - column;
    const int count = static_cast<int>(left < kLanes ? left : kLanes);
    Floats value = Op::value(s, even[v] + odd[v], column, count);
    if (s.bias != nullptr) value += load_upto(s.bias + column, count);
    store_upto(y + column, end(value), count);
  }
}

template <class Op, typename End>
void multiply_as(const ExcitationStep& s, const typename Op::Value* x, float* y, const End& end) {
  int64_t at = 0;
  for (; at + (kColumns - 1) * kLanes < s.columns; at += kColumns * kLanes) some_columns<Op, kColumns>(s, x, y, at, end);
  if (at + kLanes < s.columns) {
    some_columns<Op, 2>(s, x, y, at, end);
    at += 2 * kLanes;
  }
  if (at < s.columns) some_columns<Op, 1>(s, x, y, at, end);
}

// y[columns] of x[rows]; `rounded` has memory for as many, in whole vectors.
template <typename End>
void multiply(const ExcitationStep& s, const float* x, int32_t* rounded, float* y, const End& end) {
  if (s.static_scale == nullptr) return multiply_as<InFloat>(s, x, y, end);
  const CodeScale by = code_scale(*s.static_scale);
  for (int64_t i = 0; i < s.rows; i += kLanes) {
    *reinterpret_cast<Ints*>(rounded + i) = codes_of_values(by, load_upto(x + i, s.rows - i));
  }
  multiply_as<OfCodes>(s, rounded, y, end);
}

void excite(const Excitation& e, const float* sums, int64_t count, float* memory, float* y) {
  float *const means = memory, *const narrow = memory + e.third();
  auto* const rounded = reinterpret_cast<int32_t*>(memory + 2 * e.third());
  const int64_t c = e.narrow.rows;
  const Floats pixels = Floats{} + static_cast<float>(e.pixels);
  for (int64_t i = 0; i < c; i += kLanes) {
    Floats total = {};
    for (int64_t part = 0; part < count; ++part) total += load_upto(sums + part * c + i, c - i);
    store_upto(means + i, total / pixels, c - i);
  }
  multiply(e.narrow, means, rounded, narrow, [&](Floats v) { return activated(e.activation, v); });
  multiply(e.wide, narrow, rounded, y, [](Floats v) { return logistic(v); });
}

}  // namespace

extern const ExcitationVariant excitation = {sum, excite};

}  // namespace lepton::VARIANT
