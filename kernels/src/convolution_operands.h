// What the calls for convolutions share: operands are checked, and laid out for vectors.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>

#include "convolution.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

extern "C" const char* lepton_variant();

namespace lepton {

namespace ffi = xla::ffi;

inline const ConvolutionVariant* const kConvolutionVariants[] = {
#if defined(__x86_64__)
    &avx512::convolution, &avx2::convolution,
#endif
    &portable::convolution};

inline const ConvolutionVariant& chosen() {
  const char* name = lepton_variant();
  return **std::find_if(std::begin(kConvolutionVariants), std::end(kConvolutionVariants) - 1,
                        [&](const ConvolutionVariant* each) { return std::strcmp(each->name, name) == 0; });
}

// What reads whole lanes may read this far beyond the last element.
constexpr int64_t kBeyond = 64;

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};
using Scratch = std::unique_ptr<void, Free>;

// Memory that begins at a cache line; null if there is none.
inline Scratch scratch(int64_t bytes) {
  return Scratch(std::aligned_alloc(64, static_cast<size_t>((bytes + kBeyond + 63) / 64 * 64)));
}

inline ffi::Error no_memory() { return ffi::Error(ffi::ErrorCode::kResourceExhausted, "convolution: no memory"); }

// Runs `count` parts on the pool, or here if they are not worth it.
template <typename Work>
void run(ffi::ThreadPool& pool, bool worth, int64_t count, const Work& work) {
  if (worth && count > 1) {
    run_parts(pool, count, work);
  } else {
    for (int64_t part = 0; part < count; ++part) work(part);
  }
}

using Geometry = ffi::Span<const int64_t>;

// [k_h, k_w, stride_h, stride_w, dilation_h, dilation_w, top, bottom, left, right]
inline ffi::Error window_of(Geometry geometry, ffi::Span<const int64_t> x, ffi::Span<const int64_t> y, Window& w) {
  if (geometry.size() != 10 || x.size() != 4 || y.size() != 4)
    return ffi::Error::InvalidArgument("convolution: images have four axes, and ten numbers say how they are read");
  w = {x[0], x[1], x[2], x[3], y[1], y[2], y[3], geometry[0], geometry[1], geometry[2],
       geometry[3], geometry[4], geometry[5], geometry[6], geometry[7], geometry[8], geometry[9]};
  for (int i = 0; i < 6; ++i)
    if (geometry[i] < 1) return ffi::Error::InvalidArgument("convolution: windows, strides and dilations are positive");
  for (int i = 6; i < 10; ++i)
    if (geometry[i] < 0) return ffi::Error::InvalidArgument("convolution: padding is not negative");
  const int64_t reach_h = (w.k_h - 1) * w.dilation_h + 1, reach_w = (w.k_w - 1) * w.dilation_w + 1;
  const bool fits_h = w.out_h == 0 || (w.out_h - 1) * w.stride_h + reach_h <= w.padded_h();
  const bool fits_w = w.out_w == 0 || (w.out_w - 1) * w.stride_w + reach_w <= w.padded_w();
  if (y[0] != x[0] || !fits_h || !fits_w)
    return ffi::Error::InvalidArgument("convolution: shapes of operands and result do not fit");
  return ffi::Error::Success();
}

// `residual` may be null.
inline ffi::Error epilogue_of(ffi::BufferR1<ffi::F32>& bias, ffi::AnyBuffer* residual, Geometry activation,
                              ffi::Span<const float> bounds, ffi::Span<const int64_t> y, ConvolutionEpilogue& e) {
  if (activation.size() != 2 || activation[0] < 0 || activation[0] > 2 || bounds.size() != 2)
    return ffi::Error::InvalidArgument("convolution: unknown activation");
  const int64_t o = y[3], bias_size = bias.dimensions()[0], size = y[0] * y[1] * y[2] * o;
  const bool added = residual != nullptr && residual->element_count() > 0 && size > 0;
  if ((bias_size != 0 && bias_size != o) || (residual != nullptr && residual->element_type() != ffi::F32) ||
      (added && static_cast<int64_t>(residual->element_count()) != size))
    return ffi::Error::InvalidArgument("convolution: shapes of operands and result do not fit");
  e.bias = bias_size == 0 ? nullptr : bias.typed_data();
  e.residual = added ? static_cast<const float*>(residual->untyped_data()) : nullptr;
  e.activation = static_cast<ConvolutionActivation>(activation[0]);
  e.add_first = activation[1] != 0;
  e.low = bounds[0];
  e.high = bounds[1];
  return ffi::Error::Success();
}

// Copies a row of a padded image: `copy(row, to)` writes w.w * w.c elements of `bytes` each.
template <typename Copy>
inline void pad_row(const Window& w, int64_t bytes, int zero, int64_t row, void* memory, const Copy& copy) {
  auto* const to = static_cast<uint8_t*>(memory);
  const int64_t pixel_bytes = w.c * bytes, y = row % w.padded_h() - w.top;
  if (y < 0 || y >= w.h) {
    std::memset(to, zero, w.padded_w() * pixel_bytes);
    return;
  }
  std::memset(to, zero, w.left * pixel_bytes);
  copy(row / w.padded_h() * w.h + y, to + w.left * pixel_bytes);
  std::memset(to + (w.left + w.w) * pixel_bytes, zero, w.right * pixel_bytes);
}

// Copies so many rows of a padded image of floats.
inline void pad_floats(const Window& w, const float* x, int64_t first, int64_t rows, float* to) {
  for (int64_t row = 0; row < rows; ++row)
    pad_row(w, 4, 0, first + row, to + row * w.padded_w() * w.c,
            [&](int64_t from, void* at) { std::memcpy(at, x + from * w.w * w.c, w.w * w.c * 4); });
}

// `count` values, and zeros up to `stride`: where they are, or copied.
inline const float* spread(const float* from, int64_t count, bool one, int64_t stride, float* to) {
  if (count == stride && !one) return from;
  for (int64_t i = 0; i < stride; ++i) to[i] = i < count ? from[one ? 0 : i] : 0.0f;
  return to;
}

// Float weights [rows, columns] and a bias, with zeros up to a multiple of the vectors' lanes; copied if there are any.
struct Wide {
  const float* weights = nullptr;
  const float* bias = nullptr;
  Scratch memory;

  // False if there is no memory.
  bool lay(const float* from, const float* given_bias, int64_t rows, int64_t columns, int64_t stride) {
    weights = from;
    bias = given_bias;
    if (stride == columns) return true;
    memory = scratch((rows + 1) * stride * 4);
    auto* const to = static_cast<float*>(memory.get());
    if (to == nullptr) return false;
    for (int64_t row = 0; row < rows; ++row) spread(from + row * columns, columns, false, stride, to + row * stride);
    weights = to;
    if (bias != nullptr) {
      spread(given_bias, columns, false, stride, to + rows * stride);
      bias = to + rows * stride;
    }
    return true;
  }
};

}  // namespace lepton
