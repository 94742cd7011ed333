// SPDX-License-Identifier: MIT
// Priority-constrained descent (Varam and AlHajri, TMLR 2026).
#pragma once
#include "dual_cone.h"

namespace gs {

// The relative accuracy of G, for squared lengths.
constexpr double kGramAccuracy = 1e-6;

constexpr int64_t pcd_scratch(int64_t num_tasks) { return num_tasks * (num_tasks + 3) + dual_cone_scratch(num_tasks); }

// The weights of |g_1| x / |x|, x = argmin |x - g_1|^2 with g_t . x >= shares_t |g_t|^2 for all tasks but the first;
// shares NULL: `share` for each task. With u_t = g_t / |g_t|, z = x / |g_1| - u_1 is the shortest z such that u_t . z
// >= h_t = shares_t |g_t| / |g_1| - u_t . u_1. Lawson and Hanson (1974, chapter 23) reduce this to non-negative least
// squares: with e a unit vector orthogonal to all u_t, and the v >= 0 for which sum_t v_t (u_t + h_t e) is nearest to
// e, z = sum_t v_t u_t / (1 - sum_t v_t h_t). That is DualProj's problem for the vectors u_t + h_t e, with -e in place
// of the first one; h is scaled by its largest entry. If the distance to e is 0, no z meets the conditions, and z = 0.
template <class Team>
GS_HOST_DEVICE void pcd(const Team& team, const double* gram, int64_t num_tasks, const double* shares, double share,
                        double* weights, double* scratch) {
  double *const cone = scratch, *const units = cone + num_tasks * num_tasks, *const cosines = units + num_tasks;
  double *const heights = cosines + num_tasks, *const rest = heights + num_tasks;
  const double length = std::sqrt(gram[0] > 0 ? gram[0] : 0), first = length > 0 ? 1 / length : 0;
  double largest = 0;
  int64_t at = 0;
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
    const double square = gram[i * num_tasks + i], norm = std::sqrt(square > 0 ? square : 0);
    units[i] = norm > 0 ? 1 / norm : 0;
    cosines[i] = gram[i] * first * units[i];
    heights[i] = i == 0 ? 0 : (shares ? shares[i] : share) * norm * first - cosines[i];
    largest = std::fmin(largest, -std::fabs(heights[i]));
  }
  team.least(largest, at);
  largest = largest < 0 ? -largest : 1;
  team.sync();
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
    heights[i] = i == 0 ? -1 : heights[i] / largest;
    weights[i] = 0;
  }
  team.sync();
  each_entry(team, num_tasks, [&](int64_t i, int64_t j) {
    const double cosine = i > 0 && j > 0 ? gram[i * num_tasks + j] * units[i] * units[j] : 0;
    cone[i * num_tasks + j] = cosine + heights[i] * heights[j];
  });
  DualCone(team, cone, num_tasks, 1e-12, rest).add_solution({nullptr, 1, 0}, weights);

  double left = 0, total = 0, along = 0, squared = 0;  // s = sum_t v_t u_t: along = s . u_1, squared = |s|^2
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
    left -= heights[i] * weights[i];
    if (i == 0) continue;
    total += weights[i];
    along += weights[i] * cosines[i];
    double product = 0;
    for (int64_t j = 1; j < num_tasks; j++) product += gram[i * num_tasks + j] * units[j] * weights[j];
    squared += weights[i] * units[i] * product;
  }
  team.sum_each(left, total, along, squared);
  const double factor = squared > kGramAccuracy * total * total ? largest / left : 0;
  const double sum = 1 + factor * total, result = 1 + factor * (2 * along + factor * squared);
  const double scale = result > kGramAccuracy * sum * sum ? length / std::sqrt(result) : 0;
  team.sync();
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
    weights[i] = scale * units[i] * (i == 0 ? 1 : factor * weights[i]);
  }
  team.sync();
}

}  // namespace gs
