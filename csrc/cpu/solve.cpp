// SPDX-License-Identifier: MIT
// Stage 3 on the CPU, by the solvers of csrc/solvers.
#include "boundary.h"
#include "solvers/frank_wolfe.h"
#include "solvers/gradnorm.h"
#include "solvers/gradvac.h"
#include "solvers/min_norm.h"
#include "solvers/pcgrad.h"
#include "solvers/random.h"
#include "solvers/simplex.h"
#include "solvers/weighting.h"

namespace gs {
namespace {

constexpr int64_t kMaxGroups = 256;

// Groups of problems, one after the other, so that a workspace for these suffices for any number of problems.
int64_t groups_of(int64_t batch) { return std::min(batch, kMaxGroups); }

// Calls solve(b, group, problem, weights) for each finite problem b of matrices [batch, T, T]; the weights of others
// are NaN. operations: roughly how many a problem takes, as threads pay off only beyond a few microseconds of work.
template <class Solve>
void each_problem(const gs_parallel* parallel, const double* matrices, int64_t batch, int64_t num_tasks,
                  int64_t operations, double* weights, const Solve& solve) {
  const int64_t groups = groups_of(batch);
  parallel_for(batch * operations >= 4096 ? parallel : nullptr, groups, [&](int64_t group) {
    for (int64_t b = group * batch / groups; b < (group + 1) * batch / groups; b++) {
      const double* const problem = matrices + b * num_tasks * num_tasks;
      double* const w = weights + b * num_tasks;
      if (all_finite(problem, num_tasks * num_tasks)) {
        solve(b, group, problem, w);
      } else {
        fill_nan(SerialTeam{}, w, num_tasks);
      }
    }
  });
}

double* scratch_at(void* workspace, int64_t group, int64_t bytes) {
  return reinterpret_cast<double*>(static_cast<char*>(workspace) + group * bytes);
}

// UPGrad solves a problem for each task. Many tasks are divided among this many parts, for as many threads.
constexpr int64_t kParts = 16, kManyTasks = 24;

bool is_in_parts(gs_weighting weighting, int64_t num_tasks) {
  return weighting == GS_UPGRAD && num_tasks >= kManyTasks;
}

// workspace: a scratch of that many bytes, of which the weights of a part come first; with threads, one for each part.
void upgrad_in_parts(const gs_parallel* parallel, const double* gram, int64_t num_tasks, const double* preference,
                     double ridge, double* weights, void* workspace, int64_t bytes) {
  const int64_t at_once = parallel ? kParts : 1;
  std::fill(weights, weights + num_tasks, 0.0);
  for (int64_t first = 0; first < kParts; first += at_once) {
    parallel_for(parallel, at_once, [&](int64_t i) {
      double* const w = scratch_at(workspace, i, bytes);
      upgrad(SerialTeam{}, gram, num_tasks, preference, ridge, first + i, kParts, w, w + num_tasks);
    });
    for (int64_t i = 0; i < at_once; i++) add(1, scratch_at(workspace, i, bytes), num_tasks, weights);
  }
}

int64_t weighting_scratch_bytes(gs_weighting weighting, int64_t num_tasks) {
  int64_t values = weighting_scratch(weighting, num_tasks);
  if (is_spectral(weighting)) values += rotations_scratch(num_tasks);
  if (is_in_parts(weighting, num_tasks)) values += num_tasks;
  return (values * 8 + 63) / 64 * 64;
}

}  // namespace
}  // namespace gs

gs_status gs_task_order_cpu(int64_t num_tasks, uint64_t seed, uint64_t step, int64_t* order) {
  if (const gs_status status = gs::check_tasks(num_tasks)) return status;
  GS_REQUIRE(order, "order must not be NULL");
  for (int64_t i = 0; i < num_tasks; i++) gs::task_order_row(num_tasks, seed, step, i, order + i * num_tasks);
  return GS_OK;
}

gs_status gs_random_cpu(const double* gram, int64_t batch, int64_t num_tasks, uint64_t seed, int64_t* step,
                        double* weights) {
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(step && (batch == 0 || (gram && weights)), "gram, step and weights must not be NULL");
  double drawn[GS_MAX_TASKS];
  gs::random_weights(gs::SerialTeam{}, num_tasks, seed, static_cast<uint64_t>(*step), drawn);
  for (int64_t b = 0; b < batch; b++) {
    const bool finite = gs::all_finite(gram + b * num_tasks * num_tasks, num_tasks * num_tasks);
    for (int64_t t = 0; t < num_tasks; t++) weights[b * num_tasks + t] = finite ? drawn[t] : NAN;
  }
  *step = gs::next_step(*step);
  return GS_OK;
}

gs_status gs_pcgrad_cpu(const double* gram, int64_t batch, int64_t num_tasks, const int64_t* order, uint64_t seed,
                        uint64_t step, int mean, double* weights, const gs_parallel* parallel) {
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (gram && weights), "gram and weights must not be NULL");
  if (const gs_status status = order ? gs::check_order(order, num_tasks) : GS_OK) return status;
  const auto solve = [&](int64_t, int64_t, const double* problem, double* w) {
    std::fill(w, w + num_tasks, 1.0);
    for (int64_t i = 0; i < num_tasks; i++) {
      double v[GS_MAX_TASKS];
      int64_t drawn[GS_MAX_TASKS];
      const int64_t* visit = order ? order + i * num_tasks : drawn;
      if (!order) gs::task_order_row(num_tasks, seed, step, i, drawn);
      gs::pcgrad_project(problem, num_tasks, i, visit, w, v);
    }
    for (int64_t j = 0; mean && j < num_tasks; j++) w[j] /= static_cast<double>(num_tasks);
  };
  gs::each_problem(parallel, gram, batch, num_tasks, num_tasks * num_tasks, weights, solve);
  return GS_OK;
}

int64_t gs_min_norm_workspace_bytes(int64_t batch, int64_t num_tasks) {
  return gs::check_problems(batch, num_tasks) == GS_OK ? gs::groups_of(batch) * gs::min_norm_scratch_bytes(num_tasks)
                                                       : -1;
}

gs_status gs_min_norm_cpu(const double* gram, int64_t batch, int64_t num_tasks, gs_solver solver, int64_t max_iter,
                          double tol, double* weights, void* workspace, int64_t workspace_bytes,
                          const gs_parallel* parallel) {
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (gram && weights), "gram and weights must not be NULL");
  if (const gs_status status = gs::check_solver(solver, max_iter, tol)) return status;
  if (const gs_status status =
          gs::check_workspace(workspace, workspace_bytes, gs_min_norm_workspace_bytes(batch, num_tasks)))
    return status;
  const auto solve = [&](int64_t, int64_t group, const double* problem, double* w) {
    double* const scratch = gs::scratch_at(workspace, group, gs::min_norm_scratch_bytes(num_tasks));
    if (solver == GS_FRANK_WOLFE) {
      gs::frank_wolfe(gs::SerialTeam{}, problem, num_tasks, max_iter, tol, w, scratch);
    } else {
      gs::MinNorm(gs::SerialTeam{}, problem, num_tasks, w, scratch).solve();
    }
  };
  gs::each_problem(parallel, gram, batch, num_tasks, num_tasks * num_tasks, weights, solve);
  return GS_OK;
}

int64_t gs_simplex_steps_workspace_bytes(int64_t batch, int64_t num_tasks) {
  return gs::check_problems(batch, num_tasks) == GS_OK ? gs::groups_of(batch) * gs::simplex_scratch_bytes(num_tasks)
                                                       : -1;
}

gs_status gs_simplex_steps_cpu(const double* matrix, int64_t batch, int64_t num_tasks, double lr, double momentum,
                               int64_t num_iter, double* weights, void* workspace, int64_t workspace_bytes,
                               const gs_parallel* parallel) {
  if (const gs_status status = gs::check_simplex_steps(matrix, batch, num_tasks, num_iter, weights)) return status;
  if (const gs_status status =
          gs::check_workspace(workspace, workspace_bytes, gs_simplex_steps_workspace_bytes(batch, num_tasks)))
    return status;
  const auto solve = [&](int64_t, int64_t group, const double* problem, double* w) {
    gs::simplex_steps(gs::SerialTeam{}, problem, num_tasks, lr, momentum, num_iter, w,
                      gs::scratch_at(workspace, group, gs::simplex_scratch_bytes(num_tasks)));
  };
  gs::each_problem(parallel, matrix, batch, num_tasks, num_tasks * num_tasks, weights, solve);
  return GS_OK;
}

int64_t gs_weights_workspace_bytes(gs_weighting weighting, int64_t batch, int64_t num_tasks) {
  if (gs::check_problems(batch, num_tasks) != GS_OK || gs::check_known(weighting) != GS_OK) return -1;
  const int64_t parts = batch > 0 && gs::is_in_parts(weighting, num_tasks) ? gs::kParts : 0;
  return std::max(parts, gs::groups_of(batch)) * gs::weighting_scratch_bytes(weighting, num_tasks);
}

gs_status gs_weights_cpu(const double* gram, int64_t batch, int64_t num_tasks, gs_weighting weighting,
                         const double* preference, double parameter, double limit, double* weights, void* workspace,
                         int64_t workspace_bytes, const gs_parallel* parallel) {
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (gram && weights), "gram and weights must not be NULL");
  if (const gs_status status = gs::check_weighting(weighting, num_tasks, preference, parameter, limit)) return status;
  if (const gs_status status =
          gs::check_workspace(workspace, workspace_bytes, gs_weights_workspace_bytes(weighting, batch, num_tasks)))
    return status;
  const int64_t bytes = gs::weighting_scratch_bytes(weighting, num_tasks);
  // Threads take parts of few problems, and problems of many.
  const bool in_parts = gs::is_in_parts(weighting, num_tasks), by_parts = in_parts && batch < gs::kParts;
  const auto solve = [&](int64_t, int64_t group, const double* problem, double* w) {
    double* const scratch = gs::scratch_at(workspace, by_parts ? 0 : group, bytes);
    if (in_parts) {
      gs::upgrad_in_parts(by_parts ? parallel : nullptr, problem, num_tasks, preference, parameter, w, scratch, bytes);
    } else {
      gs::solve_weighting(gs::SerialTeam{}, weighting, problem, num_tasks, preference, parameter, limit, 0, 1, w,
                          scratch);
    }
  };
  gs::each_problem(by_parts ? nullptr : parallel, gram, batch, num_tasks, 128 * num_tasks, weights, solve);
  return GS_OK;
}

gs_status gs_gradvac_cpu(const double* gram, int64_t batch, int64_t num_tasks, const int64_t* order, double beta,
                         double* targets, double* weights, const gs_parallel* parallel) {
  if (const gs_status status = gs::check_gradvac(gram, batch, num_tasks, order, beta, targets, weights)) return status;
  if (const gs_status status = order ? gs::check_order(order, num_tasks) : GS_OK) return status;
  const auto solve = [&](int64_t b, int64_t, const double* problem, double* w) {
    std::fill(w, w + num_tasks, 1.0);
    for (int64_t i = 0; i < num_tasks; i++) {
      double v[GS_MAX_TASKS];
      gs::gradvac_row(gs::SerialTeam{}, problem, num_tasks, i, order + i * num_tasks, beta,
                      targets + (b * num_tasks + i) * num_tasks, w, v);
    }
  };
  gs::each_problem(parallel, gram, batch, num_tasks, 128 * num_tasks, weights, solve);
  return GS_OK;
}

gs_status gs_gradnorm_cpu(const double* weights, const double* norms, const double* losses,
                          const double* initial_losses, int64_t batch, int64_t num_tasks, double alpha, double lr,
                          double* new_weights) {
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (weights && norms && losses && initial_losses && new_weights),
             "weights, norms, losses, initial_losses and new_weights must not be NULL");
  if (const gs_status status = gs::check_gradnorm(alpha, lr)) return status;
  for (int64_t b = 0; b < batch; b++) {
    double updated[GS_MAX_TASKS];
    const int64_t at = b * num_tasks;
    gs::gradnorm_update(weights + at, norms + at, losses + at, initial_losses + at, num_tasks, alpha, lr, updated);
    std::copy(updated, updated + num_tasks, new_weights + at);
  }
  return GS_OK;
}

gs_status gs_gradnorm_step_cpu(const double* gram, const double* losses, int64_t batch, int64_t num_tasks, double alpha,
                               double lr, double* state_weights, double* initial_losses, double* weights) {
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (gram && losses && state_weights && initial_losses && weights),
             "gram, losses, state_weights, initial_losses and weights must not be NULL");
  if (const gs_status status = gs::check_gradnorm(alpha, lr)) return status;
  for (int64_t b = 0; b < batch; b++) {
    double norms[GS_MAX_TASKS], updated[GS_MAX_TASKS];
    const int64_t at = b * num_tasks;
    gs::gradnorm_step(gram + at * num_tasks, losses + at, num_tasks, alpha, lr, state_weights + at, initial_losses + at,
                      weights + at, norms, updated);
  }
  return GS_OK;
}
