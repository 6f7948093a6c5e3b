// What XLA calls to compute convolutions: checks operands, lays them out, and cuts the work into parts.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>

#include "convolution_operands.h"
#include "kept.h"
#include "scratch.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace lepton {
namespace {

// Multiplications of a part, if a product is cut at all.
constexpr double kPart = 1 << 18;
// Multiplications of a depthwise convolution that are worth waking another thread for, and how many times fewer are
// worth giving parts to one that is awake.
constexpr double kDepthwise = 1 << 20, kFewer = 8;
// Values of a part that are only moved or compared, and fewer than are worth waking another thread for.
constexpr int64_t kMovedPart = 1 << 15, kWorthMoving = 1 << 18;

// Multiplications that are worth sharing now, if so many are worth waking another thread for.
double worth(double products) { return others_are_awake() ? products / kFewer : products; }

// Cuts the rows of the result of a depthwise convolution into parts: `work(row, row_end)`.
template <typename Work>
void by_rows(ffi::ThreadPool& pool, const Window& w, const Work& work) {
  const int64_t threads = std::max<int64_t>(1, pool.num_threads()), all = w.n * w.out_h;
  const double products = static_cast<double>(w.pixels()) * w.c * w.k_h * w.k_w;
  const int64_t some = std::max<int64_t>(1, (all + 4 * threads - 1) / (4 * threads));
  run(pool, products >= worth(kDepthwise), (all + some - 1) / some,
      [&](int64_t part) { work(part * some, std::min(all, part * some + some)); });
}

// Cuts the result of a dense convolution into parts, at least so many, which read the least of weights and image again.
// `prepare(pixel, pixel_end)` is called before pixels are read, and tells where the image is then; null if nowhere.
template <typename Prepare>
void multiply(ffi::ThreadPool& pool, const ConvolutionVariant& variant, bool codes, const Convolution& p,
              const Prepare& prepare, int64_t least_parts = 1) {
  const auto part = [&](int64_t pixel, int64_t pixel_end, const void* x, int64_t column, int64_t column_end) {
    Convolution own = p;
    own.x = x;
    if (x != nullptr) (codes ? variant.of_codes : variant.in_float)(own, pixel, pixel_end, column, column_end);
  };
  const Window& w = p.window;
  const int64_t pixels = w.pixels(), threads = std::max<int64_t>(1, pool.num_threads());
  const double products = static_cast<double>(pixels) * w.terms() * w.o;
  const bool shares = products >= worth(codes ? variant.code_products : variant.float_products) && threads > 1;
  const int64_t wanted = shares ? std::clamp<int64_t>(static_cast<int64_t>(products / kPart), 1, 4 * threads) : 1;
  const int64_t lanes = variant.codes.lanes, vectors = p.stride / lanes;
  // Columns, if the weights are what is more to read: as many of them for each thread.
  const int64_t tiles = (vectors + variant.columns - 1) / variant.columns;
  const int64_t weight_bytes = w.runs() * p.steps * p.stride * 4, image_bytes = pixels * w.c * (codes ? variant.codes.bytes : 4);
  if (shares && pixels < 256 && tiles >= threads && weight_bytes > image_bytes) {
    const int64_t parts = std::min(vectors, (std::min(wanted, tiles) + threads - 1) / threads * threads);
    const void* const x = prepare(0, pixels);
    run_parts(pool, parts, [&](int64_t at) {
      part(0, pixels, x, vectors * at / parts * lanes, vectors * (at + 1) / parts * lanes);
    });
    return;
  }
  const int64_t groups = (pixels + 7) / 8, parts = std::min(std::max(wanted, least_parts), groups);
  run(pool, shares, parts, [&](int64_t at) {
    const int64_t begin = groups * at / parts * 8, end = std::min(groups * (at + 1) / parts * 8, pixels);
    part(begin, end, prepare(begin, end), 0, p.stride);
  });
}

// Copies the image, padded: `copy(row, to)` as `pad_row` calls it.
template <typename Copy>
void pad(ffi::ThreadPool& pool, const Window& w, int64_t bytes, int zero, void* to, const Copy& copy) {
  const int64_t row_bytes = w.padded_w() * w.c * bytes, rows = w.n * w.padded_h();
  const int64_t row_values = std::max<int64_t>(1, w.padded_w() * w.c);
  const int64_t some = std::max<int64_t>(1, kMovedPart / row_values);
  run(pool, rows * row_values >= kWorthMoving, (rows + some - 1) / some, [&](int64_t part) {
    for (int64_t row = part * some; row < std::min(rows, (part + 1) * some); ++row)
      pad_row(w, bytes, zero, row, static_cast<uint8_t*>(to) + row * row_bytes, copy);
  });
}

// Calls `work(pixel, end, example)` for pixels of one example each.
template <typename Work>
void by_example(const Window& w, int64_t pixel, int64_t end, const Work& work) {
  while (pixel < end) {
    const int64_t example = pixel / (w.h * w.w), stop = std::min(end, (example + 1) * w.h * w.w);
    work(pixel, stop, example);
    pixel = stop;
  }
}

bool is_one_position(const Window& w) {
  return w.k_h == 1 && w.k_w == 1 && w.stride_h == 1 && w.stride_w == 1 && !w.is_padded();
}

// Whether a gate [n, 1, 1, c] is there, and fits.
ffi::Error gate_of(ffi::AnyBuffer& gate, const Window& w, bool may_be, const float*& factors) {
  factors = gate.element_count() == 0 ? nullptr : static_cast<const float*>(gate.untyped_data());
  if (factors == nullptr) return ffi::Error::Success();
  if (gate.element_type() != ffi::F32 || static_cast<int64_t>(gate.element_count()) != w.n * w.c)
    return ffi::Error::InvalidArgument("convolution: shapes of operands and result do not fit");
  if (!may_be) return ffi::Error::InvalidArgument("convolution: no gate is for these images");
  return ffi::Error::Success();
}

// Multiplies a padded image of floats, whose rows each part copies for itself: from there they are read in the cache.
ffi::Error multiply_padded(ffi::ThreadPool& pool, const ConvolutionVariant& variant, const Convolution& p) {
  const Window& w = p.window;
  const int64_t row_values = w.padded_w() * w.c, reach = (w.k_h - 1) * w.dilation_h + 1;
  const auto first_row = [&](int64_t pixel) {
    const int64_t row = pixel / w.out_w;
    return row / w.out_h * w.padded_h() + row % w.out_h * w.stride_h;
  };
  std::atomic<bool> lacks_memory{false};
  const auto copy = [&](int64_t pixel, int64_t pixel_end) -> const void* {
    const int64_t first = first_row(pixel), rows = first_row(pixel_end - 1) + reach - first;
    auto* const to = static_cast<float*>(thread_scratch(rows * row_values * 4 + kBeyond));
    if (to == nullptr) {
      lacks_memory = true;
      return nullptr;
    }
    pad_floats(w, static_cast<const float*>(p.x), first, rows, to);
    return to - first * row_values;
  };
  multiply(pool, variant, false, p, copy, w.n * w.padded_h() * row_values / kMovedPart);
  return lacks_memory ? no_memory() : ffi::Error::Success();
}

ffi::Error convolution(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> x, ffi::BufferR4<ffi::F32> weights,
                       ffi::AnyBuffer gate, ffi::BufferR1<ffi::F32> bias, ffi::AnyBuffer residual, Geometry geometry,
                       Geometry activation, ffi::Span<const float> bounds, ffi::ResultBufferR4<ffi::F32> y) {
  Convolution p{};
  Window& w = p.window;
  if (auto error = window_of(geometry, x.dimensions(), y->dimensions(), w); error.failure()) return error;
  if (auto error = epilogue_of(bias, &residual, activation, bounds, y->dimensions(), p.epilogue); error.failure()) return error;
  const auto shape = weights.dimensions();
  const bool depthwise = shape[2] == 1 && w.c != 1;
  if (shape[0] != w.k_h || shape[1] != w.k_w || shape[3] != w.o || (depthwise ? w.o : shape[2]) != w.c)
    return ffi::Error::InvalidArgument("convolution: shapes of operands and result do not fit");
  const float* factors;
  if (auto error = gate_of(gate, w, is_one_position(w) && !depthwise, factors); error.failure()) return error;
  if (y->element_count() == 0) return ffi::Error::Success();
  const ConvolutionVariant& variant = chosen();
  const int64_t lanes = variant.codes.lanes;
  p.x = x.typed_data();
  p.weights = weights.typed_data();
  p.y = y->typed_data();
  p.pitch = w.o;
  p.steps = w.run_length();
  p.stride = (w.o + lanes - 1) / lanes * lanes;
  const int64_t rows = depthwise ? w.k_h * w.k_w : w.terms();
  Wide wide;
  if (!wide.lay(weights.typed_data(), p.epilogue.bias, rows, w.o, p.stride)) return no_memory();
  p.weights = wide.weights;
  p.epilogue.bias = wide.bias;
  if (depthwise) {
    by_rows(pool, w, [&](int64_t row, int64_t row_end) { variant.depthwise(p, row, row_end); });
    return ffi::Error::Success();
  }
  if (factors != nullptr) {
    const Scratch gated = scratch(w.pixels() * w.c * 4);
    auto* const to = static_cast<float*>(gated.get());
    if (to == nullptr) return no_memory();
    p.x = to;
    multiply(pool, variant, false, p, [&](int64_t pixel, int64_t end) {
      by_example(w, pixel, end, [&](int64_t from, int64_t stop, int64_t example) {
        variant.gate(x.typed_data() + from * w.c, (stop - from) * w.c, factors + example * w.c, w.c, to + from * w.c);
      });
      return p.x;
    });
    return ffi::Error::Success();
  }
  if (w.is_padded()) return multiply_padded(pool, variant, p);
  multiply(pool, variant, false, p, [&](int64_t, int64_t) { return p.x; });
  return ffi::Error::Success();
}

// Lanes of the weights of a channel.
int64_t lanes_of_depthwise(const Window& w, int rows) { return (w.k_h + rows - 1) / rows * w.k_w; }

// Lays out the weights of a depthwise convolution of codes [positions, o], `rows` of the window in a lane, and finds the
// offset of each column, both in blocks of `block` channels.
void pack_depthwise(const Window& w, const int8_t* codes, int rows, int64_t block, int64_t stride, uint32_t* weights,
                    int32_t* offset) {
  const uint32_t bits = rows == 1 ? ~0u : 255u;
  std::fill(offset, offset + stride, 0);
  std::fill(weights, weights + lanes_of_depthwise(w, rows) * stride, 0);
  for (int64_t k = 0; k < w.k_h * w.k_w; ++k) {
    const int64_t kh = k / w.k_w, lane = kh / rows * w.k_w + k % w.k_w;
    for (int64_t channel = 0; channel < w.o; ++channel) {
      const int64_t within = channel % block;
      const int64_t at = channel - within + within % 16 / 4 * 16 + within / 16 * 4 + within % 4;
      const int32_t code = codes[k * w.o + channel];
      weights[lane * stride + at] |= (static_cast<uint32_t>(code) & bits) << (8 * (kh % rows));
      // Sums may wrap on the way, as they do in the dense ones.
      offset[at] = static_cast<int32_t>(static_cast<uint32_t>(offset[at]) + static_cast<uint32_t>(128 * code));
    }
  }
}

float code_of_bound(float bound, float scale) { return std::nearbyint(std::clamp(bound / scale, -127.0f, 127.0f)); }

// Whether all sums are finite that are multiplied by a scale and these factors, and these biases added; both are by column.
bool are_numbers(const ConvolutionVariant& variant, const Convolution& p, float scale, const float* factors,
                 const float* biases) {
  const auto largest = [&](const float* values) {
    if (values == nullptr) return 0.0f;
    const int32_t bits = variant.largest(values, p.window.o);
    float found;
    std::memcpy(&found, &bits, 4);
    return found;
  };
  return std::isfinite(largest(factors) * scale * 0x1p31f + largest(biases));
}

// Finds what makes codes of sums, in `memory` for two rows of columns, where a sum has a bias and then bounds at most. Without
// a bias sums are multiplied and rounded as XLA does it, bit for bit.
void find_codes(const ConvolutionVariant& variant, Convolution& p, float* memory) {
  const ConvolutionEpilogue& e = p.epilogue;
  const float inverse = e.code_scale.inverse;
  if (!p.numbers || p.codes == nullptr || e.bias == nullptr || e.residual != nullptr || inverse == 0.0f ||
      e.activation == ConvolutionActivation::kSilu)
    return;
  for (int64_t i = 0; i < p.stride; ++i) {
    memory[i] = p.row_scale[0] * (p.scale[i] * inverse);
    memory[p.stride + i] = e.bias[i] * inverse + 128.0f;
  }
  if (!are_numbers(variant, p, 1.0f, memory, memory + p.stride)) return;
  p.code_factor = memory;
  p.code_bias = memory + p.stride;
}

// Rounds what is in float, and cuts the rows of the result into parts.
ffi::Error depthwise_of_codes(ffi::ThreadPool& pool, const DepthwiseVariant& variant, Convolution& p, const float* x) {
  const Window& w = p.window;
  const Scratch zeros = scratch(p.stride);
  if (zeros == nullptr) return no_memory();
  std::memset(zeros.get(), 128, p.stride);
  Scratch rounded;
  if (x != nullptr) {
    const int64_t line = w.w * w.c, lines = w.n * w.h;
    const int64_t some = std::max<int64_t>(1, kMovedPart / std::max<int64_t>(1, line));
    rounded = scratch(lines * line);
    if (rounded == nullptr) return no_memory();
    run(pool, lines * line >= kWorthMoving, (lines + some - 1) / some, [&](int64_t part) {
      for (int64_t at = part * some; at < std::min(lines, (part + 1) * some); ++at)
        variant.round(x + at * line, line, code_scale(p.row_scale[at / w.h]),
                      static_cast<uint8_t*>(rounded.get()) + at * line);
    });
    p.x = rounded.get();
  }
  by_rows(pool, w, [&](int64_t row, int64_t row_end) {
    variant.rows(p, static_cast<const uint8_t*>(zeros.get()), row, row_end);
  });
  return ffi::Error::Success();
}

// Either `x` or `bytes` is the image: floats, multiplied by `gate` [n, c] if that is not null, or codes with 128 added.
ffi::Error dense_of_codes(ffi::ThreadPool& pool, const ConvolutionVariant& variant, Convolution& p, const float* x,
                          const float* gate, const uint8_t* bytes) {
  const Window& w = p.window;
  const CodesLayout& layout = variant.codes;
  if (bytes != nullptr && layout.bytes == 1 && !w.is_padded() && w.run_length() % layout.terms == 0) {
    p.x = bytes;  // as the products read it
    multiply(pool, variant, true, p, [&](int64_t, int64_t) { return p.x; });
    return ffi::Error::Success();
  }
  const Scratch rounded = scratch(w.n * w.padded_h() * w.padded_w() * w.c * layout.bytes);
  if (rounded == nullptr) return no_memory();
  p.x = rounded.get();
  const auto convert = [&](int64_t from, int64_t count, int64_t example, void* to) {
    if (bytes != nullptr)
      variant.widen(bytes + from, count, to);
    else
      variant.round(x + from, count, p.row_scale[example], gate == nullptr ? gate : gate + example * w.c, w.c, to);
  };
  if (is_one_position(w)) {
    // Pixels are read once, by the part that rounds them.
    multiply(pool, variant, true, p, [&](int64_t pixel, int64_t end) {
      by_example(w, pixel, end, [&](int64_t from, int64_t stop, int64_t example) {
        convert(from * w.c, (stop - from) * w.c, example,
                static_cast<uint8_t*>(rounded.get()) + from * w.c * layout.bytes);
      });
      return p.x;
    });
    return ffi::Error::Success();
  }
  pad(pool, w, layout.bytes, layout.zero, rounded.get(),
      [&](int64_t row, void* to) { convert(row * w.w * w.c, w.w * w.c, row / w.h, to); });
  multiply(pool, variant, true, p, [&](int64_t, int64_t) { return p.x; });
  return ffi::Error::Success();
}

ffi::Error integer_convolution(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::BufferR2<ffi::S8> codes,
                               ffi::BufferR2<ffi::F32> scale, ffi::BufferR1<ffi::F32> static_scale,
                               ffi::BufferR1<ffi::F32> result_scale, ffi::AnyBuffer gate,
                               ffi::BufferR1<ffi::F32> bias, ffi::AnyBuffer residual, Geometry geometry,
                               Geometry activation, ffi::Span<const float> bounds, ffi::Result<ffi::AnyBuffer> y) {
  Convolution p{};
  Window& w = p.window;
  if (auto error = window_of(geometry, x.dimensions(), y->dimensions(), w); error.failure()) return error;
  if (auto error = epilogue_of(bias, &residual, activation, bounds, y->dimensions(), p.epilogue); error.failure())
    return error;
  const bool depthwise = codes.dimensions()[0] == w.k_h * w.k_w && w.c != 1;
  const bool read_codes = x.element_type() == ffi::U8, dynamic = static_scale.dimensions()[0] == 0;
  const bool write_codes = result_scale.dimensions()[0] == 1;
  const int64_t scales = scale.dimensions()[1];
  if (codes.dimensions()[0] != (depthwise ? w.k_h * w.k_w : w.terms()) || codes.dimensions()[1] != w.o ||
      (depthwise && w.o != w.c) || scale.dimensions()[0] != 1 || (scales != 1 && scales != w.o) ||
      static_scale.dimensions()[0] > 1 || result_scale.dimensions()[0] > 1)
    return ffi::Error::InvalidArgument("convolution: shapes of operands and result do not fit");
  if ((!read_codes && x.element_type() != ffi::F32) || (read_codes && dynamic) ||
      y->element_type() != (write_codes ? ffi::U8 : ffi::F32))
    return ffi::Error::InvalidArgument("convolution: images are floats, or codes with a scale");
  const float* factors;
  if (auto error = gate_of(gate, w, !read_codes && !dynamic && !depthwise, factors); error.failure()) return error;
  if (y->element_count() == 0) return ffi::Error::Success();
  const ConvolutionVariant& variant = chosen();
  const CodesLayout& layout = variant.codes;
  p.steps = (w.run_length() + layout.terms - 1) / layout.terms;
  const int64_t lanes = layout.lanes, image = w.h * w.w * w.c;
  const int64_t block = depthwise ? variant.depthwise_codes->block(w) : 1, multiple = std::max(block, lanes);
  p.stride = (w.o + multiple - 1) / multiple * multiple;
  if (write_codes) {
    const float written = *result_scale.typed_data();
    const bool clamps = p.epilogue.activation == ConvolutionActivation::kClamp;
    p.codes = static_cast<uint8_t*>(y->untyped_data());
    p.epilogue.code_scale = code_scale(written);
    p.epilogue.low_code = clamps ? code_of_bound(p.epilogue.low, written) : -127.0f;
    p.epilogue.high_code = clamps ? code_of_bound(p.epilogue.high, written) : 127.0f;
  } else {
    p.y = static_cast<float*>(y->untyped_data());
  }
  const auto* floats = read_codes ? nullptr : static_cast<const float*>(x.untyped_data());
  const auto* bytes = read_codes ? static_cast<const uint8_t*>(x.untyped_data()) : nullptr;
  const Scratch columns = scratch(p.stride * 8), rows = scratch(w.n * 4);
  if (columns == nullptr || rows == nullptr) return no_memory();
  float* const row_scale = static_cast<float*>(rows.get());
  p.scale = spread(scale.typed_data(), w.o, scales == 1, p.stride, static_cast<float*>(columns.get()));
  if (p.epilogue.bias != nullptr)
    p.epilogue.bias = spread(p.epilogue.bias, w.o, false, p.stride, static_cast<float*>(columns.get()) + p.stride);

  // The scales of the examples, and at the same time the weights, if they are to be packed.
  const int rows_of_lane = variant.depthwise_codes->rows_of_lane;
  const int64_t packed_rows = depthwise ? lanes_of_depthwise(w, rows_of_lane) : w.runs() * p.steps;
  const int64_t vectors = p.stride / lanes;
  const int64_t pieces = dynamic ? std::max<int64_t>(1, (image + kMovedPart - 1) / kMovedPart) : 0;
  const int64_t at_once =
      depthwise ? vectors
                : std::max<int64_t>(1, std::min(vectors, kMovedPart / std::max<int64_t>(1, packed_rows * lanes)));
  const Scratch found = scratch(std::max<int64_t>(1, pieces * w.n) * 4);
  if (found == nullptr) return no_memory();
  int32_t* const most = static_cast<int32_t*>(found.get());
  // The weights as the products read them, and behind them the offset of each column.
  const int64_t weight_bytes = packed_rows * p.stride * 4;
  const void* const layout_of = depthwise ? static_cast<const void*>(variant.depthwise_codes) : &variant;
  // The same weight may be read in blocks and without.
  const int64_t runs = !depthwise ? w.runs() : block > 1 ? -w.k_h : w.k_h;
  const auto kept = kept_panels(codes.typed_data(), codes.element_count(), layout_of, w.o, runs, 1,
                                (weight_bytes + p.stride * 4 + kBeyond + 63) / 64 * 64);
  bool fill = false;
  auto* packed = kept == nullptr ? nullptr : reinterpret_cast<uint8_t*>(kept->panel(0, fill));
  const Scratch own = packed == nullptr ? scratch(weight_bytes + p.stride * 4) : nullptr;
  const bool packs_here = fill || packed == nullptr;
  if (packed == nullptr) packed = static_cast<uint8_t*>(own.get());
  if (packed == nullptr) return no_memory();
  int32_t* const offset = reinterpret_cast<int32_t*>(packed + weight_bytes);
  const int64_t packs = packs_here ? (vectors + at_once - 1) / at_once : 0;
  const int64_t moved = (dynamic ? w.n * image : 0) + (packs_here ? static_cast<int64_t>(codes.element_count()) : 0);
  run(pool, moved >= kWorthMoving, pieces * w.n + packs, [&](int64_t part) {
    if (part < packs && depthwise)
      return pack_depthwise(w, codes.typed_data(), rows_of_lane, block, p.stride, reinterpret_cast<uint32_t*>(packed),
                            offset);
    if (part < packs) {
      variant.pack(w, codes.typed_data(), packed, p.stride, offset, part * at_once * lanes,
                   std::min(vectors, (part + 1) * at_once) * lanes);
      return;
    }
    part -= packs;
    const int64_t from = part % pieces * kMovedPart;
    most[part] = variant.largest(floats + part / pieces * image + from, std::min(kMovedPart, image - from));
  });
  if (fill) kept->filled(0);
  for (int64_t example = 0; example < w.n; ++example) {
    if (!dynamic) {
      row_scale[example] = *static_scale.typed_data();
      continue;
    }
    const int32_t bits = *std::max_element(most + example * pieces, most + (example + 1) * pieces);
    row_scale[example] = int8_scale(bits);
  }
  p.x = bytes;
  p.weights = packed;
  p.offset = offset;
  p.row_scale = row_scale;
  p.numbers = !dynamic && are_numbers(variant, p, row_scale[0], p.scale, p.epilogue.bias);
  const Scratch by_column = scratch(p.stride * 8);
  if (by_column == nullptr) return no_memory();
  find_codes(variant, p, static_cast<float*>(by_column.get()));
  if (depthwise) return depthwise_of_codes(pool, *variant.depthwise_codes, p, floats);
  return dense_of_codes(pool, variant, p, floats, factors, bytes);
}

}  // namespace
}  // namespace lepton

#define EXPORTED extern "C" __attribute__((visibility("default")))

XLA_FFI_DEFINE_HANDLER(kConvolution, lepton::convolution,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::BufferR4<ffi::F32>>()
                           .Arg<ffi::BufferR4<ffi::F32>>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::AnyBuffer>()
                           .Attr<ffi::Span<const int64_t>>("geometry")
                           .Attr<ffi::Span<const int64_t>>("activation")
                           .Attr<ffi::Span<const float>>("bounds")
                           .Ret<ffi::BufferR4<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER(kIntegerConvolution, lepton::integer_convolution,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR2<ffi::S8>>()
                           .Arg<ffi::BufferR2<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::AnyBuffer>()
                           .Attr<ffi::Span<const int64_t>>("geometry")
                           .Attr<ffi::Span<const int64_t>>("activation")
                           .Attr<ffi::Span<const float>>("bounds")
                           .Ret<ffi::AnyBuffer>());

EXPORTED XLA_FFI_Error* lepton_convolution(XLA_FFI_CallFrame* frame) { return kConvolution(frame); }
EXPORTED XLA_FFI_Error* lepton_integer_convolution(XLA_FFI_CallFrame* frame) { return kIntegerConvolution(frame); }
