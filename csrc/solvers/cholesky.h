// SPDX-License-Identifier: MIT
// Small positive definite systems for a team (common.h).
#pragma once
#include "linear.h"

namespace gs {

// row(i)[j] = entry(i, j) of a lower triangle.
template <class Team, class Row, class Entry>
GS_HOST_DEVICE void fill_lower(const Team& team, Row row, int64_t size, const Entry& entry) {
  if constexpr (Team::kPanel == 1) {
    for (int64_t i = 0; i < size; i++) {
      double* const own = row(i);
      for (int64_t j = 0; j < i; j++) own[j] = entry(i, j);
      own[i] = entry(i, i);
    }
  } else {
    // Each member takes whole columns, several rows at a time, so that a load need not wait for the last store.
    constexpr int kRows = 4;
    GS_ROLLED for (int64_t j = team.rank(); j < size; j += team.size()) {
      for (int64_t i = j; i < size; i += kRows) {
        double value[kRows];
        GS_UNROLL for (int r = 0; r < kRows; r++) value[r] = i + r < size ? entry(i + r, j) : 0;
        GS_UNROLL for (int r = 0; r < kRows; r++) {
          if (i + r < size) row(i + r)[j] = value[r];
        }
      }
    }
    team.sync();
  }
}

// Smaller pivots are raised to this part of their diagonal entry, so that a matrix that is singular to working
// precision has a solution too.
constexpr double kMinPivot = 1e-14;

// Solves A x = b by Cholesky's method, A = L L^T. row(i) holds row i of A's lower triangle and is overwritten by L,
// with 1 / L_jj on the diagonal; row(size) holds b and is overwritten by x. Stops and returns false at a pivot that is
// not above `least` times its diagonal entry. This one runs in one thread:
template <class Row>
bool factor_and_solve(const SerialTeam&, Row row, int64_t size, double least = -INFINITY) {
  for (int64_t j = 0; j < size; j++) {
    // By now columns 0..j-1 hold the factor, and entries 0..j-1 of row(size) the result of the forward substitution.
    double* const pivot_row = row(j);
    const double entry = pivot_row[j], floor = kMinPivot * entry, pivot = entry - dot(pivot_row, pivot_row, j);
    if (!(pivot > least * entry)) return false;
    const double inverse = inverse_root(pivot > floor ? pivot : floor);
    pivot_row[j] = inverse;
    for (int64_t i = j + 1; i <= size; i++) {
      double* const own = row(i);
      own[j] = (own[j] - dot(own, pivot_row, j)) * inverse;
    }
  }
  double* const x = row(size);
  for (int64_t j = size - 1; j >= 0; j--) {
    const double* const factor = row(j);
    const double value = x[j] * factor[j];
    for (int64_t i = 0; i < j; i++) x[i] -= factor[i] * value;
    x[j] = value;
  }
  return true;
}

// The diagonal block of a few columns of the factor, of which every member has a copy.
template <int kColumns>
struct Panel {
  double lower[kColumns][kColumns], inverse[kColumns];  // L below the diagonal; 1 / L_jj

  // v = L^-1 v.
  GS_HOST_DEVICE void substitute(double (&v)[kColumns]) const {
    GS_UNROLL for (int c = 0; c < kColumns; c++) {
      GS_UNROLL for (int b = 0; b < c; b++) v[c] -= v[b] * lower[c][b];
      v[c] *= inverse[c];
    }
  }
};

// The same by a team of at least kPanel members, kPanel columns at a time: one pass of loads serves the sums of all
// these columns, and so does each synchronization.
template <class Team, class Row>
GS_HOST_DEVICE_CALL bool factor_and_solve(const Team& team, Row row, int64_t size, double least = -INFINITY) {
  constexpr int kPanel = Team::kPanel;
  using Values = double[kPanel];
  Panel<kPanel> panel;
  for (int64_t j = 0; j < size; j += kPanel) {
    const int count = static_cast<int>(size - j < kPanel ? size - j : kPanel);
    const double* pivot_row[kPanel];
    double entry[kPanel];
    GS_UNROLL for (int c = 0; c < kPanel; c++) {
      pivot_row[c] = row(c < count ? j + c : j);
      entry[c] = c < count ? pivot_row[c][j + c] : 1;
    }
    // v = columns j.. of row i of A, less the products of the factor's earlier columns; a row ends at its diagonal.
    const auto reduce = [&](int64_t i, Values& v) {
      const double* const own = row(i);
      GS_UNROLL for (int c = 0; c < kPanel; c++) v[c] = c < count && j + c <= i ? own[j + c] : 0;
      GS_ROLLED for (int64_t k = 0; k < j; k += kPanel) {
        double x[kPanel], y[kPanel][kPanel];
        GS_UNROLL for (int b = 0; b < kPanel; b++) {
          x[b] = own[k + b];
          GS_UNROLL for (int c = 0; c < kPanel; c++) y[c][b] = pivot_row[c][k + b];
        }
        GS_UNROLL for (int b = 0; b < kPanel; b++) {
          GS_UNROLL for (int c = 0; c < kPanel; c++) v[c] -= x[b] * y[c][b];
        }
      }
    };
    // Writes those of the panel's columns that row i has.
    const auto write = [&](int64_t i, const Values& v) {
      double* const own = row(i);
      GS_UNROLL for (int c = 0; c < kPanel; c++) {
        if (c < count && j + c <= i) own[j + c] = v[c];
      }
    };
    const int64_t own = j + team.rank();
    Values v = {};
    if (own <= size) reduce(own, v);
    team.sync();
    if (team.rank() < count) write(own, v);
    team.sync();
    GS_UNROLL for (int c = 0; c < kPanel; c++) {
      GS_UNROLL for (int b = 0; b <= c; b++) panel.lower[c][b] = c < count ? pivot_row[c][j + b] : b == c;
    }
    GS_UNROLL for (int c = 0; c < kPanel; c++) {
      GS_UNROLL for (int b = 0; b < c; b++) {
        GS_UNROLL for (int a = 0; a < b; a++) panel.lower[c][b] -= panel.lower[c][a] * panel.lower[b][a];
        panel.lower[c][b] *= panel.inverse[b];
        panel.lower[c][c] -= panel.lower[c][b] * panel.lower[c][b];
      }
      const double pivot = panel.lower[c][c], floor = kMinPivot * entry[c];
      if (!(pivot > least * entry[c])) return false;
      panel.inverse[c] = inverse_root(pivot > floor ? pivot : floor);
    }
    if (team.rank() >= count && own <= size) {
      panel.substitute(v);
      write(own, v);
    }
    for (int64_t i = own + team.size(); i <= size; i += team.size()) {
      Values other;  // not v: the rows of the diagonal block are written last
      reduce(i, other);
      panel.substitute(other);
      write(i, other);
    }
    team.sync();
    if (team.rank() < count) {
      panel.substitute(v);
      GS_UNROLL for (int c = 0; c < kPanel; c++) {
        if (c == team.rank()) v[c] = panel.inverse[c];
      }
      write(own, v);
    }
  }
  team.sync();
  double* const x = row(size);
  for (int64_t j = (size - 1) / kPanel * kPanel; j >= 0; j -= kPanel) {
    const int count = static_cast<int>(size - j < kPanel ? size - j : kPanel);
    const double* factor[kPanel];
    double value[kPanel];
    GS_UNROLL for (int c = 0; c < kPanel; c++) {
      factor[c] = row(c < count ? j + c : j);
      value[c] = c < count ? x[j + c] : 0;
    }
    GS_UNROLL for (int c = kPanel - 1; c >= 0; c--) {
      GS_UNROLL for (int b = c + 1; b < kPanel; b++) value[c] -= b < count ? factor[b][j + c] * value[b] : 0;
      value[c] *= c < count ? factor[c][j + c] : 0;
    }
    GS_ROLLED for (int64_t i = team.rank(); i < j; i += team.size()) {
      double sum = 0;
      GS_UNROLL for (int c = 0; c < kPanel; c++) sum += factor[c][i] * value[c];
      x[i] -= sum;
    }
    team.sync();
    GS_UNROLL for (int c = 0; c < kPanel; c++) {
      if (c == team.rank() && c < count) x[j + c] = value[c];
    }
  }
  team.sync();
  return true;
}

// The factorization L D L^T of a small symmetric positive definite matrix, by one thread, in registers.
template <int kSize>
struct SmallFactor {
  double lower[kSize][kSize], inverse[kSize];  // L below the diagonal; 1 / D
  bool definite = true;                        // each pivot is above `least` times its diagonal entry

  // entry(i, j) is that of row i and column j <= i.
  template <class Entry>
  GS_HOST_DEVICE explicit SmallFactor(const Entry& entry, double least = kMinPivot) {
    GS_UNROLL for (int i = 0; i < kSize; i++) { GS_UNROLL for (int j = 0; j <= i; j++) lower[i][j] = entry(i, j); }
    GS_UNROLL for (int k = 0; k < kSize; k++) {
      const double floor = kMinPivot * entry(k, k);
      definite = definite && lower[k][k] > least * entry(k, k);
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

// Solves A x = b for A_ij = entry(i, j), j <= i; false as for factor_and_solve. Row `size` of rows holds b and is
// overwritten by x; the other rows are scratch. Up to kSmall rows each member does all of the work by itself, which
// takes less time than waiting for others.
template <class Team, class Entry>
GS_HOST_DEVICE bool solve_positive(const Team& team, const Entry& entry, double* rows, int64_t stride, int64_t size,
                                   double least) {
  constexpr int kSmall = Team::kSmall;
  double* const right = rows + size * stride;
  if constexpr (kSmall > 0) {
    if (size <= kSmall) {
      const auto padded_entry = [&](int i, int j) { return i < size ? entry(i, j) : i == j ? 1.0 : 0.0; };
      const SmallFactor<kSmall> factor(padded_entry, least);
      if (!factor.definite) return false;
      double x[kSmall];
      GS_UNROLL for (int i = 0; i < kSmall; i++) x[i] = i < size ? right[i] : 0;
      factor.solve(x);
      team.sync();
      GS_UNROLL for (int i = 0; i < kSmall; i++) {
        if (i == team.rank() && i < size) right[i] = x[i];
      }
      team.sync();
      return true;
    }
  }
  const auto row = [=](int64_t i) { return rows + i * stride; };
  fill_lower(team, row, size, entry);
  return factor_and_solve(team, row, size, least);
}

}  // namespace gs
