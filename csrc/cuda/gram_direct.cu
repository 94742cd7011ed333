// SPDX-License-Identifier: MIT
// Few tasks: every lane reads columns of its own and keeps all pairs in registers, in float64.
#include "cuda/gram.cuh"
#include "cuda/turns.cuh"

namespace gs::gpu {
namespace {

constexpr int kWarps = 8;

// Steps whose loads are in flight together: few rows alone do not cover the latency of memory.
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

template <class In, int T>
GS_KERNEL GS_BLOCKS(kWarps* kWarp, 2) direct_kernel(GS_ARGUMENT(Table) table, double* partials) {
  wait_for_previous_kernel();
  constexpr int kPairs = static_cast<int>(pairs_of(T));
  const int lane = thread() % kWarp, warp = thread() / kWarp;
  double acc[kPairs] = {};
  Turns<In, kWarp, kUnroll<T>> turns(table, block(), warp, kWarps);
  int task[T];
#pragma unroll
  for (int t = 0; t < T; t++) task[t] = t;
  const In* row[T];
  for (bool other = true; !turns.done(); other = turns.next()) {
    if (other) turns.get_rows(task, row);
    Vector<In> x[kUnroll<T>][T];
    turns.load(row, lane, load_first<Vector<In>>, x);
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
  double* sums = &shared<double>();  // [kWarps][kPairs]
#pragma unroll
  for (int pair = 0; pair < kPairs; pair++) {
    double sum = acc[pair];
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
    if (lane == 0) sums[warp * kPairs + pair] = sum;
  }
  sync_block();
  let_next_kernel_start();
  for (int pair = thread(); pair < kPairs; pair += threads()) {
    double sum = 0;
    for (int w = 0; w < kWarps; w++) sum += sums[w * kPairs + pair];
    partials[block() * kPairs + pair] = sum;
  }
}

template <class In, int T>
gs_status launch_one(const Table& table, int64_t num_tasks, double* partials, gs_stream stream) {
  if constexpr (T < kDirectTasks) {
    if (num_tasks > T) return launch_one<In, T + 1>(table, num_tasks, partials, stream);
  }
  return launch(&direct_kernel<In, T>, table.slots, kWarps * kWarp, kWarps * pairs_of(T) * 8, stream, table, partials);
}

}  // namespace

gs_status launch_direct(const Table& table, int64_t num_tasks, double* partials, gs_stream stream) {
  return with_dtype(table.dtype,
                    [&](auto in) { return launch_one<decltype(in), 1>(table, num_tasks, partials, stream); });
}

}  // namespace gs::gpu
