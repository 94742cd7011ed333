// SPDX-License-Identifier: MIT
// The C boundary: checks of the arguments, the caller's parallel loop, the caller's workspace.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "status.h"

namespace gs {

// With more, the number of bytes or of products could overflow int64_t.
constexpr int64_t kMaxBatch = int64_t{1} << 40;
constexpr int64_t kMaxElements = int64_t{1} << 52;

inline gs_status check_tasks(int64_t num_tasks) {
  GS_REQUIRE(num_tasks >= 1, "num_tasks must be at least 1, got %lld", (long long)num_tasks);
  if (num_tasks > GS_MAX_TASKS) {
    return fail(GS_UNSUPPORTED, "num_tasks must be at most %d, got %lld", GS_MAX_TASKS, (long long)num_tasks);
  }
  return GS_OK;
}

inline gs_status check(const gs_gradients& g) {
  if (const gs_status status = check_tasks(g.num_tasks)) return status;
  GS_REQUIRE(g.num_params >= 0, "num_params must be >= 0, got %lld", (long long)g.num_params);
  GS_REQUIRE(g.num_segments >= 1 && g.num_segments <= INT32_MAX, "num_segments must be in 1..2^31-1, got %lld",
             (long long)g.num_segments);
  GS_REQUIRE(g.num_params == 0 || (g.data && g.numel && g.dtype), "data, numel and dtype must not be NULL");
  int64_t left = kMaxElements;
  for (int64_t p = 0; p < g.num_params; p++) {
    GS_REQUIRE(g.numel[p] >= 0, "numel[%lld] must be >= 0, got %lld", (long long)p, (long long)g.numel[p]);
    GS_REQUIRE(g.numel[p] <= left, "numel must sum to at most 2^52, got %lld in numel[%lld], where %lld are left",
               (long long)g.numel[p], (long long)p, (long long)left);
    left -= g.numel[p];
    GS_REQUIRE(g.dtype[p] >= GS_FLOAT64 && g.dtype[p] <= GS_FLOAT16, "dtype[%lld] must be a gs_dtype, got %d",
               (long long)p, g.dtype[p]);
    GS_REQUIRE(!g.segment || (g.segment[p] >= 0 && g.segment[p] < g.num_segments),
               "segment[%lld] must be in 0..%lld, got %d", (long long)p, (long long)g.num_segments - 1, g.segment[p]);
  }
  return GS_OK;
}

inline gs_status check(const gs_gradients* grads) {
  GS_REQUIRE(grads, "grads must not be NULL");
  return check(*grads);
}

inline gs_status check_problems(int64_t batch, int64_t num_tasks) {
  GS_REQUIRE(batch >= 0 && batch <= kMaxBatch, "batch must be in 0..2^40, got %lld", (long long)batch);
  return check_tasks(num_tasks);
}

inline gs_status check_simplex_steps(const double* matrix, int64_t batch, int64_t num_tasks, int64_t num_iter,
                                     const double* weights) {
  if (const gs_status status = check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (matrix && weights), "matrix and weights must not be NULL");
  GS_REQUIRE(num_iter >= 0, "num_iter must be >= 0, got %lld", (long long)num_iter);
  return GS_OK;
}

// order [T, T] is read on the host.
inline gs_status check_order(const int64_t* order, int64_t num_tasks) {
  for (int64_t i = 0; i < num_tasks; i++) {
    bool seen[GS_MAX_TASKS] = {};
    for (int64_t k = 0; k < num_tasks; k++) {
      const int64_t j = order[i * num_tasks + k];
      GS_REQUIRE(j >= 0 && j < num_tasks && !seen[j], "order row %lld must be a permutation of 0..%lld", (long long)i,
                 (long long)num_tasks - 1);
      seen[j] = true;
    }
  }
  return GS_OK;
}

inline gs_status check_gradvac(const double* gram, int64_t batch, int64_t num_tasks, const int64_t* order, double beta,
                               const double* targets, const double* weights) {
  if (const gs_status status = check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (gram && order && targets && weights), "gram, order, targets and weights must not be NULL");
  GS_REQUIRE(beta >= 0 && beta <= 1, "beta must be in 0..1, got %g", beta);
  return GS_OK;
}

inline gs_status check_gradnorm(double alpha, double lr) {
  GS_REQUIRE(alpha >= 0 && alpha < INFINITY && lr >= 0 && lr < INFINITY,
             "alpha and lr must be >= 0 and finite, got %g and %g", alpha, lr);
  return GS_OK;
}

inline gs_status check_known(gs_weighting weighting) {
  GS_REQUIRE(weighting >= GS_UPGRAD && weighting <= GS_PCD, "weighting must be a gs_weighting, got %d", (int)weighting);
  return GS_OK;
}

inline gs_status check_weighting(gs_weighting weighting, int64_t num_tasks, const double* preference, double parameter,
                                 double limit) {
  if (const gs_status status = check_known(weighting)) return status;
  const bool ridge = weighting == GS_UPGRAD || weighting == GS_DUALPROJ;
  GS_REQUIRE(!ridge || (parameter > 0 && parameter < INFINITY), "ridge must be positive and finite, got %g", parameter);
  GS_REQUIRE(weighting != GS_CAGRAD || (parameter >= 0 && parameter <= 1e30), "c must be in 0..1e30, got %g",
             parameter);
  GS_REQUIRE(weighting != GS_FAIRGRAD || (parameter > 0 && parameter < INFINITY && limit > 0),
             "alpha and limit must be positive and alpha finite, got %g and %g", parameter, limit);
  const auto tasks = static_cast<double>(num_tasks);
  const auto is_whole = [&](double value, double least) {
    return value >= least && value <= tasks && value == std::floor(value);
  };
  GS_REQUIRE(weighting != GS_KRUM || (is_whole(parameter, 0) && is_whole(limit, 1)),
             "Krum's parameter must be in 0..%lld and its limit in 1..%lld, whole numbers, got %g and %g",
             (long long)num_tasks, (long long)num_tasks, parameter, limit);
  GS_REQUIRE(weighting != GS_PCD || preference || (parameter >= 0 && parameter <= 1), "share must be in 0..1, got %g",
             parameter);
  return GS_OK;
}

inline gs_status check_solver(gs_solver solver, int64_t max_iter, double tol) {
  GS_REQUIRE(solver == GS_EXACT || solver == GS_FRANK_WOLFE, "solver must be a gs_solver, got %d", (int)solver);
  GS_REQUIRE(solver == GS_EXACT || (max_iter >= 1 && tol >= 0),
             "max_iter must be at least 1 and tol >= 0, got %lld and %g", (long long)max_iter, tol);
  return GS_OK;
}

inline gs_status check_solve(const gs_gradients* grads, const gs_solve* solve) {
  GS_REQUIRE(grads && solve, "grads and solve must not be NULL");
  if (const gs_status status = check(*grads)) return status;
  switch (solve->method) {
    case GS_PCGRAD:
      return GS_OK;
    case GS_MIN_NORM:
      return check_solver(solve->solver, solve->max_iter, solve->tol);
    case GS_WEIGHTING:
      return check_weighting(solve->weighting, grads->num_tasks, solve->preference, solve->parameter, solve->limit);
  }
  return fail(GS_INVALID_ARGUMENT, "method must be a gs_method, got %d", (int)solve->method);
}

inline gs_status check_aggregate(const gs_gradients* grads, const gs_solve* solve, const double* gram,
                                 const double* weights, void* const* out) {
  if (const gs_status status = check_solve(grads, solve)) return status;
  GS_REQUIRE(gram && weights && (out || grads->num_params == 0), "gram, weights and out must not be NULL");
  return GS_OK;
}

inline gs_status check_rule(const gs_rule& rule, int64_t num_tasks) {
  GS_REQUIRE(rule.kind == GS_GRADDROP || rule.kind == GS_TRIMMED_MEAN, "kind must be a gs_rule_kind, got %d",
             (int)rule.kind);
  GS_REQUIRE(rule.kind != GS_GRADDROP || rule.step, "step must not be NULL");
  GS_REQUIRE(rule.kind != GS_TRIMMED_MEAN || (rule.num_trimmed >= 0 && rule.num_trimmed <= (num_tasks - 1) / 2),
             "num_trimmed must be in 0..%lld for %lld tasks, got %lld", (long long)((num_tasks - 1) / 2),
             (long long)num_tasks, (long long)rule.num_trimmed);
  return GS_OK;
}

inline int64_t segment_of(const gs_gradients& g, int64_t p) { return g.segment ? g.segment[p] : 0; }

inline int64_t element_bytes(int32_t dtype) { return dtype == GS_FLOAT64 ? 8 : dtype == GS_FLOAT32 ? 4 : 2; }

inline const char* offset(const void* data, int32_t dtype, int64_t elements) {
  return static_cast<const char*>(data) + elements * element_bytes(dtype);
}

// Calls body(i) for i in 0..count-1; on the calling thread if there is no parallel loop or only one index.
template <class Body>
void parallel_for(const gs_parallel* parallel, int64_t count, Body body) {
  if (!parallel || !parallel->run || count <= 1) {
    for (int64_t i = 0; i < count; i++) body(i);
  } else {
    parallel->run(parallel->context, count, [](void* arg, int64_t i) { (*static_cast<Body*>(arg))(i); }, &body);
  }
}

// Cuts arrays out of the caller's workspace, each on a 64-byte boundary. With a null base it only counts the bytes.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}

  template <class T>
  T* take(int64_t count) {
    T* array = base_ ? reinterpret_cast<T*>(base_ + bytes_) : nullptr;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return array;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

inline gs_status check_workspace(const void* workspace, int64_t given, int64_t needed) {
  GS_REQUIRE(given >= needed, "workspace must hold %lld bytes, got %lld", (long long)needed, (long long)given);
  GS_REQUIRE(needed == 0 || workspace, "workspace must not be NULL");
  GS_REQUIRE(needed == 0 || reinterpret_cast<uintptr_t>(workspace) % 64 == 0, "workspace must be aligned to 64 bytes");
  return GS_OK;
}

}  // namespace gs
