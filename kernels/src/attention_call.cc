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

AttentionPart* chosen(bool few) {
#if defined(__x86_64__)
  const char* name = lepton_variant();
  if (std::strcmp(name, "avx512") == 0) return few ? avx512::attention_of_few : avx512::attention;
  if (std::strcmp(name, "avx2") == 0) return few ? avx2::attention_of_few : avx2::attention;
#endif
  return few ? portable::attention_of_few : portable::attention;
}

// Fewer multiplications than this are not worth waking another thread for. Of few queries they take longer, since keys
// and values come from memory.
constexpr double kWorthAThread = 1 << 21, kWorthAThreadOfFew = 1 << 18;

bool is_narrow(ffi::DataType type) { return type == ffi::BF16; }
bool is_float(ffi::DataType type) { return type == ffi::F32 || is_narrow(type); }

ffi::Error attention(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                     ffi::BufferR4<ffi::F32> bias, float scale, bool masks, bool heads_first, bool rounds,
                     ffi::Result<ffi::AnyBuffer> y) {
  const auto qs = q.dimensions(), ks = k.dimensions(), vs = v.dimensions(), bs = bias.dimensions(), ys = y->dimensions();
  if (qs.size() != 4 || ks.size() != 4 || vs.size() != 4 || ys.size() != 4)
    return ffi::Error::InvalidArgument("attention: operands and result have four axes");
  const auto type = q.element_type();
  if (!is_float(type) || k.element_type() != type || v.element_type() != type || !is_float(y->element_type()))
    return ffi::Error::InvalidArgument("attention: operands are all float32 or all bfloat16, and the result is either");
  const int keys = heads_first ? 2 : 1, heads = 3 - keys;  // axes of keys and values
  Attention a{};
  a.q = q.untyped_data();
  a.k = k.untyped_data();
  a.v = v.untyped_data();
  a.y = y->untyped_data();
  a.narrow = is_narrow(type), a.narrow_y = is_narrow(y->element_type());
  a.batch = qs[0], a.queries = qs[1], a.heads = qs[2], a.depth = qs[3], a.keys = ks[keys], a.width = vs[3];
  a.scale = scale;
  a.masks = masks, a.heads_first = heads_first, a.rounds = rounds;
  const int64_t scores[] = {a.batch, a.heads, a.queries, a.keys};
  bool fits = ks[0] == a.batch && ks[heads] == a.heads && ks[3] == a.depth && vs[0] == a.batch && vs[keys] == a.keys &&
              vs[heads] == a.heads && ys[0] == a.batch && ys[1] == a.queries && ys[2] == a.heads && ys[3] == a.width;
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
    std::memset(a.y, 0, y->size_bytes());
    return ffi::Error::Success();
  }
  AttentionPart* const part = chosen(a.few());
  const int64_t heads_of_all = a.batch * a.heads, bytes = a.scratch() * static_cast<int64_t>(sizeof(float));
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  // Of few queries a part has several heads, each of which is fetched while the one before is computed. Otherwise a head
  // is cut if there are few of them, since each part swaps the axes of its keys.
  const int64_t beside = a.few() ? std::max<int64_t>(1, heads_of_all / (4 * threads)) : 1;
  const int64_t cuts = std::clamp<int64_t>(2 * threads / heads_of_all, 1, (a.queries + 31) / 32);
  const int64_t queries = (a.queries + cuts - 1) / cuts, parts = (heads_of_all + beside - 1) / beside * cuts;
  std::atomic<bool> complete{true};
  const auto work = [&](int64_t at) {
    auto* memory = static_cast<float*>(thread_scratch(bytes));
    if (memory == nullptr) {
      complete = false;
      return;
    }
    const int64_t query = at % cuts * queries, query_end = std::min(query + queries, a.queries);
    int64_t head = at / cuts * beside;
    for (const int64_t end = std::min(head + beside, heads_of_all); head < end; ++head)
      part(a, head / a.heads, head % a.heads, query, query_end, memory);
  };
  const double products = static_cast<double>(heads_of_all) * a.queries * a.keys * (a.depth + a.width);
  if (products < (a.few() ? kWorthAThreadOfFew : kWorthAThread)) {
    for (int64_t at = 0; at < parts; ++at) work(at);
  } else {
    run_parts(pool, parts, work);
  }
  if (!complete) return ffi::Error(ffi::ErrorCode::kResourceExhausted, "attention: no memory for scores");
  return ffi::Error::Success();
}

}  // namespace
}  // namespace lepton

XLA_FFI_DEFINE_HANDLER(kAttention, lepton::attention,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR4<ffi::F32>>()
                           .Attr<float>("scale")
                           .Attr<bool>("masks")
                           .Attr<bool>("heads_first")
                           .Attr<bool>("rounds")
                           .Ret<ffi::AnyBuffer>());

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* lepton_attention(XLA_FFI_CallFrame* frame) {
  return kAttention(frame);
}
