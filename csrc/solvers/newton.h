// SPDX-License-Identifier: MIT
// FairGrad (Ban and Ji, ICML 2024, equation 8), and for alpha = 1 Nash-MTL (Navon et al., ICML 2022, equation 3):
// (G w)_i = w_i^(-1 / alpha), w > 0.
#pragma once
#include "cholesky.h"

namespace gs {

constexpr int64_t newton_scratch(int64_t num_tasks) {
  return num_tasks * (num_tasks + 6) + (num_tasks + 1) * padded(num_tasks);
}

// With n_i = |g_i| / max |g|, y_i = n_i w_i, K the matrix of cosines and p = 1 / alpha this is (K y)_i = n_i^(p - 1)
// y_i^-p: the minimum of the convex F(y) = y^T K y / 2 - sum_i n_i^(p - 1) phi(y_i), phi'(y) = y^-p. Newton's method.
// Of steps that take some y_i further than nine tenths of the way to 0 the others take them by y_i^-p instead, in which
// the equation of a small y_i is linear, and if that does not bring all closer, all stop at the nine tenths. A ridge of
// 1e-12 on K gives Pareto-stationary gradients an answer too, where y has none or grows without bound. Where F turns
// out not to be convex, because G was rounded, it starts again with more of a ridge.
template <class Team>
class Newton {
 public:
  // scratch holds newton_scratch(num_tasks) values.
  GS_HOST_DEVICE Newton(const Team& team, const double* gram, int64_t num_tasks, double alpha, double* scratch)
      : team_(team),
        tasks_(num_tasks),
        power_(1 / alpha),
        norms_(scratch),
        c_(norms_ + num_tasks),
        y_(c_ + num_tasks),
        ky_(y_ + num_tasks),
        bend_(ky_ + num_tasks),
        tried_(bend_ + num_tasks),
        cosines_(tried_ + num_tasks),
        rows_(cosines_ + num_tasks * num_tasks) {
    for (int64_t i = 0; i < num_tasks; i++) largest_ = std::fmax(largest_, gram[i * num_tasks + i]);
    largest_ = std::sqrt(largest_);
    for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
      norms_[i] = largest_ > 0 ? std::sqrt(gram[i * num_tasks + i]) / largest_ : 0;
    }
    team.sync();
    each_entry(team, num_tasks, [&](int64_t i, int64_t j) {
      const bool some = norms_[i] > 0 && norms_[j] > 0;
      const double cosine = some ? gram[i * num_tasks + j] / largest_ / norms_[i] / largest_ / norms_[j] : 0;
      cosines_[i * num_tasks + j] = std::fmin(std::fmax(cosine, -1.0), 1.0);
    });
    for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
      // Without pow, which takes as long as a step, for Nash-MTL.
      c_[i] = norms_[i] > 0 && power_ != 1 ? std::pow(norms_[i], power_ - 1) : 1;
    }
  }

  // The weights; 0 for a zero gradient.
  GS_HOST_DEVICE void solve(double* weights) {
    for (double ridge = 1e-12; !descend(ridge);) {
      ridge = std::fmax(8 * ridge, 0x1p-23 * static_cast<double>(tasks_));
    }
    const double scale = std::pow(largest_, -2 / (1 + power_));
    for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      weights[i] = norms_[i] > 0 ? y_[i] / norms_[i] * scale : 0;
    }
    team_.sync();
  }

 private:
  // False where F is not convex.
  GS_HOST_DEVICE bool descend(double ridge) {
    const int64_t stride = padded(tasks_);
    double* const direction = rows_ + tasks_ * stride;
    double last = INFINITY;
    team_.sync();
    for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      cosines_[i * (tasks_ + 1)] = 1 + ridge;
      y_[i] = c_[i] == 1 ? 1 : std::pow(c_[i], 1 / (1 + power_));  // exact where the gradients are orthogonal
    }
    team_.sync();
    double residual = measure(y_);
    while (steps_-- > 0 && residual > 1e-15) {
      for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
        direction[i] = bend_[i] - ky_[i];
        bend_[i] *= power_ / y_[i];
      }
      team_.sync();
      const auto entry = [&](int64_t i, int64_t j) { return cosines_[i * tasks_ + j] + (i == j ? bend_[i] : 0); };
      if (!solve_positive(team_, entry, rows_, stride, tasks_, kLeastPivot)) return false;
      double lowest = 0;
      for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) lowest = std::fmin(lowest, direction[i] / y_[i]);
      int64_t unused = 0;
      team_.least(lowest, unused);
      const double step = lowest < -0.9 ? -0.9 / lowest : 1, before = residual;
      residual = INFINITY;
      if (step < 1) {
        for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
          const double part = direction[i] / y_[i];
          const double fallen = part < 0 ? y_[i] * std::pow(1 - power_ * part, -1 / power_) : y_[i] + direction[i];
          tried_[i] = fallen > kLeastY ? fallen : kLeastY;
        }
        team_.sync();
        residual = measure(tried_);
      }
      if (!(residual < before)) {
        team_.sync();  // others may still multiply by tried_
        for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) tried_[i] = y_[i] + step * direction[i];
        team_.sync();
        residual = measure(tried_);
      }
      const bool ends = before <= 1e-3 && before >= 0.5 * last;  // as good as rounding allows
      if (ends && !(residual < before)) break;
      for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) y_[i] = tried_[i];
      if (ends) break;
      last = before;
    }
    return true;
  }

  // How much of each pull is missing or too much, the root of the mean square, but for those that cannot get smaller. K
  // y and the pulls are left in ky_ and bend_.
  GS_HOST_DEVICE_CALL double measure(const double* y) {
    multiply(team_, cosines_, tasks_, y, ky_);
    double squares = 0;
    for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      bend_[i] = power_ == 1 ? c_[i] / y[i] : c_[i] * std::pow(y[i], -power_);
      const double error = (bend_[i] - ky_[i]) / bend_[i];
      squares += y[i] > kLeastY || error > 0 ? error * error : 0;
    }
    return std::sqrt(team_.sum(squares) / static_cast<double>(tasks_));
  }

  static constexpr double kLeastY = 1e-290;

  const Team team_;
  const int64_t tasks_;
  const double power_;
  double *norms_, *c_, *y_, *ky_;
  double* bend_;   // the second derivatives of the separate terms of F
  double* tried_;  // what may become y
  double *cosines_, *rows_;
  double largest_ = 0;
  int steps_ = 100;
};

// The weights, all shortened by one factor so that |d| <= max_norm.
template <class Team>
GS_HOST_DEVICE void fair_grad(const Team& team, const double* gram, int64_t num_tasks, double alpha, double max_norm,
                              double* weights, double* scratch) {
  Newton(team, gram, num_tasks, alpha, scratch).solve(weights);
  multiply(team, gram, num_tasks, weights, scratch);
  const double norm = std::sqrt(std::fmax(team_dot(team, weights, scratch, num_tasks), 0.0));
  const double factor = norm > max_norm ? max_norm / norm : 1;
  for (int64_t i = team.rank(); i < num_tasks; i += team.size()) weights[i] *= factor;
}

}  // namespace gs
