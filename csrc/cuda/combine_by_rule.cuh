// SPDX-License-Identifier: MIT
// Shared code of the kernels of the coordinate-wise rules, which read each row once and keep running values per lane.
#pragma once
#include "cuda/turns.cuh"

namespace gs::gpu {

constexpr int kRowsThreads = 256;
template <class In>
constexpr int kRows = sizeof(In) == 2 ? 2 : 4;  // rows that a lane loads together

template <class In>
using WarpTurns = Turns<In, kWarp, 1>;

template <class In>
GS_DEVICE WarpTurns<In> turns_of(const Table& table) {
  return {table, block(), thread() / kWarp, threads() / kWarp};
}

// A lane's vectors of the tasks from `first` on; zeros beyond the last task.
template <class In, int kCount>
GS_DEVICE void load_rows(const WarpTurns<In>& turns, const Unit (&unit)[1], int first, int num_tasks,
                         Vector<In> (&x)[1][kCount]) {
  int task[kCount];
#pragma unroll
  for (int u = 0; u < kCount; u++) task[u] = first + u < num_tasks ? first + u : -1;
  const In* row[kCount];
  turns.get_rows(task, row);
  turns.load(row, thread() % kWarp, unit, load_last<Vector<In>>, x);
}

// Rounds a lane's results to the output, whose pointer follows those of the tasks in the table.
template <class In>
GS_DEVICE void store_results(const WarpTurns<In>& turns, const Unit (&unit)[1], int num_tasks, bool accumulate,
                             double (&result)[kVector<In>]) {
  if (accumulate) {
    Vector<In> before[1][1];
    load_rows(turns, unit, num_tasks, num_tasks + 1, before);
#pragma unroll
    for (int e = 0; e < kVector<In>; e++) result[e] += to_double(before[0][0].get(e));
  }
  Vector<In> rounded = {};
#pragma unroll
  for (int e = 0; e < kVector<In>; e++) rounded.set(e, from_double<In>(result[e]));
  const int output[1] = {num_tasks};
  In* out[1];
  turns.get_rows(output, out);
  turns.store(out[0], thread() % kWarp, 0, unit[0], rounded);
}

// Each handles the columns of one dtype. accumulate: adds to the outputs.
gs_status launch_graddrop(const Table& table, int num_tasks, const gs_rule& rule, bool accumulate, gs_stream stream);
gs_status launch_trimmed_mean(const Table& table, int num_tasks, const gs_rule& rule, bool accumulate,
                              gs_stream stream);

}  // namespace gs::gpu
