// Attention of very few queries, as in a step that makes one token: see attention.h. Compiled once per instruction set.
//
// It takes as long as reading keys and values does, so these are read where they are, once, and what a mask hides is
// not read: a key whose score is replaced, a value whose weight is zero.
#include "attention.h"

#include "attention_scores.h"
#include "transpose.h"

namespace lepton::VARIANT {
namespace {

constexpr int kVectors = 4;  // of a value that are added up at once
constexpr int kAhead = 32;   // keys are fetched before they are multiplied: the processor does not foresee where heads are

// A vector of the sums of vectors.
inline Floats sums_of(Floats (&rows)[kLanes]) {
#if defined(__AVX2__)
  Register block[kLanes];
#pragma GCC unroll 16
  for (int j = 0; j < kLanes; ++j) block[j] = (Register)rows[j];
  transpose(block);
  Floats total[2] = {(Floats)block[0], (Floats)block[1]};
#pragma GCC unroll 16
  for (int j = 2; j < kLanes; ++j) total[j % 2] += (Floats)block[j];
  return total[0] + total[1];
#else
  Floats found;
  for (int j = 0; j < kLanes; ++j) found[j] = sum_of(rows[j]);
  return found;
#endif
}

// Products of a query with a vector of keys, of which `left` are there.
template <typename Element>
Floats multiply(const Attention& a, const float* q, const Element* keys, int64_t left) {
  const int64_t step = a.step(a.depth);
  Floats sums[kLanes] = {};
  if (left >= kLanes) {
    for (int64_t d = 0; d < a.depth; d += kLanes) {
      const Floats factor = load(q + d);
#pragma GCC unroll 16
      for (int j = 0; j < kLanes; ++j) sums[j] += read_some(keys + j * step + d, a.depth - d) * factor;
    }
  } else {
    for (int j = 0; j < left; ++j)
      for (int64_t d = 0; d < a.depth; d += kLanes) sums[j] += read_some(keys + j * step + d, a.depth - d) * load(q + d);
  }
  return sums_of(sums);
}

inline bool any(Ints flags) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)flags, (__m512i)flags) != 0;
#else
  bool found = false;
  for (int lane = 0; lane < kLanes; ++lane) found = found || flags[lane] != 0;
  return found;
#endif
}

template <typename Element>
void row(const Attention& a, int64_t example, int64_t head, int64_t query, float* scratch) {
  const int64_t padded = Attention::padded(a.keys), place = (example * a.queries + query) * a.heads + head;
  float *q = scratch, *scores = scratch + Attention::padded(a.depth);
  copy_row(static_cast<const Element*>(a.q) + place * a.depth, a.depth, Attention::padded(a.depth), q);
  const Element* keys = static_cast<const Element*>(a.k) + a.first(example, head, a.depth);
  const Element* values = static_cast<const Element*>(a.v) + a.first(example, head, a.width);
  const float* bias = a.bias;
  if (bias != nullptr) bias += example * a.bias_batch + head * a.bias_head + query * a.bias_query;
  Floats most = Floats{} - __builtin_inff();
  for (int64_t key = 0; key < padded; key += kLanes) {
    const int64_t left = a.keys - key;
    // Zeros stand for scores that are replaced, and where there is no key.
    const bool hidden = left <= 0 || (a.masks && bias != nullptr && !any(read_bias(a, bias, key, left) == 0.0f));
    Floats sums = {};
    if (!hidden) {
      const Element* from = keys + key * a.step(a.depth);
      if (left > kAhead) fetch(from + kAhead * a.step(a.depth), a.step(a.depth), a.depth, kLanes);
      fetch(values + key * a.step(a.width), a.step(a.width), a.width, kLanes);
      sums = multiply(a, q, from, left);
    }
    const Floats value = finish_scores(a, bias, key, sums * a.scale);
    store(scores + key, value);
    most = larger_of(value, most);
  }
  const int64_t next = head + 1 < a.heads ? a.first(example, head + 1, a.depth) : a.first(example + 1, 0, a.depth);
  fetch(static_cast<const Element*>(a.k) + next, a.step(a.depth), a.depth, kAhead);
  const float share = 1.0f / exponentials(padded, largest_of(most), scores);
  for (int64_t e = 0; e < a.width; e += kVectors * kLanes) {
    Floats sums[kVectors] = {};
    const int64_t left = a.width - e;
    for (int64_t key = 0; key < a.keys; ++key) {
      const float weight = scores[key];
      if (weight == 0.0f) continue;
      const Element* value = values + key * a.step(a.width) + e;
      if (left >= kVectors * kLanes) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[v] += read(value + v * kLanes) * weight;
      } else {
        for (int v = 0; v < kVectors; ++v) sums[v] += read_some(value + v * kLanes, left - v * kLanes) * weight;
      }
    }
    for (int v = 0; v < kVectors && v * kLanes < left; ++v)
      write_some(a, place * a.width + e + v * kLanes, sums[v] * share, left - v * kLanes);
  }
}

}  // namespace

void attention_of_few(const Attention& a, int64_t example, int64_t head, int64_t query, int64_t query_end,
                      float* scratch) {
  for (; query < query_end; ++query) (a.narrow ? row<uint16_t> : row<float>)(a, example, head, query, scratch);
}

}  // namespace lepton::VARIANT
