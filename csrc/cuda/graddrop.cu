// SPDX-License-Identifier: MIT
// GradDrop on the GPU. The step counter is read on the device.
#include "cuda/combine_by_rule.cuh"
#include "cuda/launch.cuh"
#include "solvers/philox.h"

namespace gs::gpu {
namespace {

// The random words of a lane's columns. Neighbouring columns share a Philox block.
template <class In>
GS_DEVICE void draw_words(const WarpTurns<In>& turns, const Unit& unit, uint64_t seed, uint64_t step,
                          uint32_t (&word)[kVector<In>]) {
  const int lane = thread() % kWarp;
  int64_t coordinate[kVector<In>];
#pragma unroll
  for (int e = 0; e < kVector<In>; e++) coordinate[e] = turns.column(lane, 0, unit, e);
  PhiloxBlock words = {};
#pragma unroll
  for (int e = 0; e < kVector<In>; e++) {
    const auto own = static_cast<uint64_t>(turns.coordinate() + coordinate[e]);
    const bool same = e > 0 && own % 4 > 0 && coordinate[e] == coordinate[e > 0 ? e - 1 : 0] + 1;
    if (!same) words = philox(coordinate_counter(step, own / 4), seed);
    const uint32_t lower = own % 2 ? words.word[1] : words.word[0], upper = own % 2 ? words.word[3] : words.word[2];
    word[e] = own % 4 < 2 ? lower : upper;
  }
}

// With p the sum of the positive values and n that of the negative ones, P > u means (1 - u) p > u |n|.
template <class In, bool kLeaks>
GS_KERNEL GS_BLOCKS(kRowsThreads, 2) graddrop_kernel(GS_ARGUMENT(Table) table, int num_tasks, uint64_t seed,
                                                     const int64_t* step, const double* leak, bool accumulate) {
  wait_for_previous_kernel();
  const auto now = static_cast<uint64_t>(*step);
  double* const leaks = &shared<double>();
  for (int t = thread(); kLeaks && t < num_tasks; t += threads()) leaks[t] = leak[t];
  sync_block();
  let_next_kernel_start();
  for (auto turns = turns_of<In>(table); !turns.done(); turns.next()) {
    Unit unit[1] = {};
    turns.get_units(thread() % kWarp, unit);
    uint32_t word[kVector<In>];
    draw_words(turns, unit[0], seed, now, word);
    double positive[kVector<In>] = {}, negative[kVector<In>] = {};
    double leaked_positive[kVector<In>] = {}, leaked_negative[kVector<In>] = {};
    for (int first = 0; first < num_tasks; first += kRows<In>) {
      Vector<In> x[1][kRows<In>];
      load_rows(turns, unit, first, num_tasks, x);
#pragma unroll
      for (int u = 0; u < kRows<In>; u++) {
        const double factor = kLeaks && first + u < num_tasks ? leaks[first + u] : 0;
#pragma unroll
        for (int e = 0; e < kVector<In>; e++) {
          const double value = to_double(x[0][u].get(e));
          // NaN is counted with the negative values.
          const double above = value > 0 ? value : 0, below = value > 0 ? 0 : value;
          positive[e] += above;
          negative[e] += below;
          if constexpr (kLeaks) {
            leaked_positive[e] += factor * above;
            leaked_negative[e] += factor * below;
          }
        }
      }
    }
    double result[kVector<In>];
#pragma unroll
    for (int e = 0; e < kVector<In>; e++) {
      const double u = uniform_of(word[e]), all = positive[e] - negative[e];
      const double up = (1 - u) * positive[e], down = -u * negative[e];
      result[e] = up > down   ? positive[e] + leaked_negative[e]
                  : up < down ? leaked_positive[e] + negative[e]
                              : leaked_positive[e] + leaked_negative[e];
      result[e] += all - all;  // NaN if `all` is not finite
    }
    store_results(turns, unit, num_tasks, accumulate, result);
  }
}

}  // namespace

gs_status launch_graddrop(const Table& table, int num_tasks, const gs_rule& rule, bool accumulate, gs_stream stream) {
  return with_dtype(table.dtype, [&](auto in) {
    using In = decltype(in);
    const auto kernel = rule.leak ? &graddrop_kernel<In, true> : &graddrop_kernel<In, false>;
    return launch(kernel, table.slots, kRowsThreads, rule.leak ? num_tasks * sizeof(double) : 0, stream, table,
                  num_tasks, rule.seed, rule.step, rule.leak, accumulate);
  });
}

}  // namespace gs::gpu
