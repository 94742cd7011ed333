// SPDX-License-Identifier: MIT
// Weights from G by the solvers of csrc/solvers/weighting.h, and Gradient Vaccine's, on the CPU: one problem per loop
// body.
#include "schedule.h"
#include "solvers/gradvac.h"
#include "solvers/weighting.h"

namespace gs {
namespace {

int64_t scratch_of(gs_weighting method, int64_t num_tasks) {
  return (weighting_scratch(method, num_tasks) + 7) / 8 * 8;
}

}  // namespace
}  // namespace gs

int64_t gs_weights_workspace_bytes(gs_weighting method, int64_t batch, int64_t num_tasks) {
  const bool valid = gs::check_problems(batch, num_tasks) == GS_OK && gs::check_method(method) == GS_OK;
  return valid ? batch * gs::scratch_of(method, num_tasks) * 8 : -1;
}

gs_status gs_weights_cpu(const double* gram, int64_t batch, int64_t num_tasks, gs_weighting method,
                         const double* preference, double parameter, double limit, double* weights, void* workspace,
                         int64_t workspace_bytes, const gs_parallel* parallel) {
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (gram && weights), "gram and weights must not be NULL");
  if (const gs_status status = gs::check_weighting(method, num_tasks, parameter, limit)) return status;
  if (const gs_status status =
          gs::check_workspace(workspace, workspace_bytes, gs_weights_workspace_bytes(method, batch, num_tasks)))
    return status;
  gs::parallel_for(batch * num_tasks >= 32 ? parallel : nullptr, batch, [&](int64_t b) {
    const gs::SerialTeam team;
    const double* problem = gram + b * num_tasks * num_tasks;
    double* w = weights + b * num_tasks;
    if (!gs::all_finite(problem, num_tasks * num_tasks)) return gs::fill_nan(team, w, num_tasks);
    gs::solve_weighting(team, method, problem, num_tasks, preference, parameter, limit, 0, 1, w,
                        static_cast<double*>(workspace) + b * gs::scratch_of(method, num_tasks));
  });
  return GS_OK;
}

gs_status gs_gradvac_cpu(const double* gram, int64_t batch, int64_t num_tasks, const int64_t* order, double beta,
                         double* targets, double* weights, const gs_parallel* parallel) {
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (gram && order && targets && weights), "gram, order, targets and weights must not be NULL");
  if (const gs_status status = gs::check_order(order, num_tasks)) return status;
  gs::parallel_for(batch * num_tasks >= 32 ? parallel : nullptr, batch, [&](int64_t b) {
    const gs::SerialTeam team;
    const double* problem = gram + b * num_tasks * num_tasks;
    double* w = weights + b * num_tasks;
    if (!gs::all_finite(problem, num_tasks * num_tasks)) return gs::fill_nan(team, w, num_tasks);
    std::fill(w, w + num_tasks, 1.0);
    for (int64_t i = 0; i < num_tasks; i++) {
      double v[GS_MAX_TASKS];
      gs::gradvac_row(team, problem, num_tasks, i, order + i * num_tasks, beta,
                      targets + (b * num_tasks + i) * num_tasks, w, v);
    }
  });
  return GS_OK;
}
