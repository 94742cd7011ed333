// SPDX-License-Identifier: MIT
// Stage 4 on the CPU of the methods that work on the gradients instead of on G: coordinates are independent of each
// other, so any split of the columns gives the same bits.
#include "chunks.h"
#include "kernels.h"
#include "solvers/philox.h"

int64_t gs_combine_by_rule_workspace_bytes(const gs_gradients* grads) {
  if (gs::check(grads) != GS_OK) return -1;
  return (2 * grads->num_params + 1) * static_cast<int64_t>(sizeof(int64_t));
}

gs_status gs_combine_by_rule_cpu(const gs_gradients* grads, const gs_rule* rule, void* const* out, int accumulate,
                                 void* workspace, int64_t workspace_bytes, const gs_parallel* parallel) {
  using namespace gs;
  GS_REQUIRE(grads && rule && (out || grads->num_params == 0), "grads, rule and out must not be NULL");
  if (const gs_status status = check(*grads)) return status;
  const gs_gradients& g = *grads;
  if (const gs_status status = check_rule(*rule, g.num_tasks)) return status;
  if (const gs_status status =
          gs::check_workspace(workspace, workspace_bytes, gs_combine_by_rule_workspace_bytes(grads)))
    return status;

  auto* const coordinate = static_cast<int64_t*>(workspace);  // the number of each parameter's first column
  int64_t columns = 0;
  for (int64_t p = 0; p < g.num_params; p++) {
    coordinate[p] = columns;
    columns += g.numel[p];
  }
  const bool stream = !accumulate && overflow_cache(g);
  each_chunk(g, coordinate + g.num_params, parallel, [&](int64_t p, int64_t begin, int64_t end) {
    if (!out[p]) return;
    const void* rows[GS_MAX_TASKS];
    for (int64_t t = 0; t < g.num_tasks; t++) {
      const void* data = g.data[p * g.num_tasks + t];
      rows[t] = data ? offset(data, g.dtype[p], begin) : nullptr;
    }
    kernels().combine_by_rule(rows, *rule, g.num_tasks, static_cast<gs_dtype>(g.dtype[p]), end - begin,
                              coordinate[p] + begin, const_cast<char*>(offset(out[p], g.dtype[p], begin)),
                              accumulate != 0, stream);
  });
  if (rule->kind == GS_GRADDROP) *rule->step = gs::next_step(*rule->step);
  return GS_OK;
}
