// Attention: softmax(queries @ keys^T * scale + bias) @ values, of each head of each example.
#pragma once

#include <cstdint>

namespace lepton {

// y[B, Q, H, E] of q[B, Q, H, D], k[B, K, H, D] and v[B, K, H, E], row-major.
struct Attention {
  const float *q, *k, *v;
  const float* bias;  // added to the scores, or null
  float* y;
  int64_t batch, heads, queries, keys, depth, width;  // B, H, Q, K, D, E
  int64_t bias_batch, bias_head, bias_query, bias_key;  // steps of the bias along these axes; 0 where it is the same
  float scale;
  bool masks;  // a bias other than zero takes the place of a score

  static int64_t padded(int64_t size) { return (size + 31) / 32 * 32; }
  // Floats that a part needs: the keys of a head with their axes swapped, its values, and the scores of a few queries.
  int64_t scratch() const { return depth * padded(keys) + keys * padded(width) + 8 * padded(keys); }
};

// Queries [query, query_end) of a head of an example; `scratch` is aligned to 64 bytes. The result of each query does
// not depend on the others.
using AttentionPart = void(const Attention&, int64_t example, int64_t head, int64_t query, int64_t query_end,
                           float* scratch);

namespace portable { AttentionPart attention; }
namespace avx2 { AttentionPart attention; }
namespace avx512 { AttentionPart attention; }

}  // namespace lepton
