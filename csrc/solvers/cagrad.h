// SPDX-License-Identifier: MIT
// CAGrad (Liu et al., NeurIPS 2021, Algorithm 1).
#pragma once
#include "dual_cone.h"
#include "min_norm.h"

namespace gs {

constexpr int64_t cagrad_scratch(int64_t num_tasks) {
  const int64_t inner = min_norm_scratch_bytes(num_tasks) / 8, cone = dual_cone_scratch(num_tasks);
  return num_tasks * (num_tasks + 3) + (inner > cone ? inner : cone);
}

// With g_0 the mean gradient and g_x = sum_t x_t g_t, x on the simplex, the problem is to minimize g_x . g_0 +
// kappa |g_x|, kappa = c |g_0|; then d = g_0 + (kappa / |g_x|) g_x. For a given lambda = kappa / |g_x| the optimality
// conditions are those of the shortest convex combination of the vectors lambda g_t + g_0, so min-norm (Wolfe's
// algorithm) yields x. It remains to find the lambda with |lambda g_x| = kappa. |lambda g_x| increases with lambda (the
// problem is jointly convex in x and |g_x|), and while the set of tasks with x_t > 0 stays the same, its square is
// linear in lambda^2: a secant method on these squares, within a bracket, takes few steps.
template <class Team>
class CAGrad {
 public:
  // scratch holds cagrad_scratch(num_tasks) values.
  GS_HOST_DEVICE CAGrad(const Team& team, const double* gram, int64_t num_tasks, double* scratch)
      : team_(team),
        gram_(gram),
        tasks_(num_tasks),
        mean_(scratch),
        x_(mean_ + num_tasks),
        gx_(x_ + num_tasks),
        shifted_(gx_ + num_tasks),
        inner_(shifted_ + num_tasks * num_tasks) {
    for (int64_t i = 0; i < num_tasks; i++) trace_ += gram[i * num_tasks + i];
    const double even = 1 / static_cast<double>(num_tasks);
    sum_rows(team, gram, num_tasks, num_tasks, [](int64_t k) { return k; }, [&](int64_t) { return even; }, mean_);
    double squares = 0;
    for (int64_t i = 0; i < num_tasks; i++) squares += mean_[i] * even;
    mean_squared_ = std::fmax(squares, 0.0);
  }

  GS_HOST_DEVICE void solve(double c, double* weights) {
    const double even = 1 / static_cast<double>(tasks_), kappa = c * std::sqrt(mean_squared_);
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) weights[i] = even;
    team_.sync();
    // If the mean gradient is 0 up to rounding, so is d.
    if (!(c > 0) || !(mean_squared_ > 1e-15 * trace_)) return;
    double length = !(c >= 1 && is_stationary()) && find_root(kappa) ? std::sqrt(length_squared()) : 0;
    if (length == 0) {
      // Pareto-stationary gradients: g_x = 0. Several directions solve the problem; takes the one nearest to g_0.
      DualCone cone(team_, gram_, tasks_, 1e-12, inner_);
      cone.add_solution({nullptr, even, -1}, weights);
      GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
        x_[i] = weights[i] - 2 * even;
        weights[i] = even;
      }
      team_.sync();
      multiply(team_, gram_, tasks_, x_, gx_);
      length = std::fmax(std::sqrt(length_squared()), kappa);  // d stays in the ball, up to rounding
    }
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) weights[i] += kappa / length * x_[i];
    team_.sync();
  }

 private:
  static constexpr double kCancelled = 4e-14;

  // Computes x for one lambda (with share = 0: x of the shortest convex combination of the g_t); returns |lambda
  // g_x|^2.
  GS_HOST_DEVICE_CALL double minimize(double lambda, double share = 1) {
    each_entry(team_, tasks_, [&](int64_t i, int64_t j) {
      const double shift = share * (lambda * (mean_[i] + mean_[j]) + mean_squared_);
      const double product = lambda * lambda * gram_[i * tasks_ + j] + shift;
      shifted_[i * tasks_ + j] = i == j ? std::fmax(product, 0.0) : product;  // a square, negative only by rounding
    });
    MinNorm(team_, shifted_, tasks_, x_, inner_).solve(/*warm=*/known_);
    known_ = true;
    team_.sync();
    multiply(team_, gram_, tasks_, x_, gx_);
    return lambda * lambda * length_squared();
  }

  GS_HOST_DEVICE double length_squared() const { return std::fmax(team_dot(team_, x_, gx_, tasks_), 0.0); }

  // Whether g_x = 0 for some x, up to the rounding of its terms or to the error in min-norm's optimality conditions: by
  // convexity every |g_x|^2 is at least the found |g_x|^2 - 2 max_t (|g_x|^2 - g_x . g_t). If g_x = 0 and c >= 1, no
  // lambda solves the problem; the search would not notice, as rounding dominates at such large lambda.
  GS_HOST_DEVICE bool is_stationary() {
    const double squared = minimize(1, 0);
    double terms = 0, least = squared;
    int64_t unused = 0;
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      terms += x_[i] * std::sqrt(gram_[i * (tasks_ + 1)]);
      least = std::fmin(least, gx_[i]);
    }
    terms = team_.sum(terms);
    team_.least(least, unused);
    return squared <= std::fmax(kCancelled * terms * terms, 2 * (squared - least));
  }

  GS_HOST_DEVICE bool is_indefinite() {
    const int64_t stride = padded(tasks_);
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) inner_[tasks_ * stride + i] = 0;
    team_.sync();
    const auto entry = [&](int64_t i, int64_t j) { return gram_[i * tasks_ + j] + (i == j ? 1e-12 * trace_ : 0); };
    const bool definite = solve_positive(team_, entry, inner_, stride, tasks_, 0);
    team_.sync();
    return !definite;
  }

  // Finds the lambda with |lambda g_x| = kappa and leaves its x in x_; false if there is none below 1e7 kappa / |g|.
  GS_HOST_DEVICE bool find_root(double kappa) {
    const double target = kappa * kappa, least = target / trace_;  // the root is above `least`
    double low = 0, high = 0x1p23 * least;                         // a bracket for lambda^2
    double before = 0, before_value = -target, last = high, last_value = minimize(std::sqrt(high)) - target;
    if (last_value < 0) {
      // An indefinite G was rounded (to float32, say): for so large a lambda only its rounding error would count.
      if (is_indefinite()) return false;
      before = low = high;
      before_value = last_value;
      last = high = 1e14 * least;
      last_value = minimize(std::sqrt(high)) - target;
    }
    if (last_value < 0) return false;
    for (int step = 0; step < 40 && high - low > 1e-15 * high; step++) {
      // The secant through the last two points; the geometric mean of the bracket if the secant leaves it or is slow.
      double next = last - last_value * (last - before) / (last_value - before_value);
      const bool slow = step > 0 && std::fabs(last_value) > 0.5 * std::fabs(before_value);
      if (slow || !(next > low && next < high)) next = std::sqrt(std::fmax(low, least) * high);
      before = last;
      before_value = last_value;
      last = next;
      last_value = minimize(std::sqrt(next)) - target;
      if (std::fabs(last_value) <= 1e-12 * target) break;
      (last_value < 0 ? low : high) = next;
    }
    return true;
  }

  const Team team_;
  const double* gram_;
  const int64_t tasks_;
  double *mean_, *x_, *gx_, *shifted_, *inner_;
  double trace_ = 0, mean_squared_ = 0;
  bool known_ = false;  // x_ holds the x of an earlier lambda
};

}  // namespace gs
