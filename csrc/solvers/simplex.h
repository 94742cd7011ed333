// SPDX-License-Identifier: MIT
// Steps on the simplex: projected gradient descent with momentum.
#pragma once
#include "common.h"

namespace gs {

// Rounded up to whole cache lines, so that threads that solve different problems share none.
constexpr int64_t simplex_scratch_bytes(int64_t num_tasks) { return (num_tasks * (num_tasks + 2) + 7) / 8 * 64; }

// argmin |w - x| with w >= 0 and sum(w) = 1: w = max(x - tau, 0). Michelot's algorithm (1986): computes tau from a set
// of tasks that contains all those with w > 0, and removes the others until none is left. The largest value is
// subtracted from x first: it becomes exactly 0, and tasks with x <= -1 have weight 0.
template <class Team>
GS_HOST_DEVICE void project_on_simplex(const Team& team, double* x, int64_t num_tasks, double* weights) {
  double least = INFINITY;
  int64_t index = 0;
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) least = -x[i] < least ? -x[i] : least;
  team.least(least, index);
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) x[i] += least;
  double tau = -1, count = 0;
  for (int64_t round = 0; round < num_tasks; round++) {
    double sum = 0, members = 0;
    GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
      if (x[i] > tau) {
        sum += x[i];
        members += 1;
      }
    }
    team.sum_each(sum, members);
    if (members == count) break;
    count = members;
    tau = (sum - 1) / members;
  }
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
    weights[i] = x[i] <= tau ? 0 : x[i] - tau;  // NaN stays NaN
  }
  team.sync();
}

// Does num_iter times v = momentum v + A w, then w = P(w - lr v), where P is the projection on the simplex and v = 0 at
// first. A [T, T] need not be symmetric, but must be finite.
template <class Team>
GS_HOST_DEVICE void simplex_steps(const Team& team, const double* matrix, int64_t num_tasks, double lr, double momentum,
                                  int64_t num_iter, double* weights, double* scratch) {
  double *const transposed = scratch, *const velocity = transposed + num_tasks * num_tasks;
  double* const x = velocity + num_tasks;
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) velocity[i] = 0;
  each_entry(team, num_tasks, [&](int64_t i, int64_t j) { transposed[j * num_tasks + i] = matrix[i * num_tasks + j]; });
  for (int64_t iter = 0; iter < num_iter; iter++) {
    sum_rows(
        team, transposed, num_tasks, num_tasks, [](int64_t k) { return k; }, [&](int64_t k) { return weights[k]; }, x);
    GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
      velocity[i] = momentum * velocity[i] + x[i];
      x[i] = weights[i] - lr * velocity[i];
    }
    project_on_simplex(team, x, num_tasks, weights);
  }
}

}  // namespace gs
