// SPDX-License-Identifier: MIT
// Stages 2 to 4 on the CPU, one after the other.
#include "schedule.h"

int64_t gs_aggregate_workspace_bytes(const gs_gradients* grads) {
  if (!grads || gs::check(*grads) != GS_OK) return -1;
  return std::max({gs_gram_workspace_bytes(grads), gs_combine_workspace_bytes(grads),
                   gs_min_norm_workspace_bytes(grads->num_segments, grads->num_tasks)});
}

gs_status gs_aggregate_cpu(const gs_gradients* grads, const gs_solve* solve, double* gram, double* weights,
                           void* const* out, int accumulate, void* workspace, int64_t workspace_bytes,
                           const gs_parallel* parallel) {
  if (const gs_status status = gs::check_aggregate(grads, solve, gram, weights, out)) return status;
  if (const gs_status status = gs::check_workspace(workspace, workspace_bytes, gs_aggregate_workspace_bytes(grads)))
    return status;
  const int64_t batch = grads->num_segments, tasks = grads->num_tasks;
  gs_status status = gs_gram_cpu(grads, gram, workspace, workspace_bytes, parallel);
  if (status != GS_OK) return status;
  if (solve->method == GS_PCGRAD) {
    const auto step = solve->step ? static_cast<uint64_t>(*solve->step) : 0;
    status = gs_pcgrad_cpu(gram, batch, tasks, nullptr, solve->seed, step, solve->mean, weights, parallel);
    if (status == GS_OK && solve->step) ++*solve->step;
  } else {
    status = gs_min_norm_cpu(gram, batch, tasks, solve->solver, solve->max_iter, solve->tol, weights, workspace,
                             workspace_bytes, parallel);
  }
  if (status != GS_OK) return status;
  return gs_combine_cpu(grads, weights, 1, out, accumulate, workspace, workspace_bytes, parallel);
}
