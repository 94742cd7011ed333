// SPDX-License-Identifier: MIT
// Many tasks: a block copies the rows once from global to shared memory, some stages of columns ahead. The rows form
// strips of 16, arranged in a circle. Each warp keeps products of one strip with itself and with the strips up to the
// opposite side of the circle: so every pair of tasks occurs once, and all warps have the same amount of work.
#include <algorithm>

#include "cuda/copier.cuh"
#include "cuda/launch.cuh"
#include "cuda/tiles.cuh"

namespace gs::gpu {
namespace {

// The slices of a stage (more slices mean fewer barriers), and the stages of a ring: as many as fit 99 KB with the most
// rows for which a warp has kTiles tiles. With the most tiles in float32, longer stages were slower.
template <bool kDouble, bool kMany, bool kShifts, int kTiles>
constexpr int kStageSlices = kMany                                  ? 1
                             : kShifts || (!kDouble && kTiles == 5) ? 2
                                                                    : 4;
template <int kSlices, int kTiles>
constexpr int kStages = kSlices == 4 && kTiles > 3 ? 3 : 4;
GS_HOST_DEVICE constexpr int most_warps(bool many) { return many ? 12 : 16; }
constexpr int kMaxTiles = 5;  // the most 16 x 8 tiles that fit a warp's registers
constexpr int kRows = 16;
// Up to this many tasks, a block holds all pairs.
constexpr int kMaxTasks = 128;

// How the warps share the pairs of tasks.
struct Split {
  int circle;  // the number of strips
  int shares;  // strips of a block; each has `groups` warps to divide its tiles, times `splits` to divide the columns
  int groups, splits;
  int tiles;             // the most tiles of a warp
  int row_parts, parts;  // blocks for a slot: row_parts divide the strips; parts in all, which also divide the tiles

  GS_HOST_DEVICE explicit Split(int num_tasks) {
    circle = (num_tasks + kRows - 1) / kRows;
    row_parts = num_tasks <= kMaxTasks ? 1 : 2;
    shares = (circle + row_parts - 1) / row_parts;
    const int all_groups = (tiles_of(0) + kMaxTiles - 1) / kMaxTiles;
    tiles = (tiles_of(0) + all_groups - 1) / all_groups;
    const int fitting = most_warps(num_tasks > kMaxTasks) / shares;
    groups = all_groups < fitting ? all_groups : fitting;
    parts = row_parts * ((all_groups + groups - 1) / groups);
    splits = num_tasks <= kMaxTasks && 2 * groups <= fitting ? 2 : 1;
  }
  GS_HOST_DEVICE int owners() const { return shares * groups; }
  GS_HOST_DEVICE int warps() const { return owners() * splits; }
  GS_HOST_DEVICE int slice_vectors() const { return circle * kRows * kRowLanes; }  // of a slice
  // The tiles of a strip: two for its products with itself, and two for each strip up to the opposite one. If there is
  // an exactly opposite strip, the first of the two takes their products.
  GS_HOST_DEVICE int tiles_of(int strip) const {
    return circle % 2 ? circle + 1 : strip < circle / 2 ? circle + 2 : circle;
  }
};

// The tiles of a warp, or of several warps that divide the columns.
struct Owner {
  int strip, first_tile, tiles;
  int first_right, blocks;  // the right block of the first tile, and the number of blocks in the circle

  GS_DEVICE Owner(const Split& split, int part, int owner) {
    strip = part % split.row_parts * split.shares + owner % split.shares;
    first_tile = (part / split.row_parts * split.groups + owner / split.shares) * split.tiles;
    tiles = strip < split.circle ? split.tiles_of(strip) - first_tile : 0;
    blocks = 2 * split.circle;
    first_right = (2 * strip + first_tile) % blocks;
  }
  GS_DEVICE int right_block(int j) const { return first_right + j - (first_right + j < blocks ? 0 : blocks); }
};

// In a row of a stage, vector c is at c ^ swizzle_of(row), so that the same vector of 8 rows uses all banks.
GS_DEVICE int swizzle_of(int row) { return row / 2 % kRowLanes; }

// A stage is [slices][rows][kRowLanes] vectors, then the rows' extra vectors, then the marks of the groups of lanes. A
// thread copies the same rows in every stage.
template <bool kMany, bool kShiftsRows, int kSlicesOfStage>
struct BlockLayout {
  static constexpr bool kShifts = kShiftsRows;
  static constexpr int kLanes = kRowLanes, kRows = kMany ? 4 : 1, kSlices = kSlicesOfStage;
  int slice_vectors;

  GS_HOST_DEVICE int extras() const { return kSlices * slice_vectors; }
  GS_HOST_DEVICE int marks() const { return extras() + slice_vectors / kRowLanes; }
  GS_HOST_DEVICE int vectors(int block_threads) const {
    return kShifts ? marks() + block_threads / kRowLanes / 4 : extras();
  }

  GS_DEVICE int lane() const { return row_lane(); }
  GS_DEVICE int row(int r) const { return (thread() + r * threads()) / kRowLanes; }
  GS_DEVICE bool holds(int r) const { return row(r) * kRowLanes < slice_vectors; }
  GS_DEVICE int place(int r, int slice, int lane) const {
    return slice * slice_vectors + row(r) * kRowLanes + (lane ^ swizzle_of(row(r)));
  }
  GS_DEVICE int extra(int r) const { return extras() + row(r); }
  GS_DEVICE int mark() const { return 4 * marks() + thread() / kRowLanes; }
};

// Where a lane reads in a slice, in vectors from the start of a block of 8 rows: for float64 tiles its own vector; for
// float32 tiles the one whose address it passes to load_matrices.
constexpr int kBlockVectors = 8 * kRowLanes;
template <class In, int kTiles>
GS_DEVICE int lane_offset(const DoubleTiles<In, 1, kTiles>&) {
  return row_in_block() * kRowLanes + (row_lane() ^ swizzle_of(row_in_block()));
}
template <class In, int kTiles>
GS_DEVICE int lane_offset(const FloatTiles<In, 1, kTiles>&) {
  return thread() % 8 * kRowLanes + (thread() % kWarp / 8 ^ swizzle_of(thread() % 8));
}

// Adds the products of the strip at `left` with the blocks at right(j).
template <class In, int kTiles, class Right, class Needed>
GS_DEVICE void add_tiles(DoubleTiles<In, 1, kTiles>& tiles, const Vector<In>* left, const Right& right,
                         const Needed& needed) {
  // Loads whole vectors: that takes half as many passes over the banks of shared memory as loading parts.
  const Vector<In> x[2] = {left[0], left[kBlockVectors]};
  Vector<In> y[kTiles] = {};
#pragma unroll
  for (int j = 0; j < kTiles; j++) {
    if (needed(0, j)) y[j] = *right(j);
  }
#pragma unroll
  for (int e = 0; e < kVector<In>; e += 2) {
    double strip[1][4], blocks[kTiles][2];
#pragma unroll
    for (int v = 0; v < 4; v++) strip[0][v] = to_double(x[v % 2].get(e + v / 2));
#pragma unroll
    for (int j = 0; j < kTiles; j++) {
#pragma unroll
      for (int h = 0; h < 2; h++) blocks[j][h] = to_double(y[j].get(e + h));
    }
    tiles.add(strip, blocks, needed);
  }
}
template <class In, int kTiles, class Right, class Needed>
GS_DEVICE void add_tiles(FloatTiles<In, 1, kTiles>& tiles, const Vector<In>* left, const Right& right,
                         const Needed& needed) {
  // Lanes 8 to 15 and 24 to 31 pass addresses of the second block's rows; lanes from 16 on those of the step's other
  // vector.
  const int matrix = thread() % kWarp / 8, row = thread() % 8;
  const Vector<In>* start = left - lane_offset(tiles) + row * kRowLanes + matrix % 2 * kBlockVectors;
  const int place = matrix / 2 ^ swizzle_of(row);
  LeftWords words[1];
  load_matrices(words[0].step[0], start + place);
  load_matrices(words[0].step[1], start + (place ^ 2));
  const auto load = [&](int j) {
    Vector<In> vector;
    load_matrices(vector.word, right(j));
    return vector;
  };
  tiles.add(words, load, needed);
}

// Sums the block's tiles over its slot and writes them. A warp has at most kTiles tiles. One with at most kTiles - 2
// skips the last two; with kMany it may lack more, whose sums are not written.
template <class In, bool kMany, bool kShifts, int kSlices, int kTiles, class Tiles>
GS_DEVICE void sum_and_write(const Table& table, int num_tasks, const Split& split, int own, int own_split,
                             Tiles& tiles, double* partials) {
  using Layout = BlockLayout<kMany, kShifts, kSlices>;
  const int slot = static_cast<int>(block() / split.parts), part = static_cast<int>(block() % split.parts);
  const Owner owner(split, part, own);
  const bool last_tiles = owner.tiles > kTiles - 2;
  // A bit for each slice of a stage that this warp multiplies. With kMaxTiles no warps are left to divide the slices.
  const bool all_slices = (kTiles == kMaxTiles && !kMany) || split.splits == 1;
  constexpr int kAll = (1 << kSlices) - 1;
  const int slices = kMany && owner.tiles <= 0 ? 0 : all_slices ? kAll : kAll / 3 << own_split;
  const int slice_vectors = split.slice_vectors(), left = lane_offset(tiles) + 2 * owner.strip * kBlockVectors;
  const int right = lane_offset(tiles) + owner.first_right * kBlockVectors;
  const int wrapped = right - owner.blocks * kBlockVectors, wrap = owner.blocks - owner.first_right;
  const Layout layout{slice_vectors};
  wait_for_table(table);
  Copier<In, Layout> ahead(table, slot, num_tasks, layout, 0, 1);
  wait_for_previous_kernel();
  for_each_stage<kStages<kSlices, kTiles>>(
      ahead, &shared<Vector<In>>(), layout.vectors(threads()), [] { sync_block(); },
      [&](const Vector<In>* stage) {
#pragma unroll 1
        for (int slice = 0; slice < kSlices; slice++) {
          if ((slices >> slice & 1) == 0) continue;
          const Vector<In>* rows = stage + slice * slice_vectors;
          add_tiles(
              tiles, rows + left, [&](int j) { return rows + (j < wrap ? right : wrapped) + j * kBlockVectors; },
              [&](int, int j) { return j < kTiles - 2 || last_tiles; });
        }
      });
  tiles.finish();
  let_next_kernel_start();
  const auto place = [&](int, int j, int row, int column) {
    row += owner.strip * kRows, column += 8 * owner.right_block(j);
    const bool twice = owner.first_tile + j < 2 && row > column;  // a strip with itself: the lower triangle
    if (j >= owner.tiles || row >= num_tasks || column >= num_tasks || twice) return -1;
    return row < column ? pair_index(row, column, num_tasks) : pair_index(column, row, num_tasks);
  };
  double* partial = partials + slot * pairs_of(num_tasks);
  write_tiles<1, kTiles>(tiles, own, own_split, split.splits, place, &shared<double>(), partial);
}
template <class In, bool kShifts, int kSlices, int kTiles>
GS_RARE void sum_and_write_in_double(const Table& table, int num_tasks, const Split& split, int own, int own_split,
                                     double* partials) {
  DoubleTiles<In, 1, kTiles> tiles;
  sum_and_write<In, false, kShifts, kSlices, kTiles>(table, num_tasks, split, own, own_split, tiles, partials);
}

template <class In, int kTiles, bool kDouble, bool kMany, bool kShifts>
GS_KERNEL GS_BLOCKS(most_warps(kMany) * kWarp, 1)
    staged_kernel(GS_ARGUMENT(Table) table, int num_tasks, double* partials) {
  constexpr int kSlices = kStageSlices<kDouble, kMany, kShifts, kTiles>;
  const Split split(num_tasks);
  // The second split starts half way round the circle: neighbouring warps share a unit of the multiprocessor.
  const int warp = thread() / kWarp, own_split = warp / split.owners();
  const int group = warp % split.owners() / split.shares;
  const int own = group * split.shares + (warp + own_split * (split.shares / 2)) % split.shares;
  if constexpr (kDouble) {
    DoubleTiles<In, 1, kTiles> tiles;
    sum_and_write<In, kMany, kShifts, kSlices, kTiles>(table, num_tasks, split, own, own_split, tiles, partials);
  } else {
    FloatTiles<In, 1, kTiles> tiles;
    sum_and_write<In, kMany, kShifts, kSlices, kTiles>(table, num_tasks, split, own, own_split, tiles, partials);
    if constexpr (!std::is_same_v<In, float16>) {  // sums of float16 products always fit float32
      const double* partial = partials + block() * pairs_of(num_tasks);
      if (any_misfit(tiles, own % split.shares * kRows, num_tasks, table.width, partial)) {
        sum_and_write_in_double<In, kShifts, kSlices, kTiles>(table, num_tasks, split, own, own_split, partials);
      }
    }
  }
}

template <class In, bool kDouble, bool kMany, bool kShifts, int kTiles = kMany ? 4 : 3>
gs_status launch_one(const Table& table, int num_tasks, double* partials, gs_stream stream) {
  const Split split(num_tasks);
  if constexpr (kTiles < kMaxTiles) {
    if (split.tiles > kTiles) {
      return launch_one<In, kDouble, kMany, kShifts, kTiles + 1>(table, num_tasks, partials, stream);
    }
  }
  const int block_threads = split.warps() * kWarp;
  constexpr int kSlices = kStageSlices<kDouble, kMany, kShifts, kTiles>;
  const BlockLayout<kMany, kShifts, kSlices> layout{split.slice_vectors()};
  const int64_t ring_bytes = int64_t{kStages<kSlices, kTiles>} * layout.vectors(block_threads) * 16;
  return launch(&staged_kernel<In, kTiles, kDouble, kMany, kShifts>, table.slots * split.parts, block_threads,
                std::max(ring_bytes, sums_bytes(split.warps())), stream, table, num_tasks, partials);
}
template <class In, bool kDouble, bool kMany>
gs_status launch_any(const Table& table, int num_tasks, double* partials, gs_stream stream) {
  return (table.shifted ? &launch_one<In, kDouble, kMany, true>
                        : &launch_one<In, kDouble, kMany, false>)(table, num_tasks, partials, stream);
}

}  // namespace

gs_status launch_staged(const Table& table, int64_t tasks, bool fast_double, double* partials, gs_stream stream) {
  const int num_tasks = static_cast<int>(tasks);
  return with_dtype(table.dtype, [&](auto in) {
    using In = decltype(in);
    // Always in float64: the check that float32 holds the sums needs all rows in one block.
    if (num_tasks > kMaxTasks) return launch_any<In, true, true>(table, num_tasks, partials, stream);
    if constexpr (sizeof(In) >= 4) {
      if (in_double(table.dtype, fast_double)) {
        return launch_any<In, true, false>(table, num_tasks, partials, stream);
      }
    }
    if constexpr (sizeof(In) <= 4) return launch_any<In, false, false>(table, num_tasks, partials, stream);
    return GS_OK;
  });
}

}  // namespace gs::gpu
