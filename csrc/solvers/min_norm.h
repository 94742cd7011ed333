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

// gw_i = (G w)_i. G is symmetric: its rows are read as columns, which neighbouring members do together.
template <class Team>
GS_HOST_DEVICE void multiply(const Team& team, const double* gram, int64_t num_tasks, const double* weights,
                             double* gw) {
  constexpr int64_t kColumns = Team::kColumns;
  for (int64_t first = team.rank() * kColumns; first < num_tasks; first += team.size() * kColumns) {
    double sum[kColumns] = {};
    const int64_t count = num_tasks - first < kColumns ? num_tasks - first : kColumns;
    for (int64_t k = 0; k < num_tasks; k++) {
      const double* row = gram + k * num_tasks + first;
      if (count == kColumns) {
        for (int64_t c = 0; c < kColumns; c++) sum[c] += row[c] * weights[k];
      } else {
        for (int64_t c = 0; c < count; c++) sum[c] += row[c] * weights[k];
      }
    }
    for (int64_t c = 0; c < count; c++) gw[first + c] = sum[c];
  }
  team.sync();
}

// Frank-Wolfe (Sener & Koltun 2018, Algorithm 2) from the uniform weights, until the step is below tol or for max_iter
// iterations. gw is scratch of num_tasks values.
template <class Team>
GS_HOST_DEVICE void frank_wolfe(const Team& team, const double* gram, int64_t num_tasks, int64_t max_iter, double tol,
                                double* weights, double* gw) {
  for (int64_t i = team.rank(); i < num_tasks; i += team.size()) weights[i] = 1.0 / static_cast<double>(num_tasks);
  team.sync();
  for (int64_t iter = 0; iter < max_iter; iter++) {
    multiply(team, gram, num_tasks, weights, gw);
    int64_t vertex = 0;
    double value = 0;
    for (int64_t i = 0; i < num_tasks; i++) {
      value += weights[i] * gw[i];
      if (gw[i] < gw[vertex]) vertex = i;
    }
    const double keep = two_point_min_norm(value, gw[vertex], gram[vertex * num_tasks + vertex]);
    team.sync();
    for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
      weights[i] = weights[i] * keep + (i == vertex ? 1 - keep : 0);
    }
    team.sync();
    if (1 - keep < tol) return;
  }
}

constexpr int64_t min_norm_scratch_bytes(int64_t num_tasks) { return (num_tasks * (num_tasks + 4) * 8 + 63) / 64 * 64; }

// Wolfe's algorithm (P. Wolfe, "Finding the nearest point in a polytope", Math. Programming 11, 1976) in Gram form.
// It keeps a set S of tasks whose affine hull has its shortest point inside the simplex, adds the task that most
// violates the optimality condition (G w)_j >= w^T G w, and drops tasks whose weight reaches zero. The shortest point
// of the hull solves (G_S + c 1 1^T) u = 1, w = u / sum(u), for any c > 0; c = min_i G_ii keeps rows of every scale in
// range. The Cholesky factor L of that matrix is extended by a row when a task enters and repaired by Givens rotations
// when one leaves. L is stored by columns, so that members work on neighbouring rows.
template <class Team>
class MinNorm {
 public:
  // scratch holds min_norm_scratch_bytes(num_tasks).
  GS_HOST_DEVICE MinNorm(const Team& team, const double* gram, int64_t num_tasks, double* weights, double* scratch)
      : team_(team),
        gram_(gram),
        tasks_(num_tasks),
        weights_(weights),
        factor_(scratch),
        gw_(scratch + num_tasks * num_tasks),
        norm_(gw_ + num_tasks),
        u_(norm_ + num_tasks),
        members_(reinterpret_cast<int64_t*>(u_ + num_tasks)) {}

  GS_HOST_DEVICE void solve() {
    int64_t shortest = 0;
    for (int64_t i = 0; i < tasks_; i++) {
      if (at(i, i) < at(shortest, shortest)) shortest = i;
    }
    for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      weights_[i] = i == shortest ? 1 : 0;
      norm_[i] = std::sqrt(at(i, i));
    }
    team_.sync();
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
  GS_HOST_DEVICE double& factor(int64_t row, int64_t column) { return factor_[column * tasks_ + row]; }

  // The task j outside S with the largest (w^T G w - (G w)_j) relative to the rounding error of (G w)_j; -1 if none is
  // above it.
  GS_HOST_DEVICE int64_t most_violating() {
    multiply(team_, gram_, tasks_, weights_, gw_);
    double spread = 0, value = 0;
    for (int64_t i = 0; i < tasks_; i++) {
      spread += weights_[i] * norm_[i];
      value += weights_[i] * gw_[i];
    }
    for (int64_t j = team_.rank(); j < tasks_; j += team_.size()) u_[j] = (value - gw_[j]) / norm_[j];
    team_.sync();
    double worst = kTolerance * spread;
    int64_t worst_task = -1;
    for (int64_t j = 0; j < tasks_; j++) {
      if (weights_[j] == 0 && u_[j] > worst) {
        worst = u_[j];
        worst_task = j;
      }
    }
    team_.sync();
    return worst_task;
  }

  // u = L^-1 u. Returns |u|^2.
  GS_HOST_DEVICE double solve_lower() {
    double squares = 0;
    for (int64_t k = 0; k < size_; k++) {
      const double value = u_[k] / factor(k, k);
      squares += value * value;
      team_.sync();
      if (team_.rank() == 0) u_[k] = value;
      for (int64_t r = k + 1 + team_.rank(); r < size_; r += team_.size()) u_[r] -= value * factor(r, k);
      team_.sync();
    }
    return squares;
  }

  // Appends the row of task j to the Cholesky factor.
  GS_HOST_DEVICE void enter(int64_t j) {
    for (int64_t k = team_.rank(); k < size_; k += team_.size()) u_[k] = at(j, members_[k]) + shift_;
    team_.sync();
    const double diagonal = at(j, j) + shift_, pivot = diagonal - solve_lower();
    const double floor = 1e-14 * diagonal;  // below it, j is affinely dependent on S to working precision
    for (int64_t k = team_.rank(); k < size_; k += team_.size()) factor(size_, k) = u_[k];
    if (team_.rank() == 0) {
      factor(size_, size_) = std::sqrt(pivot > floor ? pivot : floor);
      members_[size_] = j;
    }
    size_++;
    team_.sync();
  }

  // Removes row k: the rows below it shift up, and rotations make them lower triangular again.
  GS_HOST_DEVICE void leave(int64_t k) {
    size_--;
    for (int64_t c = team_.rank(); c <= size_; c += team_.size()) {
      for (int64_t r = c > k + 1 ? c - 1 : k; r < size_; r++) factor(r, c) = factor(r + 1, c);
    }
    if (team_.rank() == 0) {
      weights_[members_[k]] = 0;
      for (int64_t r = k; r < size_; r++) members_[r] = members_[r + 1];
    }
    team_.sync();
    for (int64_t c = k; c < size_; c++) {
      const double a = factor(c, c), b = factor(c, c + 1);
      const double radius = std::sqrt(a * a + b * b), cosine = a / radius, sine = b / radius;
      team_.sync();
      for (int64_t r = c + team_.rank(); r < size_; r += team_.size()) {
        const double left = factor(r, c), right = factor(r, c + 1);
        factor(r, c) = cosine * left + sine * right;
        factor(r, c + 1) = cosine * right - sine * left;
      }
      team_.sync();
    }
  }

  // Moves w towards the shortest point of S's affine hull. True if it got there, false if a task left S on the way.
  GS_HOST_DEVICE bool move_to_face_minimum() {
    for (int64_t i = team_.rank(); i < size_; i += team_.size()) u_[i] = 1;
    team_.sync();
    solve_lower();
    double total = 0;
    for (int64_t k = size_ - 1; k >= 0; k--) {
      const double value = u_[k] / factor(k, k);
      total += value;
      team_.sync();
      if (team_.rank() == 0) u_[k] = value;
      for (int64_t i = team_.rank(); i < k; i += team_.size()) u_[i] -= value * factor(k, i);
      team_.sync();
    }
    double reach = 1;
    int64_t blocking = -1;
    for (int64_t i = 0; i < size_; i++) {
      const double w = weights_[members_[i]], target = u_[i] / total;
      if (target <= 0 && w <= reach * (w - target)) {
        reach = w > 0 ? w / (w - target) : 0;
        blocking = i;
      }
    }
    team_.sync();
    for (int64_t i = team_.rank(); i < size_; i += team_.size()) {
      weights_[members_[i]] += reach * (u_[i] / total - weights_[members_[i]]);
    }
    team_.sync();
    if (blocking < 0) return true;
    leave(blocking);
    return false;
  }

  static constexpr double kTolerance = 1e-14;

  const Team team_;
  const double* gram_;
  const int64_t tasks_;
  double* weights_;
  double* factor_;
  double *gw_, *norm_, *u_;
  int64_t* members_;
  double shift_ = 0;
  int64_t size_ = 0;
};

}  // namespace gs
