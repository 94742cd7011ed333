// SPDX-License-Identifier: MIT
// The functions of csrc/cpu/tiles.h, which includes this file, in plain C++; their results have the same bits.
#pragma once
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace gs::tiles {

struct Unit {
  bool configured = false;
  Shapes shapes;
  char tiles[8][16][64];
};
inline thread_local Unit unit;

inline bool exist() { return true; }
inline bool request() { return true; }

inline void configure(const Shapes& shapes) {
  unit.configured = true;
  unit.shapes = shapes;
  std::memset(unit.tiles, 0, sizeof(unit.tiles));
}
inline void release() { unit.configured = false; }

// The rows of a tile, which must have at least one.
inline int rows_of(int tile) {
  if (unit.configured && unit.shapes.rows[tile] > 0) return unit.shapes.rows[tile];
  std::printf("tile %d has no shape\n", tile);
  std::abort();
}

template <int Tile>
void zero() {
  std::memset(unit.tiles[Tile], 0, rows_of(Tile) * sizeof(unit.tiles[Tile][0]));
}
template <int Tile>
void load(const void* rows, int64_t stride) {
  zero<Tile>();
  for (int r = 0; r < rows_of(Tile); r++) {
    std::memcpy(unit.tiles[Tile][r], static_cast<const char*>(rows) + r * stride, unit.shapes.bytes[Tile]);
  }
}
template <int Tile>
void store(void* rows, int64_t stride) {
  for (int r = 0; r < rows_of(Tile); r++) {
    std::memcpy(static_cast<char*>(rows) + r * stride, unit.tiles[Tile][r], unit.shapes.bytes[Tile]);
  }
}

inline float flushed(float x) { return std::abs(x) < FLT_MIN ? std::copysign(0.0f, x) : x; }

// The bfloat16 numbers of a tile.
struct Numbers {
  float of[16][32];

  Numbers(int tile, int count) {
    for (int r = 0; r < rows_of(tile); r++) {
      for (int i = 0; i < count; i++) {
        uint16_t bits;
        std::memcpy(&bits, unit.tiles[tile][r] + 2 * i, 2);
        const uint32_t wide = uint32_t{bits} << 16;
        std::memcpy(&of[r][i], &wide, 4);
        of[r][i] = flushed(of[r][i]);
      }
    }
  }
};

template <int Sum, int Left, int Right>
void multiply() {
  const int pairs = unit.shapes.bytes[Left] / 4, columns = unit.shapes.bytes[Right] / 4;
  if (rows_of(Sum) != rows_of(Left) || unit.shapes.bytes[Sum] != 4 * columns || rows_of(Right) != pairs) {
    std::printf("the shapes of tiles %d, %d and %d do not fit\n", Sum, Left, Right);
    std::abort();
  }
  const Numbers left(Left, 2 * pairs), right(Right, 2 * columns);
  for (int i = 0; i < rows_of(Sum); i++) {
    for (int j = 0; j < columns; j++) {
      float even = 0, odd = 0, sum;
      for (int k = 0; k < pairs; k++) {
        even = flushed(std::fma(left.of[i][2 * k], right.of[k][2 * j], even));
        odd = flushed(std::fma(left.of[i][2 * k + 1], right.of[k][2 * j + 1], odd));
      }
      std::memcpy(&sum, unit.tiles[Sum][i] + 4 * j, 4);
      sum = flushed(flushed(sum) + flushed(even + odd));
      std::memcpy(unit.tiles[Sum][i] + 4 * j, &sum, 4);
    }
  }
}

}  // namespace gs::tiles
