// Attention: softmax(queries @ keys^T * scale + bias) @ values, of each head of each example.
#pragma once

#include <cstdint>

namespace lepton {

// y[B, Q, H, E] of q[B, Q, H, D], k[B, K, H, D] and v[B, K, H, E], row-major.
struct Attention {
  const void *q, *k, *v;  // floats of 32 bits, or of 16 (bfloat16) if `narrow`
  const float* bias;      // added to the scores, or null
  void* y;
  int64_t batch, heads, queries, keys, depth, width;  // B, H, Q, K, D, E
  int64_t bias_batch, bias_head, bias_query, bias_key;  // steps of the bias along these axes; 0 where it is the same
  float scale;
  bool masks;        // a bias other than zero takes the place of a score
  bool heads_first;  // keys and values are k[B, H, K, D] and v[B, H, K, E] instead
  bool narrow, narrow_y;
  bool rounds;  // many queries, keys, values and weights may be rounded: see attention_rounded.h

  // Up to so many queries, each reads keys and values where they are: no copy of them would pay.
  static constexpr int64_t kFew = 4;
  bool few() const { return queries <= kFew; }

  static int64_t padded(int64_t size) { return (size + 31) / 32 * 32; }
  // Floats that a part needs: a few queries and their scores; and, of many queries, the keys of a head with their axes
  // swapped, and its values.
  int64_t scratch() const {
    if (few()) return padded(depth) + padded(keys);
    return (8 + padded(keys)) * padded(depth) + (8 + padded(width)) * padded(keys);
  }

  // Where the first row of a head of keys or values, of `size` elements each, is, and how far the next one is.
  int64_t first(int64_t example, int64_t head, int64_t size) const {
    return heads_first ? (example * heads + head) * keys * size : (example * keys * heads + head) * size;
  }
  int64_t step(int64_t size) const { return heads_first ? size : heads * size; }
};

// Queries [query, query_end) of a head of an example; `scratch` is aligned to 64 bytes. The result of each query does
// not depend on the others. `attention_of_few` is for `few()` queries, `attention` for any number.
using AttentionPart = void(const Attention&, int64_t example, int64_t head, int64_t query, int64_t query_end,
                           float* scratch);

namespace portable { AttentionPart attention, attention_of_few; }
namespace avx2 { AttentionPart attention, attention_of_few; }
namespace avx512 { AttentionPart attention, attention_of_few; }

}  // namespace lepton
