// SPDX-License-Identifier: MIT
// PCGrad in Gram form (Yu et al., NeurIPS 2020, Algorithm 1).
#pragma once
#include "common.h"

namespace gs {

// Subtracts the projections of task i from weights. The running vector is p = sum_k c_k g_k, with c = e_i at first. For
// each j != i in the visiting order, if v_j = p . g_j < 0, (v_j / G_jj) g_j is subtracted from p; v = G c is kept up to
// date. v is scratch of num_tasks values.
inline void pcgrad_project(const double* gram, int64_t num_tasks, int64_t i, const int64_t* order, double* weights,
                           double* v) {
  for (int64_t j = 0; j < num_tasks; j++) v[j] = gram[i * num_tasks + j];
  for (int64_t k = 0; k < num_tasks; k++) {
    const int64_t j = order[k];
    const double product = v[j], squared_norm = gram[j * num_tasks + j];
    if (j == i || !(product < 0) || !(squared_norm > 0)) continue;
    const double coefficient = product / squared_norm;
    weights[j] -= coefficient;
    for (int64_t l = 0; l < num_tasks; l++) v[l] -= coefficient * gram[j * num_tasks + l];
  }
}

}  // namespace gs
