// SPDX-License-Identifier: MIT
// Stage 4 on the GPU of the methods that work on the gradients instead of on G.
#include "cuda/combine_by_rule.cuh"
#include "cuda/fill_tables.cuh"
#include "cuda/launch.cuh"

namespace gs::gpu {
namespace {

// A slot is one or more vectors per lane and row, so that there are about eight blocks for each multiprocessor.
int64_t width_of(int64_t columns, int32_t dtype, int64_t processors) {
  const int64_t turn = kRowsThreads * 16 / gs::element_bytes(dtype), turns = (columns + turn - 1) / turn;
  return turn * std::max<int64_t>(1, turns / (8 * processors));
}

}  // namespace
}  // namespace gs::gpu

int64_t gs_combine_by_rule_cuda_workspace_bytes(const gs_gradients* grads) {
  return gs_combine_cuda_workspace_bytes(grads);
}

gs_status gs_combine_by_rule_cuda(const gs_gradients* grads, const gs_rule* rule, void* const* out, int accumulate,
                                  void* workspace, int64_t workspace_bytes, gs_stream stream) {
  using namespace gs::gpu;
  GS_REQUIRE(grads && rule && (out || grads->num_params == 0), "grads, rule and out must not be NULL");
  if (const gs_status status = gs::check(*grads)) return status;
  if (const gs_status status = gs::check_rule(*rule, grads->num_tasks)) return status;
  if (const gs_status status =
          gs::check_workspace(workspace, workspace_bytes, gs_combine_by_rule_cuda_workspace_bytes(grads)))
    return status;
  Traits traits;
  if (const gs_status status = get_traits(traits)) return status;
  gs_gradients whole = *grads;  // without segments, which rules ignore
  whole.segment = nullptr;
  whole.num_segments = 1;
  const auto width = [&](int64_t columns, int32_t dtype) { return width_of(columns, dtype, traits.processors); };
  Tables tables(whole, out, width);
  Table table;
  const auto launch_rule = rule->kind == GS_GRADDROP ? launch_graddrop : launch_trimmed_mean;
  while (tables.next(table)) {
    if (const gs_status status = tables.fill(table, workspace, stream)) return status;
    const gs_status status = launch_rule(table, static_cast<int>(whole.num_tasks), *rule, accumulate != 0, stream);
    if (status != GS_OK) return status;
  }
  // A separate launch: every block has read the counter by then.
  return rule->kind == GS_GRADDROP ? advance(rule->step, stream) : GS_OK;
}
