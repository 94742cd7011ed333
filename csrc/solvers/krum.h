// SPDX-License-Identifier: MIT
// Krum and multi-Krum (Blanchard et al., NeurIPS 2017).
#pragma once
#include "common.h"

namespace gs {

constexpr int64_t krum_scratch(int64_t num_tasks) { return num_tasks * (num_tasks + 1); }

// How many values come before value j in ascending order; equal values keep their order.
GS_HOST_DEVICE inline int64_t rank_of(const double* values, int64_t count, int64_t j) {
  int64_t rank = 0;
  for (int64_t k = 0; k < count; k++) rank += k < j ? values[k] <= values[j] : values[k] < values[j];
  return rank;
}

// 1 / m for the m tasks of least score, 0 for the others. A task's score is the sum of its squared distances to the
// T - f - 2 nearest other tasks, that is to all but the f + 1 farthest.
template <class Team>
GS_HOST_DEVICE void krum(const Team& team, const double* gram, int64_t num_tasks, int64_t num_byzantine,
                         int64_t num_selected, double* weights, double* scratch) {
  double *const scores = scratch, *const distances = scores + num_tasks;
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
    double* const row = distances + i * num_tasks;
    for (int64_t j = 0; j < num_tasks; j++) {
      const double square = gram[i * num_tasks + i] + gram[j * num_tasks + j] - 2 * gram[i * num_tasks + j];
      row[j] = square > 0 ? square : 0;  // negative only by rounding
    }
    for (int64_t dropped = 0; dropped <= num_byzantine; dropped++) {
      int64_t farthest = 0;
      for (int64_t j = 1; j < num_tasks; j++) farthest = row[j] > row[farthest] ? j : farthest;
      row[farthest] = 0;
    }
    scores[i] = 0;
    for (int64_t j = 0; j < num_tasks; j++) scores[i] += row[j];
  }
  team.sync();
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
    weights[i] = rank_of(scores, num_tasks, i) < num_selected ? 1 / static_cast<double>(num_selected) : 0;
  }
}

}  // namespace gs
