// Attention of rounded operands: included by attention.cc.
//
// A processor with VNNI adds 32 products of 16 bits in the time of 16 of floats. All are rounded so finely that no sum
// exceeds 32 bits: each query and the keys of a head by their largest magnitudes, to 8191 steps of it for a depth of 32
// and 5792 for 64; values to 2047 steps of theirs; and the weights of keys to steps of the largest weight, 32767 where
// weights add up to 32 of it, and fewer above, down to 2048 where 512 are the same.
//
// Results are means by the rounded weights, so they lie within the range of the rounded values. Weights of a query are off
// by less than a step each. What is added before rounding differs between 16 keys beside each other, so that where these
// have the same weight they are off by half a step at most together, and small weights of many keys do not vanish at once.
#pragma once

#include "attention_scores.h"
#include "transpose.h"

#if defined(__AVX512VNNI__)
namespace lepton::VARIANT {
namespace {

constexpr int64_t kMostKeys = 512;     // so that the steps of weights are small
constexpr int32_t kValueSteps = 2047;  // of the largest magnitude of a value
// Of all weights of a query together, so that 32 bits hold their sum of values. Some are left for the rounding of floats.
constexpr int64_t kWeightSteps = INT32_MAX / kValueSteps - 64;

// The largest magnitude of some numbers; NaN if one is none.
struct Largest {
  __m512 most = _mm512_setzero_ps();
  __mmask16 strange = 0;

  void add(Floats values) {
    const __m512 size = _mm512_abs_ps((__m512)values);
    strange |= _mm512_cmp_ps_mask(size, size, _CMP_UNORD_Q);  // which a maximum does not show
    most = _mm512_max_ps(most, size);
  }
  float find() const { return strange != 0 ? __builtin_nanf("") : _mm512_reduce_max_ps(most); }
};

inline bool is_finite(float value) { return __builtin_fabsf(value) < __builtin_inff(); }

// Numbers in so many steps of their largest magnitude; what is so small that a step has no inverse, as zero.
struct Steps {
  float step, inverse;
  Steps(float largest, int32_t count) : step(largest / count), inverse(largest > 1e-30f ? count / largest : 0.0f) {}
  __m512i operator()(Floats values) const { return _mm512_cvtps_epi32((__m512)(values * inverse)); }
};

// Steps for numbers of which `count` products are added.
inline int32_t steps_of(int64_t count) {
  const int32_t steps = static_cast<int32_t>(__builtin_sqrtf(2147483000.0f / static_cast<float>(count)));
  return steps < 32767 ? steps : 32767;
}

// 32 elements of a row in an order of their own, which is the same for queries and keys.
template <typename Element>
inline __m512i round_row(const Element* from, int64_t count, const Steps& steps) {
  return _mm512_packs_epi32(steps(read_some(from, count)), steps(read_some(from + kLanes, count - kLanes)));
}

inline void add_pairs(__m512i& sum, const __m512i& x, const __m512i& y) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
}

constexpr int kPairVectors = 2;  // of keys, or of a value, in a tile

// to[MR, kPairVectors] = left[MR, count pairs] @ right[count pairs, kPairVectors vectors]; rows are `step` and `stride` pairs
// apart. Not inlined: in a larger function GCC 12 leaves the sums in memory.
template <int MR>
__attribute__((noinline)) void multiply_pairs(const int32_t* left, int64_t step, const int32_t* right, int64_t stride,
                                              int64_t count, __m512i (&to)[MR][kPairVectors]) {
  __m512i sums[MR][kPairVectors];
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kPairVectors; ++v) sums[i][v] = _mm512_setzero_si512();
  for (int64_t at = 0; at < count; ++at, right += stride) {
    __m512i pairs[kPairVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kPairVectors; ++v) pairs[v] = _mm512_load_si512(right + v * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      const __m512i pair = _mm512_set1_epi32(left[i * step + at]);
#pragma GCC unroll 2
      for (int v = 0; v < kPairVectors; ++v) add_pairs(sums[i][v], pairs[v], pair);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < kPairVectors; ++v) _mm512_store_si512(&to[i][v], sums[i][v]);
}

// The keys and values of a head, rounded, in pairs of 16 bits, and room for the scores of a few queries.
template <typename Element>
struct RoundedHead {
  static constexpr int kVectors = kPairVectors, kRows = 8, kAhead = 16;
  const Attention& a;
  int64_t example, head;
  int64_t keys = Attention::padded(a.keys), depth = Attention::padded(a.depth), width = Attention::padded(a.width);
  int32_t *swapped, *values, *q;  // [pairs of depth, keys], [pairs of keys, width], [kRows, pairs of depth]
  float* scores;                  // [kRows, keys]; then weights, of 16 bits
  float key_step = 0, value_step = 0;
  int32_t depth_steps = steps_of(depth);

  RoundedHead(const Attention& a, int64_t example, int64_t head, float* scratch) : a(a), example(example), head(head) {
    swapped = reinterpret_cast<int32_t*>(scratch);
    values = swapped + depth / 2 * keys;
    q = values + keys / 2 * width;
    scores = reinterpret_cast<float*>(q + kRows * depth / 2);
  }

  // Meanwhile fetches rows that come next, beyond what the processor foresees.
  static float largest_in(const Element* from, int64_t rows, int64_t stride, int64_t size) {
    Largest found;
    for (int64_t row = 0; row < rows; ++row) {
      if (row + kAhead < rows) fetch(from + (row + kAhead) * stride, 0, size, 1);
      for (int64_t at = 0; at < size; at += kLanes) found.add(read_some(from + row * stride + at, size - at));
    }
    return found.find();
  }

  // False if one of the keys or values is infinite or NaN.
  bool round() {
    const auto* const k = static_cast<const Element*>(a.k) + a.first(example, head, a.depth);
    const auto* const v = static_cast<const Element*>(a.v) + a.first(example, head, a.width);
    const int64_t k_stride = a.step(a.depth), v_stride = a.step(a.width);
    fetch(v, v_stride, a.width, static_cast<int>(a.keys < kAhead ? a.keys : kAhead));
    const Steps of_keys(largest_in(k, a.keys, k_stride, a.depth), depth_steps);
    const Steps of_values(largest_in(v, a.keys, v_stride, a.width), kValueSteps);
    key_step = of_keys.step;
    value_step = of_values.step;
    if (!is_finite(key_step) || !is_finite(value_step)) return false;
    for (int64_t d = 0; d < a.depth; d += 2 * kLanes)
      for (int64_t key = 0; key < keys; key += kLanes) {
        __m512i block[16];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j)
          block[j] = key + j < a.keys ? round_row(k + (key + j) * k_stride + d, a.depth - d, of_keys) : __m512i{};
        transpose(block);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) _mm512_store_si512(swapped + (d / 2 + j) * keys + key, block[j]);
      }
    const __m512i lower = _mm512_set1_epi32(0xffff);
    for (int64_t key = 0; key < a.keys; key += 2)
      for (int64_t e = 0; e < width; e += kLanes) {
        const Element* from = v + key * v_stride + e;
        const __m512i first = of_values(read_some(from, a.width - e));
        const __m512i second = key + 1 < a.keys ? of_values(read_some(from + v_stride, a.width - e)) : __m512i{};
        _mm512_store_si512(values + key / 2 * width + e,
                           _mm512_or_si512(_mm512_and_si512(first, lower), _mm512_slli_epi32(second, 16)));
      }
    return true;
  }

  // Rounds a few queries, and finds by what the sums of each are multiplied: NaN, if one of its numbers is infinite or NaN.
  template <int MR>
  void round_queries(const Element* from, float (&factor)[MR]) {
    for (int i = 0; i < MR; ++i) {
      const Element* row = from + i * a.heads * a.depth;
      const Steps steps(largest_in(row, 1, 0, a.depth), depth_steps);
      factor[i] = is_finite(steps.step) ? steps.step * key_step * a.scale : __builtin_nanf("");
      for (int64_t d = 0; d < depth; d += 2 * kLanes)
        _mm512_store_si512(q + (i * depth + d) / 2, round_row(row + d, a.depth - d, steps));
    }
  }

  // Makes the scores of a query weights, and returns by what their sums are multiplied.
  float weigh(float largest, float* row) const {
    const float total = exponentials(keys, largest, row);
    const float most = static_cast<float>(kWeightSteps - keys) / total;  // each may be rounded up
    const __m512 by = _mm512_set1_ps(most < 32767.0f ? most : 32767.0f);
    // In steps, all within half of one: what is zero stays zero.
    const __m512 added = _mm512_setr_ps(-15, 1, -7, 9, -11, 5, -3, 13, -13, 3, -5, 11, -9, 7, -1, 15) * (1.0f / 32);
    auto* const to = reinterpret_cast<int16_t*>(row);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t key = 0; key < keys; key += kLanes) {
      const __m512i steps = _mm512_cvtps_epi32(_mm512_fmadd_ps((__m512)load(row + key), by, added));
      sum = _mm512_add_epi32(sum, steps);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + key), _mm512_cvtepi32_epi16(steps));
    }
    return total == total ? value_step / static_cast<float>(_mm512_reduce_add_epi32(sum)) : total;
  }

  template <int MR>
  void rows(int64_t query) {
    const int64_t row = (example * a.queries + query) * a.heads + head;
    float factor[MR];
    const Element* from = static_cast<const Element*>(a.q) + row * a.depth;
    round_queries<MR>(from, factor);
    fetch(from + MR * a.heads * a.depth, a.heads * a.depth, a.depth, MR);
    const float* bias = a.bias;
    if (bias != nullptr) bias += example * a.bias_batch + head * a.bias_head + query * a.bias_query;
    __m512i sums[MR][kVectors];
    Floats most[MR];
    for (int i = 0; i < MR; ++i) most[i] = Floats{} - __builtin_inff();
    for (int64_t key = 0; key < keys; key += kVectors * kLanes) {
      multiply_pairs<MR>(q, depth / 2, swapped + key, keys, depth / 2, sums);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = key + v * kLanes;
          const Floats score = as_floats((Ints)sums[i][v]) * factor[i];
          const Floats value = finish_scores(a, bias == nullptr ? bias : bias + i * a.bias_query, at, score);
          store(scores + i * keys + at, value);
          most[i] = larger_of(value, most[i]);
        }
      }
    }
    float share[MR];
    for (int i = 0; i < MR; ++i) share[i] = weigh(largest_of(most[i]), scores + i * keys);
    for (int64_t e = 0; e < a.width; e += kVectors * kLanes) {
      multiply_pairs<MR>(reinterpret_cast<const int32_t*>(scores), keys, values + e, width, (a.keys + 1) / 2, sums);
      for (int i = 0; i < MR; ++i)
        for (int v = 0; v < kVectors; ++v)
          write_some(a, (row + i * a.heads) * a.width + e + v * kLanes, as_floats((Ints)sums[i][v]) * share[i],
                     a.width - e - v * kLanes);
    }
  }
};

}  // namespace
}  // namespace lepton::VARIANT
#endif
