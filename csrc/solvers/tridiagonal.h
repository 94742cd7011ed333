// SPDX-License-Identifier: MIT
// Eigenvalues of a symmetric matrix A by one thread: a tridiagonal form by Householder's reflections, diagonalized by
// implicit QL steps (Golub and Van Loan, Matrix Computations, section 8.3). The eigenvectors V = Q Z are not computed:
// the reflections, whose product is Q, and the rotations, whose product is Z, are kept, and multiply vectors.
#pragma once
#include <limits>

#include "gradsurgery/gradsurgery.h"
#include "linear.h"

namespace gs {

// How many pairs of doubles may record rotations; those of the worst matrices that were found, tridiagonal ones, filled
// three quarters. The steps end where there is no room for another.
constexpr int64_t max_rotations(int64_t num_tasks) { return 2 * num_tasks * num_tasks + 8 * num_tasks; }

// y += factor x.
inline void add(double factor, const double* x, int64_t count, double* y) {
  for (int64_t i = 0; i < count; i++) y[i] += factor * x[i];
}

// x <- (I - v v^T) x, with the reflection that tridiagonalize() has left in row k.
inline void reflect(const double* rows, int64_t stride, int64_t size, int64_t k, double* x) {
  const double* const v = rows + k * stride + k + 1;
  add(-dot(v, x + k + 1, size - k - 1), v, size - k - 1, x + k + 1);
}

// Writes the diagonal of Q^T A Q, and the entries below it, to two arrays of the size of A, which has entries <= 1 and
// rows `stride` values apart. Q is the product of reflections k = 0, 1, ..., which stay in the rows of A.
inline void tridiagonalize(double* rows, int64_t stride, int64_t size, double* diagonal, double* below) {
  double w[GS_MAX_TASKS];
  for (int64_t k = 0; k + 1 < size; k++) {
    // The reflection I - v v^T maps the column below the diagonal to a multiple of the first unit vector. v stays in
    // row k.
    const int64_t first = k + 1, left = size - first;
    double* const v = rows + k * stride + first;
    const double squares = dot(v, v, left);
    const double length = squares > 1e-280 ? std::sqrt(squares) : 0;  // a subnormal would give no true reflection
    const double end = v[0] > 0 ? -length : length;
    diagonal[k] = rows[k * stride + k];
    below[k] = end;
    // v - end e_1 has the squared length 2 length (length + |v_0|).
    const double squared = length * (length + std::fabs(v[0]));
    const double scale = squared > 0 ? 1 / std::sqrt(squared) : 0;
    v[0] -= end;
    for (int64_t i = 0; i < left; i++) v[i] *= scale;
    // A - v w^T - w v^T with w = A v - (v^T A v / 2) v.
    double* const rest = rows + first * stride + first;
    for (int64_t i = 0; i < left; i++) w[i] = dot(rest + i * stride, v, left);
    add(-dot(w, v, left) / 2, v, left, w);
    for (int64_t i = 0; i < left; i++) {
      const double vi = v[i], wi = w[i];
      double* const row = rest + i * stride;
      for (int64_t j = 0; j < left; j++) row[j] -= vi * w[j] + wi * v[j];
    }
  }
  diagonal[size - 1] = rows[(size - 1) * stride + size - 1];
  below[size - 1] = 0;
}

// Turns the diagonal into the eigenvalues, in no order, and y into Z^T y. Returns how many pairs record Z: for each
// sweep the cosine and sine of its rotations, of the entries i and i + 1 for i = last - 1, last - 2, ..., then `last`
// and the number of rotations.
inline int64_t diagonalize_tridiagonal(int64_t size, double* diagonal, double* below, double* y, double* pairs) {
  double norm = 0;
  for (int64_t i = 0; i < size; i++) {
    norm = std::fmax(norm, std::fabs(diagonal[i]) + std::fabs(below[i]));
  }
  const double rounding = std::numeric_limits<double>::epsilon() * norm;
  int64_t count = 0;
  for (int64_t first = 0; first < size; first++) {
    for (;;) {
      int64_t last = first;
      while (last + 1 < size && std::fabs(below[last]) > rounding) last++;
      if (last == first) break;
      if (count + last - first + 1 > max_rotations(size)) return count;
      // Wilkinson's shift, then rotations that chase the entry outside the tridiagonal form upwards (bulge chasing).
      const double half = (diagonal[first + 1] - diagonal[first]) / (2 * below[first]);
      const double root = std::sqrt(1 + half * half);
      double chased = diagonal[last] - diagonal[first] + below[first] / (half + (half < 0 ? -root : root));
      double sine = 1, cosine = 1, shift = 0;
      int64_t i = last - 1;
      for (; i >= first; i--) {
        const double off = sine * below[i], kept = cosine * below[i];
        const double length = std::sqrt(off * off + chased * chased);
        below[i + 1] = length;
        if (length == 0) break;
        sine = off / length;
        cosine = chased / length;
        const double corner = diagonal[i + 1] - shift;
        const double turned = (diagonal[i] - corner) * sine + 2 * cosine * kept;
        shift = sine * turned;
        diagonal[i + 1] = corner + shift;
        chased = cosine * turned - kept;
        const double a = y[i], b = y[i + 1];
        y[i] = cosine * a - sine * b;
        y[i + 1] = sine * a + cosine * b;
        pairs[2 * count] = cosine;
        pairs[2 * count + 1] = sine;
        count++;
      }
      pairs[2 * count] = static_cast<double>(last);
      pairs[2 * count + 1] = static_cast<double>(last - 1 - i);
      count++;
      if (i >= first) {  // the submatrix split in two
        diagonal[i + 1] -= shift;
      } else {
        diagonal[first] -= shift;
        below[first] = chased;
      }
      below[last] = 0;
    }
  }
  return count;
}

// x <- Z x.
inline void rotate_back(const double* pairs, int64_t count, double* x) {
  while (count > 0) {
    count--;
    const auto last = static_cast<int64_t>(pairs[2 * count]), rotations = static_cast<int64_t>(pairs[2 * count + 1]);
    for (int64_t i = last - rotations; i < last; i++) {
      count--;
      const double cosine = pairs[2 * count], sine = pairs[2 * count + 1], a = x[i], b = x[i + 1];
      x[i] = cosine * a + sine * b;
      x[i + 1] = cosine * b - sine * a;
    }
  }
}

// The memory that the functions below need behind T + 1 rows: for the number of pairs, and the pairs.
constexpr int64_t rotations_scratch(int64_t num_tasks) { return 1 + 2 * max_rotations(num_tasks); }

// These take the place of the templates in spectral.h, whose Jacobi rotations are slower by one thread.
inline void decompose(const SerialTeam&, double* rows, int64_t num_tasks, const double* preference, double otherwise,
                      double* values, double* products) {
  double below[GS_MAX_TASKS];
  const int64_t stride = padded(num_tasks);
  double* const rotations = rows + (num_tasks + 1) * stride;
  tridiagonalize(rows, stride, num_tasks, values, below);
  for (int64_t i = 0; i < num_tasks; i++) products[i] = preference ? preference[i] : otherwise;
  for (int64_t k = 0; k + 1 < num_tasks; k++) reflect(rows, stride, num_tasks, k, products);
  rotations[0] = static_cast<double>(diagonalize_tridiagonal(num_tasks, values, below, products, rotations + 1));
  for (int64_t k = 0; k < num_tasks; k++) {
    values[k] = std::fmax(values[k], 0.0);
    products[k] *= values[k];
  }
}

inline void compose(const SerialTeam&, const double* rows, int64_t num_tasks, const double* values,
                    const double* factor, double* out) {
  const int64_t stride = padded(num_tasks);
  const double* const rotations = rows + (num_tasks + 1) * stride;
  for (int64_t k = 0; k < num_tasks; k++) out[k] = factor[k] * values[k];
  rotate_back(rotations + 1, static_cast<int64_t>(rotations[0]), out);
  for (int64_t k = num_tasks - 2; k >= 0; k--) reflect(rows, stride, num_tasks, k, out);
}

}  // namespace gs
