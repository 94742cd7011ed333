// SPDX-License-Identifier: MIT
// Gradient Vaccine in Gram form (Wang et al., ICLR 2021, Algorithm 1 and equations 3 to 5).
#pragma once
#include "common.h"

namespace gs {

// A target above this counts as this: at 1 the coefficient has no bound.
constexpr double kMaxTarget = 1 - 1e-8;

// A vector whose square is less than this of the squares of its terms is 0 but for rounding.
constexpr double kCancelled = 1e-12;

// Adds to weights what task i contributes besides its own gradient, and moves its targets [T]. The running vector p =
// g_i at first; for each j != i in the visiting order, rho = cos(p, g_j) < target_j adds to p the multiple of g_j that
// makes their cosine target_j, and target_j moves by beta towards rho. Zero vectors have no cosine. v = J p is scratch.
// On a GPU nobody has looked at what order holds: what is no task is passed over.
template <class Team>
GS_HOST_DEVICE void gradvac_row(const Team& team, const double* gram, int64_t num_tasks, int64_t i,
                                const int64_t* order, double beta, double* target, double* weights, double* v) {
  team.sync();  // v is the last row's no more
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
      const double length = coefficient * other;  // of what is added
      squared += coefficient * 2 * product + length * length;
      terms += length * length;
      if (!(squared > kCancelled * terms)) squared = 0;
    }
    if (team.rank() == 0) target[j] = (1 - beta) * target[j] + beta * rho;
    team.sync();
  }
}

}  // namespace gs
