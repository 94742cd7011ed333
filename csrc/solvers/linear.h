// SPDX-License-Identifier: MIT
// Small dense linear algebra for a team (common.h): products with G, and positive definite systems.
#pragma once
#include "common.h"

namespace gs {

// out = M x for a symmetric M [T, T].
template <class Team>
GS_HOST_DEVICE void multiply(const Team& team, const double* matrix, int64_t num_tasks, const double* x, double* out) {
  combine_rows(team, matrix, num_tasks, num_tasks, [](int64_t k) { return k; }, [&](int64_t k) { return x[k]; }, out);
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
  for (int64_t i = team.rank(); i < count; i += team.size()) sum += x[i] * y[i];
  return team.sum(sum);
}

// Rows of an odd number of values: on a GPU a column then lies in many banks of shared memory.
GS_HOST_DEVICE constexpr int64_t padded(int64_t num_tasks) { return num_tasks | 1; }

// Solves A x = b by Cholesky's method. rows, `stride` values apart, hold the lower triangle of A [size, size], then b
// as one more row, which becomes x. A pivot below 1e-14 of its diagonal entry counts as that much, so that a matrix
// that is singular to working precision has an answer too.
template <class Team>
GS_HOST_DEVICE_CALL void solve_positive(const Team& team, double* rows, int64_t stride, int64_t size) {
  double* const x = rows + size * stride;
  for (int64_t j = 0; j < size; j++) {
    // Columns 0..j-1 are those of the factor by now, b's those of the forward substitution.
    const double* const pivot_row = rows + j * stride;
    const double entry = pivot_row[j], floor = 1e-14 * entry;
    const double pivot = entry - dot(pivot_row, pivot_row, j);
    const double root = std::sqrt(pivot > floor ? pivot : floor);
    for (int64_t i = j + 1 + team.rank(); i <= size; i += team.size()) {
      double* const row = rows + i * stride;
      row[j] = (row[j] - dot(row, pivot_row, j)) / root;
    }
    team.sync();
    if (team.rank() == 0) rows[j * stride + j] = root;
  }
  for (int64_t j = size - 1; j >= 0; j--) {
    team.sync();
    const double* const row = rows + j * stride;
    const double value = x[j] / row[j];
    team.sync();
    for (int64_t i = team.rank(); i <= j; i += team.size()) x[i] = i == j ? value : x[i] - row[i] * value;
  }
  team.sync();
}

}  // namespace gs
