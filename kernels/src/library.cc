// What Python sees: the kernels as XLA's FFI handlers, and which instruction set they use.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "integer_product.h"
#include "kept.h"
#include "parallel.h"
#include "scratch.h"
#include "weight_only.h"
#include "xla/ffi/api/ffi.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace ffi = xla::ffi;

namespace lepton {
namespace {

struct Variant {
  const char* name;
  bool (*runs)();
  WeightOnlyPart *weight_only_8, *weight_only_4;
  IntegerRangePart* round_rows;
  IntegerPart* integer_product;
  IntegerPanel* integer_panel;  // null where `integer_product` is fastest for many rows too
  int64_t code_bytes;           // of a code in a panel
  double integer_products;      // fewer of them than this are not worth waking another thread for: some 30 microseconds
};

// From the fastest to the one that runs everywhere.
const Variant kVariants[] = {
#if defined(__x86_64__)
    {"avx512",
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
     },
     avx512::weight_only_8, avx512::weight_only_4, avx512::round_rows, avx512::integer_product,
     avx512::integer_panel, 1, 1 << 23},
    {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2::weight_only_8,
     avx2::weight_only_4, avx2::round_rows, avx2::integer_product,
     avx2::integer_panel, 2, 1 << 22},
#elif defined(__aarch64__) && defined(__linux__)
    {"dotprod", [] { return (getauxval(AT_HWCAP) & (1ul << 20)) != 0; },  // HWCAP_ASIMDDP
     portable::weight_only_8, portable::weight_only_4, dotprod::round_rows, dotprod::integer_product,
     dotprod::integer_panel, 1, 1 << 22},
#endif
    {"portable", [] { return true; }, portable::weight_only_8, portable::weight_only_4, portable::round_rows,
     portable::integer_product, nullptr, 0, 1 << 19},
};

const Variant* fastest() {
  return std::find_if(std::begin(kVariants), std::end(kVariants), [](const Variant& each) { return each.runs(); });
}

std::atomic<const Variant*> chosen{fastest()};

// Fewer multiplications than this are not worth waking another thread for.
constexpr int64_t kWorthAThread = 1 << 17;
// Parts of this many rows and columns keep their sums and activations in the second-level cache.
constexpr int64_t kPartRows = 64, kPartColumns = 512;
constexpr int64_t kFirstLevelBytes = 24 << 10, kFewRows = 12;
// From this number of rows on, a packed panel of a weight pays for packing on each call; panels of more bytes leave the
// cache. Parts of a panel have at least some rows, since each packs it again.
constexpr int64_t kPanelRows = 16, kPanelBytes = 2 << 20, kPanelPartRows = 96;
// Of a thread that is awake, so much less is worth it.
constexpr double kWhereAwake = 8;
// Rows whose codes stay in the second-level cache while all panels pass by; a multiple of those of tiles.
constexpr int64_t kBlockRows = 132, kTileRows = 12;

// Reads the operands of an epilogue; false if they do not fit a result [m, n].
bool read_epilogue(Epilogue& e, ffi::BufferR1<ffi::F32> bias, ffi::BufferR2<ffi::F32> residual, int64_t activation,
                   int64_t m, int64_t n) {
  const auto added = residual.dimensions();
  e.bias = bias.dimensions()[0] == 0 ? nullptr : bias.typed_data();
  e.residual = added[0] == 0 ? nullptr : residual.typed_data();
  e.activation = static_cast<Activation>(activation);
  return activation >= 0 && activation < kActivations && (e.bias == nullptr || bias.dimensions()[0] == n) &&
         (e.residual == nullptr || (added[0] == m && added[1] == n));
}

// A part of a product, by packed panels if there is memory for one.
void multiply_part(const IntegerProduct& p, const Variant& variant, bool packs, int64_t row, int64_t row_end,
                     int64_t column, int64_t column_end) {
  auto* packed = packs ? static_cast<int8_t*>(thread_scratch(p.panel_scratch())) : nullptr;
  if (packed != nullptr)
    variant.integer_panel(p, row, row_end, column, column_end, packed);
  else
    variant.integer_product(p, row, row_end, column, column_end);
}

// By packed panels. Of many rows a part is all columns of some of them: it rounds them itself, and their codes stay in the
// second-level cache, and each thread gets as many parts. Parts of a weight that is not kept are columns instead, since
// each part packs its panels.
void panels(ffi::ThreadPool& pool, const IntegerProduct& p, const Variant& variant, int64_t threads) {
  constexpr int64_t kColumns = IntegerProduct::kPanelColumns;
  if (p.kept != nullptr && p.m >= 2 * threads * kPanelPartRows) {
    const int64_t rounds = (p.m + threads * kBlockRows - 1) / (threads * kBlockRows), wanted = threads * rounds;
    const int64_t rows = ((p.m + wanted - 1) / wanted + kTileRows - 1) / kTileRows * kTileRows;
    run_parts(pool, (p.m + rows - 1) / rows, [&](int64_t part) {
      const int64_t row = part * rows, row_end = std::min(row + rows, p.m);
      variant.round_rows(p, row, row_end);
      multiply_part(p, variant, true, row, row_end, 0, p.n);
    });
    return;
  }
  if (p.m * p.k < kWorthAThread) {
    variant.round_rows(p, 0, p.m);
  } else {
    const int64_t rows = (p.m + 2 * threads - 1) / (2 * threads);
    run_parts(pool, (p.m + rows - 1) / rows,
              [&](int64_t part) { variant.round_rows(p, part * rows, std::min(part * rows + rows, p.m)); });
  }
  // A part is several panels beside each other, each of which is fetched while the one before is multiplied. A thread
  // gets two, if that does not leave another without work in the end.
  const int64_t all = (p.n + kColumns - 1) / kColumns;
  const int64_t wanted = all >= 6 * threads ? 2 * threads : threads;
  const int64_t width = (all + wanted - 1) / wanted * kColumns, column_parts = (p.n + width - 1) / width;
  const int64_t row_parts =
      std::clamp<int64_t>((2 * threads + column_parts - 1) / column_parts, 1, std::max<int64_t>(1, p.m / kPanelPartRows));
  const int64_t rows = (p.m + row_parts - 1) / row_parts;
  run_parts(pool, column_parts * row_parts, [&](int64_t part) {
    const int64_t column = part / row_parts * width, row = part % row_parts * rows;
    const int64_t column_end = std::min(column + width, p.n), row_end = std::min(row + rows, p.m);
    multiply_part(p, variant, true, row, row_end, column, column_end);
  });
}

// Columns of a part, a multiple of the widest tile: as many as keep all threads busy to the end. Less than a twentieth of
// the time is not worth narrower parts, each of which reads all activations.
int64_t part_width(int64_t columns, int64_t row_parts, int64_t threads) {
  int64_t best = kPartColumns, least = INT64_MAX;
  for (int64_t width = kPartColumns; width > 0; width -= 128) {
    const int64_t parts = (columns + width - 1) / width * row_parts;
    const int64_t longest = (parts + threads - 1) / threads * std::min(width, columns);
    if (longest < least - least / 20) best = width, least = longest;
  }
  return best;
}

ffi::Error weight_only(ffi::ThreadPool pool, int bits, WeightOnly p, int64_t code_rows, int64_t code_columns,
                       ffi::AnyBuffer scale, ffi::BufferR1<ffi::F32> bias, ffi::BufferR2<ffi::F32> residual,
                       int64_t activation, int64_t y_rows, int64_t y_columns) {
  const auto shape = scale.dimensions();
  if (shape.size() != 2) return ffi::Error::InvalidArgument("weight_only: scale is a matrix");
  p.groups = shape[0];
  p.one_scale = shape[1] == 1 && code_columns != 1;
  p.narrow_scale = scale.element_type() == ffi::BF16;
  p.scale = scale.untyped_data();
  p.n = code_columns;
  if (!p.narrow_scale && scale.element_type() != ffi::F32)
    return ffi::Error::InvalidArgument("weight_only: scales are float32 or bfloat16");
  if (code_rows != p.packed_rows(bits) || (shape[1] != 1 && shape[1] != p.n) || y_rows != p.m || y_columns != p.n ||
      p.groups < 1 || p.k % p.groups != 0 || !read_epilogue(p.epilogue, bias, residual, activation, p.m, p.n))
    return ffi::Error::InvalidArgument("weight_only: shapes of operands and result do not fit");
  if (p.m == 0 || p.n == 0) return ffi::Error::Success();
  const Variant& variant = *chosen.load();
  WeightOnlyPart* compute = bits == 8 ? variant.weight_only_8 : variant.weight_only_4;
  // In doubles, since the product of huge sizes may not fit an integer.
  if (static_cast<double>(p.m) * p.k * p.n < 2.0 * kWorthAThread) {
    compute(p, 0, p.m, 0, p.n);
    return ffi::Error::Success();
  }
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  const int64_t row_parts = (p.m + kPartRows - 1) / kPartRows;
  const int64_t width = part_width(p.n, row_parts, threads);
  const int64_t column_parts = (p.n + width - 1) / width;
  run_parts(pool, row_parts * column_parts, [&](int64_t part) {
    const int64_t row = part / column_parts * kPartRows, column = part % column_parts * width;
    compute(p, row, std::min(row + kPartRows, p.m), column, std::min(column + width, p.n));
  });
  return ffi::Error::Success();
}

ffi::Error weight_only_8(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR2<ffi::S8> codes,
                         ffi::AnyBuffer scale, ffi::BufferR1<ffi::F32> bias, ffi::BufferR2<ffi::F32> residual,
                         int64_t activation, ffi::ResultBufferR2<ffi::F32> y) {
  WeightOnly p{};
  p.x = x.typed_data();
  p.codes = reinterpret_cast<const uint8_t*>(codes.typed_data());
  p.y = y->typed_data();
  p.m = x.dimensions()[0];
  p.k = x.dimensions()[1];
  return weight_only(pool, 8, p, codes.dimensions()[0], codes.dimensions()[1], scale, bias, residual, activation,
                     y->dimensions()[0], y->dimensions()[1]);
}

ffi::Error weight_only_4(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR2<ffi::U8> codes,
                         ffi::AnyBuffer scale, ffi::BufferR1<ffi::F32> levels, ffi::BufferR1<ffi::F32> bias,
                         ffi::BufferR2<ffi::F32> residual, int64_t activation, ffi::ResultBufferR2<ffi::F32> y) {
  WeightOnly p{};
  if (levels.dimensions()[0] != 16) return ffi::Error::InvalidArgument("weight_only_4: there are 16 levels");
  p.x = x.typed_data();
  p.codes = codes.typed_data();
  p.levels = levels.typed_data();
  p.y = y->typed_data();
  p.m = x.dimensions()[0];
  p.k = x.dimensions()[1];
  return weight_only(pool, 4, p, codes.dimensions()[0], codes.dimensions()[1], scale, bias, residual, activation,
                     y->dimensions()[0], y->dimensions()[1]);
}

ffi::Error integer_product(ffi::ThreadPool pool, ffi::BufferR2<ffi::F32> x, ffi::BufferR2<ffi::S8> codes,
                           ffi::BufferR2<ffi::F32> scale, ffi::BufferR1<ffi::F32> static_scale,
                           ffi::BufferR1<ffi::F32> factor, ffi::BufferR1<ffi::F32> bias,
                           ffi::BufferR2<ffi::F32> residual, int64_t activation, ffi::ResultBufferR2<ffi::F32> y) {
  IntegerProduct p{};
  p.x = x.typed_data();
  p.codes = codes.typed_data();
  p.scale = scale.typed_data();
  p.static_scale = static_scale.dimensions()[0] == 1 ? static_scale.typed_data() : nullptr;
  p.factor = factor.dimensions()[0] == 0 ? nullptr : factor.typed_data();
  p.y = y->typed_data();
  p.m = x.dimensions()[0];
  p.k = x.dimensions()[1];
  p.n = codes.dimensions()[0];
  p.one_scale = scale.dimensions()[1] == 1;
  if (codes.dimensions()[1] != p.k || scale.dimensions()[0] != 1 || (!p.one_scale && scale.dimensions()[1] != p.n) ||
      static_scale.dimensions()[0] > 1 || (p.factor != nullptr && factor.dimensions()[0] != p.k) ||
      y->dimensions()[0] != p.m || y->dimensions()[1] != p.n ||
      !read_epilogue(p.epilogue, bias, residual, activation, p.m, p.n))
    return ffi::Error::InvalidArgument("integer_product: shapes of operands and result do not fit");
  if (p.m == 0 || p.n == 0) return ffi::Error::Success();
  const std::unique_ptr<uint8_t[]> rounded(new (std::nothrow) uint8_t[p.m * p.padded_depth()]);
  const std::unique_ptr<float[]> row_scale(new (std::nothrow) float[p.m]);
  if (rounded == nullptr || row_scale == nullptr)
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "integer_product: no memory for rounded rows");
  p.rounded = rounded.get();
  p.row_scale = row_scale.get();
  const Variant& variant = *chosen.load();
  p.code_bytes = variant.code_bytes;
  const double products = static_cast<double>(p.m) * p.k * p.n;
  const bool may_pack = variant.integer_panel != nullptr && p.panel_scratch() <= kPanelBytes;
  const std::shared_ptr<KeptPanels> kept =
      may_pack ? kept_panels(p.codes, p.n * p.k, &variant, p.n, 1, p.panels(), p.panel_bytes()) : nullptr;
  p.kept = kept.get();
  const bool packs = may_pack && (p.kept != nullptr || p.m >= kPanelRows);
  // One row is over sooner than it is shared: where it was, the tokens of a decoder took a tenth longer.
  const double share = p.m == 1 ? 2 : others_are_awake() ? 1 / kWhereAwake : 1;
  if (products < variant.integer_products * share) {
    variant.round_rows(p, 0, p.m);
    multiply_part(p, variant, packs, 0, p.m, 0, p.n);
    return ffi::Error::Success();
  }
  const int64_t threads = std::max<int64_t>(1, pool.num_threads());
  if (packs) {
    panels(pool, p, variant, threads);
  } else if (p.m >= 2 * threads * kFewRows) {
    // A part rounds its rows, which stay in the first-level cache while all columns pass by.
    int64_t rows = std::min((p.m + 2 * threads - 1) / (2 * threads), kFirstLevelBytes / p.padded_depth());
    rows = (std::max(rows, kFewRows) + 3) / 4 * 4;
    run_parts(pool, (p.m + rows - 1) / rows, [&](int64_t part) {
      const int64_t end = std::min(part * rows + rows, p.m);
      variant.round_rows(p, part * rows, end);
      variant.integer_product(p, part * rows, end, 0, p.n);
    });
  } else {
    variant.round_rows(p, 0, p.m);
    const int64_t width = std::max<int64_t>(16, (p.n + 8 * threads - 1) / (8 * threads) * 4);
    run_parts(pool, (p.n + width - 1) / width, [&](int64_t part) {
      variant.integer_product(p, 0, p.m, part * width, std::min(part * width + width, p.n));
    });
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace lepton

#define EXPORTED extern "C" __attribute__((visibility("default")))

XLA_FFI_DEFINE_HANDLER(kWeightOnly8, lepton::weight_only_8,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::BufferR2<ffi::F32>>()
                           .Arg<ffi::BufferR2<ffi::S8>>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR2<ffi::F32>>()
                           .Attr<int64_t>("activation")
                           .Ret<ffi::BufferR2<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER(kWeightOnly4, lepton::weight_only_4,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::BufferR2<ffi::F32>>()
                           .Arg<ffi::BufferR2<ffi::U8>>()
                           .Arg<ffi::AnyBuffer>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR2<ffi::F32>>()
                           .Attr<int64_t>("activation")
                           .Ret<ffi::BufferR2<ffi::F32>>());

XLA_FFI_DEFINE_HANDLER(kIntegerProduct, lepton::integer_product,
                       ffi::Ffi::Bind()
                           .Ctx<ffi::ThreadPool>()
                           .Arg<ffi::BufferR2<ffi::F32>>()
                           .Arg<ffi::BufferR2<ffi::S8>>()
                           .Arg<ffi::BufferR2<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR1<ffi::F32>>()
                           .Arg<ffi::BufferR2<ffi::F32>>()
                           .Attr<int64_t>("activation")
                           .Ret<ffi::BufferR2<ffi::F32>>());

EXPORTED XLA_FFI_Error* lepton_integer_product(XLA_FFI_CallFrame* frame) { return kIntegerProduct(frame); }
EXPORTED XLA_FFI_Error* lepton_weight_only_8(XLA_FFI_CallFrame* frame) { return kWeightOnly8(frame); }
EXPORTED XLA_FFI_Error* lepton_weight_only_4(XLA_FFI_CallFrame* frame) { return kWeightOnly4(frame); }

// The version of XLA's FFI that this was compiled for: major * 1000 + minor.
EXPORTED int lepton_ffi_version() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

// The name of the instruction set in use.
EXPORTED const char* lepton_variant() { return lepton::chosen.load()->name; }

// Says that a weight's elements do not change until `lepton_release` was called as often: see kept.h.
EXPORTED void lepton_keep(const void* weight, int64_t bytes) { lepton::keep(weight, bytes); }
EXPORTED void lepton_release(const void* weight) { lepton::release(weight); }
EXPORTED int64_t lepton_packed_bytes(const void* weight) { return lepton::packed_bytes(weight); }

// Uses an instruction set, by default (an empty name) the fastest one; false if this machine lacks it.
EXPORTED bool lepton_use(const char* name) {
  for (const auto& each : lepton::kVariants) {
    if ((*name == 0 || std::strcmp(each.name, name) == 0) && each.runs()) {
      lepton::chosen = &each;
      return true;
    }
  }
  return false;
}
