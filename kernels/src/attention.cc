// Attention of short sequences: see attention.h. Compiled once per instruction set.
//
// Scores of a few queries stay in the first-level cache: they are never written as a whole. A lane holds a key, so
// keys are read with their axes swapped, which is done once for all queries of a part.
#include "attention.h"

#include "transpose.h"
#include "vectors.h"

namespace lepton::VARIANT {
namespace {

constexpr int kVectors = 2;                      // of keys, or of a value, in a tile
constexpr int kRows = kRegisters == 32 ? 8 : 4;  // queries in a tile

inline Floats larger_of(Floats a, Floats b) { return a > b ? a : b; }

// e^x for x up to zero, to float32's precision; 0 where it would be smaller than a normal float, and NaN of NaN.
inline Floats exp(Floats x) {
  const Floats magic = Floats{} + 12582912.0f;  // adding it rounds to an integer, in the last bits
  const Floats at = larger_of(x, Floats{} - 87.0f);
  const Floats shifted = at * 1.44269504088896341f + magic, count = shifted - magic;
  const Floats rest = (at - count * 0.693359375f) + count * 2.12194440e-4f;
  Floats value = rest * 1.9875691500e-4f + 1.3981999507e-3f;
  value = value * rest + 8.3334519073e-3f;
  value = value * rest + 4.1665795894e-2f;
  value = value * rest + 1.6666665459e-1f;
  value = value * rest + 5.0000001201e-1f;
  value = value * (rest * rest) + rest + 1.0f;
  const Ints power = ((Ints)shifted - 0x4b400000 + 127) << 23;
  value = value * (Floats)power;
  value = x < -87.0f ? Floats{} : value;
  return x == x ? value : x;
}

// Swaps the axes of the keys of a head: to[D, padded(K)]. Where there is no key, there are zeros.
void swap_axes(const Attention& a, const float* from, float* to) {
  const int64_t stride = a.heads * a.depth, padded = Attention::padded(a.keys);
  for (int64_t key = 0; key < padded; key += kLanes) {
    int64_t d = 0;
#if defined(__AVX2__)
    if (key + kLanes <= a.keys) {
      for (; d + kLanes <= a.depth; d += kLanes) {
        Register block[kLanes];
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) block[j] = load_register(from + (key + j) * stride + d);
        transpose(block);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) store(to + (d + j) * padded + key, (Floats)block[j]);
      }
    }
#endif
    for (; d < a.depth; ++d)
      for (int j = 0; j < kLanes; ++j) to[d * padded + key + j] = key + j < a.keys ? from[(key + j) * stride + d] : 0;
  }
}

void copy_values(const Attention& a, const float* from, float* to) {
  const int64_t stride = a.heads * a.width, padded = Attention::padded(a.width);
  for (int64_t key = 0; key < a.keys; ++key, from += stride, to += padded) {
    int64_t e = 0;
    for (; e + kLanes <= a.width; e += kLanes) store(to + e, load(from + e));
    for (; e < padded; ++e) to[e] = e < a.width ? from[e] : 0;
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

// Scores of a query from sums, with the bias of the query, if any; minus infinity where there is no key.
inline Floats finish_scores(const Attention& a, const float* bias, int64_t key, Floats sums) {
  Floats value = sums * a.scale;
  const int64_t left = a.keys - key;
  if (bias != nullptr) {
    Floats added = {};
    if (a.bias_key == 0) {
      added = Floats{} + *bias;
    } else if (left >= kLanes) {
      added = load(bias + key);
    } else {
      for (int lane = 0; lane < left; ++lane) added[lane] = bias[key + lane];
    }
    value = !a.masks ? value + added : added == 0.0f ? value : added;
  }
  if (left < kLanes)
    for (int lane = 0; lane < kLanes; ++lane) value[lane] = lane < left ? value[lane] : -__builtin_inff();
  return value;
}

// Makes scores exponentials, and returns their sum.
float exponentials(int64_t count, float largest, float* scores) {
  Floats total[2] = {};
  for (int64_t key = 0; key < count; key += 2 * kLanes) {
    for (int half = 0; half < 2; ++half) {
      float* at = scores + key + half * kLanes;
      const Floats value = exp(load(at) - largest);
      store(at, value);
      total[half] += value;
    }
  }
  return sum_of(total[0] + total[1]);
}

template <int MR>
void rows(const Attention& a, int64_t example, int64_t head, int64_t query, const float* keys, const float* values,
          float* scores) {
  const int64_t padded = Attention::padded(a.keys), width = Attention::padded(a.width), tile = kVectors * kLanes;
  const int64_t q_stride = a.heads * a.depth, y_stride = a.heads * a.width;
  const float* q = a.q + (example * a.queries + query) * q_stride + head * a.depth;
  float* y = a.y + (example * a.queries + query) * y_stride + head * a.width;
  const float* bias = a.bias;
  if (bias != nullptr) bias += example * a.bias_batch + head * a.bias_head + query * a.bias_query;
  Floats sums[MR][kVectors], most[MR];
  for (int i = 0; i < MR; ++i) most[i] = Floats{} - __builtin_inff();
  for (int64_t key = 0; key < padded; key += tile) {
    multiply<MR>(q, q_stride, keys + key, padded, a.depth, sums);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        const int64_t at = key + v * kLanes;
        const Floats value = finish_scores(a, bias == nullptr ? bias : bias + i * a.bias_query, at, sums[i][v]);
        store(scores + i * padded + at, value);
        most[i] = larger_of(value, most[i]);
      }
    }
  }
  float share[MR];
  for (int i = 0; i < MR; ++i) {
    float* row = scores + i * padded;
    share[i] = 1.0f / exponentials(padded, largest_of(most[i]), row);
  }
  for (int64_t e = 0; e < a.width; e += tile) {
    multiply<MR>(scores, padded, values + e, width, a.keys, sums);
    for (int i = 0; i < MR; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        float* to = y + i * y_stride + e + v * kLanes;
        const int64_t left = a.width - e - v * kLanes;
        const Floats out = sums[i][v] * share[i];
        if (left >= kLanes) {
          store(to, out);
        } else {
          for (int64_t lane = 0; lane < left; ++lane) to[lane] = out[lane];
        }
      }
    }
  }
}

}  // namespace

void attention(const Attention& a, int64_t example, int64_t head, int64_t query, int64_t query_end, float* scratch) {
  float* keys = scratch;
  float* values = keys + a.depth * Attention::padded(a.keys);
  float* scores = values + a.keys * Attention::padded(a.width);
  swap_axes(a, a.k + example * a.keys * a.heads * a.depth + head * a.depth, keys);
  copy_values(a, a.v + example * a.keys * a.heads * a.width + head * a.width, values);
  for (; query + kRows <= query_end; query += kRows) rows<kRows>(a, example, head, query, keys, values, scores);
  for (; query + 2 <= query_end; query += 2) rows<2>(a, example, head, query, keys, values, scores);
  if (query < query_end) rows<1>(a, example, head, query, keys, values, scores);
}

}  // namespace lepton::VARIANT
