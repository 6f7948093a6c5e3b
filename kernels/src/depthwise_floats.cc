// Depthwise convolutions of float32 images with their channels last: see convolution.h. Compiled once per instruction set.
//
// Pixels beside each other share the weights that are loaded and, where windows overlap, what is loaded of the image.
#include "convolution_finish.h"

namespace lepton::VARIANT {
namespace {

constexpr int kPixels = kRegisters == 32 ? 8 : 4;

// What becomes of the sums.
struct Ending {
  Finish finish;
  Bounds bounds;
  bool is_bounded, is_long;  // only bounds; with a SiLU, which is too long to be there for each pixel

  explicit Ending(const Convolution& p)
      : finish(p),
        bounds(p.epilogue),
        is_bounded(Bounds::suffice(p)),
        is_long(p.epilogue.activation == ConvolutionActivation::kSilu) {}
};

// P sums of whole vectors, `pitch` apart from `at` on.
template <int P>
inline void write(const Ending& ending, const Floats (&sums)[P], int64_t at, int64_t pitch) {
  if (ending.is_bounded) {
    float* const to = ending.finish.y + at;
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) store(to + i * pitch, ending.bounds(sums[i]));
  } else if (ending.is_long) {
    Floats held[P];
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) held[i] = sums[i];
#pragma GCC unroll 1
    for (int i = 0; i < P; ++i) ending.finish(held[i], at + i * pitch, kLanes);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) ending.finish(sums[i], at + i * pitch, kLanes);
  }
}

// One pixel, channels from `c` on, with the positions of the window that are inside of the image.
void one(const Convolution& p, const Ending& ending, const float* x, int64_t at, int64_t first_h, int64_t end_h,
         int64_t first_w, int64_t end_w, int64_t c) {
  const Window& w = p.window;
  const int64_t row_pitch = w.dilation_h * w.w * w.c, column_pitch = w.dilation_w * w.c;
  for (; c < w.c; c += kLanes) {
    const int count = static_cast<int>(w.c - c < kLanes ? w.c - c : kLanes);
    Floats sum = bias_at(p.epilogue, c);
    for (int64_t kh = first_h; kh < end_h; ++kh) {
      const float* from = x + kh * row_pitch + c + first_w * column_pitch;
      const float* weights = static_cast<const float*>(p.weights) + (kh * w.k_w + first_w) * p.stride + c;
      for (int64_t kw = first_w; kw < end_w; ++kw, from += column_pitch, weights += p.stride)
        sum += (count < kLanes ? load_some(from, count) : load(from)) * load(weights);
    }
    ending.finish(sum, at + c, count);
  }
}

// P pixels whose windows are inside of the image from left to right, K wide and S apart.
template <int P, int K, int S>
void some(const Convolution& p, const Ending& ending, const float* x, int64_t at, int64_t first_h, int64_t end_h) {
  const Window& w = p.window;
  const int64_t channels = w.c, stride = p.stride, row_pitch = w.dilation_h * w.w * channels;
  const float* const weights = static_cast<const float*>(p.weights) + first_h * K * stride;
  const float* const first = x + first_h * row_pitch;
  int64_t c = 0;
  for (; c + kLanes <= channels; c += kLanes) {
    const Floats bias = bias_at(p.epilogue, c);
    Floats sums[P];
#pragma GCC unroll 8
    for (int i = 0; i < P; ++i) sums[i] = bias;
    const float *row = first + c, *factors = weights + c;
    for (int64_t kh = first_h; kh < end_h; ++kh, row += row_pitch, factors += K * stride) {
#pragma GCC unroll 5
      for (int kw = 0; kw < K; ++kw) {
        const Floats factor = load(factors + kw * stride);
#pragma GCC unroll 8
        for (int i = 0; i < P; ++i) sums[i] += load(row + (i * S + kw) * channels) * factor;
      }
    }
    write<P>(ending, sums, at + c, p.pitch);
  }
  if (c == channels) return;
  for (int i = 0; i < P; ++i)
    one(p, ending, x + i * S * channels, at + i * p.pitch, first_h, end_h, 0, K, c);
}

using Some = void(const Convolution&, const Ending&, const float*, int64_t, int64_t, int64_t);

// `some` for each number of pixels from 1 to kPixels.
template <int K, int S>
Some* some_of(int64_t count) {
  static_assert(kPixels == 4 || kPixels == 8);
  switch (count) {
    case 1: return some<1, K, S>;
    case 2: return some<2, K, S>;
    case 3: return some<3, K, S>;
#if defined(__AVX512F__)
    case 4: return some<4, K, S>;
    case 5: return some<5, K, S>;
    case 6: return some<6, K, S>;
    case 7: return some<7, K, S>;
#endif
    default: return some<kPixels, K, S>;
  }
}

Some* some_of(const Window& w, int64_t count) {
  if (w.dilation_w != 1 || w.stride_w > 2) return nullptr;
  if (w.k_w == 3) return w.stride_w == 1 ? some_of<3, 1>(count) : some_of<3, 2>(count);
  if (w.k_w == 5) return w.stride_w == 1 ? some_of<5, 1>(count) : some_of<5, 2>(count);
  return nullptr;
}

// Which positions of a window that begins at `start` are inside: [first, end).
inline void inside(int64_t start, int64_t size, int64_t positions, int64_t dilation, int64_t& first, int64_t& end) {
  first = start < 0 ? (-start + dilation - 1) / dilation : 0;
  end = start < size ? (size - start + dilation - 1) / dilation : 0;
  if (end > positions) end = positions;
  if (first > end) first = end;
}

}  // namespace

void depthwise_floats(const Convolution& p, int64_t row, int64_t row_end) {
  const Window& w = p.window;
  const Ending ending(p);
  // Columns [begin, end) read nothing beside the image, in groups of about one size.
  const int64_t last = w.w + w.left - (w.k_w - 1) * w.dilation_w - 1;  // where the last such window may begin
  int64_t begin = (w.left + w.stride_w - 1) / w.stride_w, end = last < 0 ? 0 : last / w.stride_w + 1;
  if (end > w.out_w) end = w.out_w;
  if (begin > end || some_of(w, 1) == nullptr) begin = end = w.out_w;
  const int64_t groups = (end - begin + kPixels - 1) / kPixels;
  const int64_t small = groups == 0 ? 0 : (end - begin) / groups, larger = groups == 0 ? 0 : (end - begin) % groups;
  Some* const of_small = some_of(w, small);
  Some* const of_larger = some_of(w, small + 1);
  for (; row < row_end; ++row) {
    const int64_t top = row % w.out_h * w.stride_h - w.top;
    int64_t first_h, end_h;
    inside(top, w.h, w.k_h, w.dilation_h, first_h, end_h);
    const int64_t image = (row / w.out_h * w.h + top) * w.w;
    const auto from = [&](int64_t column) {
      return static_cast<const float*>(p.x) + (image + column * w.stride_w - w.left) * w.c;
    };
    for (int64_t column = 0; column < w.out_w;) {
      if (column == begin) {
        for (int64_t group = 0; group < groups; ++group) {
          const int64_t count = small + (group < larger);
          (group < larger ? of_larger : of_small)(p, ending, from(column), (row * w.out_w + column) * p.pitch, first_h, end_h);
          column += count;
        }
        if (column == w.out_w) break;
      }
      int64_t first_w, end_w;
      inside(column * w.stride_w - w.left, w.w, w.k_w, w.dilation_w, first_w, end_w);
      one(p, ending, from(column), (row * w.out_w + column) * p.pitch, first_h, end_h, first_w, end_w, 0);
      ++column;
    }
  }
}

}  // namespace lepton::VARIANT
