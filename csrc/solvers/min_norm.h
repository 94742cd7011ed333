// SPDX-License-Identifier: MIT
// argmin w^T G w over the simplex: the shortest convex combination of the task gradients (MGDA).
#pragma once
#include "common.h"

namespace gs {

// argmin over c in [0, 1] of |c a + (1 - c) b|^2, from inner products (Sener & Koltun 2018, Algorithm 1).
GS_HOST_DEVICE inline double two_point_min_norm(double aa, double ab, double bb) {
  if (ab >= aa) return 1;
  if (ab >= bb) return 0;
  return (bb - ab) / (aa + bb - 2 * ab);
}

// Frank-Wolfe (Sener & Koltun 2018, Algorithm 2) from the uniform weights, until the step is below tol or for max_iter
// iterations. gw is scratch of num_tasks values.
GS_HOST_DEVICE inline void frank_wolfe(const double* gram, int64_t num_tasks, int64_t max_iter, double tol,
                                       double* weights, double* gw) {
  for (int64_t i = 0; i < num_tasks; i++) weights[i] = 1.0 / static_cast<double>(num_tasks);
  for (int64_t iter = 0; iter < max_iter; iter++) {
    int64_t vertex = 0;
    for (int64_t i = 0; i < num_tasks; i++) {
      gw[i] = dot(gram + i * num_tasks, weights, num_tasks);
      if (gw[i] < gw[vertex]) vertex = i;
    }
    const double keep = two_point_min_norm(dot(weights, gw, num_tasks), gw[vertex], gram[vertex * num_tasks + vertex]);
    for (int64_t i = 0; i < num_tasks; i++) weights[i] *= keep;
    weights[vertex] += 1 - keep;
    if (1 - keep < tol) return;
  }
}

// Wolfe's algorithm (P. Wolfe, "Finding the nearest point in a polytope", Math. Programming 11, 1976) in Gram form.
// It keeps a set S of tasks whose affine hull has its shortest point inside the simplex, adds the task that most
// violates the optimality condition (G w)_j >= w^T G w, and drops tasks whose weight reaches zero. The shortest point
// of the hull solves (G_S + c 1 1^T) u = 1, w = u / sum(u), for any c > 0; c = min_i G_ii keeps rows of every scale in
// range. The Cholesky factor of that matrix is extended by a row when a task enters and repaired by Givens rotations
// when one leaves.
class MinNorm {
 public:
  static constexpr int64_t scratch_doubles(int64_t num_tasks) { return num_tasks * (num_tasks + 3); }

  // scratch holds scratch_doubles(num_tasks) values, members num_tasks.
  GS_HOST_DEVICE MinNorm(const double* gram, int64_t num_tasks, double* weights, double* scratch, int64_t* members)
      : gram_(gram),
        tasks_(num_tasks),
        weights_(weights),
        members_(members),
        factor_(scratch),
        gw_(scratch + num_tasks * num_tasks),
        norm_(gw_ + num_tasks),
        u_(norm_ + num_tasks) {}

  GS_HOST_DEVICE void solve() {
    int64_t shortest = 0;
    for (int64_t i = 0; i < tasks_; i++) {
      weights_[i] = 0;
      norm_[i] = std::sqrt(at(i, i));
      if (at(i, i) < at(shortest, shortest)) shortest = i;
    }
    weights_[shortest] = 1;
    shift_ = at(shortest, shortest);
    if (!(shift_ > 0)) return;  // a zero gradient is the shortest point itself
    enter(shortest);
    int64_t solves = 8 * tasks_ + 32;
    for (int64_t j = most_violating(); j >= 0 && solves > 0; j = most_violating()) {
      enter(j);
      while (solves-- > 0 && !move_to_face_minimum()) {
      }
    }
  }

 private:
  GS_HOST_DEVICE double at(int64_t i, int64_t j) const { return gram_[i * tasks_ + j]; }

  // The task j outside S with the largest (w^T G w - (G w)_j) relative to the rounding error of (G w)_j; -1 if none is
  // above it.
  GS_HOST_DEVICE int64_t most_violating() {
    double spread = 0, value = 0;
    for (int64_t i = 0; i < tasks_; i++) {
      gw_[i] = dot(gram_ + i * tasks_, weights_, tasks_);
      spread += weights_[i] * norm_[i];
      value += weights_[i] * gw_[i];
    }
    double worst = kTolerance * spread;
    int64_t worst_task = -1;
    for (int64_t j = 0; j < tasks_; j++) {
      const double violation = (value - gw_[j]) / norm_[j];
      if (weights_[j] == 0 && violation > worst) {
        worst = violation;
        worst_task = j;
      }
    }
    return worst_task;
  }

  // Appends the row of task j to the Cholesky factor.
  GS_HOST_DEVICE void enter(int64_t j) {
    double* row = factor_ + size_ * tasks_;
    double pivot = at(j, j) + shift_;
    const double floor = 1e-14 * pivot;  // below it, j is affinely dependent on S to working precision
    for (int64_t k = 0; k < size_; k++) {
      row[k] = (at(j, members_[k]) + shift_ - dot(row, factor_ + k * tasks_, k)) / factor_[k * tasks_ + k];
      pivot -= row[k] * row[k];
    }
    row[size_] = std::sqrt(pivot > floor ? pivot : floor);
    members_[size_++] = j;
  }

  // Removes row k: the rows below it shift up, and rotations make them lower triangular again.
  GS_HOST_DEVICE void leave(int64_t k) {
    weights_[members_[k]] = 0;
    size_--;
    for (int64_t r = k; r < size_; r++) {
      members_[r] = members_[r + 1];
      double* row = factor_ + r * tasks_;
      for (int64_t c = 0; c <= r + 1; c++) row[c] = row[tasks_ + c];
    }
    for (int64_t c = k; c < size_; c++) {
      double* pivot = factor_ + c * tasks_ + c;
      const double radius = std::sqrt(pivot[0] * pivot[0] + pivot[1] * pivot[1]);
      const double cosine = pivot[0] / radius, sine = pivot[1] / radius;
      for (int64_t r = c; r < size_; r++) {
        double* pair = factor_ + r * tasks_ + c;
        const double rotated = cosine * pair[0] + sine * pair[1];
        pair[1] = cosine * pair[1] - sine * pair[0];
        pair[0] = rotated;
      }
    }
  }

  // Moves w towards the shortest point of S's affine hull. True if it got there, false if a task left S on the way.
  GS_HOST_DEVICE bool move_to_face_minimum() {
    for (int64_t i = 0; i < size_; i++) {
      u_[i] = (1 - dot(factor_ + i * tasks_, u_, i)) / factor_[i * tasks_ + i];
    }
    double total = 0;
    for (int64_t i = size_ - 1; i >= 0; i--) {
      for (int64_t k = i + 1; k < size_; k++) u_[i] -= factor_[k * tasks_ + i] * u_[k];
      u_[i] /= factor_[i * tasks_ + i];
      total += u_[i];
    }
    double reach = 1;
    int64_t blocking = -1;
    for (int64_t i = 0; i < size_; i++) {
      u_[i] /= total;
      const double w = weights_[members_[i]];
      if (u_[i] <= 0 && w <= reach * (w - u_[i])) {
        reach = w > 0 ? w / (w - u_[i]) : 0;
        blocking = i;
      }
    }
    for (int64_t i = 0; i < size_; i++) weights_[members_[i]] += reach * (u_[i] - weights_[members_[i]]);
    if (blocking < 0) return true;
    leave(blocking);
    return false;
  }

  static constexpr double kTolerance = 1e-14;

  const double* gram_;
  const int64_t tasks_;
  double* weights_;
  int64_t* members_;
  double* factor_;  // [size][num_tasks] lower triangular
  double *gw_, *norm_, *u_;
  double shift_ = 0;
  int64_t size_ = 0;
};

}  // namespace gs
