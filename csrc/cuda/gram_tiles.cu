// SPDX-License-Identifier: MIT
// More tasks: a warp keeps the tiles of all pairs in registers. Each lane reads its own vectors, through stages in
// shared memory that no other lane reads.
#include <algorithm>

#include "cuda/copier.cuh"
#include "cuda/launch.cuh"
#include "cuda/tiles.cuh"

namespace gs::gpu {
namespace {

constexpr int kWarps = 8;

// A lane's vectors of a stage: those of row number row_in_block() of each block.
template <int kTiles, bool kDouble, bool kShiftsRows>
struct LaneLayout {
  static constexpr bool kShifts = kShiftsRows;
  static constexpr int kLanes = kRowLanes, kRows = kTiles;
  // Longer stages have less overhead; shorter ones keep all warps busy if there are few columns.
  static constexpr int kSlices = kShifts || !kDouble ? (kTiles <= 4 ? 2 : 1) : kTiles <= 3 ? 4 : kTiles <= 6 ? 2 : 1;
  static constexpr int kExtras = kTiles * kSlices * kWarp;  // where the extra vectors begin, in vectors
  static constexpr int kMarks = kExtras + kTiles * 8;
  static constexpr int kVectors = kShifts ? kMarks + 2 : kExtras;  // of a stage
  // As many as 12 KB hold: a block's eight warps then fit the 99 KB of GPUs with little shared memory.
  static constexpr int kStages = std::clamp(768 / kVectors, 2, 6);

  GS_DEVICE int lane() const { return row_lane(); }
  GS_DEVICE int row(int r) const { return 8 * r + row_in_block(); }
  GS_DEVICE bool holds(int) const { return true; }
  GS_DEVICE int place(int r, int slice, int lane) const {
    return ((slice * kTiles + r) * 8 + row_in_block()) * kRowLanes + lane;
  }
  GS_DEVICE int extra(int r) const { return kExtras + 8 * r + row_in_block(); }
  GS_DEVICE int mark() const { return 4 * kMarks + row_in_block(); }
};
template <class Layout>
constexpr int64_t kRingBytes = int64_t{kWarps} * Layout::kStages * Layout::kVectors * 16;

template <int kTiles>
constexpr int kStrips = (kTiles + 1) / 2;

// Adds the products of the blocks' vectors x(r); with the most tiles in parts, as there are no registers for whole
// ones.
template <class In, int kTiles, class Vectors>
GS_DEVICE void add_vectors(DoubleTiles<In, kStrips<kTiles>, kTiles>& tiles, const Vectors& x) {
  constexpr int kPart = kTiles > 7 ? 2 : kVector<In>, kWords = kPart * static_cast<int>(sizeof(In)) / 4;
#pragma unroll 1
  for (int part = 0; part < kVector<In>; part += kPart) {
    uint32_t word[kTiles][kWords];
#pragma unroll
    for (int r = 0; r < kTiles; r++) memcpy(word[r], x(r).word + part / kPart * kWords, sizeof(word[r]));
#pragma unroll
    for (int e = 0; e < kPart; e += 2) {
      double left[kStrips<kTiles>][4] = {}, right[kTiles][2];
#pragma unroll
      for (int r = 0; r < kTiles; r++) {
#pragma unroll
        for (int h = 0; h < 2; h++) left[r / 2][r % 2 + 2 * h] = right[r][h] = to_double(element<In>(word[r], e + h));
      }
      tiles.add(left, right, IsUpper{});
    }
  }
}
template <class In, int kTiles, class Vectors>
GS_DEVICE void add_vectors(FloatTiles<In, kStrips<kTiles>, kTiles>& tiles, const Vectors& x) {
  LeftWords left[kStrips<kTiles>];
#pragma unroll
  for (int i = 0; i < kStrips<kTiles>; i++) {
    left[i] = LeftWords::from(x(2 * i), 2 * i + 1 < kTiles ? x(2 * i + 1) : Vector<In>{});
  }
  tiles.add(left, x, IsUpper{});
}

template <class In, int kTiles, class Layout, class Tiles>
GS_DEVICE void sum_slot(const Table& table, int num_tasks, Vector<In>* ring, Tiles& tiles) {
  wait_for_table(table);
  const Layout layout;
  const int warp = thread() / kWarp;
  Copier<In, Layout> ahead(table, block(), num_tasks, layout, warp, kWarps);
  wait_for_previous_kernel();
  for_each_stage<Layout::kStages>(
      ahead, ring + warp * Layout::kStages * Layout::kVectors, Layout::kVectors, [] {},
      [&](const Vector<In>* stage) {
#pragma unroll 1
        for (int slice = 0; slice < Layout::kSlices; slice++) {
          add_vectors<In, kTiles>(
              tiles, [&](int r) -> const Vector<In>& { return stage[layout.place(r, slice, row_lane())]; });
        }
      });
  tiles.finish();
}

// Writes the sums of the block's slot.
template <class In, int kTiles, class Layout, class Tiles>
GS_DEVICE void sum_and_write(const Table& table, int num_tasks, Tiles& tiles, double* partial) {
  sum_slot<In, kTiles, Layout>(table, num_tasks, &shared<Vector<In>>(), tiles);
  let_next_kernel_start();
  const auto place = [&](int i, int j, int row, int column) {
    row += 16 * i, column += 8 * j;
    return row <= column && column < num_tasks ? pair_index(row, column, num_tasks) : -1;
  };
  write_tiles<kStrips<kTiles>, kTiles>(tiles, 0, thread() / kWarp, kWarps, place, &shared<double>(), partial);
}
template <class In, int kTiles, class Layout>
GS_RARE void sum_and_write_in_double(const Table& table, int num_tasks, double* partial) {
  DoubleTiles<In, kStrips<kTiles>, kTiles> tiles;
  sum_and_write<In, kTiles, Layout>(table, num_tasks, tiles, partial);
}

template <class In, int kTiles, bool kDouble, bool kShifts>
GS_KERNEL GS_BLOCKS(kWarps* kWarp, kTiles <= (kDouble ? 4 : 3) ? 2 : 1)
    tiles_kernel(GS_ARGUMENT(Table) table, int num_tasks, double* partials) {
  using Layout = LaneLayout<kTiles, kDouble, kShifts>;
  double* partial = partials + block() * pairs_of(num_tasks);
  if constexpr (kDouble) {
    DoubleTiles<In, kStrips<kTiles>, kTiles> tiles;
    sum_and_write<In, kTiles, Layout>(table, num_tasks, tiles, partial);
  } else {
    FloatTiles<In, kStrips<kTiles>, kTiles> tiles;
    sum_and_write<In, kTiles, Layout>(table, num_tasks, tiles, partial);
    if constexpr (!std::is_same_v<In, float16>) {  // sums of float16 products always fit float32
      if (any_misfit(tiles, 0, num_tasks, table.width, partial)) {
        sum_and_write_in_double<In, kTiles, Layout>(table, num_tasks, partial);
      }
    }
  }
}

// kTiles: the number of row blocks of 8 tasks.
template <class In, bool kDouble, bool kShifts, int kTiles = 1>
gs_status launch_one(const Table& table, int64_t num_tasks, double* partials, gs_stream stream) {
  constexpr int64_t kMax = kDouble ? kDoubleTileTasks : kFloatTileTasks;
  if constexpr (kTiles * 8 < kMax) {
    if (num_tasks > kTiles * 8) return launch_one<In, kDouble, kShifts, kTiles + 1>(table, num_tasks, partials, stream);
  }
  return launch(&tiles_kernel<In, kTiles, kDouble, kShifts>, table.slots, kWarps * kWarp,
                std::max(kRingBytes<LaneLayout<kTiles, kDouble, kShifts>>, sums_bytes(kWarps)), stream, table,
                static_cast<int>(num_tasks), partials);
}
template <class In, bool kDouble>
gs_status launch_any(const Table& table, int64_t num_tasks, double* partials, gs_stream stream) {
  return (table.shifted ? &launch_one<In, kDouble, true> : &launch_one<In, kDouble, false>)(table, num_tasks, partials,
                                                                                            stream);
}

}  // namespace

gs_status launch_tiles(const Table& table, int64_t num_tasks, bool fast_double, double* partials, gs_stream stream) {
  return with_dtype(table.dtype, [&](auto in) {
    using In = decltype(in);
    if constexpr (sizeof(In) >= 4) {
      if (in_double(table.dtype, fast_double)) {
        return launch_any<In, true>(table, num_tasks, partials, stream);
      }
    }
    if constexpr (sizeof(In) <= 4) return launch_any<In, false>(table, num_tasks, partials, stream);
    return GS_OK;
  });
}

}  // namespace gs::gpu
