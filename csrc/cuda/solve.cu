// SPDX-License-Identifier: MIT
// Stage 3 on the GPU, except PCGrad: the solvers of csrc/solvers on warps. G and the weights stay on the device.
#include <algorithm>

#include "cpu/boundary.h"
#include "cuda/faces.cuh"
#include "cuda/launch.cuh"
#include "solvers/frank_wolfe.h"
#include "solvers/gradnorm.h"
#include "solvers/min_norm.h"
#include "solvers/random.h"
#include "solvers/simplex.h"

namespace gs::gpu {
namespace {

// The same answer for every lane.
GS_DEVICE bool warp_finite(const double* values, int64_t count) {
  bool finite = true;
#pragma unroll 16
  for (int64_t i = thread() % kWarp; i < count; i += kWarp) finite &= std::isfinite(values[i]);
  return all_of_warp(finite);
}

// One warp per problem.
template <bool kInShared>
GS_KERNEL min_norm_kernel(const double* gram, int64_t num_tasks, bool exact, int64_t max_iter, double tol,
                          double* weights, double* workspace, int64_t scratch_bytes) {
  wait_for_previous_kernel();
  const WarpTeam team;
  const double* problem = gram + block() * num_tasks * num_tasks;
  double* w = weights + block() * num_tasks;
  double* scratch = kInShared ? &shared<double>() : workspace + block() * (scratch_bytes / 8);
  const bool finite = warp_finite(problem, num_tasks * num_tasks);
  let_next_kernel_start();
  if (!finite) {
    fill_nan(team, w, num_tasks);
  } else if (exact) {
    MinNorm(team, problem, num_tasks, w, scratch).solve();
  } else {
    frank_wolfe(team, problem, num_tasks, max_iter, tol, w, scratch);
  }
}

// One warp per problem.
template <bool kInShared>
GS_KERNEL simplex_steps_kernel(const double* matrix, int64_t num_tasks, double lr, double momentum, int64_t num_iter,
                               double* weights, double* workspace, int64_t scratch_bytes) {
  wait_for_previous_kernel();
  const WarpTeam team;
  const double* problem = matrix + block() * num_tasks * num_tasks;
  double* w = weights + block() * num_tasks;
  double* scratch = kInShared ? &shared<double>() : workspace + block() * (scratch_bytes / 8);
  const bool finite = warp_finite(problem, num_tasks * num_tasks);
  let_next_kernel_start();
  if (finite) {
    simplex_steps(team, problem, num_tasks, lr, momentum, num_iter, w, scratch);
  } else {
    fill_nan(team, w, num_tasks);
  }
}

// One warp per problem. The kernel advances the counter only if there is a single problem.
GS_KERNEL random_kernel(const double* gram, int64_t num_tasks, uint64_t seed, int64_t* step, bool advance,
                        double* weights) {
  wait_for_previous_kernel();
  const WarpTeam team;
  double* w = weights + block() * num_tasks;
  const auto now = static_cast<uint64_t>(*step);
  const bool finite = warp_finite(gram + block() * num_tasks * num_tasks, num_tasks * num_tasks);
  let_next_kernel_start();
  if (finite) {
    random_weights(team, num_tasks, seed, now, w);
  } else {
    fill_nan(team, w, num_tasks);
  }
  sync_warp();  // every lane has read the step
  if (advance && thread() == 0) *step = static_cast<int64_t>(now + 1);
}

// The exact min-norm solution for up to kTasks tasks, one block per problem, one thread per face.
template <int kTasks>
GS_KERNEL min_norm_faces_kernel(const double* gram, int num_tasks, double* weights) {
  wait_for_previous_kernel();
  auto& memory = shared<FaceMemory<kTasks>>();
  const double* problem = gram + block() * num_tasks * num_tasks;
  double* result = weights + block() * num_tasks;
  const bool finite = load_gram<kTasks>(memory.gram, problem, num_tasks);
  let_next_kernel_start();
  if (!finite) {
    if (thread() < kWarp) fill_nan(WarpTeam{}, result, num_tasks);
    return;
  }
  solve_min_norm_faces(memory, num_tasks, result);
}

template <int kTasks>
gs_status launch_faces(const double* gram, int64_t batch, int num_tasks, double* weights, gs_stream stream) {
  return launch(min_norm_faces_kernel<kTasks>, batch, std::max(kWarp, 1 << num_tasks), sizeof(FaceMemory<kTasks>),
                stream, gram, num_tasks, weights);
}

// One problem per block, solved by its first thread, as the work is linear in T.
GS_KERNEL gradnorm_kernel(const double* weights, const double* norms, const double* losses,
                          const double* initial_losses, int64_t num_tasks, double alpha, double lr,
                          double* new_weights) {
  wait_for_previous_kernel();
  const int64_t at = block() * num_tasks;
  double* updated = &shared<double>();
  if (thread() == 0) {
    gradnorm_update(weights + at, norms + at, losses + at, initial_losses + at, num_tasks, alpha, lr, updated);
    for (int64_t i = 0; i < num_tasks; i++) new_weights[at + i] = updated[i];
  }
}

GS_KERNEL gradnorm_step_kernel(const double* gram, const double* losses, int64_t num_tasks, double alpha, double lr,
                               double* state_weights, double* initial_losses, double* weights) {
  wait_for_previous_kernel();
  const int64_t at = block() * num_tasks;
  double* norms = &shared<double>();
  if (thread() == 0) {
    gradnorm_step(gram + at * num_tasks, losses + at, num_tasks, alpha, lr, state_weights + at, initial_losses + at,
                  weights + at, norms, norms + num_tasks);
  }
}

}  // namespace
}  // namespace gs::gpu

int64_t gs_min_norm_cuda_workspace_bytes(int64_t batch, int64_t num_tasks) {
  if (gs::check_problems(batch, num_tasks) != GS_OK) return -1;
  return gs::gpu::workspace_bytes(batch, gs::min_norm_scratch_bytes(num_tasks));
}

gs_status gs_min_norm_cuda(const double* gram, int64_t batch, int64_t num_tasks, gs_solver solver, int64_t max_iter,
                           double tol, double* weights, void* workspace, int64_t workspace_bytes, gs_stream stream) {
  using namespace gs::gpu;
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (gram && weights), "gram and weights must not be NULL");
  if (const gs_status status = gs::check_solver(solver, max_iter, tol)) return status;
  if (const gs_status status =
          gs::check_workspace(workspace, workspace_bytes, gs_min_norm_cuda_workspace_bytes(batch, num_tasks)))
    return status;
  if (solver == GS_EXACT && num_tasks <= kFaceTasks) {
    const auto launch_kernel = num_tasks <= 2   ? launch_faces<2>
                               : num_tasks <= 4 ? launch_faces<4>
                                                : launch_faces<kFaceTasks>;
    return launch_kernel(gram, batch, static_cast<int>(num_tasks), weights, stream);
  }
  const int64_t bytes = gs::min_norm_scratch_bytes(num_tasks);
  const bool fits = bytes <= kSharedBytes;
  return launch(fits ? min_norm_kernel<true> : min_norm_kernel<false>, batch, kWarp, fits ? bytes : 0, stream, gram,
                num_tasks, solver == GS_EXACT, max_iter, tol, weights, static_cast<double*>(workspace), bytes);
}

gs_status gs_random_cuda(const double* gram, int64_t batch, int64_t num_tasks, uint64_t seed, int64_t* step,
                         double* weights, gs_stream stream) {
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(step && (batch == 0 || (gram && weights)), "gram, step and weights must not be NULL");
  const gs_status status = gs::gpu::launch(gs::gpu::random_kernel, batch, gs::gpu::kWarp, 0, stream, gram, num_tasks,
                                           seed, step, batch == 1, weights);
  if (status != GS_OK || batch == 1) return status;
  return gs::gpu::advance(step, stream);  // a separate launch: every block has read the counter by then
}

int64_t gs_simplex_steps_cuda_workspace_bytes(int64_t batch, int64_t num_tasks) {
  if (gs::check_problems(batch, num_tasks) != GS_OK) return -1;
  return gs::gpu::workspace_bytes(batch, gs::simplex_scratch_bytes(num_tasks));
}

gs_status gs_simplex_steps_cuda(const double* matrix, int64_t batch, int64_t num_tasks, double lr, double momentum,
                                int64_t num_iter, double* weights, void* workspace, int64_t workspace_bytes,
                                gs_stream stream) {
  using namespace gs::gpu;
  if (const gs_status status = gs::check_simplex_steps(matrix, batch, num_tasks, num_iter, weights)) return status;
  if (const gs_status status =
          gs::check_workspace(workspace, workspace_bytes, gs_simplex_steps_cuda_workspace_bytes(batch, num_tasks)))
    return status;
  const int64_t bytes = gs::simplex_scratch_bytes(num_tasks);
  const bool fits = bytes <= kSharedBytes;
  return launch(fits ? simplex_steps_kernel<true> : simplex_steps_kernel<false>, batch, kWarp, fits ? bytes : 0, stream,
                matrix, num_tasks, lr, momentum, num_iter, weights, static_cast<double*>(workspace), bytes);
}

gs_status gs_gradnorm_cuda(const double* weights, const double* norms, const double* losses,
                           const double* initial_losses, int64_t batch, int64_t num_tasks, double alpha, double lr,
                           double* new_weights, gs_stream stream) {
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (weights && norms && losses && initial_losses && new_weights),
             "weights, norms, losses, initial_losses and new_weights must not be NULL");
  if (const gs_status status = gs::check_gradnorm(alpha, lr)) return status;
  return gs::gpu::launch(gs::gpu::gradnorm_kernel, batch, gs::gpu::kWarp, num_tasks * 8, stream, weights, norms, losses,
                         initial_losses, num_tasks, alpha, lr, new_weights);
}

gs_status gs_gradnorm_step_cuda(const double* gram, const double* losses, int64_t batch, int64_t num_tasks,
                                double alpha, double lr, double* state_weights, double* initial_losses, double* weights,
                                gs_stream stream) {
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (gram && losses && state_weights && initial_losses && weights),
             "gram, losses, state_weights, initial_losses and weights must not be NULL");
  if (const gs_status status = gs::check_gradnorm(alpha, lr)) return status;
  return gs::gpu::launch(gs::gpu::gradnorm_step_kernel, batch, gs::gpu::kWarp, 2 * num_tasks * 8, stream, gram, losses,
                         num_tasks, alpha, lr, state_weights, initial_losses, weights);
}
