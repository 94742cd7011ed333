// SPDX-License-Identifier: MIT
// The methods that need G's eigenvalues: IMTL-G, ConFIG, Aligned-MTL.
#pragma once
#include "cholesky.h"
#include "gradsurgery/gradsurgery.h"
#include "tridiagonal.h"

namespace gs {

constexpr int64_t spectral_scratch(int64_t num_tasks) { return (num_tasks + 1) * padded(num_tasks) + 4 * num_tasks; }

// x^T y, and below it the rotation of x and y, over the entries 0, kStep, 2 kStep, ... below count. They take four
// entries at a time, so that memory accesses need not wait for each other.
template <int kStep>
GS_HOST_DEVICE double strided_dot(const double* x, const double* y, int count) {
  double sum[4] = {};
  for (int first = 0; first < count; first += 4 * kStep) {
    GS_UNROLL for (int k = 0; k < 4; k++) {
      const int i = first + k * kStep;
      if (i < count) sum[k] += x[i] * y[i];
    }
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

template <int kStep>
GS_HOST_DEVICE void strided_rotate(double* x, double* y, int count, double cosine, double sine) {
  for (int first = 0; first < count; first += 4 * kStep) {
    double a[4], b[4];
    GS_UNROLL for (int k = 0; k < 4; k++) {
      const int i = first + k * kStep;
      a[k] = i < count ? x[i] : 0;
      b[k] = i < count ? y[i] : 0;
    }
    GS_UNROLL for (int k = 0; k < 4; k++) {
      const int i = first + k * kStep;
      if (i >= count) break;
      x[i] = cosine * a[k] - sine * b[k];
      y[i] = sine * a[k] + cosine * b[k];
    }
  }
}

// Turns the rows a_k of a symmetric positive semidefinite matrix A into lambda_k v_k^T for its eigenvalues and
// eigenvectors, in no particular order; lambda_k = |a_k| goes into values. One-sided Jacobi: rotates each pair of rows
// so that they become orthogonal; pairs without a common row are rotated in parallel, each by kPairMembers members.
// When all rows are orthogonal, the product Q^T A of the rotations and A is diag(lambda) V^T. Rows of eigenvalues that
// are 0 up to rounding hold noise.
template <class Team>
GS_HOST_DEVICE_CALL void diagonalize(const Team& team, double* rows, int64_t tasks, double* values) {
  constexpr int kMembers = Team::kPairMembers;
  // int, as a GPU multiplies 64-bit integers in several steps.
  const auto num_tasks = static_cast<int>(tasks), stride = static_cast<int>(padded(tasks));
  const int pairs = (num_tasks + 1) / 2, rounds = 2 * pairs - 1, member = static_cast<int>(team.rank());
  const int rank = member % kMembers, group = member / kMembers, groups = static_cast<int>(team.size()) / kMembers;
  for (int sweep = 0; sweep < 30; sweep++) {
    // The squared lengths. The rotations of a sweep update them, with some rounding error, so each sweep begins anew.
    for (int k = member; k < num_tasks; k += kMembers * groups) {
      values[k] = dot(rows + k * stride, rows + k * stride, num_tasks);
    }
    team.sync();
    double again = 0;
    for (int round = 0; round < rounds; round++) {
      for (int first = 0; first < pairs; first += groups) {
        // Pairs as in a round-robin tournament: the last player stays, the others move on by one place in each round.
        const int k = first + group, above = round + k, below = round - k;
        const int p = k == 0 ? rounds : above < rounds ? above : above - rounds;
        const int q = below < 0 ? below + rounds : below;
        const bool plays = k < pairs && p < num_tasks;  // else q sits out
        double *const a = rows + p * stride, *const b = rows + q * stride;
        const double aa = plays ? values[p] : 0, bb = plays ? values[q] : 0;
        const double part = plays ? strided_dot<kMembers>(a + rank, b + rank, num_tasks - rank) : 0;
        const double ab = team.sum(part, kMembers);
        team.sync();
        if (!(ab * ab > 1e-30 * (aa * bb))) continue;
        // The rotation's angle phi: tan(2 phi) = twice / apart.
        const double apart = bb - aa, twice = 2 * ab, inverse = inverse_root(apart * apart + twice * twice);
        const double square = 0.5 + 0.5 * std::fabs(apart) * inverse, secant = inverse_root(square);
        const double cosine = square * secant, sine = (apart < 0 ? -ab : ab) * inverse * secant;
        // Rotations by small angles of nearly orthogonal rows leave errors of second order only: no further sweep.
        if (ab * ab > 1e-16 * (aa * bb) || sine * sine > 1e-16) again = 1;
        if (rank == 0) {
          values[p] = std::fmax(aa - sine * secant * ab, 0.0);
          values[q] = std::fmax(bb + sine * secant * ab, 0.0);
        }
        strided_rotate<kMembers>(a + rank, b + rank, num_tasks - rank, cosine, sine);
      }
      team.sync();
    }
    if (team.sum(again) == 0) break;
  }
  for (int k = member; k < num_tasks; k += kMembers * groups) {
    values[k] = std::sqrt(dot(rows + k * stride, rows + k * stride, num_tasks));
  }
  team.sync();
}

// Writes the eigenvalues of a symmetric positive semidefinite matrix A to values, in no particular order, and lambda_k
// v_k^T p to products, each by the member that k % team.size() names. p is `preference`, or `otherwise` each. A's rows
// are overwritten. tridiagonal.h has this and compose() for one thread.
template <class Team>
GS_HOST_DEVICE void decompose(const Team& team, double* rows, int64_t num_tasks, const double* preference,
                              double otherwise, double* values, double* products) {
  diagonalize(team, rows, num_tasks, values);
  GS_ROLLED for (int64_t k = team.rank(); k < num_tasks; k += team.size()) {
    const double* const row = rows + k * padded(num_tasks);
    double product = 0;
    for (int64_t i = 0; i < num_tasks; i++) product += row[i] * (preference ? preference[i] : otherwise);
    products[k] = product;
  }
}

// out = sum_k factor_k lambda_k v_k, after decompose(). The eigenvalues serve the version for one thread only.
template <class Team>
GS_HOST_DEVICE void compose(const Team& team, const double* rows, int64_t num_tasks, const double*,
                            const double* factor, double* out) {
  team.sync();
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
    double sum = 0;
    for (int64_t k = 0; k < num_tasks; k++) sum += factor[k] * rows[k * padded(num_tasks) + i];
    out[i] = sum;
  }
  team.sync();
}

GS_HOST_DEVICE inline double largest(const double* values, int64_t count) {
  double most = 0;
  for (int64_t i = 0; i < count; i++) most = values[i] > most ? values[i] : most;
  return most;
}

// rows = K, K_ij = G_ij / (|g_i| |g_j|). A zero gradient has `of_zero` on the diagonal and 0 elsewhere.
template <class Team>
GS_HOST_DEVICE void write_cosines(const Team& team, const double* gram, int64_t num_tasks, const double* norms,
                                  double of_zero, double* rows) {
  each_entry(team, num_tasks, [&](int64_t i, int64_t j) {
    const double none = i == j ? of_zero : 0;
    rows[i * padded(num_tasks) + j] =
        norms[i] > 0 && norms[j] > 0 ? gram[i * num_tasks + j] / norms[i] / norms[j] : none;
  });
}

// c = K^-1 p by Cholesky's method. Returns whether it showed that all eigenvalues of K are above `rounding` times the
// largest one: the least is at least 1 / trace(K^-1), the largest at most T, and at most the root of the sum of all
// K_ij^2. rows needs one row more than K has.
template <class Team>
GS_HOST_DEVICE_CALL bool solve_independent(const Team& team, const double* gram, int64_t num_tasks,
                                           const double* preference, const double* norms, double rounding, double* c,
                                           double* rows) {
  const int64_t stride = padded(num_tasks);
  double* const x = rows + num_tasks * stride;
  write_cosines(team, gram, num_tasks, norms, 1, rows);
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
    x[i] = norms[i] > 0 ? (preference ? preference[i] : 1) : 0;
  }
  team.sync();
  factor_and_solve(team, [=](int64_t i) { return rows + i * stride; }, num_tasks);
  // Writes column j of the factor's inverse to row j, right of the diagonal.
  double trace = 0;
  GS_ROLLED for (int64_t j = team.rank(); j < num_tasks; j += team.size()) {
    double* const column = rows + j * stride;
    const double first = column[j];
    double sum = first * first;
    for (int64_t i = j + 1; i < num_tasks; i++) {
      const double* const row = rows + i * stride;
      column[i] = -(row[j] * first + dot(row + j + 1, column + j + 1, i - j - 1)) * row[i];
      sum += column[i] * column[i];
    }
    trace += sum;
  }
  trace = team.sum(trace);
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) c[i] = x[i];
  team.sync();
  if (trace * rounding * static_cast<double>(num_tasks) < 1) return true;
  write_cosines(team, gram, num_tasks, norms, 1, rows);
  double squares = 0;
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
    squares += dot(rows + i * stride, rows + i * stride, num_tasks);
  }
  return trace * rounding * std::sqrt(team.sum(squares)) < 1;
}

// c = pinv(K) p, with the matrix K of cosines (0 for a zero gradient), and its squared length c^T K c = p^T c.
// preference NULL: 1 each. Eigenvalues up to T 2^-23 of the largest count as 0: dependent gradients that were rounded
// to float32 have such eigenvalues. If p lies almost entirely in their eigenvectors, c = 0.
template <class Team>
GS_HOST_DEVICE_CALL double solve_cosines(const Team& team, const double* gram, int64_t num_tasks,
                                         const double* preference, double* norms, double* c, double* scratch) {
  const double rounding = 0x1p-23 * static_cast<double>(num_tasks);
  double *values = scratch, *factor = values + num_tasks, *rows = factor + num_tasks;
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
    norms[i] = std::sqrt(gram[i * num_tasks + i]);
  }
  team.sync();
  if (solve_independent(team, gram, num_tasks, preference, norms, rounding, c, rows)) {
    double product = 0;
    GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
      product += (preference ? preference[i] : 1) * c[i];
    }
    return team.sum(product);
  }
  write_cosines(team, gram, num_tasks, norms, 0, rows);
  decompose(team, rows, num_tasks, preference, 1, values, factor);
  const double least = rounding * largest(values, num_tasks);
  double length = 0, kept = 0, whole = 0;
  GS_ROLLED for (int64_t k = team.rank(); k < num_tasks; k += team.size()) {
    const double value = values[k], product = factor[k];
    factor[k] = value > least ? product / value / value / value : 0;
    length += factor[k] * product;
    kept += value > least ? product / value * (product / value) : 0;
    const double wanted = norms[k] > 0 ? (preference ? preference[k] : 1) : 0;
    whole += wanted * wanted;
  }
  team.sum_each(length, kept, whole);
  compose(team, rows, num_tasks, values, factor, c);
  if (kept > rounding * rounding * whole) return length;
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) c[i] = 0;
  team.sync();
  return 0;
}

// IMTL-G (Liu et al., ICLR 2021, equation 4): a direction with the same projection on every gradient's line.
template <class Team>
GS_HOST_DEVICE void imtl_g(const Team& team, const double* gram, int64_t num_tasks, double* weights, double* scratch) {
  double* norms = scratch;
  solve_cosines(team, gram, num_tasks, nullptr, norms, weights, scratch + num_tasks);
  double total = 0, size = 0;
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
    weights[i] = norms[i] > 0 ? weights[i] / norms[i] : 0;
    total += weights[i];
    size += std::fabs(weights[i]);
  }
  team.sum_each(total, size);
  const bool any = std::fabs(total) > 1e-12 * size;
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) weights[i] = any ? weights[i] / total : 0;
}

// ConFIG (Liu, Chu and Thuerey, ICLR 2025, equations 2 and 3).
template <class Team>
GS_HOST_DEVICE void config(const Team& team, const double* gram, int64_t num_tasks, const double* preference,
                           double* weights, double* scratch) {
  double *norms = scratch, *product = norms + num_tasks;
  const double length =
      std::sqrt(solve_cosines(team, gram, num_tasks, preference, norms, weights, product + num_tasks));
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
    weights[i] = norms[i] > 0 && length > 0 ? weights[i] / norms[i] / length : 0;
  }
  team.sync();
  multiply(team, gram, num_tasks, weights, product);
  double projection = 0;
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) projection += product[i];
  projection = team.sum(projection);
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) weights[i] *= projection;
}

// Aligned-MTL (Senushkin et al., CVPR 2023, Algorithm 1): w = sqrt(scale) V diag(lambda)^(-1/2) V^T p over the
// eigenvalues above T 2^-23 of the largest one. preference NULL: 1 / T each.
template <class Team>
GS_HOST_DEVICE void aligned_mtl(const Team& team, const double* gram, int64_t num_tasks, const double* preference,
                                gs_weighting weighting, double* weights, double* scratch) {
  const int64_t stride = padded(num_tasks);
  double *values = scratch, *factor = values + num_tasks, *rows = factor + num_tasks;
  const double even = 1 / static_cast<double>(num_tasks);
  double trace = 0;
  for (int64_t i = 0; i < num_tasks; i++) trace += gram[i * num_tasks + i];
  each_entry(team, num_tasks,
             [&](int64_t i, int64_t j) { rows[i * stride + j] = trace > 0 ? gram[i * num_tasks + j] / trace : 0; });
  decompose(team, rows, num_tasks, preference, even, values, factor);
  const double least = 0x1p-23 * static_cast<double>(num_tasks) * largest(values, num_tasks);
  int64_t rank = 0;
  double smallest = INFINITY, sum = 0;
  for (int64_t k = 0; k < num_tasks; k++) {
    if (!(values[k] > least)) continue;
    rank++;
    sum += values[k];
    smallest = values[k] < smallest ? values[k] : smallest;
  }
  double scale = weighting == GS_ALIGNED_MTL_MIN ? smallest : sum / static_cast<double>(rank);
  if (weighting == GS_ALIGNED_MTL_MEDIAN) {
    // The lower median of the kept values: as many of them are below it as above, or one fewer.
    for (int64_t k = 0; k < num_tasks; k++) {
      int64_t before = 0;
      for (int64_t l = 0; l < num_tasks; l++) {
        before += values[l] > least && (values[l] < values[k] || (values[l] == values[k] && l < k));
      }
      if (values[k] > least && before == (rank - 1) / 2) scale = values[k];
    }
  }
  GS_ROLLED for (int64_t k = team.rank(); k < num_tasks; k += team.size()) {
    const double value = values[k];
    factor[k] = value > least ? std::sqrt(scale / value) * factor[k] / value / value : 0;
  }
  compose(team, rows, num_tasks, values, factor, weights);
  if (rank > 0) return;
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
    weights[i] = preference ? preference[i] : even;
  }
}

}  // namespace gs
