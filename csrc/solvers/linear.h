// SPDX-License-Identifier: MIT
// Products with small dense matrices for a team (common.h).
#pragma once
#include "common.h"

namespace gs {

// out = M x for a symmetric M [T, T].
template <class Team>
GS_HOST_DEVICE void multiply(const Team& team, const double* matrix, int64_t num_tasks, const double* x, double* out) {
  sum_rows(team, matrix, num_tasks, num_tasks, [](int64_t k) { return k; }, [&](int64_t k) { return x[k]; }, out);
}

// x^T y in interleaved sums, by one member.
GS_HOST_DEVICE inline double dot(const double* x, const double* y, int64_t count) {
  double sum[4] = {};
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    for (int64_t k = 0; k < 4; k++) sum[k] += x[i + k] * y[i + k];
  }
  for (; i < count; i++) sum[0] += x[i] * y[i];
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// x^T y, by the team.
template <class Team>
GS_HOST_DEVICE double team_dot(const Team& team, const double* x, const double* y, int64_t count) {
  double sum = 0;
  GS_ROLLED for (int64_t i = team.rank(); i < count; i += team.size()) sum += x[i] * y[i];
  return team.sum(sum);
}

// Rows are padded to an odd number of values: on a GPU a column then lies in many banks of shared memory.
GS_HOST_DEVICE constexpr int64_t padded(int64_t num_tasks) { return num_tasks | 1; }

}  // namespace gs
