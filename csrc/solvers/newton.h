// SPDX-License-Identifier: MIT
// FairGrad (Ban and Ji, ICML 2024, equation 8), and for alpha = 1 Nash-MTL (Navon et al., ICML 2022, equation 3):
// (G w)_i = w_i^(-1 / alpha), w > 0.
#pragma once
#include "cholesky.h"

namespace gs {

constexpr int64_t newton_scratch(int64_t num_tasks) {
  return num_tasks * (num_tasks + 7) + (num_tasks + 1) * padded(num_tasks);
}

// With n_i = |g_i| / max |g|, y_i = n_i w_i, K the matrix of cosines and p = 1 / alpha, this is (K y)_i = n_i^(p - 1)
// y_i^-p: the minimum of the convex F(y) = y^T K y / 2 - sum_i n_i^(p - 1) phi(y_i), phi'(y) = y^-p. Solved by Newton's
// method. If a step would take some y_i more than nine tenths of the way to 0, every y_i that gets smaller takes its
// step in the variable y_i^-p instead, in which the equation of a small y_i is linear. For Pareto-stationary gradients
// there is no solution, or y grows without bound; a ridge of 1e-12 on K gives them an answer. If F turns out not to be
// convex, because G was rounded, the solver starts again with a larger ridge.
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
        missing_(y_ + num_tasks),
        bend_(missing_ + num_tasks),
        inverse_(bend_ + num_tasks),
        tried_(inverse_ + num_tasks),
        cosines_(tried_ + num_tasks),
        rows_(cosines_ + num_tasks * num_tasks) {
    double least = 0;  // the least -G_ii
    GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
      least = std::fmin(least, -gram[i * (num_tasks + 1)]);
    }
    int64_t unused = 0;
    team.least(least, unused);
    largest_ = std::sqrt(-least);
    GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
      const double squared = gram[i * (num_tasks + 1)], norm = squared > 0 ? std::sqrt(squared) : 0;
      norms_[i] = norm > 0 ? norm / largest_ : 0;
      inverse_[i] = norm > 0 ? 1 / norm : 0;
    }
    team.sync();
    each_entry(team, num_tasks, [&](int64_t i, int64_t j) {
      const double cosine = gram[i * num_tasks + j] * inverse_[i] * inverse_[j];
      cosines_[i * num_tasks + j] = std::fmin(std::fmax(cosine, -1.0), 1.0);
    });
    GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) {
      // Nash-MTL (power 1) needs no pow, which takes as long as a step.
      c_[i] = norms_[i] > 0 && power_ != 1 ? std::pow(norms_[i], power_ - 1) : 1;
    }
  }

  // The weights; 0 for a zero gradient.
  GS_HOST_DEVICE void solve(double* weights) {
    for (double ridge = 1e-12; !descend(ridge);) {
      ridge = std::fmax(8 * ridge, 0x1p-23 * static_cast<double>(tasks_));
    }
    const double scale = std::pow(largest_, -2 / (1 + power_));
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      weights[i] = norms_[i] > 0 ? y_[i] / norms_[i] * scale : 0;
    }
    team_.sync();
  }

 private:
  // Returns false if F is not convex. measure() is called in a single place, so that a GPU's compiler inlines it.
  GS_HOST_DEVICE bool descend(double ridge) {
    const int64_t stride = padded(tasks_);
    double* const direction = rows_ + tasks_ * stride;
    double residual = INFINITY, last = INFINITY;  // at y and at the previous y
    team_.sync();
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      cosines_[i * (tasks_ + 1)] = 1 + ridge;
      tried_[i] = c_[i] == 1 ? 1 : std::pow(c_[i], 1 / (1 + power_));  // exact where the gradients are orthogonal
    }
    for (;;) {
      team_.sync();
      const double found = measure();
      const bool ends = residual <= 1e-3 && residual >= 0.5 * last;  // no better than this by rounding
      if (ends && !(found < residual)) return true;
      GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
        y_[i] = tried_[i];
        direction[i] = missing_[i];
      }
      last = residual;
      residual = found;
      if (ends || !(residual > 1e-15) || steps_-- == 0) return true;
      team_.sync();
      const auto entry = [&](int64_t i, int64_t j) { return cosines_[i * tasks_ + j] + (i == j ? bend_[i] : 0); };
      if (!solve_positive(team_, entry, rows_, stride, tasks_, kMinPivot)) return false;
      double lowest = 0;
      GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
        lowest = std::fmin(lowest, direction[i] * inverse_[i]);
      }
      int64_t unused = 0;
      team_.least(lowest, unused);
      GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
        const double part = direction[i] * inverse_[i];
        if (lowest < -0.9 && part < 0) {
          const double base = 1 - power_ * part;
          tried_[i] = std::fmax(power_ == 1 ? y_[i] / base : y_[i] * std::pow(base, -1 / power_), kMinY);
        } else {
          tried_[i] = y_[i] + direction[i];
        }
      }
    }
  }

  // The root mean square of the relative errors of the equations at tried_, where each compares (K y)_i with its pull
  // n_i^(p - 1) y_i^-p. A y_i at its lower bound that should get smaller does not count. Fills missing_, bend_ and
  // inverse_ for tried_.
  GS_HOST_DEVICE double measure() {
    multiply(team_, cosines_, tasks_, tried_, missing_);
    double squares = 0;
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      const double y = tried_[i], ky = missing_[i], inverse = 1 / y;
      const double pull = power_ == 1 ? inverse : c_[i] * std::pow(y, -power_);
      const double error = power_ == 1 ? 1 - ky * y : (pull - ky) / pull;  // NaN if the pull overflows
      squares += y > kMinY || error > 0 ? error * error : 0;
      missing_[i] = pull - ky;
      bend_[i] = power_ * pull * inverse;
      inverse_[i] = inverse;
    }
    return std::sqrt(team_.sum(squares) / static_cast<double>(tasks_));
  }

  static constexpr double kMinY = 1e-290;

  const Team team_;
  const int64_t tasks_;
  const double power_;
  double *norms_, *c_, *y_;
  double *missing_, *bend_, *inverse_;  // -F', the second derivatives of F's separate terms, 1 / y (1 / |g_i| at first)
  double* tried_;                       // the next y
  double *cosines_, *rows_;
  double largest_ = 0;
  int steps_ = 400;
};

// The weights, scaled down if needed so that |d| <= max_norm.
template <class Team>
GS_HOST_DEVICE void fair_grad(const Team& team, const double* gram, int64_t num_tasks, double alpha, double max_norm,
                              double* weights, double* scratch) {
  Newton(team, gram, num_tasks, alpha, scratch).solve(weights);
  multiply(team, gram, num_tasks, weights, scratch);
  const double norm = std::sqrt(std::fmax(team_dot(team, weights, scratch, num_tasks), 0.0));
  const double factor = norm > max_norm ? max_norm / norm : 1;
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) weights[i] *= factor;
}

}  // namespace gs
