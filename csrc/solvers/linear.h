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

// Solves A x = b by Cholesky's method, A = L L^T. row(i) holds row i of A's lower triangle, row(size) holds b, which
// becomes x; L takes A's place, but for 1 / L_jj on the diagonal. A pivot below 1e-14 of its diagonal entry counts as
// that much, so that a matrix that is singular to working precision has an answer too. False, with the work left
// undone, where one is not above `least` of its diagonal entry.
template <class Team, class Row>
GS_HOST_DEVICE_CALL bool factor_and_solve(const Team& team, const Row& row, int64_t size, double least = -INFINITY) {
  double* const x = row(size);
  for (int64_t j = 0; j < size; j++) {
    // Columns 0..j-1 are those of the factor by now, b's those of the forward substitution.
    double* const pivot_row = row(j);
    const double entry = pivot_row[j], floor = 1e-14 * entry;
    const auto reduced = [&](int64_t i) { return row(i)[j] - dot(row(i), pivot_row, j); };
    const int64_t own = j + team.rank();
    const double value = own <= size ? reduced(own) : 0, pivot = team.first(value);
    if (!(pivot > least * entry)) return false;
    const double inverse = inverse_root(pivot > floor ? pivot : floor);
    if (own > j && own <= size) row(own)[j] = value * inverse;
    for (int64_t i = own + team.size(); i <= size; i += team.size()) row(i)[j] = reduced(i) * inverse;
    team.sync();
    if (team.rank() == 0) pivot_row[j] = inverse;
  }
  team.sync();
  for (int64_t j = size - 1; j > 0; j--) {
    const double* const factor = row(j);
    const double value = x[j] * factor[j];
    for (int64_t i = team.rank(); i < j; i += team.size()) x[i] -= factor[i] * value;
    team.sync();
  }
  for (int64_t i = team.rank(); i < size; i += team.size()) x[i] *= row(i)[i];
  team.sync();
  return true;
}

// L D L^T of a symmetric positive matrix of a few rows, by one thread, in registers.
template <int kSize>
struct SmallFactor {
  double lower[kSize][kSize], inverse[kSize];  // L below the diagonal; 1 / D
  bool definite = true;                        // no pivot is below 1e-14 of its diagonal entry; such count as that much

  // entry(i, j) is that of row i and column j <= i.
  template <class Entry>
  GS_HOST_DEVICE explicit SmallFactor(const Entry& entry) {
    GS_UNROLL for (int i = 0; i < kSize; i++) { GS_UNROLL for (int j = 0; j <= i; j++) lower[i][j] = entry(i, j); }
    GS_UNROLL for (int k = 0; k < kSize; k++) {
      const double floor = 1e-14 * entry(k, k);
      definite = definite && lower[k][k] > floor;
      inverse[k] = 1 / (lower[k][k] > floor ? lower[k][k] : floor);
      GS_UNROLL for (int i = kSize - 1; i > k; i--) {
        const double ratio = lower[i][k] * inverse[k];
        GS_UNROLL for (int j = k + 1; j <= i; j++) lower[i][j] -= ratio * lower[j][k];
        lower[i][k] = ratio;
      }
    }
  }

  GS_HOST_DEVICE void solve(double (&x)[kSize]) const {
    GS_UNROLL for (int k = 0; k < kSize; k++) {
      GS_UNROLL for (int i = k + 1; i < kSize; i++) x[i] -= lower[i][k] * x[k];
    }
    GS_UNROLL for (int k = 0; k < kSize; k++) x[k] *= inverse[k];
    GS_UNROLL for (int k = kSize - 1; k > 0; k--) { GS_UNROLL for (int i = 0; i < k; i++) x[i] -= lower[k][i] * x[k]; }
  }
};

// Solves A x = b likewise. entry(i, j) is that of A, j <= i; rows is scratch, but for its row `size`, which holds b and
// becomes x. Up to kSmall rows each member does all of the work by itself: it takes less time than waiting for others.
template <class Team, class Entry>
GS_HOST_DEVICE void solve_positive(const Team& team, const Entry& entry, double* rows, int64_t stride, int64_t size) {
  constexpr int kSmall = Team::kSmall;
  double* const right = rows + size * stride;
  if constexpr (kSmall > 0) {
    if (size <= kSmall) {
      const SmallFactor<kSmall> factor([&](int i, int j) { return i < size ? entry(i, j) : i == j ? 1.0 : 0.0; });
      double x[kSmall];
      GS_UNROLL for (int i = 0; i < kSmall; i++) x[i] = i < size ? right[i] : 0;
      factor.solve(x);
      team.sync();
      GS_UNROLL for (int i = 0; i < kSmall; i++) {
        if (i == team.rank() && i < size) right[i] = x[i];
      }
      team.sync();
      return;
    }
  }
  for (int64_t i = team.rank(); i < size; i += team.size()) {
    for (int64_t j = 0; j <= i; j++) rows[i * stride + j] = entry(i, j);
  }
  team.sync();
  factor_and_solve(team, [&](int64_t i) { return rows + i * stride; }, size);
}

}  // namespace gs
