// SPDX-License-Identifier: MIT
// argmin w^T G w over the simplex for a few tasks: the minimum lies inside some face, and each face is solved by
// itself.
#pragma once
#include "common.h"

namespace gs {

// w = the shortest point of the affine hull of the tasks in the set `face`, a bit each; returns w^T G w, or infinity if
// the point lies outside the simplex or the tasks are affinely dependent to working precision. A smaller face attains
// the minimum then, by Caratheodory's theorem. gram is kTasks x kTasks; shift is the c = min_i G_ii of MinNorm, of
// which this solves the equations, as L D L^T with rows of the identity for the tasks outside.
template <int kTasks>
GS_HOST_DEVICE double face_min_norm(const double* gram, double shift, uint32_t face, double (&w)[kTasks]) {
  const auto inside = [&](int i) { return (face >> i & 1) != 0; };
  double factor[kTasks][kTasks], inverse[kTasks];  // the lower triangle; 1 / D
#pragma unroll
  for (int i = 0; i < kTasks; i++) {
#pragma unroll
    for (int j = 0; j <= i; j++) {
      factor[i][j] = inside(i) && inside(j) ? gram[i * kTasks + j] + shift : i == j ? 1 : 0;
    }
    w[i] = inside(i) ? 1 : 0;
  }
  bool valid = true;
#pragma unroll
  for (int k = 0; k < kTasks; k++) {
    valid = valid && (!inside(k) || factor[k][k] > 1e-14 * (gram[k * kTasks + k] + shift));
    inverse[k] = 1 / factor[k][k];
#pragma unroll
    for (int i = kTasks - 1; i > k; i--) {
      const double ratio = factor[i][k] * inverse[k];
#pragma unroll
      for (int j = k + 1; j <= i; j++) factor[i][j] -= ratio * factor[j][k];
      factor[i][k] = ratio;
      w[i] -= ratio * w[k];
    }
  }
  double total = 0;
#pragma unroll
  for (int k = kTasks - 1; k >= 0; k--) {
    w[k] *= inverse[k];
#pragma unroll
    for (int i = k + 1; i < kTasks; i++) w[k] -= factor[i][k] * w[i];
    valid = valid && w[k] >= 0;
    total += w[k];
  }
  // A task alone is its own shortest point, also where it is zero and no equation has one solution.
  const bool alone = (face & (face - 1)) == 0;
  const double scale = 1 / total;
  double value = 0;
#pragma unroll
  for (int i = 0; i < kTasks; i++) w[i] = alone ? (inside(i) ? 1 : 0) : w[i] * scale;
#pragma unroll
  for (int i = 0; i < kTasks; i++) {
    double sum = 0;
#pragma unroll
    for (int j = 0; j < kTasks; j++) sum += gram[i * kTasks + j] * w[j];
    value += w[i] * sum;
  }
  return alone || (valid && shift > 0 && value < INFINITY) ? value : INFINITY;
}

}  // namespace gs
