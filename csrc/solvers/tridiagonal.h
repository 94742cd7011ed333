// SPDX-License-Identifier: MIT
// Eigenvalues and eigenvectors by one thread: a tridiagonal form by Householder's reflections, diagonalized by implicit
// QL steps (Golub and Van Loan, Matrix Computations, section 8.3).
#pragma once
#include <limits>

#include "gradsurgery/gradsurgery.h"
#include "linear.h"

namespace gs {

// y += factor x.
inline void add(double factor, const double* x, int64_t count, double* y) {
  for (int64_t i = 0; i < count; i++) y[i] += factor * x[i];
}

// Replaces a symmetric A, with entries <= 1 and rows `stride` values apart, by Q^T for an orthogonal Q such that Q^T A
// Q is tridiagonal. Writes the diagonal of that and the entries below it to two arrays of A's size.
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
  // Q^T, from the last reflection to the first: each row times I - v v^T.
  rows[(size - 1) * stride + size - 1] = 1;
  for (int64_t k = size - 2; k >= 0; k--) {
    double* const v = rows + k * stride + k + 1;
    for (int64_t i = k + 1; i < size; i++) {
      double* const row = rows + i * stride + k + 1;
      add(-dot(row, v, size - k - 1), v, size - k - 1, row);
    }
    rows[k * stride + k] = 1;
    for (int64_t i = k + 1; i < size; i++) rows[k * stride + i] = rows[i * stride + k] = 0;
  }
}

// Turns Q^T into the eigenvectors of A as rows, and the diagonal into the eigenvalues, in no order.
inline void diagonalize_tridiagonal(double* rows, int64_t stride, int64_t size, double* diagonal, double* below) {
  double norm = 0;
  for (int64_t i = 0; i < size; i++) {
    norm = std::fmax(norm, std::fabs(diagonal[i]) + std::fabs(below[i]));
  }
  const double rounding = std::numeric_limits<double>::epsilon() * norm;
  int64_t steps = 30 * size;
  for (int64_t first = 0; first < size; first++) {
    for (; steps > 0; steps--) {
      int64_t last = first;
      while (last + 1 < size && std::fabs(below[last]) > rounding) last++;
      if (last == first) break;
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
        double *const a = rows + i * stride, *const b = a + stride;
        for (int64_t j = 0; j < size; j++) {
          const double x = a[j], y = b[j];
          a[j] = cosine * x - sine * y;
          b[j] = sine * x + cosine * y;
        }
      }
      if (i >= first) {  // the submatrix split in two
        diagonal[i + 1] -= shift;
      } else {
        diagonal[first] -= shift;
        below[first] = chased;
      }
      below[last] = 0;
    }
  }
}

}  // namespace gs
