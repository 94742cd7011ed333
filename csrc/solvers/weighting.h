// SPDX-License-Identifier: MIT
// Maps each gs_weighting to its solver.
#pragma once
#include "cagrad.h"
#include "gradsurgery/gradsurgery.h"
#include "krum.h"
#include "newton.h"
#include "pcd.h"
#include "spectral.h"

namespace gs {

constexpr int64_t weighting_scratch(gs_weighting weighting, int64_t num_tasks) {
  switch (weighting) {
    case GS_UPGRAD:
    case GS_DUALPROJ:
      return dual_cone_scratch(num_tasks);
    case GS_CAGRAD:
      return cagrad_scratch(num_tasks);
    case GS_FAIRGRAD:
      return newton_scratch(num_tasks);
    case GS_KRUM:
      return krum_scratch(num_tasks);
    case GS_PCD:
      return pcd_scratch(num_tasks);
    default:
      return spectral_scratch(num_tasks);
  }
}

// The methods that need G's eigenvalues.
constexpr bool is_spectral(gs_weighting weighting) {
  return weighting == GS_IMTL_G || weighting == GS_CONFIG || weighting == GS_ALIGNED_MTL_MIN ||
         weighting == GS_ALIGNED_MTL_MEDIAN || weighting == GS_ALIGNED_MTL_RMSE;
}

template <class Team>
GS_HOST_DEVICE void solve_spectral(const Team& team, gs_weighting weighting, const double* gram, int64_t num_tasks,
                                   const double* preference, double* weights, double* scratch) {
  switch (weighting) {
    case GS_IMTL_G:
      return imtl_g(team, gram, num_tasks, weights, scratch);
    case GS_CONFIG:
      return config(team, gram, num_tasks, preference, weights, scratch);
    default:
      return aligned_mtl(team, gram, num_tasks, preference, weighting, weights, scratch);
  }
}

// The weights of one problem with finite G. UPGrad's weights are a sum over tasks; this call adds only the tasks first,
// first + step, ...
template <class Team>
GS_HOST_DEVICE void solve_weighting(const Team& team, gs_weighting weighting, const double* gram, int64_t num_tasks,
                                    const double* preference, double parameter, double limit, int64_t first,
                                    int64_t step, double* weights, double* scratch) {
  switch (weighting) {
    case GS_UPGRAD:
      return upgrad(team, gram, num_tasks, preference, parameter, first, step, weights, scratch);
    case GS_DUALPROJ:
      return dual_proj(team, gram, num_tasks, preference, parameter, weights, scratch);
    case GS_CAGRAD:
      return CAGrad(team, gram, num_tasks, scratch).solve(parameter, weights);
    case GS_FAIRGRAD:
      return fair_grad(team, gram, num_tasks, parameter, limit, weights, scratch);
    case GS_KRUM:
      return krum(team, gram, num_tasks, static_cast<int64_t>(parameter), static_cast<int64_t>(limit), weights,
                  scratch);
    case GS_PCD:
      return pcd(team, gram, num_tasks, preference, parameter, weights, scratch);
    default:
      return solve_spectral(team, weighting, gram, num_tasks, preference, weights, scratch);
  }
}

}  // namespace gs
