// SPDX-License-Identifier: MIT
// Stages 2 to 4 on the GPU: in one launch if possible, else one after the other.
#include <algorithm>

#include "cpu/boundary.h"
#include "cuda/fused.cuh"
#include "cuda/launch.cuh"

namespace gs::gpu {
namespace {

// A smaller slot is not worth a block.
constexpr int64_t kMinColumns = 256;
constexpr int kMaxSlots = 256;
// The limit for 16-bit formats, whose products from shared memory cost twice as much per byte; with more bytes separate
// launches are faster.
constexpr int64_t kMaxShortBytes = 16 << 20;

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Fills in all of the table except the solver's options; false if one launch cannot do the work.
bool plan_fused(const gs_gradients& g, const gs_solve& solve, void* const* out, const Traits& traits, AnyTable& table,
                int32_t& dtype) {
  const int64_t tasks = g.num_tasks;
  if (g.num_segments > 1 || !has_fused_solver(solve, tasks) || !traits.fast_double) return false;
  dtype = -1;
  table.params = 0;
  for (int64_t p = 0; p < g.num_params; p++) {
    if (g.numel[p] == 0) continue;
    if (table.params > 0 && g.dtype[p] != dtype) return false;
    dtype = g.dtype[p];
    table.params++;
    const void* const* rows = g.data + p * tasks;
    if (!std::all_of(rows, rows + tasks, is_aligned) || !is_aligned(out[p])) return false;
  }
  if (table.params == 0 || AnyTable::bytes_of(table.params, tasks) > kTableBytes) return false;
  table.num_tasks = static_cast<int>(tasks);
  auto* const first_column = reinterpret_cast<int64_t*>(table.bytes);
  int64_t* const numel = first_column + table.params;
  int64_t* pointer = numel + table.params;
  table.columns = 0;
  for (int64_t p = 0, i = 0; p < g.num_params; p++) {
    if (g.numel[p] == 0) continue;
    first_column[i] = table.columns;
    numel[i++] = g.numel[p];
    table.columns += (g.numel[p] + kFusedUnit - 1) / kFusedUnit * kFusedUnit;
    for (int64_t t = 0; t < tasks; t++) *pointer++ = reinterpret_cast<int64_t>(g.data[p * tasks + t]);
    *pointer++ = reinterpret_cast<int64_t>(out[p]);
  }
  const int64_t most = std::min(kMaxSlots, traits.processors);
  const int64_t share = std::max(kMinColumns, (table.columns + most - 1) / most);
  table.width = (share + kFusedUnit - 1) / kFusedUnit * kFusedUnit;
  table.slots = static_cast<int>((table.columns + table.width - 1) / table.width);
  if (element_bytes(dtype) == 2 && table.columns * tasks * 2 > kMaxShortBytes) return false;
  return table.width <= fused_width_at_most(dtype, tasks, traits.shared_bytes);
}

int64_t partial_bytes(int64_t num_tasks) { return kMaxSlots * pairs_of(std::min(num_tasks, kFusedTasks)) * 8; }

int64_t solver_bytes(const gs_solve& solve, int64_t batch, int64_t num_tasks) {
  switch (solve.method) {
    case GS_PCGRAD:
      return 0;
    case GS_MIN_NORM:
      return gs_min_norm_cuda_workspace_bytes(batch, num_tasks);
    default:
      return gs_weights_cuda_workspace_bytes(solve.weighting, batch, num_tasks);
  }
}

gs_status solve_weights(const gs_solve& solve, const double* gram, int64_t batch, int64_t num_tasks, double* weights,
                        void* workspace, int64_t workspace_bytes, gs_stream stream) {
  switch (solve.method) {
    case GS_PCGRAD:
      return gs_pcgrad_cuda(gram, batch, num_tasks, nullptr, solve.seed, solve.step, solve.step != nullptr, solve.mean,
                            weights, stream);
    case GS_MIN_NORM:
      return gs_min_norm_cuda(gram, batch, num_tasks, solve.solver, solve.max_iter, solve.tol, weights, workspace,
                              workspace_bytes, stream);
    default:
      return gs_weights_cuda(gram, batch, num_tasks, solve.weighting, solve.preference, solve.parameter, solve.limit,
                             weights, workspace, workspace_bytes, stream);
  }
}

}  // namespace
}  // namespace gs::gpu

int64_t gs_aggregate_cuda_workspace_bytes(const gs_gradients* grads, const gs_solve* solve) {
  if (gs::check_solve(grads, solve) != GS_OK) return -1;
  return std::max({gs_gram_cuda_workspace_bytes(grads), gs_combine_cuda_workspace_bytes(grads),
                   gs::gpu::solver_bytes(*solve, grads->num_segments, grads->num_tasks),
                   gs::gpu::partial_bytes(grads->num_tasks)});
}

gs_status gs_aggregate_cuda(const gs_gradients* grads, const gs_solve* solve, double* gram, double* weights,
                            void* const* out, int accumulate, void* workspace, int64_t workspace_bytes,
                            gs_stream stream) {
  using namespace gs::gpu;
  if (const gs_status status = gs::check_aggregate(grads, solve, gram, weights, out)) return status;
  if (const gs_status status =
          gs::check_workspace(workspace, workspace_bytes, gs_aggregate_cuda_workspace_bytes(grads, solve)))
    return status;
  Traits traits;
  if (const gs_status status = get_traits(traits)) return status;
  AnyTable table;
  int32_t dtype;
  if (plan_fused(*grads, *solve, out, traits, table, dtype)) {
    table.method = solve->method;
    table.accumulate = accumulate != 0;
    table.mean = solve->mean != 0;
    table.seed = solve->seed;
    table.step = solve->step;
    const gs_status status = launch_fused(table, dtype, static_cast<double*>(workspace), gram, weights, stream);
    // GS_UNSUPPORTED: a context that has only a part of the GPU may not be able to run all blocks at once.
    if (status != GS_UNSUPPORTED) return status;
  }
  gs_status status = gs_gram_cuda(grads, gram, workspace, workspace_bytes, stream);
  if (status != GS_OK) return status;
  status =
      solve_weights(*solve, gram, grads->num_segments, grads->num_tasks, weights, workspace, workspace_bytes, stream);
  if (status != GS_OK) return status;
  return gs_combine_cuda(grads, weights, out, accumulate, workspace, workspace_bytes, stream);
}
