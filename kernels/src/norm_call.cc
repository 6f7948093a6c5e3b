// What XLA calls to compute norms of rows: checks operands and cuts the work into parts.
#include <algorithm>
#include <cstring>

#include "norm.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

extern "C" const char* lepton_variant();

namespace lepton {
namespace {

NormPart* chosen() {
#if defined(__x86_64__)
  const char* name = lepton_variant();
  if (std::strcmp(name, "avx512") == 0) return avx512::norm;
  if (std::strcmp(name, "avx2") == 0) return avx2::norm;
#endif
  return portable::norm;
}

// Fewer elements than this are not worth waking another thread for.
constexpr double kWorthAThread = 1 << 17;

ffi::Error norm(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR1<ffi::F32> gain,
                ffi::BufferR1<ffi::F32> shift, float epsilon, bool centered, ffi::ResultBufferR2<ffi::F32> y) {
  const int64_t rows = x.dimensions()[0], gains = gain.dimensions()[0], shifts = shift.dimensions()[0];
  Norm p{};
  p.k = x.dimensions()[1];
  if (y->dimensions()[0] != rows || y->dimensions()[1] != p.k || (gains != 0 && gains != p.k) ||
      (shifts != 0 && shifts != p.k))
    return ffi::Error::InvalidArgument("norm: shapes of operands and result do not fit");
  if (rows == 0 || p.k == 0) return ffi::Error::Success();
  p.x = x.typed_data();
  p.gain = gains == 0 ? nullptr : gain.typed_data();
  p.shift = shifts == 0 ? nullptr : shift.typed_data();
  p.y = y->typed_data();
  p.epsilon = epsilon;
  p.centered = centered;
  NormPart* const part = chosen();
  if (static_cast<double>(rows) * p.k < kWorthAThread) {
    part(p, 0, rows);
    return ffi::Error::Success();
  }
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t share = (rows + 2 * threads - 1) / (2 * threads);
  run_parts(pool, (rows + share - 1) / share,
            [&](int64_t at) { part(p, at * share, std::min(at * share + share, rows)); });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace lepton

XLA_FFI_DEFINE_HANDLER(kNorm, lepton::norm,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::BufferR2<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Attr<float>("epsilon")
                           .Attr<bool>("centered")
                           .Ret<ffi::BufferR2<ffi::F32>>());

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* lepton_norm(XLA_FFI_CallFrame* frame) {
  return kNorm(frame);
}
