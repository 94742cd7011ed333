// SPDX-License-Identifier: MIT
// Stages 2 to 4 on the CPU, one after the other.
#include "boundary.h"
#include "solvers/philox.h"

namespace gs {
namespace {

int64_t solver_bytes(const gs_solve& solve, int64_t batch, int64_t num_tasks) {
  switch (solve.method) {
    case GS_PCGRAD:
      return 0;
    case GS_MIN_NORM:
      return gs_min_norm_workspace_bytes(batch, num_tasks);
    default:
      return gs_weights_workspace_bytes(solve.weighting, batch, num_tasks);
  }
}

gs_status solve_weights(const gs_solve& solve, const double* gram, int64_t batch, int64_t num_tasks, double* weights,
                        void* workspace, int64_t workspace_bytes, const gs_parallel* parallel) {
  switch (solve.method) {
    case GS_PCGRAD: {
      const auto step = solve.step ? static_cast<uint64_t>(*solve.step) : 0;
      const gs_status status =
          gs_pcgrad_cpu(gram, batch, num_tasks, nullptr, solve.seed, step, solve.mean, weights, parallel);
      if (status == GS_OK && solve.step) *solve.step = next_step(*solve.step);
      return status;
    }
    case GS_MIN_NORM:
      return gs_min_norm_cpu(gram, batch, num_tasks, solve.solver, solve.max_iter, solve.tol, weights, workspace,
                             workspace_bytes, parallel);
    default:
      return gs_weights_cpu(gram, batch, num_tasks, solve.weighting, solve.preference, solve.parameter, solve.limit,
                            weights, workspace, workspace_bytes, parallel);
  }
}

}  // namespace
}  // namespace gs

int64_t gs_aggregate_workspace_bytes(const gs_gradients* grads, const gs_solve* solve) {
  if (gs::check_solve(grads, solve) != GS_OK) return -1;
  return std::max({gs_gram_workspace_bytes(grads), gs_combine_workspace_bytes(grads),
                   gs::solver_bytes(*solve, grads->num_segments, grads->num_tasks)});
}

gs_status gs_aggregate_cpu(const gs_gradients* grads, const gs_solve* solve, double* gram, double* weights,
                           void* const* out, int accumulate, void* workspace, int64_t workspace_bytes,
                           const gs_parallel* parallel) {
  if (const gs_status status = gs::check_aggregate(grads, solve, gram, weights, out)) return status;
  if (const gs_status status =
          gs::check_workspace(workspace, workspace_bytes, gs_aggregate_workspace_bytes(grads, solve)))
    return status;
  gs_status status = gs_gram_cpu(grads, gram, workspace, workspace_bytes, parallel);
  if (status != GS_OK) return status;
  status = gs::solve_weights(*solve, gram, grads->num_segments, grads->num_tasks, weights, workspace, workspace_bytes,
                             parallel);
  if (status != GS_OK) return status;
  return gs_combine_cpu(grads, weights, out, accumulate, workspace, workspace_bytes, parallel);
}
