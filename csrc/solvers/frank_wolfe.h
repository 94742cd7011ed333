// SPDX-License-Identifier: MIT
// argmin w^T G w over the simplex by Frank-Wolfe steps, as published for MGDA.
#pragma once
#include "common.h"

namespace gs {

// argmin over c in [0, 1] of |c a + (1 - c) b|^2, from inner products (Sener & Koltun 2018, Algorithm 1).
GS_HOST_DEVICE inline double two_point_min_norm(double aa, double ab, double bb) {
  if (ab >= aa) return 1;
  if (ab >= bb) return 0;
  return (bb - ab) / (aa + bb - 2 * ab);
}

// Frank-Wolfe (Sener & Koltun 2018, Algorithm 2) from uniform weights, until a step is below tol or max_iter iterations
// are done. gw is scratch of num_tasks values.
template <class Team>
GS_HOST_DEVICE void frank_wolfe(const Team& team, const double* gram, int64_t num_tasks, int64_t max_iter, double tol,
                                double* weights, double* gw) {
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
    weights[i] = 1.0 / static_cast<double>(num_tasks);
  }
  team.sync();
  for (int64_t iter = 0; iter < max_iter; iter++) {
    sum_rows(team, gram, num_tasks, num_tasks, [](int64_t k) { return k; }, [&](int64_t k) { return weights[k]; }, gw);
    double value = 0, least = INFINITY;
    int64_t vertex = 0;
    GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
      value += weights[i] * gw[i];
      if (gw[i] < least) {
        least = gw[i];
        vertex = i;
      }
    }
    value = team.sum(value);
    team.least(least, vertex);
    const double keep = two_point_min_norm(value, least, gram[vertex * num_tasks + vertex]);
    GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
      weights[i] = weights[i] * keep + (i == vertex ? 1 - keep : 0);
    }
    team.sync();
    if (1 - keep < tol) return;
  }
}

}  // namespace gs
