// SPDX-License-Identifier: MIT
// PCGrad in Gram form (Yu et al., NeurIPS 2020, Algorithm 1).
#pragma once
#include "philox.h"

namespace gs {

// The running vector of task i is p = sum_k c_k g_k, c = e_i at first. For each j != i in the visiting order,
// v_j = p . g_j < 0 subtracts (v_j / G_jj) g_j from p; v = G c is kept up to date. weights = sum_i c.
// v and row_order (used when no order is given) are scratch of num_tasks values.
GS_HOST_DEVICE inline void pcgrad_weights(const double* gram, int64_t num_tasks, const int64_t* order, uint64_t seed,
                                          uint64_t step, bool mean, double* weights, double* v, int64_t* row_order) {
  if (!all_finite(gram, num_tasks * num_tasks)) return fill_nan(weights, num_tasks);
  for (int64_t j = 0; j < num_tasks; j++) weights[j] = 1;
  for (int64_t i = 0; i < num_tasks; i++) {
    const int64_t* visit = row_order;
    if (order) {
      visit = order + i * num_tasks;
    } else {
      task_order_row(num_tasks, seed, step, i, row_order);
    }
    for (int64_t j = 0; j < num_tasks; j++) v[j] = gram[i * num_tasks + j];
    for (int64_t k = 0; k < num_tasks; k++) {
      const int64_t j = visit[k];
      const double squared_norm = gram[j * num_tasks + j];
      if (j == i || !(v[j] < 0) || !(squared_norm > 0)) continue;
      const double coefficient = v[j] / squared_norm;
      weights[j] -= coefficient;
      for (int64_t l = 0; l < num_tasks; l++) v[l] -= coefficient * gram[j * num_tasks + l];
    }
  }
  if (mean) {
    for (int64_t j = 0; j < num_tasks; j++) weights[j] /= static_cast<double>(num_tasks);
  }
}

}  // namespace gs
