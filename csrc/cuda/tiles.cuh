// SPDX-License-Identifier: MIT
// Tiles of matrix instructions, in the registers of one warp: products of the 16 tasks of a left strip (two row blocks)
// with the 8 tasks of a right block. Lane 4 g + k supplies a vector of row g of a block, as it was loaded, for both the
// left and the right operand: any order of the columns gives the same products, if both operands use it. The lane holds
// the products of the left tasks g and g + 8 with the right tasks 2 k and 2 k + 1.
#pragma once
#include "cuda/gram.cuh"

namespace gs::gpu {

// The lanes that share a row, and this lane's number among them.
constexpr int kRowLanes = 4;
GS_DEVICE int row_lane() { return thread() % kRowLanes; }
GS_DEVICE int row_in_block() { return thread() % kWarp / kRowLanes; }

// Exact products, sums in float64. Tiles for which needed(i, j) is false are left out.
template <class In, int kLeft, int kRight>
struct DoubleTiles {
  double acc[kLeft][kRight][4] = {};

  // One step: the operands of multiply_double.
  template <class Needed>
  GS_DEVICE void add(const double (&left)[kLeft][4], const double (&right)[kRight][2], const Needed& needed) {
#pragma unroll
    for (int i = 0; i < kLeft; i++) {
#pragma unroll
      for (int j = 0; j < kRight; j++) {
        if (needed(i, j)) multiply_double(acc[i][j], left[i], right[j]);
      }
    }
  }
  GS_DEVICE void finish() {}
};

// Words of one or two blocks as operands. A 16-bit format is used as it is; a float is split into the sum of two tf32
// values, `word` and `rest`, to a relative error of 2^-22.
template <class In, int kWords>
struct Parts {
  uint32_t word[kWords];
  GS_DEVICE explicit Parts(const uint32_t (&bits)[kWords]) {
#pragma unroll
    for (int w = 0; w < kWords; w++) word[w] = bits[w];
  }
};
template <int kWords>
struct Parts<float, kWords> {
  uint32_t word[kWords], rest[kWords];
  GS_DEVICE explicit Parts(const uint32_t (&bits)[kWords]) {
#pragma unroll
    for (int w = 0; w < kWords; w++) {
      // 11 bits of mantissa, rounded to nearest, and the rest, which is NaN if the value is not finite.
      word[w] = (bits[w] + 0x1000) & 0xffffe000;
      rest[w] = bits_of_float(float_from_bits(bits[w]) - float_from_bits(word[w])) & 0xffffe000;
    }
  }
};

// d = the products of 16 tasks with 8 in one step.
GS_DEVICE void multiply(float (&d)[4], const Parts<bfloat16, 4>& left, const Parts<bfloat16, 2>& right) {
  multiply_bfloat(d, left.word, right.word, {0, 0, 0, 0});
}
GS_DEVICE void multiply(float (&d)[4], const Parts<float16, 4>& left, const Parts<float16, 2>& right) {
  multiply_half(d, left.word, right.word, {0, 0, 0, 0});
}
// The product of the two rests is left out: it is below float's precision.
GS_DEVICE void multiply(float (&d)[4], const Parts<float, 4>& left, const Parts<float, 2>& right) {
  multiply_tf32(d, left.rest, right.word, {0, 0, 0, 0});
  multiply_tf32(d, left.word, right.rest, d);
  multiply_tf32(d, left.word, right.word, d);
}

// A strip's operands in two steps: step s uses words 2 s and 2 s + 1 of both vectors.
struct LeftWords {
  uint32_t step[2][4];
  template <class In>
  GS_DEVICE static LeftWords from(const Vector<In>& top, const Vector<In>& bottom) {
    return {{{top.word[0], bottom.word[0], top.word[1], bottom.word[1]},
             {top.word[2], bottom.word[2], top.word[3], bottom.word[3]}}};
  }
};

// Products and sums within one step are computed by the instruction in float32, which may truncate. Eight steps are
// added in float32, rounded to nearest, before the sum continues in float64. right(j) is the vector of right block j.
template <class In, int kLeft, int kRight>
struct FloatTiles {
  static constexpr int kFold = 4;  // vectors, of two steps each
  double acc[kLeft][kRight][4] = {};
  float chain[kLeft][kRight][4] = {};
  uint32_t seen[kLeft][2] = {};  // all values' bits without the sign, or-ed: 0 if a left row is all zeros
  int length = 0;

  template <class Right, class Needed>
  GS_DEVICE void add(const LeftWords (&left)[kLeft], const Right& right, const Needed& needed) {
#pragma unroll
    for (int i = 0; i < kLeft; i++) {
      const uint32_t (&step)[2][4] = left[i].step;
      constexpr uint32_t kMagnitude = sizeof(In) == 4 ? 0x7fffffff : 0x7fff7fff;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        seen[i][h] |= (step[0][h] | step[0][h + 2] | step[1][h] | step[1][h + 2]) & kMagnitude;
      }
      const Parts<In, 4> a[2] = {Parts<In, 4>(step[0]), Parts<In, 4>(step[1])};
#pragma unroll
      for (int j = 0; j < kRight; j++) {
        if (!needed(i, j)) continue;
        const Vector<In> vector = right(j);
#pragma unroll
        for (int s = 0; s < 2; s++) {
          const uint32_t words[2] = {vector.word[2 * s], vector.word[2 * s + 1]};
          float d[4];
          multiply(d, a[s], Parts<In, 2>(words));
#pragma unroll
          for (int v = 0; v < 4; v++) chain[i][j][v] += d[v];
        }
      }
    }
    if (++length == kFold) finish();
  }

  GS_DEVICE void finish() {
    length = 0;
#pragma unroll
    for (int i = 0; i < kLeft; i++) {
#pragma unroll
      for (int j = 0; j < kRight; j++) {
#pragma unroll
        for (int v = 0; v < 4; v++) {
          acc[i][j][v] += chain[i][j][v];
          chain[i][j][v] = 0;
        }
      }
    }
  }
};

// Whether float32 could hold the sum of a row's squares over `columns` columns: no overflow, and losses by underflow
// are below the precision. Products of float16 values always fit.
GS_DEVICE bool fits_float(double square, int64_t columns) {
  return square >= 0x1p-100 * static_cast<double>(columns) && square <= 0x1p120;
}

// The shared memory of write_tiles, which handles kGroup tiles of every warp at a time.
constexpr int kGroup = 4, kTileValues = 128;
GS_HOST_DEVICE constexpr int64_t sums_bytes(int warps) { return int64_t{warps} * kGroup * kTileValues * 8; }

// The tiles of strip i from block 2 i on; the others repeat pairs of these.
struct IsUpper {
  GS_DEVICE constexpr bool operator()(int i, int j) const { return j >= 2 * i; }
};

// Adds the upper tiles of the `splits` warps that share an owner's tiles, in the order of the splits. The sum in tile
// (i, j), at a row of the strip and a column of the block, goes to partial[place(i, j, row, column)] unless place() is
// negative. Every thread of the block must call this, with the same number of splits.
template <int kLeft, int kRight, class Tiles, class Place>
GS_DEVICE void write_tiles(const Tiles& tiles, int owner, int split, int splits, const Place& place, double* sums,
                           double* partial) {
  const int first_row = row_in_block(), first_column = 2 * row_lane();
  const auto place_of = [&](int i, int j, int v) { return place(i, j, first_row + v / 2 * 8, first_column + v % 2); };
  if (splits == 1) {
#pragma unroll
    for (int tile = 0; tile < kLeft * kRight; tile++) {
      const int i = tile / kRight, j = tile % kRight;
      if (!IsUpper{}(i, j)) continue;
#pragma unroll
      for (int v = 0; v < 4; v++) {
        const int pair = place_of(i, j, v);
        if (pair >= 0) partial[pair] = tiles.acc[i][j][v];
      }
    }
    return;
  }
  constexpr int kUpper = kLeft * kRight - kLeft * (kLeft - 1), kValues = kGroup * kTileValues;
  double* const parts = sums + owner * splits * kValues + thread() % kWarp;
#pragma unroll 1
  for (int first = 0; first < kUpper; first += kGroup) {
    sync_block();
    int number = 0;  // counts the upper tiles
#pragma unroll
    for (int tile = 0; tile < kLeft * kRight; tile++) {
      if (!IsUpper{}(tile / kRight, tile % kRight)) continue;
      // Registers cannot be indexed, so all tiles are visited, and those of the group are taken.
      if (number / kGroup * kGroup == first) {
#pragma unroll
        for (int v = 0; v < 4; v++) {
          parts[split * kValues + number % kGroup * kTileValues + v * kWarp] =
              tiles.acc[tile / kRight][tile % kRight][v];
        }
      }
      number++;
    }
    sync_block();
#pragma unroll 1
    for (int at = split * kWarp; at < kValues; at += splits * kWarp) {
      int i = 0, j = first + at / kTileValues;  // j: at first the number of the upper tile, then its block in strip i
      if (j >= kUpper) break;
      for (; j >= kRight; i++) j -= kRight - 2 * (i + 1);
      const int pair = place_of(i, j, at / kWarp % 4);
      if (pair < 0) continue;
      double sum = parts[at];
      for (int other = 1; other < splits; other++) sum += parts[other * kValues + at];
      partial[pair] = sum;
    }
  }
}

// Whether float32 could not hold the sum of squares of some row of the strips. write_tiles must have written the sums.
template <class In, int kLeft, int kRight>
GS_DEVICE bool any_misfit(const FloatTiles<In, kLeft, kRight>& tiles, int first_row, int num_tasks, int64_t columns,
                          const double* partial) {
  sync_block();
  bool misfit = false;
#pragma unroll
  for (int b = 0; b < 2 * kLeft; b++) {
    const int row = first_row + 8 * b + row_in_block();
    if (row < num_tasks && tiles.seen[b / 2][b % 2] != 0) {
      misfit = misfit || !fits_float(partial[pair_index(row, row, num_tasks)], columns);
    }
  }
  return any_of_block(misfit);
}

}  // namespace gs::gpu
