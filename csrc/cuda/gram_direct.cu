// SPDX-License-Identifier: MIT
// Few tasks: every lane reads its own columns and keeps the sums of all pairs in registers, in float64. With up to four
// tasks the rows are loaded to registers, too; with more they come through shared memory.
#include "cuda/copier.cuh"
#include "cuda/gram.cuh"
#include "cuda/launch.cuh"

namespace gs::gpu {
namespace {

constexpr int kWarps = 8;

// Steps whose loads are in flight together: the loads of so few rows alone would not hide the latency of memory.
template <int T>
constexpr int kUnroll = T <= 2 ? 4 : 2;

template <int T>
GS_DEVICE void add_pairs(const double (&value)[T], double (&acc)[pairs_of(T)]) {
#pragma unroll
  for (int i = 0; i < T; i++) {
#pragma unroll
    for (int j = i; j < T; j++) acc[pair_index(i, j, T)] += value[i] * value[j];
  }
}

// Adds the sums of all lanes of the block and writes them for its slot.
template <int T>
GS_DEVICE void write_pairs(const double (&acc)[pairs_of(T)], double* partials) {
  constexpr int kPairs = static_cast<int>(pairs_of(T));
  const int warp = thread() / kWarp;
  double* sums = &shared<double>();  // [kWarps][kPairs]
  sum_lanes(acc, 0, kPairs, [&](int pair, double sum) { sums[warp * kPairs + pair] = sum; });
  sync_block();
  let_next_kernel_start();
  for (int pair = thread(); pair < kPairs; pair += threads()) {
    double sum = 0;
    for (int w = 0; w < kWarps; w++) sum += sums[w * kPairs + pair];
    partials[block() * kPairs + pair] = sum;
  }
}

template <class In, int T>
GS_KERNEL GS_BLOCKS(kWarps* kWarp, 2) direct_kernel(GS_ARGUMENT(Table) table, double* partials) {
  wait_for_table(table);
  const int lane = thread() % kWarp, warp = thread() / kWarp;
  double acc[pairs_of(T)] = {};
  Turns<In, kWarp, kUnroll<T>> turns(table, block(), warp, kWarps);
  wait_for_previous_kernel();
  int task[T];
#pragma unroll
  for (int t = 0; t < T; t++) task[t] = t;
  const In* row[T];
  for (bool other = true; !turns.done(); other = turns.next()) {
    if (other) turns.get_rows(task, row);
    Unit unit[kUnroll<T>] = {};
    turns.get_units(lane, unit);
    Vector<In> x[kUnroll<T>][T];
    turns.load(row, lane, unit, load_first<Vector<In>>, x);
#pragma unroll
    for (int u = 0; u < kUnroll<T>; u++) {
#pragma unroll
      for (int e = 0; e < kVector<In>; e++) {
        double value[T];
#pragma unroll
        for (int t = 0; t < T; t++) value[t] = to_double(x[u][t].get(e));
        add_pairs<T>(value, acc);
      }
    }
  }
  write_pairs<T>(acc, partials);
}

// A lane's vectors of a stage, one of each row. For 8 rows a block's stages take more shared memory than GPUs with slow
// float64 have; those do not use this kernel.
template <int T, bool kShiftsRows>
struct ColumnLayout {
  static constexpr bool kShifts = kShiftsRows;
  static constexpr int kLanes = kWarp, kRows = T, kSlices = 1;
  static constexpr int kVectors = kShifts ? T * (kWarp + 1) + 1 : T * kWarp;  // of a stage
  static constexpr int kStages = 3;

  GS_DEVICE int lane() const { return thread() % kWarp; }
  GS_DEVICE int row(int r) const { return r; }
  GS_DEVICE bool holds(int) const { return true; }
  GS_DEVICE int place(int r, int, int lane) const { return r * kWarp + lane; }
  GS_DEVICE int extra(int r) const { return T * kWarp + r; }
  GS_DEVICE int mark() const { return 4 * T * (kWarp + 1); }
};

template <class In, int T, bool kShifts>
GS_KERNEL GS_BLOCKS(kWarps* kWarp, 2) lanes_kernel(GS_ARGUMENT(Table) table, double* partials) {
  using Layout = ColumnLayout<T, kShifts>;
  wait_for_table(table);
  const Layout layout;
  const int warp = thread() / kWarp;
  double acc[pairs_of(T)] = {};
  Copier<In, Layout> ahead(table, block(), T, layout, warp, kWarps);
  wait_for_previous_kernel();
  for_each_stage<Layout::kStages>(
      ahead, &shared<Vector<In>>() + warp * Layout::kStages * Layout::kVectors, Layout::kVectors, [] {},
      [&](const Vector<In>* stage) {
#pragma unroll 1
        for (int half = 0; half < 2; half++) {  // half a vector of each row: there are no registers for more
          uint32_t word[T][2];
#pragma unroll
          for (int t = 0; t < T; t++) memcpy(word[t], stage[layout.place(t, 0, layout.lane())].word + 2 * half, 8);
#pragma unroll
          for (int e = 0; e < kVector<In> / 2; e++) {
            double value[T];
#pragma unroll
            for (int t = 0; t < T; t++) value[t] = to_double(element<In>(word[t], e));
            add_pairs<T>(value, acc);
          }
        }
      });
  sync_block();  // write_pairs overwrites the stages
  write_pairs<T>(acc, partials);
}

template <class In, int T>
gs_status launch_one(const Table& table, int64_t num_tasks, double* partials, gs_stream stream) {
  if constexpr (T < kDirectTasks) {
    if (num_tasks > T) return launch_one<In, T + 1>(table, num_tasks, partials, stream);
  }
  return launch(&direct_kernel<In, T>, table.slots, kWarps * kWarp, kWarps * pairs_of(T) * 8, stream, table, partials);
}

template <class In, int T, int kMax>
gs_status launch_lanes_of(const Table& table, int64_t num_tasks, double* partials, gs_stream stream) {
  if constexpr (T < kMax) {
    if (num_tasks > T) return launch_lanes_of<In, T + 1, kMax>(table, num_tasks, partials, stream);
  }
  const auto run = [&](auto kernel, auto layout) {
    return launch(kernel, table.slots, kWarps * kWarp, kWarps * layout.kStages * layout.kVectors * 16, stream, table,
                  partials);
  };
  return table.shifted ? run(&lanes_kernel<In, T, true>, ColumnLayout<T, true>{})
                       : run(&lanes_kernel<In, T, false>, ColumnLayout<T, false>{});
}

}  // namespace

gs_status launch_direct(const Table& table, int64_t num_tasks, double* partials, gs_stream stream) {
  return with_dtype(table.dtype,
                    [&](auto in) { return launch_one<decltype(in), 1>(table, num_tasks, partials, stream); });
}

gs_status launch_lanes(const Table& table, int64_t num_tasks, double* partials, gs_stream stream) {
  return with_dtype(table.dtype, [&](auto in) {
    using In = decltype(in);
    constexpr int kMax = lanes_tasks(sizeof(In));
    if constexpr (kMax > kDirectTasks) {
      return launch_lanes_of<In, kDirectTasks + 1, kMax>(table, num_tasks, partials, stream);
    }
    return GS_OK;
  });
}

}  // namespace gs::gpu
