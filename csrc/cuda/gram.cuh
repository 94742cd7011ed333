// SPDX-License-Identifier: MIT
// Stage 2 on the GPU. A block sums the products of one slot of columns into partial sums, one per slot and pair of
// tasks; a second kernel adds the slots in order. The slots, and with them the bits of G, depend on the sizes and the
// architecture, but not on the number of multiprocessors. The kernels, by the number of tasks:
//   * gram_direct.cu, few tasks: every lane holds all pairs for its own columns; from five tasks on rows pass through
//     shared memory;
//   * gram_tiles.cu, more tasks: a warp holds all pairs in tiles of matrix instructions, for its own columns;
//   * gram_staged.cu, many tasks: each warp of a block holds some of the tiles, and the warps share the columns.
#pragma once
#include <algorithm>
#include <cmath>

#include "cpu/boundary.h"
#include "cuda/table.cuh"

namespace gs::gpu {

constexpr int64_t kDirectTasks = 4;
// Without fast float64, pairs cost more than tiles of matrix instructions for float32 and shorter formats.
constexpr int64_t kSlowDirectTasks = 2;
// Up to how many tasks lanes sum pair by pair, if float64 is fast: that takes fewer operations than tiles with half of
// their rows empty. The limit is lower for float64, where there are no conversions to save, and for 16-bit formats,
// whose matrix instructions are ten times as fast.
constexpr int64_t lanes_tasks(int64_t element_bytes) {
  return element_bytes == 8 ? kDirectTasks : element_bytes == 4 ? 8 : 6;
}
// The most tasks whose tiles fit one warp's registers: with float64 sums only, or with float32 sums as well.
constexpr int64_t kDoubleTileTasks = 64;
constexpr int64_t kFloatTileTasks = 32;

GS_HOST_DEVICE constexpr int64_t pairs_of(int64_t num_tasks) { return num_tasks * (num_tasks + 1) / 2; }
// Pair (i, j), i <= j, in a row-wise upper triangle.
GS_HOST_DEVICE constexpr int pair_index(int i, int j, int num_tasks) { return i * num_tasks - i * (i - 1) / 2 + j - i; }

// The row i of a pair. The 4 keeps the root at least 0.003 away from the values at which the row changes, so that its
// rounding does not matter.
GS_DEVICE int row_of_pair(int pair, int num_tasks) {
  const int side = 2 * num_tasks + 1;
  return static_cast<int>((side - std::sqrt(static_cast<float>(side * side - 8 * pair - 4))) / 2);
}

// Adds the values `held` of all lanes of a warp, and calls write(i, sum) in one lane for each. In each step two lanes
// exchange halves of their values, so that each lane is left with half as many. begin: the number of the first value.
template <int kMask = kWarp / 2, int kHeld, class Write>
GS_DEVICE void sum_lanes(const double (&held)[kHeld], int begin, int end, const Write& write) {
  if constexpr (kMask == 0) {
#pragma unroll
    for (int v = 0; v < kHeld; v++) {
      if (begin + v < end) write(begin + v, held[v]);
    }
  } else {
    constexpr int kHalf = (kHeld + 1) / 2;
    const bool upper = (thread() & kMask) != 0;
    double half[kHalf];
#pragma unroll
    for (int v = 0; v < kHalf; v++) {
      const double other = v + kHalf < kHeld ? held[v + kHalf < kHeld ? v + kHalf : v] : 0;
      half[v] = (upper ? other : held[v]) + shuffle_xor(upper ? held[v] : other, kMask);
    }
    if (upper) begin += kHalf;
    if (!upper && end > begin + kHalf) end = begin + kHalf;
    sum_lanes<kMask / 2>(half, begin, end, write);
  }
}

// Each writes the partial sums [slots][pairs] of a table.
gs_status launch_direct(const Table& table, int64_t num_tasks, double* partials, gs_stream stream);
gs_status launch_lanes(const Table& table, int64_t num_tasks, double* partials, gs_stream stream);
gs_status launch_tiles(const Table& table, int64_t num_tasks, bool fast_double, double* partials, gs_stream stream);
gs_status launch_staged(const Table& table, int64_t num_tasks, bool fast_double, double* partials, gs_stream stream);

// Whether this dtype is multiplied and summed in float64. That would be exact for 16-bit formats too, but slower.
inline bool in_double(int32_t dtype, bool fast_double) {
  return dtype == GS_FLOAT64 || (dtype == GS_FLOAT32 && fast_double);
}

constexpr int64_t kHopperProcessors = 132, kAmpereProcessors = 108;
// An upper bound for any dtype and GPU.
constexpr int64_t most_slots(int64_t num_tasks) { return kHopperProcessors * (num_tasks <= 48 ? 2 : 1); }

// A smaller slot is not worth a block. Many tasks allow smaller slots: their products take as long as everything else.
constexpr int64_t min_columns(int64_t num_tasks) {
  return num_tasks <= 8 ? 512 : num_tasks <= 48 ? 256 : num_tasks <= 64 ? 128 : 64;
}

// The width of slots for a total number of columns: slots make one wave of blocks on an H200 (before compute capability
// 9.0 on an A100), as a second wave would wait for its first rows as long as the first one did. There are fewer slots
// if the partial sums would otherwise be many bytes compared to the rows.
struct SlotWidth {
  int64_t num_tasks;
  bool fast_double, since_hopper;

  // Blocks that fit a multiprocessor's registers, by the kernels' launch bounds; an A100's shared memory holds one.
  int64_t resident(int32_t dtype) const {
    if (!since_hopper && num_tasks > 6) return 1;
    if (in_double(dtype, fast_double)) return num_tasks <= 32 ? 2 : 1;
    return num_tasks <= 24 || (num_tasks > kFloatTileTasks && num_tasks <= 48) ? 2 : 1;
  }
  int64_t processors() const { return since_hopper ? kHopperProcessors : kAmpereProcessors; }
  int64_t least(int32_t dtype) const {
    static_assert(6144 / 8 >= min_columns(kDirectTasks));  // the workspace is sized for min_columns
    return num_tasks <= kDirectTasks ? 6144 / gs::element_bytes(dtype) : min_columns(num_tasks);
  }
  int64_t operator()(int64_t columns, int32_t dtype) const {
    const auto share = [&](int64_t slots) { return (columns + slots - 1) / slots; };
    // The partial sums may take a 16th of the rows' bytes; but there is at least one block for each multiprocessor.
    const int64_t light = std::min(64 * num_tasks / gs::element_bytes(dtype), share(processors()));
    return std::max({least(dtype), share(processors() * resident(dtype)), light});
  }
};

}  // namespace gs::gpu
