// What XLA calls to compute attention: checks operands and cuts the work into parts.
#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "attention.h"
#include "parallel.h"
#include "scratch.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

extern "C" const char* lepton_variant();

namespace lepton {
namespace {

AttentionPart* chosen() {
#if defined(__x86_64__)
  const char* name = lepton_variant();
  if (std::strcmp(name, "avx512") == 0) return avx512::attention;
  if (std::strcmp(name, "avx2") == 0) return avx2::attention;
#endif
  return portable::attention;
}

// Fewer multiplications than this are not worth waking another thread for.
constexpr double kWorthAThread = 1 << 21;

using Heads = ffi::BufferR4<ffi::F32>;

ffi::Error attention(ffi::ThreadPool pool, Heads q, Heads k, Heads v, Heads bias, float scale, bool masks,
                     ffi::ResultBufferR4<ffi::F32> y) {
  const auto qs = q.dimensions(), ks = k.dimensions(), vs = v.dimensions(), bs = bias.dimensions(), ys = y->dimensions();
  Attention a{};
  a.q = q.typed_data();
  a.k = k.typed_data();
  a.v = v.typed_data();
  a.y = y->typed_data();
  a.batch = qs[0], a.queries = qs[1], a.heads = qs[2], a.depth = qs[3], a.keys = ks[1], a.width = vs[3];
  a.scale = scale;
  a.masks = masks;
  const int64_t scores[] = {a.batch, a.heads, a.queries, a.keys};
  bool fits = ks[0] == a.batch && ks[2] == a.heads && ks[3] == a.depth && vs[0] == a.batch && vs[1] == a.keys &&
              vs[2] == a.heads && ys[0] == a.batch && ys[1] == a.queries && ys[2] == a.heads && ys[3] == a.width;
  if (bs[0] != 0 && bias.element_count() != 0) {
    a.bias = bias.typed_data();
    int64_t* const steps[] = {&a.bias_batch, &a.bias_head, &a.bias_query, &a.bias_key};
    int64_t step = 1;
    for (int axis = 3; axis >= 0; step *= bs[axis], --axis) {
      fits = fits && (bs[axis] == 1 || bs[axis] == scores[axis]);
      *steps[axis] = bs[axis] == 1 ? 0 : step;
    }
  }
  if (!fits) return ffi::Error::InvalidArgument("attention: shapes of operands and result do not fit");
  if (y->element_count() == 0) return ffi::Error::Success();
  if (a.keys == 0) {
    std::fill_n(a.y, y->element_count(), 0.0f);
    return ffi::Error::Success();
  }
  AttentionPart* const part = chosen();
  const int64_t heads = a.batch * a.heads, bytes = a.scratch() * static_cast<int64_t>(sizeof(float));
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  // Heads are cut only if there are few of them, since each part swaps the axes of its keys.
  const int64_t cuts = std::clamp<int64_t>(2 * threads / heads, 1, (a.queries + 31) / 32);
  const int64_t queries = (a.queries + cuts - 1) / cuts;
  std::atomic<bool> complete{true};
  const auto work = [&](int64_t at) {
    auto* memory = static_cast<float*>(thread_scratch(bytes));
    if (memory == nullptr) {
      complete = false;
      return;
    }
    const int64_t head = at / cuts, query = at % cuts * queries;
    part(a, head / a.heads, head % a.heads, query, std::min(query + queries, a.queries), memory);
  };
  const double products = static_cast<double>(heads) * a.queries * a.keys * (a.depth + a.width);
  if (products < kWorthAThread) {
    for (int64_t at = 0; at < heads * cuts; ++at) work(at);
  } else {
    run_parts(pool, heads * cuts, work);
  }
  if (!complete) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "attention: no memory for scores");
  return ffi::Error::Success();
}

}  // namespace
}  // namespace lepton

XLA_FFI_DEFINE_HANDLER(kAttention, lepton::attention,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::BufferR4<ffi::F32>>()
                           .Arg<ffi::BufferR4<ffi::F32>>()
                           .Arg<ffi::BufferR4<ffi::F32>>()
                           .Arg<ffi::BufferR4<ffi::F32>>()
                           .Attr<float>("scale")
                           .Attr<bool>("masks")
                           .Ret<ffi::BufferR4<ffi::F32>>());

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* lepton_attention(XLA_FFI_CallFrame* frame) {
  return kAttention(frame);
}
