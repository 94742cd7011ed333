// SPDX-License-Identifier: MIT
// Gradient Vaccine in Gram form (Wang et al., ICLR 2021, Algorithm 1 and equations 3 to 5).
#pragma once
#include "common.h"

namespace gs {

// Larger targets count as this one: at 1 the coefficient would be unbounded.
constexpr double kMaxTarget = 1 - 1e-8;

// A vector whose squared length is below this part of the sum of its terms' squared lengths counts as 0.
constexpr double kCancelled = 1e-12;

// Adds task i's contribution, except its own gradient, to weights, and moves its targets [T]. The running vector p
// starts at g_i. For each j != i in the visiting order, rho = cos(p, g_j): if rho < target_j, the multiple of g_j is
// added to p that makes their cosine target_j; then target_j moves towards rho by the fraction beta. A zero vector has
// no cosine and is skipped. v = J p is scratch. On a GPU order has not been checked: entries that are no task are
// skipped.
template <class Team>
GS_HOST_DEVICE void gradvac_row(const Team& team, const double* gram, int64_t num_tasks, int64_t i,
                                const int64_t* order, double beta, double* target, double* weights, double* v) {
  team.sync();  // all members are done with the last row's v
  GS_ROLLED for (int64_t j = team.rank(); j < num_tasks; j += team.size()) v[j] = gram[i * num_tasks + j];
  team.sync();
  double squared = gram[i * num_tasks + i], terms = squared;
  for (int64_t k = 0; k < num_tasks; k++) {
    const int64_t j = order[k];
    if (j < 0 || j >= num_tasks) continue;
    const double norm = std::sqrt(squared), other = std::sqrt(gram[j * num_tasks + j]), product = v[j];
    if (j == i || !(norm > 0 && other > 0)) continue;
    const double cosine = product / norm / other, rho = cosine < -1 ? -1 : cosine > 1 ? 1 : cosine;
    const double wanted = target[j] < kMaxTarget ? target[j] : kMaxTarget;
    team.sync();
    if (rho < wanted) {
      const double sine = std::sqrt(1 - wanted * wanted);
      const double coefficient = norm / other * (wanted * std::sqrt(1 - rho * rho) - rho * sine) / sine;
      GS_ROLLED for (int64_t l = team.rank(); l < num_tasks; l += team.size()) {
        v[l] += coefficient * gram[j * num_tasks + l];
      }
      if (team.rank() == 0) weights[j] += coefficient;
      const double length = coefficient * other;  // of the vector added to p
      squared += coefficient * 2 * product + length * length;
      terms += length * length;
      if (!(squared > kCancelled * terms)) squared = 0;
    }
    if (team.rank() == 0) target[j] = (1 - beta) * target[j] + beta * rho;
    team.sync();
  }
}

}  // namespace gs
