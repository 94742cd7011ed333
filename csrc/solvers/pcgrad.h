// SPDX-License-Identifier: MIT
// PCGrad in Gram form (Yu et al., NeurIPS 2020, Algorithm 1).
#pragma once
#include "philox.h"

namespace gs {

// Subtracts from weights what the projections of task i take. The running vector is p = sum_k c_k g_k, c = e_i at
// first. For each j != i in the visiting order, v_j = p . g_j < 0 subtracts (v_j / G_jj) g_j from p; v = G c is kept up
// to date. visit(k) is the task at position k of the order; v is scratch of num_tasks values.
template <class Team, class Visit>
GS_HOST_DEVICE void pcgrad_project(const Team& team, const double* gram, int64_t num_tasks, int64_t i,
                                   const Visit& visit, double* weights, double* v) {
  for (int64_t j = team.rank(); j < num_tasks; j += team.size()) v[j] = gram[i * num_tasks + j];
  team.sync();
  for (int64_t k = 0; k < num_tasks; k++) {
    const int64_t j = visit(k);
    const double product = v[j], squared_norm = gram[j * num_tasks + j];
    if (j == i || !(product < 0) || !(squared_norm > 0)) continue;
    const double coefficient = product / squared_norm;
    team.sync();
    if (team.rank() == 0) weights[j] -= coefficient;
    for (int64_t l = team.rank(); l < num_tasks; l += team.size()) v[l] -= coefficient * gram[j * num_tasks + l];
    team.sync();
  }
}

}  // namespace gs
