// SPDX-License-Identifier: MIT
// Weights from G by the solvers of csrc/solvers/weighting.h, and Gradient Vaccine's, on the GPU: one block per problem.
#include <algorithm>

#include "cpu/boundary.h"
#include "cuda/faces.cuh"
#include "cuda/launch.cuh"
#include "solvers/gradvac.h"
#include "solvers/weighting.h"

namespace gs::gpu {
namespace {

constexpr int64_t kMaxWarps = 8;  // of a block; UPGrad and Gradient Vaccine divide their tasks among them

int64_t warps_of(gs_weighting weighting, int64_t num_tasks) {
  return weighting == GS_UPGRAD ? std::min(num_tasks, kMaxWarps) : 1;
}

// The scratch of a problem, in doubles: each warp's scratch and weights.
int64_t scratch_of(gs_weighting weighting, int64_t num_tasks) {
  return (warps_of(weighting, num_tasks) * (weighting_scratch(weighting, num_tasks) + num_tasks) + 7) / 8 * 8;
}

// The same answer for every thread.
GS_DEVICE bool block_finite(const double* values, int64_t count) {
  bool finite = true;
#pragma unroll 16
  for (int64_t i = thread(); i < count; i += threads()) finite &= std::isfinite(values[i]);
  return !any_of_block(!finite);
}

// scratch_values is 0 if the scratch lies in shared memory. One kernel for all solvers, which share much of their code.
GS_KERNEL GS_BLOCKS(kMaxWarps* kWarp, 1)
    weights_kernel(const double* gram, int64_t num_tasks, gs_weighting weighting, const double* preference,
                   double parameter, double limit, double* weights, double* workspace, int64_t scratch_values,
                   int64_t warp_values) {
  wait_for_previous_kernel();
  const WarpTeam team;
  const double* problem = gram + block() * num_tasks * num_tasks;
  double* result = weights + block() * num_tasks;
  double* scratch = scratch_values == 0 ? &shared<double>() : workspace + block() * scratch_values;
  const bool finite = block_finite(problem, num_tasks * num_tasks);
  let_next_kernel_start();
  if (!finite) {
    if (thread() < kWarp) fill_nan(team, result, num_tasks);
    return;
  }
  const int64_t warp = thread() / kWarp, warps = threads() / kWarp;
  double* part = scratch + warp * num_tasks;
  solve_weighting(team, weighting, problem, num_tasks, preference, parameter, limit, warp, warps, part,
                  scratch + warps * num_tasks + warp * warp_values);
  sync_block();
  for (int64_t i = thread(); i < num_tasks; i += threads()) {
    double sum = 0;
    for (int64_t w = 0; w < warps; w++) sum += scratch[w * num_tasks + i];
    result[i] = sum;
  }
}

// The spectral methods for larger numbers of tasks, with a whole block per problem.
constexpr int64_t kSpectralTasks = 17, kSpectralThreads = 512;

GS_KERNEL GS_BLOCKS(kSpectralThreads, 1)
    spectral_kernel(const double* gram, int64_t num_tasks, gs_weighting weighting, const double* preference,
                    double* weights, double* workspace, int64_t scratch_values) {
  wait_for_previous_kernel();
  const BlockTeam team(&shared<double>());
  const double* problem = gram + block() * num_tasks * num_tasks;
  double* result = weights + block() * num_tasks;
  double* scratch = scratch_values == 0 ? &shared<double>() + BlockTeam::kValues : workspace + block() * scratch_values;
  const bool finite = block_finite(problem, num_tasks * num_tasks);
  let_next_kernel_start();
  if (finite) {
    solve_spectral(team, weighting, problem, num_tasks, preference, result, scratch);
  } else {
    fill_nan(team, result, num_tasks);
  }
}

gs_status launch_spectral(const double* gram, int64_t batch, int64_t num_tasks, gs_weighting weighting,
                          const double* preference, double* weights, double* workspace, gs_stream stream) {
  const int64_t values = scratch_of(weighting, num_tasks), lanes = (num_tasks + 1) / 2 * BlockTeam::kPairMembers;
  const int64_t threads = std::min((lanes + kWarp - 1) / kWarp * kWarp, kSpectralThreads);
  const bool fits = values * 8 <= kSharedBytes;
  return launch(spectral_kernel, batch, static_cast<int>(threads), (BlockTeam::kValues + (fits ? values : 0)) * 8,
                stream, gram, num_tasks, weighting, preference, weights, workspace, fits ? 0 : values);
}

// The warps divide the rows among them; their parts are added in the order of the warps.
GS_KERNEL gradvac_kernel(const double* gram, int64_t num_tasks, const int64_t* order, double beta, double* targets,
                         double* weights) {
  wait_for_previous_kernel();
  const WarpTeam team;
  const double* problem = gram + block() * num_tasks * num_tasks;
  const bool finite = block_finite(problem, num_tasks * num_tasks);
  let_next_kernel_start();
  const int64_t warp = thread() / kWarp, warps = threads() / kWarp;
  double *part = &shared<double>() + warp * num_tasks, *v = &shared<double>() + (warps + warp) * num_tasks;
  for (int64_t j = team.rank(); j < num_tasks; j += team.size()) part[j] = 0;
  team.sync();
  for (int64_t i = warp; finite && i < num_tasks; i += warps) {
    gradvac_row(team, problem, num_tasks, i, order + i * num_tasks, beta,
                targets + (block() * num_tasks + i) * num_tasks, part, v);
  }
  sync_block();
  for (int64_t j = thread(); j < num_tasks; j += threads()) {
    double sum = finite ? 1 : NAN;
    for (int64_t w = 0; w < warps; w++) sum += (&shared<double>())[w * num_tasks + j];
    weights[block() * num_tasks + j] = sum;
  }
}

}  // namespace
}  // namespace gs::gpu

int64_t gs_weights_cuda_workspace_bytes(gs_weighting weighting, int64_t batch, int64_t num_tasks) {
  if (gs::check_problems(batch, num_tasks) != GS_OK || gs::check_known(weighting) != GS_OK) return -1;
  return gs::gpu::workspace_bytes(batch, gs::gpu::scratch_of(weighting, num_tasks) * 8);
}

gs_status gs_weights_cuda(const double* gram, int64_t batch, int64_t num_tasks, gs_weighting weighting,
                          const double* preference, double parameter, double limit, double* weights, void* workspace,
                          int64_t workspace_bytes, gs_stream stream) {
  using namespace gs::gpu;
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (gram && weights), "gram and weights must not be NULL");
  if (const gs_status status = gs::check_weighting(weighting, num_tasks, preference, parameter, limit)) return status;
  if (const gs_status status =
          gs::check_workspace(workspace, workspace_bytes, gs_weights_cuda_workspace_bytes(weighting, batch, num_tasks)))
    return status;
  if (num_tasks <= kFaceTasks && weighting == GS_CAGRAD) {
    return launch_cagrad_faces(gram, batch, static_cast<int>(num_tasks), parameter, weights, stream);
  }
  if (num_tasks <= kFaceTasks && (weighting == GS_UPGRAD || weighting == GS_DUALPROJ)) {
    return launch_projection_faces(gram, batch, static_cast<int>(num_tasks), weighting == GS_UPGRAD, preference,
                                   parameter, weights, stream);
  }
  if (gs::is_spectral(weighting) && num_tasks >= kSpectralTasks) {
    return launch_spectral(gram, batch, num_tasks, weighting, preference, weights, static_cast<double*>(workspace),
                           stream);
  }
  const int64_t values = scratch_of(weighting, num_tasks), threads = warps_of(weighting, num_tasks) * kWarp;
  const bool fits = values * 8 <= kSharedBytes;
  return launch(weights_kernel, batch, static_cast<int>(threads), fits ? values * 8 : 0, stream, gram, num_tasks,
                weighting, preference, parameter, limit, weights, static_cast<double*>(workspace), fits ? 0 : values,
                gs::weighting_scratch(weighting, num_tasks));
}

gs_status gs_gradvac_cuda(const double* gram, int64_t batch, int64_t num_tasks, const int64_t* order, double beta,
                          double* targets, double* weights, gs_stream stream) {
  using namespace gs::gpu;
  if (const gs_status status = gs::check_gradvac(gram, batch, num_tasks, order, beta, targets, weights)) return status;
  const int64_t warps = std::min(num_tasks, kMaxWarps);
  return launch(gradvac_kernel, batch, static_cast<int>(warps * kWarp), 2 * warps * num_tasks * 8, stream, gram,
                num_tasks, order, beta, targets, weights);
}
