// Squeeze-excite: the mean of each channel of an image, two products of it, and a logistic function give a factor for each
// channel.
#pragma once

#include <cstdint>

#include "convolution.h"

namespace lepton {

// A product [rows] times [rows, columns] and what follows. Weights are floats, or int8 codes if there is a `static_scale`
// by which what is multiplied is rounded.
struct ExcitationStep {
  const void* weights;
  const float* scale;         // of codes: [columns], or one for all
  bool one_scale;
  const float* static_scale;  // null: in float
  const float* bias;          // [columns]; null: none
  int64_t rows, columns;
};

struct Excitation {
  ExcitationStep narrow, wide;
  ConvolutionEpilogue activation;  // what follows the narrow one; only its activation and bounds count
  int64_t pixels;

  // Elements of the memory that `excite` needs, and of a third of it: what the products read, in whole vectors.
  int64_t scratch() const { return 3 * third(); }
  int64_t third() const { return (narrow.rows > wide.rows ? narrow.rows : wide.rows) + 16; }
};

struct ExcitationVariant {
  // The sums of channels of some pixels: to[c].
  void (*sum)(const float* x, int64_t pixels, int64_t c, float* to);
  // The factors of an example, of `count` sums of parts of its pixels.
  void (*excite)(const Excitation&, const float* sums, int64_t count, float* memory, float* y);
};

namespace portable { extern const ExcitationVariant excitation; }
namespace avx2 { extern const ExcitationVariant excitation; }
namespace avx512 { extern const ExcitationVariant excitation; }

}  // namespace lepton
