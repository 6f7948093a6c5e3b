// What XLA calls to compute a convolution of one position and the depthwise one that reads its result, which is wide and
// need not be written: bands of its rows, a few channels at a time, stay in the second-level cache.
#include "convolution_operands.h"
#include "scratch.h"

namespace lepton {
namespace {

// Bytes of a band, and its channels.
constexpr int64_t kBandBytes = 384 << 10, kChannels = 48;

// A band: rows [row, row_end) of the result of one example, and those of the image that they read.
struct Band {
  int64_t row, row_end, first, end;

  Band(const Window& w, int64_t row, int64_t row_end) : row(row), row_end(row_end) {
    const int64_t reach = (w.k_h - 1) * w.dilation_h + 1;
    first = std::clamp<int64_t>(row * w.stride_h - w.top, 0, w.h);
    end = std::clamp<int64_t>((row_end - 1) * w.stride_h - w.top + reach, first, w.h);
  }
  int64_t rows() const { return end - first; }
};

// Most rows of the result whose band fits.
int64_t rows_that_fit(const Window& w, int64_t row_bytes) {
  const int64_t reach = (w.k_h - 1) * w.dilation_h + 1, rows = kBandBytes / row_bytes;
  return std::clamp<int64_t>((rows - reach) / w.stride_h + 1, 1, w.out_h);
}

// `expand` computes some channels of the image that `filter` reads; each has the whole operands.
void compute(const ConvolutionVariant& variant, Convolution expand, Convolution filter, int64_t example, const Band& band,
             int64_t channel, int64_t channel_end, float* scratch) {
  const Window image = filter.window;
  const int64_t count = std::min(channel_end, image.c) - channel, inputs = expand.window.c;
  const int64_t width = image.padded_w();
  const auto shift = [&](Convolution& p) {
    p.weights = static_cast<const float*>(p.weights) + channel;
    if (p.epilogue.bias != nullptr) p.epilogue.bias += channel;
  };
  shift(expand);
  expand.window.o = count;
  const auto* const x = static_cast<const float*>(expand.x) + (example * image.h + band.first) * image.w * inputs;
  const auto multiply = [&](int64_t row, int64_t rows, float* to) {
    expand.x = x + row * image.w * inputs;
    expand.y = to;
    expand.window.h = expand.window.out_h = rows;
    variant.in_float(expand, 0, rows * image.w, 0, channel_end - channel);
  };
  if (width == image.w) multiply(0, band.rows(), scratch);
  for (int64_t row = 0; row < band.rows() && width != image.w; ++row) {
    float* const to = scratch + row * width * count;
    std::memset(to, 0, image.left * count * 4);
    multiply(row, 1, to + image.left * count);
    std::memset(to + (image.left + image.w) * count, 0, image.right * count * 4);
  }
  shift(filter);
  filter.x = scratch;
  filter.y += (example * image.out_h + band.row) * image.out_w * filter.pitch + channel;
  Window& w = filter.window;
  w.n = 1;
  w.h = band.rows();
  w.w = width;
  w.c = w.o = count;
  w.out_h = band.row_end - band.row;
  w.top = band.first - (band.row * image.stride_h - image.top);
  w.left = w.right = 0;
  variant.depthwise(filter, 0, w.out_h);
}

ffi::Error expanding(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> x, ffi::BufferR4<ffi::F32> expand_weights,
                     ffi::BufferR1<ffi::F32> expand_bias, ffi::BufferR4<ffi::F32> weights,
                     ffi::BufferR1<ffi::F32> bias, Geometry geometry, Geometry expand_activation, ffi::Span<const float> expand_bounds,
                     Geometry activation, ffi::Span<const float> bounds,
                     ffi::ResultBufferR4<ffi::F32> y) {
  Convolution expand{}, filter{};
  Window& w = filter.window;
  const auto shape = expand_weights.dimensions(), filters = weights.dimensions(), image = x.dimensions();
  const int64_t sizes[] = {image[0], image[1], image[2], shape[3]};
  const ffi::Span<const int64_t> wide(sizes, 4);
  if (auto error = window_of(geometry, wide, y->dimensions(), w); error.failure()) return error;
  if (auto error = epilogue_of(expand_bias, nullptr, expand_activation, expand_bounds, wide, expand.epilogue);
      error.failure())
    return error;
  if (auto error = epilogue_of(bias, nullptr, activation, bounds, y->dimensions(), filter.epilogue); error.failure())
    return error;
  if (shape[0] != 1 || shape[1] != 1 || shape[2] != image[3] || filters[0] != w.k_h || filters[1] != w.k_w ||
      filters[2] != 1 || filters[3] != w.c || w.o != w.c)
    return ffi::Error::InvalidArgument("convolution: shapes of operands and result do not fit");
  if (y->element_count() == 0) return ffi::Error::Success();
  if (image[3] == 0) return ffi::Error::InvalidArgument("convolution: images without channels");
  const ConvolutionVariant& variant = chosen();
  const int64_t lanes = variant.codes.lanes, stride = (w.c + lanes - 1) / lanes * lanes;
  Wide first, second;
  if (!first.lay(expand_weights.typed_data(), expand.epilogue.bias, image[3], w.c, stride) ||
      !second.lay(weights.typed_data(), filter.epilogue.bias, w.k_h * w.k_w, w.c, stride))
    return no_memory();
  expand.window = {1, 1, w.w, image[3], 1, w.w, w.c, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0};
  expand.x = x.typed_data();
  expand.steps = image[3];
  expand.stride = filter.stride = stride;
  expand.weights = first.weights;
  expand.epilogue.bias = first.bias;
  filter.weights = second.weights;
  filter.epilogue.bias = second.bias;
  filter.y = y->typed_data();
  filter.pitch = w.c;

  const int64_t vectors = stride / lanes, at_once = std::max<int64_t>(1, kChannels / lanes);
  const int64_t pieces = (vectors + at_once - 1) / at_once;
  const int64_t most = (vectors + pieces - 1) / pieces * lanes, row_bytes = w.padded_w() * most * 4;
  const int64_t fit = rows_that_fit(w, row_bytes), bands = (w.out_h + fit - 1) / fit;
  const double products = static_cast<double>(w.n * w.h * w.w) * w.c * image[3];
  std::atomic<bool> lacks_memory{false};
  run(pool, products >= variant.float_products, w.n * bands * pieces, [&](int64_t part) {
    const int64_t piece = part % pieces, at = part / pieces % bands, example = part / pieces / bands;
    const Band band(w, w.out_h * at / bands, w.out_h * (at + 1) / bands);
    auto* const memory = static_cast<float*>(thread_scratch(band.rows() * row_bytes + kBeyond));
    if (memory == nullptr) {
      lacks_memory = true;
      return;
    }
    compute(variant, expand, filter, example, band, vectors * piece / pieces * lanes,
            vectors * (piece + 1) / pieces * lanes, memory);
  });
  return lacks_memory ? no_memory() : ffi::Error::Success();
}

}  // namespace
}  // namespace lepton

XLA_FFI_DEFINE_HANDLER(kExpanding, lepton::expanding,
                       xla::ffi::Ffi::Bind()
                           .Ctx<xla::ffi::ThreadPool>()
                           .Arg<xla::ffi::BufferR4<xla::ffi::F32>>()
                           .Arg<xla::ffi::BufferR4<xla::ffi::F32>>()
                           .Arg<xla::ffi::BufferR1<xla::ffi::F32>>()
                           .Arg<xla::ffi::BufferR4<xla::ffi::F32>>()
                           .Arg<xla::ffi::BufferR1<xla::ffi::F32>>()
                           .Attr<xla::ffi::Span<const int64_t>>("geometry")
                           .Attr<xla::ffi::Span<const int64_t>>("expand_activation")
                           .Attr<xla::ffi::Span<const float>>("expand_bounds")
                           .Attr<xla::ffi::Span<const int64_t>>("activation")
                           .Attr<xla::ffi::Span<const float>>("bounds")
                           .Ret<xla::ffi::BufferR4<xla::ffi::F32>>());

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* lepton_expanding(XLA_FFI_CallFrame* frame) {
  return kExpanding(frame);
}
