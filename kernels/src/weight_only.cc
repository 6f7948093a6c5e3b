// Products of float activations with codes of 8 or 4 bits: see weight_only.h. Compiled once per instruction set.
//
// A product of few rows takes as long as reading the weight does, so the codes are read once, in order, and become floats
// in registers. A tile of up to kBlock rows of codes and a few vectors of columns is multiplied with up to kRows rows of
// activations, all sums in registers; meanwhile the tile after the next is fetched, since rows are too far apart for the
// processor to foresee, and the next one would not be there yet when it is wanted.
#include "weight_only.h"

#include "finish.h"
#include "weight_only_rounded.h"

namespace lepton::VARIANT {
namespace {

constexpr int kBlock = 128;                          // rows of codes in a tile
constexpr int kRows = kRegisters == 32 ? 8 : 4;      // rows of activations in a tile
constexpr int kSums = kRegisters == 32 ? 24 : 12;    // registers for sums

constexpr int smaller(int a, int b) { return a < b ? a : b; }

// Scales of `kLanes` columns of a group, from `column` on, of which `count` are there.
Floats scales(const WeightOnly& p, int64_t group, int64_t column, int count) {
  Floats found;
  if (p.one_scale) return Floats{} + scale_at(p, group);
  if (count == kLanes) {
    const int64_t at = group * p.n + column;
    if (!p.narrow_scale) return load(static_cast<const float*>(p.scale) + at);
    return widen_bfloat16(static_cast<const uint16_t*>(p.scale) + at);
  }
  for (int lane = 0; lane < kLanes; ++lane) found[lane] = lane < count ? scale_at(p, group * p.n + column + lane) : 0;
  return found;
}

struct Eight {
  static constexpr int kBits = 8, kParts = 1;
  explicit Eight(const float*) {}
  static bool linear(const float*) { return true; }
  template <int NR>
  void decode(const uint8_t* from, Floats (&to)[kParts][NR]) const {
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) to[0][j] = as_floats(widen_signed(from + j * kLanes));
  }
};

struct Four {
  static constexpr int kBits = 4, kParts = 2;
  Table table;
  explicit Four(const float* levels) : table(levels) {}
  // Whether codes are integers in two's complement.
  static bool linear(const float* levels) {
    for (int code = 0; code < 16; ++code)
      if (levels[code] != static_cast<float>(code < 8 ? code : code - 16)) return false;
    return true;
  }
  template <int NR>
  void decode(const uint8_t* from, Floats (&to)[kParts][NR]) const {
#pragma GCC unroll 8
    for (int j = 0; j < NR; ++j) {
      const Ints both = widen_unsigned(from + j * kLanes);
      to[0][j] = table.at(both);
      to[1][j] = table.at(both >> 4);
    }
  }
};

// Some rows of codes whose parts have one scale each.
struct Block {
  int64_t first;      // row of codes
  int count;          // rows
  int parts;          // 1, or 2 if the high halves of bytes count too
  int64_t groups[2];  // of each part
};

// Adds the product of `MR` rows of x from `row` on with a tile to `y`, which has `stride` floats a row; or stores it.
template <class Decoder, int MR, int NR>
void tile(const WeightOnly& p, const Decoder& decoder, const Block& block, const uint8_t* codes, int64_t codes_stride,
          int64_t row, int64_t column, int columns, float* y, int64_t stride, const uint8_t* next) {
  constexpr int kParts = Decoder::kParts;
  const int64_t packed = p.packed_rows(Decoder::kBits);
  Floats sums[kParts][MR][NR] = {};
  const float* x[kParts];
  for (int part = 0; part < kParts; ++part) x[part] = p.x + row * p.k + block.first + part * packed;
  if (kParts == 2 && block.parts == 1) x[kParts - 1] = x[0];  // what is read there is not used
  for (int r = 0; r < block.count; ++r) {
#pragma GCC unroll 2
    for (int at = 0; at < NR * kLanes; at += 64) __builtin_prefetch(next + r * p.n + at, 0, 2);
    Floats values[kParts][NR];
    decoder.template decode<NR>(codes + r * codes_stride, values);
#pragma GCC unroll 2
    for (int part = 0; part < kParts; ++part) {
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        const float factor = x[part][i * p.k + r];
#pragma GCC unroll 8
        for (int j = 0; j < NR; ++j) sums[part][i][j] += values[part][j] * factor;
      }
    }
  }
#pragma GCC unroll 8
  for (int j = 0; j < NR; ++j) {
    const int count = smaller(columns - j * kLanes, kLanes);
    const Floats first = scales(p, block.groups[0], column + j * kLanes, count);
#pragma GCC unroll 8
    for (int i = 0; i < MR; ++i) {
      float* to = y + i * stride + j * kLanes;
      Floats sum = block.first == 0 ? sums[0][i][j] * first : load(to) + sums[0][i][j] * first;
      store(to, sum);
    }
    if (kParts == 2 && block.parts == 2) {
      const Floats second = scales(p, block.groups[1], column + j * kLanes, count);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        float* to = y + i * stride + j * kLanes;
        store(to, load(to) + sums[kParts - 1][i][j] * second);
      }
    }
  }
}

// A tile of fewer columns than a vector has lanes, by way of padded copies.
template <class Decoder, int MR>
void narrow_tile(const WeightOnly& p, const Decoder& decoder, const Block& block, int64_t row, int64_t column,
                 int columns) {
  uint8_t codes[kBlock * kLanes];
  float y[MR * kLanes];
  for (int r = 0; r < block.count; ++r)
    for (int c = 0; c < kLanes; ++c)
      codes[r * kLanes + c] = c < columns ? p.codes[(block.first + r) * p.n + column + c] : 0;
  for (int i = 0; i < MR; ++i)
    for (int c = 0; c < kLanes; ++c)
      y[i * kLanes + c] = c < columns && block.first > 0 ? p.y[(row + i) * p.n + column + c] : 0;
  tile<Decoder, MR, 1>(p, decoder, block, codes, kLanes, row, column, columns, y, kLanes, p.codes);
  for (int i = 0; i < MR; ++i)
    for (int c = 0; c < columns; ++c) p.y[(row + i) * p.n + column + c] = y[i * kLanes + c];
}

template <class Decoder, int MR>
void rows(const WeightOnly& p, const Decoder& decoder, const Block& block, int64_t row, int64_t column,
          int64_t column_end) {
  constexpr int kWide = smaller(8, kSums / (MR * Decoder::kParts)) > 0 ? smaller(8, kSums / (MR * Decoder::kParts)) : 1;
  const uint8_t* codes = p.codes + block.first * p.n;
  const int64_t after = block.first + block.count;
  const uint8_t* below = p.codes + (after + block.count <= p.packed_rows(Decoder::kBits) ? after : block.first) * p.n;
  const int64_t start = column;
  constexpr int64_t kWidth = kWide * kLanes;
  for (; column + kWidth <= column_end; column += kWidth) {
    const int64_t ahead = column + 2 * kWidth;
    const uint8_t* next = ahead + kWidth <= column_end ? codes + ahead : below + start + (ahead <= column_end ? 0 : kWidth);
    tile<Decoder, MR, kWide>(p, decoder, block, codes + column, p.n, row, column, kWidth, p.y + row * p.n + column, p.n,
                             next);
  }
  for (; column + kLanes <= column_end; column += kLanes)
    tile<Decoder, MR, 1>(p, decoder, block, codes + column, p.n, row, column, kLanes, p.y + row * p.n + column, p.n,
                         codes + column);
  if (column < column_end)
    narrow_tile<Decoder, MR>(p, decoder, block, row, column, static_cast<int>(column_end - column));
}

template <class Decoder>
void block_of_floats(const WeightOnly& p, const Decoder& decoder, const Block& block, int64_t row, int64_t row_end,
                     int64_t column, int64_t column_end) {
  for (int64_t at = row; at < row_end; at += kRows) {
    switch (smaller(kRows, static_cast<int>(row_end - at < kRows ? row_end - at : kRows))) {
      case 1: rows<Decoder, 1>(p, decoder, block, at, column, column_end); break;
      case 2: rows<Decoder, 2>(p, decoder, block, at, column, column_end); break;
      case 3: rows<Decoder, 3>(p, decoder, block, at, column, column_end); break;
      case 4: rows<Decoder, 4>(p, decoder, block, at, column, column_end); break;
#if defined(__AVX512F__)
      case 5: rows<Decoder, 5>(p, decoder, block, at, column, column_end); break;
      case 6: rows<Decoder, 6>(p, decoder, block, at, column, column_end); break;
      case 7: rows<Decoder, 7>(p, decoder, block, at, column, column_end); break;
      case 8: rows<Decoder, 8>(p, decoder, block, at, column, column_end); break;
#endif
    }
  }
}

#if defined(__AVX512VNNI__)
// The same with rounded activations, for up to kRoundedRows rows; in floats for rows that cannot be rounded.
template <class Decoder>
void block_of_integers(const WeightOnly& p, const Decoder& decoder, const Block& block, int64_t row, int64_t row_end,
                       int64_t column, int64_t column_end) {
  constexpr int kParts = Decoder::kParts, kWidth = kPanel * kLanes;
  const int64_t packed = p.packed_rows(Decoder::kBits), after = block.first + block.count;
  const int pairs = (block.count + 1) / 2;
  Rounded x;
  for (int64_t at = row; at < row_end; ++at) {
    bool fits = true;
    for (int part = 0; part < block.parts && fits; ++part)
      fits = round_row(p.x + at * p.k + block.first + part * packed, block.count, part, kParts, 1 << (Decoder::kBits - 1),
                       static_cast<int>(at - row), x);
    x.fits[at - row] = fits;
  }
  const uint8_t* codes = p.codes + block.first * p.n;
  const uint8_t* below = after + block.count <= packed ? p.codes + after * p.n : nullptr;
  for (int64_t at = column; at < column_end; at += kWidth) {
    const int64_t end = at + kWidth < column_end ? at + kWidth : column_end;
    const __mmask64 columns = ~0ull >> (kWidth - (end - at));
    Panel<kParts> panel;
    unpack<kParts>(codes + at, p.n, block.count, columns, panel);
    __m512 scale[kParts][kPanel];
    for (int part = 0; part < block.parts; ++part)
      for (int j = 0; j < kPanel; ++j)
        scale[part][j] = panel_scales(p, block.groups[part], at + j * kLanes, static_cast<__mmask16>(columns >> (j * kLanes)));
    const uint8_t* next = below == nullptr ? nullptr : below + column + (end < column_end ? 0 : kWidth);
    if (at + 2 * kWidth < column_end) next = codes + at + 2 * kWidth;
    for (int64_t r = row; r < row_end; r += kRoundedTile, next = nullptr) {
      const int count = static_cast<int>(row_end - r < kRoundedTile ? row_end - r : kRoundedTile);
      const int from = static_cast<int>(r - row);
      bool fits = true;
      for (int i = 0; i < count; ++i) fits = fits && x.fits[from + i];
      for (int i = 0; i < count && !fits; ++i) {  // one after the other: what a row gives depends on no other row
        if (x.fits[from + i])
          rounded_tile<kParts, 1>(x, from + i, panel, pairs, block.parts, scale, columns, block.first == 0,
                                  p.y + (r + i) * p.n + at, p.n, nullptr, p.n);
        else
          block_of_floats(p, decoder, block, r + i, r + i + 1, at, end);
      }
      if (!fits) continue;
      const auto multiply = count == 1 ? rounded_tile<kParts, 1>
                          : count == 2 ? rounded_tile<kParts, 2>
                          : count == 3 ? rounded_tile<kParts, 3>
                                       : rounded_tile<kParts, 4>;
      multiply(x, from, panel, pairs, block.parts, scale, columns, block.first == 0, p.y + r * p.n + at, p.n, next, p.n);
    }
  }
}
#endif

template <class Decoder>
void part(const WeightOnly& p, int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
  const Decoder decoder(p.levels);
  const int64_t packed = p.packed_rows(Decoder::kBits), depth = p.k / p.groups;
  int most = kBlock;
#if defined(__AVX512VNNI__)
  const int64_t count = row_end - row;
  const bool rounds = count >= kFewestRounded && count <= kRoundedRows && Decoder::linear(p.levels);
  if (rounds) most = 2 * kPairs / Decoder::kParts;
#endif
  for (int64_t first = 0; first < packed;) {
    Block block{first, 0, 1, {first / depth, 0}};
    // Up to where one of the parts enters its next group, or the last byte whose high half is not used.
    int64_t end = (block.groups[0] + 1) * depth;
    if (Decoder::kParts == 2 && first + packed < p.k) {
      block.parts = 2;
      block.groups[1] = (first + packed) / depth;
      const int64_t other = (block.groups[1] + 1) * depth - packed;
      if (other < end) end = other;
      if (p.k - packed < end) end = p.k - packed;
    }
    if (packed < end) end = packed;
    if (first + most < end) end = first + most;
    block.count = static_cast<int>(end - first);
#if defined(__AVX512VNNI__)
    if (rounds) {
      block_of_integers(p, decoder, block, row, row_end, column, column_end);
      first = end;
      continue;
    }
#endif
    block_of_floats(p, decoder, block, row, row_end, column, column_end);
    first = end;
  }
  for (int64_t at = row; p.k == 0 && at < row_end; ++at)
    for (int64_t c = column; c < column_end; ++c) p.y[at * p.n + c] = 0;
  finish(p.epilogue, p.y, p.n, row, row_end, column, column_end);
}

}  // namespace

void weight_only_8(const WeightOnly& p, int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
  part<Eight>(p, row, row_end, column, column_end);
}

void weight_only_4(const WeightOnly& p, int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
  part<Four>(p, row, row_end, column, column_end);
}

}  // namespace lepton::VARIANT
