// SPDX-License-Identifier: MIT
// Stage 3 on the GPU: the solvers of csrc/solvers on warps. G and the weights stay on the device; the step counter is
// read there, and advanced there, so that a captured graph draws new orders at each replay.
#include <algorithm>

#include "cpu/schedule.h"
#include "cuda/device.cuh"
#include "solvers/gradnorm.h"
#include "solvers/min_norm.h"
#include "solvers/pcgrad.h"

namespace gs::gpu {
namespace {

struct WarpTeam {
  static constexpr int kColumns = 1;
  GS_DEVICE int64_t rank() const { return thread() % kWarp; }
  GS_DEVICE int64_t size() const { return kWarp; }
  GS_DEVICE void sync() const { sync_warp(); }
};

// The same answer for every lane.
GS_DEVICE bool warp_finite(const double* values, int64_t count) {
  bool finite = true;
  for (int64_t i = thread() % kWarp; i < count; i += kWarp) finite = finite && std::isfinite(values[i]);
  return all_of_warp(finite);
}

GS_KERNEL task_order_kernel(int64_t num_tasks, uint64_t seed, const int64_t* step, int64_t* order) {
  wait_for_previous_kernel();
  const int64_t row = block() * threads() + thread();
  if (row < num_tasks) task_order_row(num_tasks, seed, static_cast<uint64_t>(*step), row, order + row * num_tasks);
}

// Rows whose orders a warp draws at once, a lane each: a draw is one long chain of dependent steps.
constexpr int64_t kDrawnRows = 4;

// What a warp of the PCGrad kernel keeps in shared memory: the running products, its part of the weights and, in a byte
// each, the orders of the rows at hand.
GS_HOST_DEVICE constexpr int64_t pcgrad_warp_bytes(int64_t num_tasks) {
  return num_tasks * 16 + (kDrawnRows * num_tasks + 7) / 8 * 8;
}

// One block per problem. Each warp projects its share of the tasks; the parts are added in the order of the warps.
GS_KERNEL GS_BLOCKS(kMaxThreads, 1)
    pcgrad_kernel(const double* gram, int64_t num_tasks, const int64_t* order, uint64_t seed, int64_t* step,
                  bool advance, bool mean, double* weights) {
  wait_for_previous_kernel();
  const double* problem = gram + block() * num_tasks * num_tasks;
  double* result = weights + block() * num_tasks;
  bool finite = true;
  for (int64_t i = thread(); i < num_tasks * num_tasks; i += threads()) finite = finite && std::isfinite(problem[i]);
  if (any_of_block(!finite)) {
    if (thread() < kWarp) fill_nan(WarpTeam{}, result, num_tasks);
  } else {
    const WarpTeam team;
    const int64_t warps = threads() / kWarp, warp = thread() / kWarp;
    const auto part_of = [&](int64_t w) {
      return reinterpret_cast<double*>(&shared<unsigned char>() + w * pcgrad_warp_bytes(num_tasks));
    };
    double *part = part_of(warp), *v = part + num_tasks;
    auto* drawn = reinterpret_cast<uint8_t*>(v + num_tasks);
    for (int64_t j = team.rank(); j < num_tasks; j += kWarp) part[j] = 0;
    for (int64_t first = warp; first < num_tasks; first += kDrawnRows * warps) {
      const int64_t own = first + team.rank() * warps;
      if (!order && team.rank() < kDrawnRows && own < num_tasks) {
        task_order_row(num_tasks, seed, static_cast<uint64_t>(*step), own, drawn + team.rank() * num_tasks);
      }
      team.sync();
      for (int64_t row = 0; row < kDrawnRows && first + row * warps < num_tasks; row++) {
        const int64_t i = first + row * warps;
        const auto visit = [&](int64_t k) {
          if (!order) return static_cast<int64_t>(drawn[row * num_tasks + k]);
          const int64_t j = order[i * num_tasks + k];
          return j >= 0 && j < num_tasks ? j : i;  // never outside G, whatever order holds
        };
        pcgrad_project(team, problem, num_tasks, i, visit, part, v);
        team.sync();
      }
    }
    sync_block();
    for (int64_t j = thread(); j < num_tasks; j += threads()) {
      double weight = 1;
      for (int64_t w = 0; w < warps; w++) weight += part_of(w)[j];
      result[j] = mean ? weight / static_cast<double>(num_tasks) : weight;
    }
  }
  let_next_kernel_start();
  sync_block();
  if (advance && thread() == 0) ++*step;
}

GS_KERNEL advance_kernel(int64_t* step) {
  wait_for_previous_kernel();
  ++*step;
}

// One warp per problem.
GS_KERNEL min_norm_kernel(const double* gram, int64_t num_tasks, bool exact, int64_t max_iter, double tol,
                          double* weights, double* workspace, int64_t scratch_bytes) {
  wait_for_previous_kernel();
  const WarpTeam team;
  const double* problem = gram + block() * num_tasks * num_tasks;
  double* w = weights + block() * num_tasks;
  double* scratch = workspace ? workspace + block() * (scratch_bytes / 8) : &shared<double>();
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

// One problem per block, by its first thread: the work is linear in T.
GS_KERNEL gradnorm_kernel(const double* weights, const double* norms, const double* losses,
                          const double* initial_losses, int64_t num_tasks, double alpha, double lr,
                          double* new_weights) {
  wait_for_previous_kernel();
  const int64_t at = block() * num_tasks;
  if (thread() == 0) {
    gradnorm_update(weights + at, norms + at, losses + at, initial_losses + at, num_tasks, alpha, lr, new_weights + at);
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

// Scratch beyond this lies in the workspace: every GPU has so much shared memory.
constexpr int64_t kSharedBytes = 48 * 1024;

}  // namespace
}  // namespace gs::gpu

gs_status gs_task_order_cuda(int64_t num_tasks, uint64_t seed, const int64_t* step, int64_t* order, gs_stream stream) {
  if (const gs_status status = gs::check_problems(1, num_tasks)) return status;
  GS_REQUIRE(step && order, "step and order must not be NULL");
  return gs::gpu::launch(gs::gpu::task_order_kernel, (num_tasks + 31) / 32, 32, 0, stream, num_tasks, seed, step,
                         order);
}

gs_status gs_pcgrad_cuda(const double* gram, int64_t batch, int64_t num_tasks, const int64_t* order, uint64_t seed,
                         int64_t* step, int advance, int mean, double* weights, gs_stream stream) {
  using namespace gs::gpu;
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (gram && weights && step), "gram, weights and step must not be NULL");
  const int64_t fitting = kSharedBytes / pcgrad_warp_bytes(num_tasks);
  const int64_t warps = std::clamp<int64_t>(num_tasks, 1, std::min<int64_t>(kMaxThreads / kWarp, fitting));
  const gs_status status =
      launch(pcgrad_kernel, batch, static_cast<int>(warps * kWarp), warps * pcgrad_warp_bytes(num_tasks), stream, gram,
             num_tasks, order, seed, step, advance != 0 && batch == 1, mean != 0, weights);
  if (status != GS_OK || !advance || batch == 1) return status;
  return launch(advance_kernel, 1, 1, 0, stream, step);  // after every block has read the counter
}

gs_status gs_min_norm_cuda(const double* gram, int64_t batch, int64_t num_tasks, gs_solver solver, int64_t max_iter,
                           double tol, double* weights, void* workspace, int64_t workspace_bytes, gs_stream stream) {
  using namespace gs::gpu;
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (gram && weights), "gram and weights must not be NULL");
  GS_REQUIRE(solver == GS_EXACT || solver == GS_FRANK_WOLFE, "solver is %d, which no gs_solver is", (int)solver);
  GS_REQUIRE_WORKSPACE(workspace, workspace_bytes, gs_min_norm_workspace_bytes(batch, num_tasks));
  const int64_t bytes = gs::min_norm_scratch_bytes(num_tasks);
  const bool fits = bytes <= kSharedBytes;
  return launch(min_norm_kernel, batch, kWarp, fits ? bytes : 0, stream, gram, num_tasks, solver == GS_EXACT, max_iter,
                tol, weights, fits ? nullptr : static_cast<double*>(workspace), bytes);
}

gs_status gs_gradnorm_cuda(const double* weights, const double* norms, const double* losses,
                           const double* initial_losses, int64_t batch, int64_t num_tasks, double alpha, double lr,
                           double* new_weights, gs_stream stream) {
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (weights && norms && losses && initial_losses && new_weights),
             "weights, norms, losses, initial_losses and new_weights must not be NULL");
  return gs::gpu::launch(gs::gpu::gradnorm_kernel, batch, gs::gpu::kWarp, 0, stream, weights, norms, losses,
                         initial_losses, num_tasks, alpha, lr, new_weights);
}

gs_status gs_gradnorm_step_cuda(const double* gram, const double* losses, int64_t batch, int64_t num_tasks,
                                double alpha, double lr, double* state_weights, double* initial_losses, double* weights,
                                gs_stream stream) {
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (gram && losses && state_weights && initial_losses && weights),
             "gram, losses, state_weights, initial_losses and weights must not be NULL");
  return gs::gpu::launch(gs::gpu::gradnorm_step_kernel, batch, gs::gpu::kWarp, 2 * num_tasks * 8, stream, gram, losses,
                         num_tasks, alpha, lr, state_weights, initial_losses, weights);
}
