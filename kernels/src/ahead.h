// Fetches a part of a matrix of bytes into the second-level cache before it is wanted.
#pragma once

#include <cstdint>

namespace lepton::VARIANT {

// The part is multiplied in blocks of some rows, and these in tiles of some columns: rows are too far apart for the
// processor to foresee. Two lines side by side are fetched of each row, whatever a tile's width: to be at another row, which
// is on another page of memory, takes as long as a line.
class Ahead {
 public:
  Ahead() = default;  // fetches nothing
  Ahead(const uint8_t* from, int64_t width, int64_t stride, int64_t rows)
      : block_(from), width_(width), stride_(stride), rows_(rows) {}

  // Fetches the first two tiles; `depth` rows are a block.
  void begin(int depth) {
    depth_ = depth;
    if (rows_ == 0) return;
    begin_tile();
    fetch(4 * depth);
  }

  // Fetches the next lines; called for as many as are read, it stays as far ahead as it is. Loops call it of a copy, which
  // is in registers.
  __attribute__((always_inline)) void fetch(int lines) {
#pragma GCC unroll 4
    for (int i = 0; i < lines; ++i) {
      if (left_ == 0) return;
      __builtin_prefetch(line_, 0, 2);
      line_ += 64;
      if (line_ < row_ + tile_width_) continue;
      line_ = row_ += stride_;
      if (--left_ == 0) next_tile();
    }
  }

 private:
  static constexpr int64_t kTile = 128;

  void begin_tile() {
    line_ = row_ = block_ + column_;
    tile_width_ = width_ - column_ < kTile ? width_ - column_ : kTile;
    left_ = rows_ < depth_ ? rows_ : depth_;
  }

  void next_tile() {
    column_ += kTile;
    if (column_ >= width_) {
      column_ = 0;
      block_ += depth_ * stride_;
      rows_ -= depth_;
    }
    if (rows_ > 0) begin_tile();
  }

  const uint8_t *block_ = nullptr, *row_ = nullptr, *line_ = nullptr;
  int64_t width_ = 0, stride_ = 0, rows_ = 0, depth_ = 0;  // of the part; rows from the block on
  int64_t column_ = 0, tile_width_ = 0, left_ = 0;         // of the tile; rows that are left
};

}  // namespace lepton::VARIANT
