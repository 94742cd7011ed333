// SPDX-License-Identifier: MIT
// More tasks: a warp keeps the tiles of all pairs in registers and reads its columns straight from global memory.
#include "cuda/tiles.cuh"

namespace gs::gpu {
namespace {

constexpr int kWarps = 8;

// Steps whose loads are in flight together.
template <int kTiles>
constexpr int kUnroll = kTiles == 1   ? 4
                        : kTiles <= 3 ? 2
                                      : 1;
// Whether the next step is loaded while this one is multiplied: where the sums leave a multiprocessor one block, and
// registers for it.
template <class In, int kTiles>
constexpr bool kAhead = kTiles == 5 || kTiles == 6 || (kTiles == 4 && sizeof(In) == 2);

template <class In, int kTiles, class... Functions>
GS_DEVICE void add_group(DoubleTiles<In, kTiles, kTiles>& tiles, const Vector<In> (&x)[kTiles],
                         Functions... functions) {
  tiles.add(x, functions...);
}
template <class In, int kTiles, class... Functions>
GS_DEVICE void add_group(FloatTiles<In, kTiles, kTiles>& tiles, const Vector<In> (&x)[kTiles], Functions... functions) {
  LeftWords left[(kTiles + 1) / 2];
#pragma unroll
  for (int i = 0; i < kTiles; i += 2) left[i / 2] = LeftWords::from(x[i], i + 1 < kTiles ? x[i + 1] : Vector<In>{});
  tiles.add(left, functions...);
}

template <class Tiles, class In, int kTiles>
GS_DEVICE void sum_slot(const Table& table, int64_t num_tasks, Tiles& tiles) {
  using Rows = Piece<In, kRowLanes>;
  const auto add = [&](const Vector<In>(&x)[kTiles]) {
    add_group(tiles, x, [&](int j) { return x[j]; }, [](int i, int j) { return j >= i; });
  };
  int64_t turn = thread() / kWarp;  // the warps' turns go on from piece to piece
  for_each_piece<In, kRowLanes>(table, block(), [&](const Rows& piece) {
    const auto row_of = [&](int i) {
      const int64_t t = 8 * i + row_in_block();
      return t < num_tasks ? piece.row(t) : nullptr;
    };
    const In* row[kTiles];
#pragma unroll
    for (int i = 0; i < kTiles; i++) row[i] = row_of(i);
    const Steps steps(piece, kUnroll<kTiles> * Rows::kStep);
    const auto load = [&](int64_t i, Vector<In>(&x)[kUnroll<kTiles>][kTiles]) {
      load_steps<kRowLanes>(row, steps.step(i), piece.aligned, row_lane(), load_first<Vector<In>>, x);
    };
    Vector<In> x[kUnroll<kTiles>][kTiles];
    if (kAhead<In, kTiles> && turn < steps.count) load(turn, x);
    for (; turn < steps.count; turn += kWarps) {
      if constexpr (kAhead<In, kTiles>) {
        Vector<In> next[1][kTiles] = {};
        if (turn + kWarps < steps.count) load(turn + kWarps, next);
        add(x[0]);
#pragma unroll
        for (int i = 0; i < kTiles; i++) x[0][i] = next[0][i];
      } else {
        load(turn, x);
#pragma unroll
        for (int u = 0; u < kUnroll<kTiles>; u++) add(x[u]);
      }
    }
    turn -= steps.count;
    for (int64_t i = thread() / kWarp * Rows::kStep; i < steps.rest; i += kWarps * Rows::kStep) {
      Vector<In> x[kTiles];
#pragma unroll
      for (int r = 0; r < kTiles; r++) x[r] = load_rest<kRowLanes>(row_of(r), steps, i, row_lane());
      add(x);
    }
  });
  tiles.finish();
}

template <class In, int kTiles, bool kDouble>
GS_KERNEL GS_BLOCKS(kWarps* kWarp, kDouble&& kTiles == 4 ? 2 : 1)
    tiles_kernel(const GS_GRID_CONSTANT Table table, int64_t num_tasks, double* partials) {
  wait_for_previous_kernel();
  double* sums = &shared<double>();  // [kWarps][64]
  double* partial = partials + block() * pairs_of(num_tasks);
  const auto place = [&](int i, int j, int h) -> int64_t {
    const int64_t row = 8 * i + row_in_block(), column = 8 * j + 2 * row_lane() + h;
    return row <= column && column < num_tasks ? pair_index(row, column, num_tasks) : -1;
  };
  const auto sum_and_write = [&](auto& tiles) {
    sum_slot<std::decay_t<decltype(tiles)>, In, kTiles>(table, num_tasks, tiles);
    let_next_kernel_start();
    write_tiles<kTiles, kTiles>(tiles, 0, 1, thread() / kWarp, kWarps, place, sums, partial);
  };
  if constexpr (!kDouble) {
    FloatTiles<In, kTiles, kTiles> tiles;
    sum_and_write(tiles);
    if constexpr (std::is_same_v<In, float16>) return;  // always fits
    if (!any_misfit(tiles, 0, num_tasks, table.width, partial)) return;
  }
  DoubleTiles<In, kTiles, kTiles> tiles;
  sum_and_write(tiles);
}

// kTiles: row blocks of 8 tasks, as many as there are.
template <class In, bool kDouble, int kTiles>
gs_status launch_one(const Table& table, int64_t num_tasks, double* partials, gs_stream stream) {
  constexpr int64_t kMost = kDouble ? kDoubleTileTasks : kFloatTileTasks;
  if constexpr (kTiles * 8 < kMost) {
    if (num_tasks > kTiles * 8) return launch_one<In, kDouble, kTiles + 1>(table, num_tasks, partials, stream);
  }
  return launch(&tiles_kernel<In, kTiles, kDouble>, table.slots, kWarps * kWarp, kWarps * 64 * 8, stream, table,
                num_tasks, partials);
}

}  // namespace

gs_status launch_tiles(const Table& table, int64_t num_tasks, bool fast_double, double* partials, gs_stream stream) {
  return with_dtype(table.dtype, [&](auto in) {
    using In = decltype(in);
    if constexpr (sizeof(In) >= 4) {
      if (in_double(table.dtype, num_tasks, fast_double)) {
        return launch_one<In, true, 1>(table, num_tasks, partials, stream);
      }
    }
    if constexpr (sizeof(In) <= 4) return launch_one<In, false, 1>(table, num_tasks, partials, stream);
    return GS_OK;
  });
}

}  // namespace gs::gpu
