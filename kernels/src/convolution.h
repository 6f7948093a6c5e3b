// Convolutions of images with their channels last, in float32 and of int8 codes, and what follows them.
#pragma once

#include <cstdint>

#include "scale.h"

namespace lepton {

// Where the elements of a convolution are. Sizes are at least 1; padding is not negative.
struct Window {
  int64_t n, h, w, c;              // x[n, h, w, c]
  int64_t out_h, out_w, o;         // y[n, out_h, out_w, o]
  int64_t k_h, k_w;                // positions of the window
  int64_t stride_h, stride_w, dilation_h, dilation_w;
  int64_t top, bottom, left, right;  // padding

  int64_t padded_h() const { return h + top + bottom; }
  int64_t padded_w() const { return w + left + right; }
  bool is_padded() const { return top + bottom + left + right > 0; }
  int64_t pixels() const { return n * out_h * out_w; }
  int64_t terms() const { return k_h * k_w * c; }
  // Positions beside each other that are also so in memory are one run.
  bool joins() const { return dilation_w == 1; }
  int64_t runs() const { return joins() ? k_h : k_h * k_w; }
  int64_t run_length() const { return joins() ? k_w * c : c; }
};

enum class ConvolutionActivation : int32_t { kNone = 0, kClamp = 1, kSilu = 2 };

// What becomes of each sum before it is written.
struct ConvolutionEpilogue {
  const float* bias;      // [o]; null: none
  const float* residual;  // of the shape of y, added before or after the activation; null: none
  ConvolutionActivation activation;
  float low, high;        // kClamp
  bool add_first;
  // Of codes that are written: their scale, and those of the bounds, or the least and the largest.
  CodeScale code_scale;
  float low_code, high_code;
};

// A dense convolution. Weights are lanes of 32 bits: a float, or as many codes of successive terms as fit.
struct Convolution {
  Window window;
  ConvolutionEpilogue epilogue;      // its bias has zeros up to `stride`
  const void* x;          // [n, padded_h, padded_w, c], padding included
  const void* weights;    // [runs, steps, stride]
  int64_t steps;          // lanes of a run, ceil(run_length / terms of a lane)
  int64_t stride;         // columns of the weights, a multiple of the vectors' lanes
  float* y;
  int64_t pitch;          // of depthwise ones in float: from a pixel of y to the next
  uint8_t* codes;         // written instead of y, each with 128 added; null: y is written
  // Where a result is a sum and a bias between bounds, and one scale is for all examples: by what a sum is multiplied, and
  // what is then added, that it becomes its code with 128 added, [stride] each; null: it is rounded otherwise.
  const float *code_factor, *code_bias;
  // Of codes only.
  const float* scale;     // [stride], of columns
  const int32_t* offset;  // [stride], what is subtracted from the sums of a column
  const float* row_scale; // [n]
  // One scale is for all examples, and no result is NaN or infinite before a residual. Not asked of the scales of several:
  // how an example is rounded would depend on the others.
  bool numbers;
};

// Rows [pixel, pixel_end) of y, columns from `column` on; both columns are multiples of the vectors' lanes.
using ConvolutionPart = void(const Convolution&, int64_t pixel, int64_t pixel_end, int64_t column, int64_t column_end);
// A depthwise convolution: rows [row, row_end) of the n * out_h of y. `x` is not padded, weights are [k_h, k_w, stride].
using DepthwisePart = void(const Convolution&, int64_t row, int64_t row_end);

// How codes are laid out for products of an instruction set.
struct CodesLayout {
  int lanes, terms, bytes;  // lanes of a vector; terms in a lane; bytes of a code of x
  int32_t zero;             // what stands for a code of zero in x
};

// Largest magnitude of values, as the bits of a float: NaN is the largest.
using LargestPart = int32_t(const float* x, int64_t count);
// Rounds values, each multiplied by that one of `channels` factors whose turn it is, if there are any.
using RoundPart = void(const float* x, int64_t count, float scale, const float* factors, int64_t channels, void* to);
// Multiplies values each by that one of `channels` factors whose turn it is.
using GatePart = void(const float* x, int64_t count, const float* factors, int64_t channels, float* to);
// Makes of codes with 128 added, as they are between convolutions, what `RoundPart` writes.
using WidenPart = void(const uint8_t* x, int64_t count, void* to);
// Lays out columns [column, column_end) of the weights for products of codes [terms, o], and finds their `offset`. Both
// are multiples of the vectors' lanes.
using PackPart = void(const Window&, const int8_t* codes, void* weights, int64_t stride, int32_t* offset, int64_t column,
                      int64_t column_end);

struct DepthwiseVariant;

struct ConvolutionVariant {
  const char* name;
  CodesLayout codes;
  int columns;  // vectors of a tile
  // Fewer multiplications than these, of floats and of codes, are not worth waking another thread for: some 40
  // microseconds.
  double float_products, code_products;
  ConvolutionPart *in_float, *of_codes;
  DepthwisePart* depthwise;
  LargestPart* largest;
  RoundPart* round;
  GatePart* gate;
  WidenPart* widen;
  PackPart* pack;
  const DepthwiseVariant* depthwise_codes;
};

// A depthwise convolution of codes, x and the result of bytes with 128 added. Weights are lanes of 32 bits: the codes of
// `rows_of_lane` rows of the window, the first in the lowest bits, [ceil(k_h / rows_of_lane) * k_w, stride]. `zeros` is
// `stride` bytes of 128.
struct DepthwiseVariant {
  int rows_of_lane;  // 1 or 4
  // Weights and `offset` may be in blocks of 64 channels, of which `stride` is a multiple then: in each the fours of each 16
  // channels are apart, first all first ones. 64 or 1.
  int (*block)(const Window&);
  void (*rows)(const Convolution&, const uint8_t* zeros, int64_t row, int64_t row_end);
  void (*round)(const float* x, int64_t count, CodeScale scale, uint8_t* to);
};

#define LEPTON_CONVOLUTIONS(variant)                 \
  namespace variant {                                \
  extern const ConvolutionVariant convolution;       \
  extern const DepthwiseVariant depthwise_codes;     \
  DepthwisePart depthwise_floats;                    \
  }
LEPTON_CONVOLUTIONS(portable)
LEPTON_CONVOLUTIONS(avx2)
LEPTON_CONVOLUTIONS(avx512)
#undef LEPTON_CONVOLUTIONS

}  // namespace lepton
