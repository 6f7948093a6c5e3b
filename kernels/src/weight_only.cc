// Products of float activations with codes of 8 or 4 bits: see weight_only.h. Compiled once per instruction set.
//
// A product of few rows takes as long as reading the weight does, so the codes are read once, in order, and become floats
// in registers. A tile of up to kBlock rows of codes and a few vectors of columns is multiplied with up to kRows rows of
// activations, all sums in registers; meanwhile the tile after the next is fetched.
#include "weight_only.h"

#include "ahead.h"
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
          int64_t row, int64_t column, int columns, float* y, int64_t stride, Ahead& fetched) {
  Ahead ahead = fetched;
  constexpr int kParts = Decoder::kParts;
  const int64_t packed = p.packed_rows(Decoder::kBits);
  Floats sums[kParts][MR][NR] = {};
  const float* x[kParts];
  for (int part = 0; part < kParts; ++part) x[part] = p.x + row * p.k + block.first + part * packed;
  if (kParts == 2 && block.parts == 1) x[kParts - 1] = x[0];  // what is read there is not used
  for (int r = 0; r < block.count; ++r) {
    ahead.fetch((NR * kLanes + 63) / 64);
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
  fetched = ahead;
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
                 int columns, Ahead& ahead) {
  uint8_t codes[kBlock * kLanes];
  float y[MR * kLanes];
  for (int r = 0; r < block.count; ++r)
    for (int c = 0; c < kLanes; ++c)
      codes[r * kLanes + c] = c < columns ? p.codes[(block.first + r) * p.n + column + c] : 0;
  for (int i = 0; i < MR; ++i)
    for (int c = 0; c < kLanes; ++c)
      y[i * kLanes + c] = c < columns && block.first > 0 ? p.y[(row + i) * p.n + column + c] : 0;
  tile<Decoder, MR, 1>(p, decoder, block, codes, kLanes, row, column, columns, y, kLanes, ahead);
  for (int i = 0; i < MR; ++i)
    for (int c = 0; c < columns; ++c) p.y[(row + i) * p.n + column + c] = y[i * kLanes + c];
}

template <class Decoder, int MR>
void rows(const WeightOnly& p, const Decoder& decoder, const Block& block, int64_t row, int64_t column,
          int64_t column_end, Ahead& ahead) {
  constexpr int kWide = smaller(8, kSums / (MR * Decoder::kParts)) > 0 ? smaller(8, kSums / (MR * Decoder::kParts)) : 1;
  const uint8_t* codes = p.codes + block.first * p.n;
  constexpr int64_t kWidth = kWide * kLanes;
  for (; column + kWidth <= column_end; column += kWidth)
    tile<Decoder, MR, kWide>(p, decoder, block, codes + column, p.n, row, column, kWidth, p.y + row * p.n + column, p.n,
                             ahead);
  for (; column + kLanes <= column_end; column += kLanes)
    tile<Decoder, MR, 1>(p, decoder, block, codes + column, p.n, row, column, kLanes, p.y + row * p.n + column, p.n,
                         ahead);
  if (column < column_end)
    narrow_tile<Decoder, MR>(p, decoder, block, row, column, static_cast<int>(column_end - column), ahead);
}

template <class Decoder>
void block_of_floats(const WeightOnly& p, const Decoder& decoder, const Block& block, int64_t row, int64_t row_end,
                     int64_t column, int64_t column_end, Ahead& first) {
  Ahead none;
  for (int64_t at = row; at < row_end; at += kRows) {
    Ahead& ahead = at == row ? first : none;
    switch (smaller(kRows, static_cast<int>(row_end - at < kRows ? row_end - at : kRows))) {
      case 1: rows<Decoder, 1>(p, decoder, block, at, column, column_end, ahead); break;
      case 2: rows<Decoder, 2>(p, decoder, block, at, column, column_end, ahead); break;
      case 3: rows<Decoder, 3>(p, decoder, block, at, column, column_end, ahead); break;
      case 4: rows<Decoder, 4>(p, decoder, block, at, column, column_end, ahead); break;
#if defined(__AVX512F__)
      case 5: rows<Decoder, 5>(p, decoder, block, at, column, column_end, ahead); break;
      case 6: rows<Decoder, 6>(p, decoder, block, at, column, column_end, ahead); break;
      case 7: rows<Decoder, 7>(p, decoder, block, at, column, column_end, ahead); break;
      case 8: rows<Decoder, 8>(p, decoder, block, at, column, column_end, ahead); break;
#endif
    }
  }
}

#if defined(__AVX512VNNI__)
// Rounds a row's numbers of a block; false if they cannot be.
bool round_row(const WeightOnly& p, const Block& block, int64_t packed, int parts, int64_t row, int to, Rounded& x) {
  for (int part = 0; part < block.parts; ++part)
    if (!x.round(p.x + row * p.k + block.first + part * packed, block.count, part, parts, to)) return false;
  return true;
}

template <int kParts>
Target<kParts> target_at(const WeightOnly& p, const Block& block, int64_t column, int64_t column_end) {
  Target<kParts> target;
  target.parts = block.parts;
  target.first = block.first == 0;
  target.columns = column + 64 <= column_end ? ~0ull : ~0ull >> (64 - (column_end - column));
  for (int part = 0; part < block.parts; ++part)
    for (int j = 0; j < kPanel; ++j)
      target.scales[part][j] = panel_scales(p, block.groups[part], column + j * kLanes,
                                            static_cast<__mmask16>(target.columns >> (j * kLanes)));
  return target;
}

// The same of one row, rounded; in floats if it cannot be.
template <class Decoder, class Codes>
void block_of_a_row(const WeightOnly& p, const Decoder& decoder, const Codes& of, const Block& block, int64_t row,
                    int64_t column, int64_t column_end, Ahead& ahead) {
  constexpr int kParts = Decoder::kParts;
  Rounded x;
  if (!round_row(p, block, p.packed_rows(Decoder::kBits), kParts, row, 0, x))
    return block_of_floats(p, decoder, block, row, row + 1, column, column_end, ahead);
  for (int64_t at = column; at < column_end; at += 64)
    multiply_row(of, x, 0, p.codes + block.first * p.n + at, p.n, block.count,
                 target_at<kParts>(p, block, at, column_end), p.y + row * p.n + at, ahead);
}

// And of up to kRoundedRows rows; in floats those that cannot be rounded.
template <class Decoder, class Codes>
void block_of_rows(const WeightOnly& p, const Decoder& decoder, const Codes& of, const Block& block, int64_t row,
                   int64_t row_end, int64_t column, int64_t column_end, Ahead& ahead) {
  constexpr int kParts = Decoder::kParts;
  Rounded x;
  for (int64_t r = row; r < row_end; ++r) {
    const int to = static_cast<int>(r - row);
    x.fits[to] = round_row(p, block, p.packed_rows(Decoder::kBits), kParts, r, to, x);
  }
  Ahead none;
  for (int64_t at = column; at < column_end; at += 64) {
    const auto target = target_at<kParts>(p, block, at, column_end);
    Panel<kParts> panel;
    unpack(of, p.codes + block.first * p.n + at, p.n, block.count, target.columns, panel, ahead);
    for (int64_t r = row; r < row_end; r += kRoundedTile) {
      const int count = static_cast<int>(row_end - r < kRoundedTile ? row_end - r : kRoundedTile);
      const int from = static_cast<int>(r - row);
      bool fits = true;
      for (int i = 0; i < count; ++i) fits = fits && x.fits[from + i];
      for (int i = 0; i < count && !fits; ++i) {  // one after the other: what a row gives depends on no other row
        if (x.fits[from + i])
          multiply_rows<Codes, 1>(of, x, from + i, panel, block.count, target, p.y + (r + i) * p.n + at, p.n);
        else
          block_of_floats(p, decoder, block, r + i, r + i + 1, at, at + 64 < column_end ? at + 64 : column_end, none);
      }
      if (!fits) continue;
      const auto multiply = count == 1 ? multiply_rows<Codes, 1>
                          : count == 2 ? multiply_rows<Codes, 2>
                          : count == 3 ? multiply_rows<Codes, 3>
                                       : multiply_rows<Codes, 4>;
      multiply(of, x, from, panel, block.count, target, p.y + r * p.n + at, p.n);
    }
  }
}
#endif

// Calls multiply(block) for blocks of up to `most` rows of codes, one after the other.
template <class Decoder, class Multiply>
void each_block(const WeightOnly& p, int most, const Multiply& multiply) {
  const int64_t packed = p.packed_rows(Decoder::kBits), depth = p.k / p.groups;
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
    multiply(block);
    first = end;
  }
}

template <class Decoder>
void part(const WeightOnly& p, int64_t row, int64_t row_end, int64_t column, int64_t column_end) {
  const Decoder decoder(p.levels);
  Ahead ahead(p.codes + column, column_end - column, p.n, p.packed_rows(Decoder::kBits));
  const auto in_floats = [&] {
    ahead.begin(kBlock);
    each_block<Decoder>(p, kBlock, [&](const Block& block) {
      block_of_floats(p, decoder, block, row, row_end, column, column_end, ahead);
    });
  };
#if defined(__AVX512VNNI__)
  constexpr int kCount = kDepth / Decoder::kParts;
  const auto as_a_row = [&](const auto& codes) {
    ahead.begin(kCount);
    each_block<Decoder>(p, kCount, [&](const Block& block) {
      block_of_a_row(p, decoder, codes, block, row, column, column_end, ahead);
    });
  };
  const auto in_integers = [&](const auto& codes) {
    if (row_end - row == 1) return as_a_row(codes);
    if (row_end - row > kRoundedRows) return in_floats();
    ahead.begin(kCount);
    each_block<Decoder>(p, kCount, [&](const Block& block) {
      block_of_rows(p, decoder, codes, block, row, row_end, column, column_end, ahead);
    });
  };
  if constexpr (Decoder::kParts == 1) {
    in_integers(SignedBytes());
  } else if (Decoder::linear(p.levels)) {
    in_integers(SignedHalves());
  } else {
    const LookedUpHalves codes(p.levels);
    p.m == 1 && codes.fits ? as_a_row(codes) : in_floats();  // by all rows: the last part may have one that is not alone
  }
#else
  in_floats();
#endif
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
