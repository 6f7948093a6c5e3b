// Attention of short sequences: see attention.h. Compiled once per instruction set.
//
// Scores of a few queries stay in the first-level cache: they are never written as a whole. A lane holds a key, so
// keys are read with their axes swapped, which is done once for all queries of a part.
#include "attention.h"

#include "attention_rounded.h"
#include "attention_scores.h"
#include "transpose.h"

namespace lepton::VARIANT {
namespace {

constexpr int kVectors = 2;                      // of keys, or of a value, in a tile
constexpr int kRows = kRegisters == 32 ? 8 : 4;  // queries in a tile

// Swaps the axes of the keys of a head: to[D, padded(K)]. Where there is no key, there are zeros.
template <typename Element>
void swap_axes(const Attention& a, const Element* from, float* to) {
  const int64_t stride = a.step(a.depth), padded = Attention::padded(a.keys);
  for (int64_t key = 0; key < padded; key += kLanes) {
    int64_t d = 0;
#if defined(__AVX2__)
    if (key + kLanes <= a.keys) {
      for (; d + kLanes <= a.depth; d += kLanes) {
        Register block[kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) block[j] = (Register)read(from + (key + j) * stride + d);
        transpose(block);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store(to + (d + j) * padded + key, (Floats)block[j]);
      }
    }
#endif
    for (; d < a.depth; ++d)
      for (int j = 0; j < kLanes; ++j)
        to[d * padded + key + j] = key + j < a.keys ? read_one(from + (key + j) * stride + d) : 0;
  }
}

// sums[MR, kVectors] = left[MR, count] @ right[count, kVectors vectors]; rows are `step` and `stride` floats apart.
template <int MR>
inline void multiply(const float* left, int64_t step, const float* right, int64_t stride, int64_t count,
                     Floats (&sums)[MR][kVectors]) {
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sums[i][v] = Floats{};
  for (int64_t at = 0; at < count; ++at, right += stride) {
    Floats values[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) values[v] = load(right + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const float factor = left[i * step + at];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sums[i][v] += values[v] * factor;
    }
  }
}

// `scratch` has room for so many queries and their scores.
template <typename Element, int MR>
void rows(const Attention& a, int64_t example, int64_t head, int64_t query, const float* keys, const float* values,
          float* scratch) {
  const int64_t padded = Attention::padded(a.keys), width = Attention::padded(a.width), tile = kVectors * kLanes;
  const int64_t depth = Attention::padded(a.depth);
  const int64_t row = (example * a.queries + query) * a.heads + head;
  float *q = scratch, *scores = scratch + MR * depth;
  for (int i = 0; i < MR; ++i)
    copy_row(static_cast<const Element*>(a.q) + (row + i * a.heads) * a.depth, a.depth, depth, q + i * depth);
  fetch(static_cast<const Element*>(a.q) + (row + MR * a.heads) * a.depth, a.heads * a.depth, a.depth, MR);
  const float* bias = a.bias;
  if (bias != nullptr) bias += example * a.bias_batch + head * a.bias_head + query * a.bias_query;
  Floats sums[MR][kVectors], most[MR];
  for (int i = 0; i < MR; ++i) most[i] = Floats{} - __builtin_inff();
  for (int64_t key = 0; key < padded; key += tile) {
    multiply<MR>(q, depth, keys + key, padded, a.depth, sums);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = key + v * kLanes;
        const Floats value = finish_scores(a, bias == nullptr ? bias : bias + i * a.bias_query, at, sums[i][v] * a.scale);
        store(scores + i * padded + at, value);
        most[i] = larger_of(value, most[i]);
      }
    }
  }
  float share[MR];
  for (int i = 0; i < MR; ++i) share[i] = 1.0f / exponentials(padded, largest_of(most[i]), scores + i * padded);
  for (int64_t e = 0; e < a.width; e += tile) {
    multiply<MR>(scores, padded, values + e, width, a.keys, sums);
    for (int i = 0; i < MR; ++i)
      for (int v = 0; v < kVectors; ++v)
        write_some(a, (row + i * a.heads) * a.width + e + v * kLanes, sums[i][v] * share[i], a.width - e - v * kLanes);
  }
}

template <typename Element>
void part(const Attention& a, int64_t example, int64_t head, int64_t query, int64_t query_end, float* scratch) {
#if defined(__AVX512VNNI__)
  if (a.rounds && a.keys <= kMostKeys) {
    RoundedHead<Element> rounded(a, example, head, scratch);
    if (rounded.round()) {
      for (; query + 8 <= query_end; query += 8) rounded.template rows<8>(query);
      for (; query + 2 <= query_end; query += 2) rounded.template rows<2>(query);
      if (query < query_end) rounded.template rows<1>(query);
      return;
    }
  }
#endif
  const int64_t width = Attention::padded(a.width);
  float* keys = scratch;
  float* values = keys + a.depth * Attention::padded(a.keys);
  float* rest = values + a.keys * width;
  swap_axes(a, static_cast<const Element*>(a.k) + a.first(example, head, a.depth), keys);
  const Element* value = static_cast<const Element*>(a.v) + a.first(example, head, a.width);
  for (int64_t key = 0; key < a.keys; ++key) copy_row(value + key * a.step(a.width), a.width, width, values + key * width);
  for (; query + kRows <= query_end; query += kRows) rows<Element, kRows>(a, example, head, query, keys, values, rest);
  for (; query + 2 <= query_end; query += 2) rows<Element, 2>(a, example, head, query, keys, values, rest);
  if (query < query_end) rows<Element, 1>(a, example, head, query, keys, values, rest);
}

}  // namespace

void attention(const Attention& a, int64_t example, int64_t head, int64_t query, int64_t query_end, float* scratch) {
  (a.narrow ? part<uint16_t> : part<float>)(a, example, head, query, query_end, scratch);
}

}  // namespace lepton::VARIANT
