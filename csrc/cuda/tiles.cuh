// SPDX-License-Identifier: MIT
// Tiles of matrix instructions, in the registers of one warp: products of the 8 tasks of a left block i with the 8 of a
// right block j. Lane 4 g + k brings a vector of the g-th row of a block, which serves as the left and as the right
// operand as it is: any order of the columns gives the same products, if both use it. The lane holds the products of
// the g-th left task with the right tasks 2 k and 2 k + 1.
#pragma once
#include "cuda/gram.cuh"

namespace gs::gpu {

// The lanes of a row, and the number of one of them.
constexpr int kRowLanes = 4;
GS_DEVICE int row_lane() { return thread() % kRowLanes; }
GS_DEVICE int row_in_block() { return thread() % kWarp / kRowLanes; }

// Exact products, sums in float64. right(j) is the vector of right block j; tiles for which needed(i, j) is false are
// left out.
template <class In, int kLeft, int kRight>
struct DoubleTiles {
  double acc[kLeft][kRight][2] = {};

  template <class Right, class Needed>
  GS_DEVICE void add(const Vector<In> (&left)[kLeft], const Right& right, const Needed& needed) {
    constexpr int kPart = kRight <= 8 ? kRight : (kRight + 1) / 2;  // as many as leave registers for the sums
#pragma unroll
    for (int first = 0; first < kRight; first += kPart) {
      Vector<In> y[kPart] = {};
#pragma unroll
      for (int j = 0; j < kPart; j++) {
        if (needed(0, first + j)) y[j] = right(first + j);
      }
#pragma unroll
      for (int e = 0; e < kVector<In>; e++) {
        double a[kLeft], b[kPart];
#pragma unroll
        for (int i = 0; i < kLeft; i++) a[i] = to_double(left[i].get(e));
#pragma unroll
        for (int j = 0; j < kPart; j++) b[j] = to_double(y[j].get(e));
#pragma unroll
        for (int i = 0; i < kLeft; i++) {
#pragma unroll
          for (int j = 0; j < kPart; j++) {
            if (needed(i, first + j)) multiply_8x8x4(acc[i][first + j], a[i], b[j]);
          }
        }
      }
    }
  }
  GS_DEVICE void finish() {}
};

// Words of one or two blocks in float32's two parts: a 16-bit format has one, a float is the sum of two tf32 values, to
// 2^-22 of it.
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
      // 11 bits of mantissa, rounded to nearest, and the rest, which is NaN where the value is not finite.
      word[w] = (bits[w] + 0x1000) & 0xffffe000;
      rest[w] = bits_of_float(float_from_bits(bits[w]) - float_from_bits(word[w])) & 0xffffe000;
    }
  }
};

// d += the products of 16 tasks with 8 in one step.
GS_DEVICE void multiply(float (&d)[4], const Parts<bfloat16, 4>& left, const Parts<bfloat16, 2>& right) {
  multiply_bfloat(d, left.word, right.word);
}
GS_DEVICE void multiply(float (&d)[4], const Parts<float16, 4>& left, const Parts<float16, 2>& right) {
  multiply_half(d, left.word, right.word);
}
// The product of the two rests is below float's precision.
GS_DEVICE void multiply(float (&d)[4], const Parts<float, 4>& left, const Parts<float, 2>& right) {
  multiply_tf32(d, left.rest, right.word);
  multiply_tf32(d, left.word, right.rest);
  multiply_tf32(d, left.word, right.word);
}

// What two steps read of 16 tasks: words 2 s and 2 s + 1 of the vectors of both blocks.
struct LeftWords {
  uint32_t step[2][4];
  template <class In>
  GS_DEVICE static LeftWords from(const Vector<In>& top, const Vector<In>& bottom) {
    return {{{top.word[0], bottom.word[0], top.word[1], bottom.word[1]},
             {top.word[2], bottom.word[2], top.word[3], bottom.word[3]}}};
  }
};

// Products and sums of one step in float32, as the instruction has them, truncated maybe. Eight steps are added in
// float32, rounded to nearest, before the sum goes on in float64. right and needed are as in DoubleTiles.
template <class In, int kLeft, int kRight>
struct FloatTiles {
  static constexpr int kFold = 4;  // vectors, of two steps each
  double acc[kLeft][kRight][2] = {};
  float chain[kLeft][kRight][2] = {};
  uint32_t seen[kLeft] = {};  // the bits of the left rows but for the sign
  int length = 0;

  template <class Right, class Needed>
  GS_DEVICE void add(const LeftWords (&left)[(kLeft + 1) / 2], const Right& right, const Needed& needed) {
#pragma unroll
    for (int i = 0; i < kLeft; i++) {
      const uint32_t (&step)[2][4] = left[i / 2].step;
      constexpr uint32_t kMagnitude = sizeof(In) == 4 ? 0x7fffffff : 0x7fff7fff;
      seen[i] |= (step[0][i % 2] | step[0][i % 2 + 2] | step[1][i % 2] | step[1][i % 2 + 2]) & kMagnitude;
    }
#pragma unroll
    for (int i = 0; i < kLeft; i += 2) {
      const Parts<In, 4> a[2] = {Parts<In, 4>(left[i / 2].step[0]), Parts<In, 4>(left[i / 2].step[1])};
#pragma unroll
      for (int j = 0; j < kRight; j++) {
        if (!needed(i, j)) continue;
        const Vector<In> vector = right(j);
#pragma unroll
        for (int s = 0; s < 2; s++) {
          const uint32_t words[2] = {vector.word[2 * s], vector.word[2 * s + 1]};
          float d[4] = {};
          multiply(d, a[s], Parts<In, 2>(words));
#pragma unroll
          for (int h = 0; h < 2; h++) {
            chain[i][j][h] += d[h];
            if (i + 1 < kLeft) chain[i + 1][j][h] += d[2 + h];
          }
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
        for (int h = 0; h < 2; h++) {
          acc[i][j][h] += chain[i][j][h];
          chain[i][j][h] = 0;
        }
      }
    }
  }
};

// Whether float32 could hold the sums of a row's squares over so many columns: no overflow, and what underflow took
// away is below the precision. Products of float16 values always fit.
GS_DEVICE bool fits_float(double square, int64_t columns) {
  return square >= 0x1p-100 * static_cast<double>(columns) && square <= 0x1p120;
}

// Adds the tiles of the `splits` warps that share each of `shares` sets of tiles, in the order of the splits, and
// writes the sums to place(i, j, h), unless that is negative. `sums` is shared memory, [splits][shares][64]. Every
// thread of the block must come here.
template <int kLeft, int kRight, class Tiles, class Place>
GS_DEVICE void write_tiles(const Tiles& tiles, int share, int shares, int split, int splits, const Place& place,
                           double* sums, double* partial) {
  double* own = sums + (split * shares + share) * 64 + thread() % kWarp * 2;
#pragma unroll 1
  for (int tile = 0; tile < kLeft * kRight; tile++) {
    const int i = tile / kRight, j = tile % kRight;
    sync_block();
    // Registers have no index: one of them is picked.
#pragma unroll
    for (int t = 0; t < kLeft * kRight; t++) {
      if (t != tile) continue;
      own[0] = tiles.acc[t / kRight][t % kRight][0];
      own[1] = tiles.acc[t / kRight][t % kRight][1];
    }
    sync_block();
#pragma unroll 1
    for (int h = 0; h < 2 && split == 0; h++) {
      const int64_t pair = place(i, j, h);
      if (pair < 0) continue;
      double sum = own[h];
#pragma unroll 1
      for (int other = 1; other < splits; other++) sum += own[other * shares * 64 + h];
      partial[pair] = sum;
    }
  }
}

// Whether float32 could not hold the squares of a row of the block, whose sums write_tiles has written.
template <class In, int kLeft, int kRight>
GS_DEVICE bool any_misfit(const FloatTiles<In, kLeft, kRight>& tiles, int64_t first_row, int64_t num_tasks,
                          int64_t columns, const double* partial) {
  sync_block();
  bool misfit = false;
#pragma unroll
  for (int i = 0; i < kLeft; i++) {
    const int64_t row = first_row + 8 * i + row_in_block();
    if (row < num_tasks && tiles.seen[i] != 0) {
      misfit = misfit || !fits_float(partial[pair_index(row, row, num_tasks)], columns);
    }
  }
  return any_of_block(misfit);
}

}  // namespace gs::gpu
