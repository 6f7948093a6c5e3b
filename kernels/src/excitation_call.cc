// What XLA calls to compute squeeze-excite: checks operands and cuts the sum of an image into parts.
#include "excitation.h"

#include "convolution_operands.h"

namespace lepton {
namespace {

// Elements of a part of an image, and how many parts there are at most.
constexpr int64_t kPart = 1 << 14, kMostParts = 8;
// Elements of images that are worth another thread.
constexpr double kWorthAThread = 1 << 18, kWorthOneAwake = 1 << 15;

const ExcitationVariant& chosen_excitation() {
#if defined(__x86_64__)
  const char* name = lepton_variant();
  if (std::strcmp(name, "avx512") == 0) return avx512::excitation;
  if (std::strcmp(name, "avx2") == 0) return avx2::excitation;
#endif
  return portable::excitation;
}

// False if the operands do not fit.
bool step_of(ffi::AnyBuffer& weights, ffi::BufferR2<ffi::F32>& scale, ffi::BufferR1<ffi::F32>& static_scale,
             ffi::BufferR1<ffi::F32>& bias, ExcitationStep& step) {
  const auto shape = weights.dimensions();
  const int64_t scales = static_cast<int64_t>(scale.element_count()), biases = bias.dimensions()[0];
  if (shape.size() != 2) return false;
  step.rows = shape[0];
  step.columns = shape[1];
  step.weights = weights.untyped_data();
  step.bias = biases == 0 ? nullptr : bias.typed_data();
  if (biases != 0 && biases != step.columns) return false;
  if (weights.element_type() == ffi::F32) return true;
  step.scale = scale.typed_data();
  step.one_scale = scales == 1;
  step.static_scale = static_scale.typed_data();
  return weights.element_type() == ffi::S8 && static_scale.dimensions()[0] == 1 &&
         (scales == 1 || scales == step.columns);
}

ffi::Error excitation(ffi::ThreadPool pool, ffi::BufferR4<ffi::F32> x, ffi::AnyBuffer narrow,
                      ffi::BufferR2<ffi::F32> narrow_scale, ffi::BufferR1<ffi::F32> narrow_static,
                      ffi::BufferR1<ffi::F32> narrow_bias, ffi::AnyBuffer wide, ffi::BufferR2<ffi::F32> wide_scale,
                      ffi::BufferR1<ffi::F32> wide_static, ffi::BufferR1<ffi::F32> wide_bias, Geometry activation,
                      ffi::Span<const float> bounds, ffi::ResultBufferR4<ffi::F32> y) {
  Excitation e{};
  const auto shape = x.dimensions(), out = y->dimensions();
  const int64_t n = shape[0], c = shape[3];
  const bool fits = step_of(narrow, narrow_scale, narrow_static, narrow_bias, e.narrow) &&
                    step_of(wide, wide_scale, wide_static, wide_bias, e.wide);
  if (!fits || e.narrow.rows != c || e.wide.rows != e.narrow.columns || out[0] != n || out[1] != 1 || out[2] != 1 ||
      out[3] != e.wide.columns)
    return ffi::Error::InvalidArgument("excitation: shapes of operands and result do not fit");
  const int64_t between[] = {n, 1, 1, e.narrow.columns};
  if (auto error = epilogue_of(narrow_bias, nullptr, activation, bounds, ffi::Span<const int64_t>(between, 4), e.activation);
      error.failure())
    return error;
  if (y->element_count() == 0) return ffi::Error::Success();
  e.pixels = shape[1] * shape[2];
  const ExcitationVariant& variant = chosen_excitation();
  // As many parts as the image is large, whoever computes them: so each sum is in one order.
  const int64_t parts = std::clamp<int64_t>(e.pixels * c / kPart, 1, kMostParts);
  const Scratch sums = scratch(n * parts * c * 4);
  const int64_t own = e.scratch();
  const Scratch memory = scratch(n * own * 4);
  if (sums == nullptr || memory == nullptr) return no_memory();
  auto* const to = static_cast<float*>(sums.get());
  const double elements = static_cast<double>(n) * e.pixels * c;
  const bool worth = elements >= (others_are_awake() ? kWorthOneAwake : kWorthAThread);
  run(pool, worth, n * parts, [&](int64_t at) {
    const int64_t first = e.pixels * (at % parts) / parts, end = e.pixels * (at % parts + 1) / parts;
    variant.sum(x.typed_data() + (at / parts * e.pixels + first) * c, end - first, c, to + at * c);
  });
  run(pool, worth, n, [&](int64_t at) {
    variant.excite(e, to + at * parts * c, parts, static_cast<float*>(memory.get()) + at * own,
                   y->typed_data() + at * e.wide.columns);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace lepton

XLA_FFI_DEFINE_HANDLER(kExcitation, lepton::excitation,
                       xla::ffi::Ffi::Bind()
                           .Ctx<xla::ffi::ThreadPool>()
                           .Arg<xla::ffi::BufferR4<xla::ffi::F32>>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                           .Arg<xla::ffi::BufferR1<xla::ffi::F32>>()
                           .Arg<xla::ffi::BufferR1<xla::ffi::F32>>()
                           .Arg<xla::ffi::AnyBuffer>()
                           .Arg<xla::ffi::BufferR2<xla::ffi::F32>>()
                           .Arg<xla::ffi::BufferR1<xla::ffi::F32>>()
                           .Arg<xla::ffi::BufferR1<xla::ffi::F32>>()
                           .Attr<xla::ffi::Span<const int64_t>>("activation")
                           .Attr<xla::ffi::Span<const float>>("bounds")
                           .Ret<xla::ffi::BufferR4<xla::ffi::F32>>());

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* lepton_excitation(XLA_FFI_CallFrame* frame) {
  return kExcitation(frame);
}
