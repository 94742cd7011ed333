// SPDX-License-Identifier: MIT
// Stage 4 on the CPU: each output element is summed in a fixed order, so any split of the columns gives the same bits.
#include "chunks.h"
#include "kernels.h"

namespace gs {
namespace {

void combine_chunk(const gs_gradients& g, const double* weights, void* out, bool accumulate, bool stream, int64_t p,
                   int64_t begin, int64_t end) {
  const void* rows[GS_MAX_TASKS];
  double present_weights[GS_MAX_TASKS];
  const double* w = weights + segment_of(g, p) * g.num_tasks;
  int64_t present = 0;
  for (int64_t t = 0; t < g.num_tasks; t++) {
    const void* data = g.data[p * g.num_tasks + t];
    if (!data || w[t] == 0) continue;
    rows[present] = offset(data, g.dtype[p], begin);
    present_weights[present++] = w[t];
  }
  if (present == 0 && accumulate) return;
  void* destination = const_cast<char*>(offset(out, g.dtype[p], begin));
  kernels().combine(rows, present_weights, present, static_cast<gs_dtype>(g.dtype[p]), end - begin, destination,
                    accumulate, stream);
}

}  // namespace
}  // namespace gs

int64_t gs_combine_workspace_bytes(const gs_gradients* grads) {
  return gs::check(grads) == GS_OK ? (grads->num_params + 1) * static_cast<int64_t>(sizeof(int64_t)) : -1;
}

gs_status gs_combine_cpu(const gs_gradients* grads, const double* weights, void* const* out, int accumulate,
                         void* workspace, int64_t workspace_bytes, const gs_parallel* parallel) {
  using namespace gs;
  GS_REQUIRE(grads && weights && (out || grads->num_params == 0), "grads, weights and out must not be NULL");
  if (const gs_status status = check(*grads)) return status;
  const gs_gradients& g = *grads;
  if (const gs_status status = gs::check_workspace(workspace, workspace_bytes, gs_combine_workspace_bytes(grads)))
    return status;

  const bool stream = !accumulate && overflow_cache(g);
  each_chunk(g, static_cast<int64_t*>(workspace), parallel, [&](int64_t p, int64_t begin, int64_t end) {
    if (out[p]) combine_chunk(g, weights, out[p], accumulate != 0, stream, p, begin, end);
  });
  return GS_OK;
}
