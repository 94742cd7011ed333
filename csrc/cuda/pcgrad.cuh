// SPDX-License-Identifier: MIT
// PCGrad by a block (the recurrence of csrc/solvers/pcgrad.h): a warp per task and its visiting order.
#pragma once
#include <cfloat>
#include <cmath>

#include "cuda/device.cuh"
#include "solvers/philox.h"

namespace gs::gpu {

// Rows whose orders a warp draws at once, one per lane: the swaps of a row are one long chain of dependent steps.
constexpr int kDrawnRows = 4;

// A warp's part of the shared memory is a double per task. It holds two bytes per task for each of these rows and,
// after the last row, the warp's part of the weights.
constexpr int kWarpBytesPerTask = 8;
static_assert(2 * kDrawnRows <= kWarpBytesPerTask);

// task_order_row for the rows first, first + stride, ...: first all their random words, one Philox block per lane, then
// the swaps.
GS_DEVICE void draw_orders(int num_tasks, uint64_t seed, uint64_t step, int first, int stride, uint8_t* order,
                           uint8_t* other) {
  const int lane = thread() % kWarp, blocks = (num_tasks + 2) / 4;
  for (int item = lane; item < kDrawnRows * blocks; item += kWarp) {
    const int slot = item / blocks, number = item % blocks, row = first + slot * stride;
    if (row >= num_tasks) break;
    const PhiloxBlock draws = order_draws(seed, step, row, static_cast<uint32_t>(number));
    for (int i = 0; i < 4; i++) {
      const int k = num_tasks - 1 - 4 * number - i;
      if (k > 0) other[slot * num_tasks + k] = static_cast<uint8_t>(swap_position(draws.word[i], k));
    }
  }
  for (int k = lane; k < num_tasks; k += kWarp) {
    for (int slot = 0; slot < kDrawnRows; slot++) order[slot * num_tasks + k] = static_cast<uint8_t>(k);
  }
  sync_warp();
  if (lane < kDrawnRows && first + lane * stride < num_tasks) {
    uint8_t* row = order + lane * num_tasks;
    const uint8_t* swap = other + lane * num_tasks;
    uint8_t next = swap[num_tasks - 1];
    for (int k = num_tasks - 1; k > 0; k--) {
      const uint8_t at = next, high = row[k], low = row[at];
      next = swap[k - 1];
      row[k] = low;
      row[at] = high;
    }
  }
  sync_warp();
}

constexpr uint32_t kNoTask = 0xffffffff;

// A lane's data of its tasks lane, lane + 32, ...
template <int kPerLane>
struct LaneTasks {
  double inverse[kPerLane];  // 1 / G_jj, 0 for a task that is never projected on
  double weight[kPerLane];   // this warp's part
  bool finite;               // all inverses of the warp are finite (a subnormal G_jj has an infinite one)
};

// The projections of task i. rank[j] is the place of task j in the visiting order, from 1 on; 0 if it is not visited.
// Between two projections v = G c does not change, so the next task to project on is the one of least rank above the
// last one's with v_j < 0: one minimum over the warp finds it, and visits without a conflict cost nothing. All warps do
// this at the same time, so each instruction counts: the sign is read off the bits (a projection for -0 does nothing),
// and each lane has its coefficients ready before the task is known.
template <int kPerLane>
GS_DEVICE void project(const double* gram, int num_tasks, int i, const uint16_t* rank, LaneTasks<kPerLane>& tasks) {
  const int lane = thread() % kWarp;
  double v[kPerLane];
  uint32_t visit[kPerLane];  // 256 rank + task
  int column[kPerLane];      // of G; places beyond the last task repeat its column and are never visited
  for (int r = 0; r < kPerLane; r++) {
    const int j = lane + r * kWarp;
    column[r] = j < num_tasks ? j : num_tasks - 1;
    v[r] = gram[i * num_tasks + column[r]];
    visit[r] = tasks.inverse[r] > 0 && j != i ? 256u * rank[j] + static_cast<uint32_t>(j) : 0;
  }
  for (uint32_t last = 255;;) {
    uint32_t next = kNoTask;
    for (int r = 0; r < kPerLane; r++) {
      if (std::signbit(v[r]) && visit[r] > last && visit[r] < next) next = visit[r];
    }
    last = min_of_warp(next);
    if (last == kNoTask) return;
    const int j = last % 256;
    double coefficient = v[0] * tasks.inverse[0];
    for (int r = 1; r < kPerLane; r++) {
      const double other = v[r] * tasks.inverse[r];
      if (j / kWarp == r) coefficient = other;
    }
    if (!tasks.finite) {
      for (int r = 0; r < kPerLane; r++) {
        if (j == lane + r * kWarp && tasks.inverse[r] > DBL_MAX) coefficient = v[r] / gram[j * (num_tasks + 1)];
      }
    }
    coefficient = shuffle(coefficient, j % kWarp);
    for (int r = 0; r < kPerLane; r++) {
      if (visit[r] == last) tasks.weight[r] -= coefficient;
      v[r] -= coefficient * gram[j * num_tasks + column[r]];
    }
  }
}

// A warp's part of the block's parts [warps][T].
struct WarpPart {
  double* weights;
  uint8_t *drawn, *other;

  GS_DEVICE WarpPart(double* parts, int num_tasks) : weights(parts + thread() / kWarp * num_tasks) {
    drawn = reinterpret_cast<uint8_t*>(weights);
    other = drawn + kDrawnRows * num_tasks;
  }
};

// The tasks of a warp: first, first + stride, ...
struct WarpTasks {
  int first, stride;
};

GS_DEVICE void draw_first_orders(int num_tasks, uint64_t seed, uint64_t step, WarpTasks own, double* parts) {
  const WarpPart part(parts, num_tasks);
  draw_orders(num_tasks, seed, step, own.first, own.stride, part.drawn, part.other);
}

// Writes to the warp's part what the projections of its tasks add to the weights. g is the Gram matrix of at most
// kPerLane x kWarp tasks. If order is NULL, draw_first_orders must have filled parts.
template <int kPerLane>
GS_DEVICE void project_tasks(const double* g, int num_tasks, const int64_t* order, uint64_t seed, uint64_t now,
                             WarpTasks own, double* parts) {
  const int lane = thread() % kWarp;
  const WarpPart part(parts, num_tasks);
  LaneTasks<kPerLane> tasks;
  bool finite = true;
  for (int r = 0; r < kPerLane; r++) {
    const int j = lane + r * kWarp;
    const double squared_norm = j < num_tasks ? g[j * (num_tasks + 1)] : 0;
    tasks.inverse[r] = squared_norm > 0 ? 1 / squared_norm : 0;
    tasks.weight[r] = 0;
    finite = finite && tasks.inverse[r] <= DBL_MAX;
  }
  tasks.finite = all_of_warp(finite);
  for (int first = own.first; first < num_tasks; first += kDrawnRows * own.stride) {
    if (!order && first != own.first) draw_orders(num_tasks, seed, now, first, own.stride, part.drawn, part.other);
    for (int slot = 0; slot < kDrawnRows; slot++) {
      const int i = first + slot * own.stride;
      if (i >= num_tasks) break;
      auto* rank = reinterpret_cast<uint16_t*>(part.other);  // free again, as the swaps are done
      sync_warp();
      for (int j = lane; j < num_tasks; j += kWarp) rank[j] = 0;
      sync_warp();
      for (int k = lane; k < num_tasks; k += kWarp) {
        const int64_t j = order ? order[i * num_tasks + k] : part.drawn[slot * num_tasks + k];
        if (j >= 0 && j < num_tasks) rank[j] = static_cast<uint16_t>(k + 1);  // order has not been checked
      }
      sync_warp();
      project(g, num_tasks, i, rank, tasks);
    }
    sync_warp();
  }
  for (int r = 0; r < kPerLane; r++) {
    if (lane + r * kWarp < num_tasks) part.weights[lane + r * kWarp] = tasks.weight[r];
  }
}

// The sum for task j over `count` parts, in order.
GS_DEVICE double sum_parts(const double* parts, int count, int num_tasks, int j) {
  double sum = 0;
#pragma unroll 8
  for (int p = 0; p < count; p++) sum += parts[p * num_tasks + j];
  return sum;
}

// A task's weight: 1 for its own gradient, plus `added` by the projections.
GS_DEVICE double pcgrad_weight(double added, int num_tasks, bool broken, bool mean) {
  if (broken) return NAN;
  return mean ? (1 + added) / num_tasks : 1 + added;
}

}  // namespace gs::gpu
