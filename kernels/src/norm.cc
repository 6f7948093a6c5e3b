// Norms of rows: see norm.h. Compiled once per instruction set.
//
// A row is read three times, the last two from the first-level cache: its mean, the mean of the squares of what differs
// from it (never negative, as the difference of two large sums may be), and the result.
#include "norm.h"

#include "vectors.h"

namespace lepton::VARIANT {
namespace {

// The sum of f(x) of each element, in one order for every caller.
template <typename F>
float sum(const float* x, int64_t k, const F& f) {
  Floats totals[4] = {};
  int64_t i = 0;
  for (; i + 4 * kLanes <= k; i += 4 * kLanes)
    for (int j = 0; j < 4; ++j) totals[j] += f(load(x + i + j * kLanes));
  for (; i + kLanes <= k; i += kLanes) totals[0] += f(load(x + i));
  float total = sum_of((totals[0] + totals[1]) + (totals[2] + totals[3]));
  for (; i < k; ++i) total += f(Floats{} + x[i])[0];
  return total;
}

void norm_row(const Norm& p, const float* x, float* y) {
  const float count = static_cast<float>(p.k);
  const Floats mean = Floats{} + (p.centered ? sum(x, p.k, [](Floats at) { return at; }) / count : 0.0f);
  const float square = sum(x, p.k, [&](Floats at) { return (at - mean) * (at - mean); }) / count;
  const Floats factor = Floats{} + 1.0f / __builtin_sqrtf(square + p.epsilon);
  int64_t i = 0;
  for (; i + kLanes <= p.k; i += kLanes) {
    Floats at = (load(x + i) - mean) * factor;
    if (p.gain != nullptr) at *= load(p.gain + i);
    if (p.shift != nullptr) at += load(p.shift + i);
    store(y + i, at);
  }
  for (; i < p.k; ++i)
    y[i] = (x[i] - mean[0]) * factor[0] * (p.gain == nullptr ? 1.0f : p.gain[i]) + (p.shift == nullptr ? 0.0f : p.shift[i]);
}

}  // namespace

void norm(const Norm& p, int64_t row, int64_t row_end) {
  for (; row < row_end; ++row) norm_row(p, p.x + row * p.k, p.y + row * p.k);
}

}  // namespace lepton::VARIANT
