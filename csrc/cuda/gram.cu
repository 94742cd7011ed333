// SPDX-License-Identifier: MIT
// Stage 2 on the GPU. A block sums one slot of columns, its warps taking turns at vectors of 16 bytes; all products and
// sums are in float64. Two kinds of tiles, both in registers alone:
//   * up to kDirectTasks rows: every lane holds all pairs for columns of its own;
//   * more rows: 8 x 8 tiles of the float64 matrix instruction, in groups of kGroup rows. A lane's vector of row
//     8 r + g serves as the left and the right operand: any order of the columns gives the same products, if both use
//     it.
// A second kernel adds the slots in order. Slots depend on the sizes alone, so the bits do not depend on the GPU.
#include <algorithm>

#include "cuda/table.cuh"

namespace gs::gpu {
namespace {

constexpr int64_t kDirectTasks = 8;
constexpr int64_t kGroup = 32;
constexpr int kWarps = 8;
constexpr int64_t kMaxSlots = 528;
constexpr int64_t kSlotColumns = 2048;  // a slot smaller than this is not worth a block

int64_t slots_of(int64_t columns) { return std::clamp<int64_t>(columns / kSlotColumns, 1, kMaxSlots); }
GS_HOST_DEVICE constexpr int64_t pairs_of(int64_t num_tasks) { return num_tasks * (num_tasks + 1) / 2; }
// Pair (i, j), i <= j, in a row-wise upper triangle.
GS_HOST_DEVICE constexpr int64_t pair_index(int64_t i, int64_t j, int64_t num_tasks) {
  return i * num_tasks - i * (i - 1) / 2 + j - i;
}

template <class In, int T>
GS_KERNEL direct_kernel(const GS_GRID_CONSTANT Table table, double* partials) {
  wait_for_previous_kernel();
  constexpr int kPairs = static_cast<int>(pairs_of(T));
  double acc[kPairs] = {};
  for_each_piece<In>(table, block(), [&](const Piece<In>& piece) {
    constexpr int64_t kStep = kWarp * kVector<In>;
    for (int64_t c = piece.first_vector + thread() * kVector<In>; c < piece.end; c += kWarps * kStep) {
      Vector<In> x[T];
#pragma unroll
      for (int t = 0; t < T; t++) x[t] = piece.load(t, c);
#pragma unroll
      for (int e = 0; e < kVector<In>; e++) {
        double value[T];
#pragma unroll
        for (int t = 0; t < T; t++) value[t] = to_double(x[t].value[e]);
#pragma unroll
        for (int i = 0; i < T; i++) {
#pragma unroll
          for (int j = i; j < T; j++) acc[pair_index(i, j, T)] += value[i] * value[j];
        }
      }
    }
  });
  double* sums = &shared<double>();  // [kWarps][kPairs]
#pragma unroll
  for (int pair = 0; pair < kPairs; pair++) {
    double sum = acc[pair];
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (thread() % kWarp == 0) sums[thread() / kWarp * kPairs + pair] = sum;
  }
  sync_block();
  let_next_kernel_start();
  for (int pair = thread(); pair < kPairs; pair += threads()) {
    double sum = 0;
    for (int warp = 0; warp < kWarps; warp++) sum += sums[warp * kPairs + pair];
    partials[block() * kPairs + pair] = sum;
  }
}

// The products of row groups I <= J, kGroup rows each: block = (slot, pair of groups).
template <class In, bool Diagonal>
GS_DEVICE void sum_tiles(const Table& table, int64_t num_tasks, int64_t slot, int64_t first_row, int64_t first_column,
                         double* partial) {
  constexpr int kTiles = static_cast<int>(kGroup / 8);
  const int lane = thread() % kWarp, g = lane / 4, k = lane % 4;
  double acc[kTiles][kTiles][2] = {};
  for_each_piece<In>(table, slot, [&](const Piece<In>& piece) {
    const auto load = [&](int64_t first, int tile, int64_t c) {
      const int64_t t = first + 8 * tile + g;
      return t < num_tasks ? piece.load(t, c) : Vector<In>{};
    };
    constexpr int64_t kStep = 4 * kVector<In>;
    for (int64_t start = piece.first_vector + thread() / kWarp * kStep; start < piece.end; start += kWarps * kStep) {
      const int64_t c = start + k * kVector<In>;
      Vector<In> a[kTiles], b[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; tile++) {
        a[tile] = load(first_row, tile, c);
        if (!Diagonal) b[tile] = load(first_column, tile, c);
      }
#pragma unroll
      for (int e = 0; e < kVector<In>; e++) {
        double left[kTiles], right[kTiles];
#pragma unroll
        for (int tile = 0; tile < kTiles; tile++) {
          left[tile] = to_double(a[tile].value[e]);
          right[tile] = Diagonal ? left[tile] : to_double(b[tile].value[e]);
        }
#pragma unroll
        for (int i = 0; i < kTiles; i++) {
#pragma unroll
          for (int j = Diagonal ? i : 0; j < kTiles; j++) multiply_8x8x4(acc[i][j], left[i], right[j]);
        }
      }
    }
  });
  // A lane holds row g and columns 2 k, 2 k + 1 of each tile.
  double* sums = &shared<double>();  // [kWarps][8][8]
#pragma unroll
  for (int i = 0; i < kTiles; i++) {
#pragma unroll
    for (int j = Diagonal ? i : 0; j < kTiles; j++) {
#pragma unroll
      for (int h = 0; h < 2; h++) sums[thread() / kWarp * 64 + g * 8 + 2 * k + h] = acc[i][j][h];
      sync_block();
      const int64_t row = first_row + 8 * i + thread() / 8, column = first_column + 8 * j + thread() % 8;
      if (thread() < 64 && row <= column && column < num_tasks) {
        double sum = 0;
        for (int warp = 0; warp < kWarps; warp++) sum += sums[warp * 64 + thread()];
        partial[pair_index(row, column, num_tasks)] = sum;
      }
      sync_block();
    }
  }
}

template <class In>
GS_KERNEL tiles_kernel(const GS_GRID_CONSTANT Table table, int64_t num_tasks, double* partials) {
  wait_for_previous_kernel();
  const int64_t slot = block() % table.slots;
  int64_t i = 0, j = block() / table.slots;
  for (int64_t groups = (num_tasks + kGroup - 1) / kGroup; j >= groups - i; i++) j -= groups - i;
  j += i;
  double* partial = partials + slot * pairs_of(num_tasks);
  if (i == j) {
    sum_tiles<In, true>(table, num_tasks, slot, i * kGroup, j * kGroup, partial);
  } else {
    sum_tiles<In, false>(table, num_tasks, slot, i * kGroup, j * kGroup, partial);
  }
}

constexpr int kParts = 32;  // of a segment's slots, summed by a thread each and then in order

// Sets gram, or adds to it, from the slots of each segment: block = (segment, kWarp pairs).
GS_KERNEL sum_slots_kernel(const GS_GRID_CONSTANT Table table, int64_t num_tasks, const double* partials,
                           bool accumulate, double* gram) {
  wait_for_previous_kernel();
  const int64_t pairs = pairs_of(num_tasks), blocks = (pairs + kWarp - 1) / kWarp;
  const int64_t segment = block() / blocks, pair = block() % blocks * kWarp + thread() % kWarp;
  const int part = thread() / kWarp;
  double sum = 0;
  for (int64_t r = 0; r < table.runs && pair < pairs; r++) {
    const Run& run = table.run(r);
    if (run.segment != segment) continue;
    const int64_t next = r + 1 < table.runs ? table.run(r + 1).first_slot : table.slots;
    for (int64_t slot = run.first_slot + part; slot < next; slot += kParts) sum += partials[slot * pairs + pair];
  }
  double* sums = &shared<double>();  // [kParts][kWarp]
  sums[thread()] = sum;
  sync_block();
  let_next_kernel_start();
  if (part > 0 || pair >= pairs) return;
  for (int p = 1; p < kParts; p++) sum += sums[p * kWarp + thread()];
  int64_t i = 0;
  while (pair_index(i + 1, i + 1, num_tasks) <= pair) i++;
  const int64_t j = i + pair - pair_index(i, i, num_tasks);
  double* out = gram + segment * num_tasks * num_tasks;
  const double value = accumulate ? out[i * num_tasks + j] + sum : sum;
  out[i * num_tasks + j] = value;
  out[j * num_tasks + i] = value;
}

template <class In>
gs_status launch_direct(const Table& table, int64_t num_tasks, double* partials, gs_stream stream) {
  const auto run = [&](auto kernel) {
    return launch(kernel, table.slots, kWarps * kWarp, kWarps * pairs_of(num_tasks) * 8, stream, table, partials);
  };
  switch (num_tasks) {
    case 1:
      return run(&direct_kernel<In, 1>);
    case 2:
      return run(&direct_kernel<In, 2>);
    case 3:
      return run(&direct_kernel<In, 3>);
    case 4:
      return run(&direct_kernel<In, 4>);
    case 5:
      return run(&direct_kernel<In, 5>);
    case 6:
      return run(&direct_kernel<In, 6>);
    case 7:
      return run(&direct_kernel<In, 7>);
    default:
      return run(&direct_kernel<In, 8>);
  }
}

}  // namespace
}  // namespace gs::gpu

int64_t gs_gram_cuda_workspace_bytes(const gs_gradients* grads) {
  using namespace gs::gpu;
  if (!grads || gs::check(*grads) != GS_OK) return -1;
  const TableBuilder builder(*grads, nullptr, slots_of);
  auto tables = builder;
  Table table;
  int64_t most = 0;
  while (tables.fill(table)) most = std::max<int64_t>(most, table.slots);
  return most * pairs_of(grads->num_tasks) * 8;
}

gs_status gs_gram_cuda(const gs_gradients* grads, double* gram, void* workspace, int64_t workspace_bytes,
                       gs_stream stream) {
  using namespace gs::gpu;
  GS_REQUIRE(grads && gram, "grads and gram must not be NULL");
  if (const gs_status status = gs::check(*grads)) return status;
  GS_REQUIRE_WORKSPACE(workspace, workspace_bytes, gs_gram_cuda_workspace_bytes(grads));
  const int64_t tasks = grads->num_tasks, groups = (tasks + kGroup - 1) / kGroup;
  const int64_t blocks = grads->num_segments * ((pairs_of(tasks) + kWarp - 1) / kWarp);
  auto* partials = static_cast<double*>(workspace);
  TableBuilder tables(*grads, nullptr, slots_of);
  Table table;
  bool accumulate = false;
  do {
    gs_status status = GS_OK;
    if (tables.fill(table)) {
      status = with_dtype(tables.dtype(), [&](auto in) {
        using In = decltype(in);
        if (tasks <= kDirectTasks) return launch_direct<In>(table, tasks, partials, stream);
        return launch(&tiles_kernel<In>, table.slots * (groups * (groups + 1) / 2), kWarps * kWarp, kWarps * 64 * 8,
                      stream, table, tasks, partials);
      });
    } else if (accumulate) {
      return GS_OK;
    }
    if (status != GS_OK) return status;
    status = launch(&sum_slots_kernel, blocks, kParts * kWarp, kParts * kWarp * 8, stream, table, tasks, partials,
                    accumulate, gram);
    if (status != GS_OK || table.params == 0) return status;
    accumulate = true;
  } while (true);
}
