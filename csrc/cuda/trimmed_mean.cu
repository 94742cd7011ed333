// SPDX-License-Identifier: MIT
// The coordinate-wise trimmed mean, and with it the median, on the GPU.
#include <algorithm>
#include <iterator>

#include "cuda/combine_by_rule.cuh"
#include "cuda/launch.cuh"

namespace gs::gpu {
namespace {

// Values are compared as floats (float64 as doubles) and converted to doubles for the sum. Both conversions are exact.
template <class In>
using Compared = std::conditional_t<std::is_same_v<In, double>, double, float>;

template <class V>
GS_DEVICE void order(V& low, V& high) {
  const V least = std::fmin(low, high);
  high = std::fmax(low, high);
  low = least;
}

// For one column: unordered lists of the kTrimmed least and largest values so far, and the sum of the values pushed out
// of both. Such a value has at least kTrimmed values on either side, whatever follows, so it counts in the mean.
template <class V, int kTrimmed>
struct Middle {
  V low[kTrimmed], high[kTrimmed];
  V broken = 0;  // NaN if a value is not finite
  double sum = 0;

  // Adds value r of the first 2 kTrimmed values.
  GS_DEVICE void begin(int r, V x) {
    broken += x * 0;
    if (r >= kTrimmed) pass_low(x);
    (r < kTrimmed ? low[r] : high[r - kTrimmed]) = x;
  }
  GS_DEVICE void add(V x) {
    broken += x * 0;
    pass_low(x);
#pragma unroll
    for (int i = 0; i < kTrimmed; i++) order(x, high[i]);
    sum += x;
  }
  GS_DEVICE double mean(int num_tasks) const { return (sum + broken) / (num_tasks - 2 * kTrimmed); }

 private:
  GS_DEVICE void pass_low(V& x) {
#pragma unroll
    for (int i = 0; i < kTrimmed; i++) order(low[i], x);
  }
};

template <class In, int kTrimmed>
GS_KERNEL GS_BLOCKS(kRowsThreads, 2) trimmed_mean_kernel(GS_ARGUMENT(Table) table, int num_tasks, bool accumulate) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  for (auto turns = turns_of<In>(table); !turns.done(); turns.next()) {
    Unit unit[1] = {};
    turns.get_units(thread() % kWarp, unit);
    Middle<Compared<In>, kTrimmed> middle[kVector<In>];
    Vector<In> ends[1][2 * kTrimmed];
    load_rows(turns, unit, 0, num_tasks, ends);
#pragma unroll
    for (int r = 0; r < 2 * kTrimmed; r++) {
#pragma unroll
      for (int e = 0; e < kVector<In>; e++) middle[e].begin(r, static_cast<Compared<In>>(to_double(ends[0][r].get(e))));
    }
    for (int first = 2 * kTrimmed; first < num_tasks; first += kRows<In>) {
      Vector<In> x[1][kRows<In>];
      load_rows(turns, unit, first, num_tasks, x);
#pragma unroll
      for (int u = 0; u < kRows<In>; u++) {
        if (first + u >= num_tasks) break;
#pragma unroll
        for (int e = 0; e < kVector<In>; e++) middle[e].add(static_cast<Compared<In>>(to_double(x[0][u].get(e))));
      }
    }
    double result[kVector<In>];
#pragma unroll
    for (int e = 0; e < kVector<In>; e++) result[e] = middle[e].mean(num_tasks);
    store_results(turns, unit, num_tasks, accumulate, result);
  }
}

// The same with lists of any length (or none) in shared memory; a lane handles its columns one after the other.
template <class In>
GS_KERNEL GS_BLOCKS(kRowsThreads, 1)
    long_trimmed_mean_kernel(GS_ARGUMENT(Table) table, int num_tasks, int trimmed, bool accumulate) {
  using V = Compared<In>;
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int lane = thread() % kWarp;
  V* const low = &shared<V>() + int64_t{thread()} / kWarp * 2 * trimmed * kWarp + lane;
  V* const high = low + trimmed * kWarp;
  for (auto turns = turns_of<In>(table); !turns.done(); turns.next()) {
    Unit unit[1] = {};
    turns.get_units(lane, unit);
#pragma unroll 1
    for (int e = 0; e < kVector<In>; e++) {
      // Reads single elements, with neighbours in different lanes, whatever the alignment.
      const int64_t column = turns.is_whole() ? turns.column() + e * kWarp + lane : turns.column(lane, 0, unit[0], e);
      if (column < 0) continue;
      V broken = 0;
      double sum = 0;
#pragma unroll 4
      for (int t = 0; t < num_tasks; t++) {
        const int task[1] = {t};
        const In* row[1];
        turns.get_rows(task, row);
        V x = row[0] ? static_cast<V>(to_double(row[0][column])) : 0;
        broken += x * 0;
        if (t >= trimmed) {
#pragma unroll 4
          for (int i = 0; i < trimmed; i++) order(low[i * kWarp], x);
        }
        if (t < 2 * trimmed) {
          (t < trimmed ? low + t * kWarp : high + (t - trimmed) * kWarp)[0] = x;
          continue;
        }
#pragma unroll 4
        for (int i = 0; i < trimmed; i++) order(x, high[i * kWarp]);
        sum += x;
      }
      const int output[1] = {num_tasks};
      In* out[1];
      turns.get_rows(output, out);
      sum = (sum + broken) / (num_tasks - 2 * trimmed);
      out[0][column] = from_double<In>(accumulate ? to_double(out[0][column]) + sum : sum);
    }
  }
}

template <class In>
gs_status launch_kernel(const Table& table, int num_tasks, int64_t trimmed, bool accumulate, gs_stream stream) {
  constexpr decltype(&trimmed_mean_kernel<In, 1>) kKernels[] = {trimmed_mean_kernel<In, 1>, trimmed_mean_kernel<In, 2>,
                                                                trimmed_mean_kernel<In, 3>};
  if (trimmed >= 1 && trimmed <= static_cast<int64_t>(std::size(kKernels))) {
    return launch(kKernels[trimmed - 1], table.slots, kRowsThreads, 0, stream, table, num_tasks, accumulate);
  }
  // As many warps as fit 48 KB, but at least one.
  const int64_t bytes = 2 * trimmed * kWarp * int64_t{sizeof(Compared<In>)};
  const int64_t warps = std::clamp<int64_t>(48 * 1024 / std::max<int64_t>(1, bytes), 1, kRowsThreads / kWarp);
  return launch(&long_trimmed_mean_kernel<In>, table.slots, static_cast<int>(warps * kWarp), warps * bytes, stream,
                table, num_tasks, static_cast<int>(trimmed), accumulate);
}

}  // namespace

gs_status launch_trimmed_mean(const Table& table, int num_tasks, const gs_rule& rule, bool accumulate,
                              gs_stream stream) {
  return with_dtype(table.dtype, [&](auto in) {
    return launch_kernel<decltype(in)>(table, num_tasks, rule.num_trimmed, accumulate, stream);
  });
}

}  // namespace gs::gpu
