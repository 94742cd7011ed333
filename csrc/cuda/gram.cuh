// SPDX-License-Identifier: MIT
// Stage 2 on the GPU. A block sums the products of one slot of columns into partial sums, of which there is one per
// slot and pair of tasks; a second kernel adds the slots in order. Slots depend on the sizes and the architecture, not
// on the multiprocessors that there are, nor do the bits. The kernels, by the number of tasks:
//   * gram_direct.cu: few, every lane holds all pairs for columns of its own, through shared memory from five tasks on;
//   * gram_tiles.cu: more, a warp holds all pairs in tiles of matrix instructions, for columns of its own;
//   * gram_staged.cu: many, the warps of a block hold tiles each, and share the columns.
#pragma once
#include <algorithm>
#include <cmath>

#include "cpu/boundary.h"
#include "cuda/table.cuh"

namespace gs::gpu {

constexpr int64_t kDirectTasks = 4;
// Without fast float64, pairs cost more than tiles of matrix instructions for float32 and shorter formats.
constexpr int64_t kSlowDirectTasks = 2;
// How many tasks of a format lanes sum pair by pair, if float64 is fast: fewer operations than in tiles, of which half
// the rows are empty. float64 has no conversions to spare, 16-bit formats have matrix instructions of ten times the
// rate.
constexpr int64_t lanes_tasks(int64_t element_bytes) {
  return element_bytes == 8 ? kDirectTasks : element_bytes == 4 ? 8 : 6;
}
// What one warp can hold: float64 sums, or float32 sums beside them.
constexpr int64_t kDoubleTileTasks = 64;
constexpr int64_t kFloatTileTasks = 32;

GS_HOST_DEVICE constexpr int64_t pairs_of(int64_t num_tasks) { return num_tasks * (num_tasks + 1) / 2; }
// Pair (i, j), i <= j, in a row-wise upper triangle.
GS_HOST_DEVICE constexpr int pair_index(int i, int j, int num_tasks) { return i * num_tasks - i * (i - 1) / 2 + j - i; }

// The row i of a pair. The 4 keeps the root 0.003 or more from where the row changes, so that its rounding does not
// matter.
GS_DEVICE int row_of_pair(int pair, int num_tasks) {
  const int side = 2 * num_tasks + 1;
  return static_cast<int>((side - std::sqrt(static_cast<float>(side * side - 8 * pair - 4))) / 2);
}

// Adds what all lanes of a warp hold, of which write(i, sum) gets each sum once: lanes halve what they hold from step
// to step, so that an exchange costs as much as a sum that only one lane would get. begin: the number of the first
// value.
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

// Float64 products and sums for this dtype: always exact, but for 16-bit formats slower.
inline bool in_double(int32_t dtype, bool fast_double) {
  return dtype == GS_FLOAT64 || (dtype == GS_FLOAT32 && fast_double);
}

constexpr int64_t kHopperProcessors = 132, kAmpereProcessors = 108;
// Of any dtype, on any GPU.
constexpr int64_t most_slots(int64_t num_tasks) { return kHopperProcessors * (num_tasks <= 48 ? 2 : 1); }

// A slot smaller than this is not worth a block: the products of many tasks take a block as long as all else.
constexpr int64_t min_columns(int64_t num_tasks) {
  return num_tasks <= 8 ? 512 : num_tasks <= 48 ? 256 : num_tasks <= 64 ? 128 : 64;
}

// The width of slots for so many columns in all: what makes one wave of blocks on an H200's multiprocessors, before
// compute capability 9.0 an A100's, or fewer slots where the partial sums would weigh beside the rows. A second wave
// would wait for its first rows as long as the first one did.
struct SlotWidth {
  int64_t num_tasks;
  bool fast_double, since_hopper;

  // Blocks for which a multiprocessor has registers, as the kernels are bounded; an A100's has shared memory for one.
  int64_t resident(int32_t dtype) const {
    if (!since_hopper && num_tasks > 6) return 1;
    if (in_double(dtype, fast_double)) return num_tasks <= 32 ? 2 : 1;
    return num_tasks <= 24 || (num_tasks > kFloatTileTasks && num_tasks <= 48) ? 2 : 1;
  }
  int64_t processors() const { return since_hopper ? kHopperProcessors : kAmpereProcessors; }
  int64_t least(int32_t dtype) const {
    static_assert(6144 / 8 >= min_columns(kDirectTasks));  // the workspace is for those
    return num_tasks <= kDirectTasks ? 6144 / gs::element_bytes(dtype) : min_columns(num_tasks);
  }
  int64_t operator()(int64_t columns, int32_t dtype) const {
    const auto share = [&](int64_t slots) { return (columns + slots - 1) / slots; };
    // Partial sums of a 16th of the rows' bytes, as long as there is a block for each multiprocessor.
    const int64_t light = std::min(64 * num_tasks / gs::element_bytes(dtype), share(processors()));
    return std::max({least(dtype), share(processors() * resident(dtype)), light});
  }
};

}  // namespace gs::gpu
