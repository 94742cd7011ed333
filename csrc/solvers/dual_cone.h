// SPDX-License-Identifier: MIT
// Projections on the cone of directions that conflict with no task: UPGrad and DualProj.
#pragma once
#include "cholesky.h"

namespace gs {

// Rounding errors allowed in y_i, relative to |H^(1/2) v| H_ii^(1/2), and in z_i, relative to |H^(1/2) v| / H_ii^(1/2).
constexpr double kConeOptimal = 1e-13, kConeFeasible = 1e-12;

constexpr int64_t dual_cone_scratch(int64_t num_tasks) { return (num_tasks + 1) * padded(num_tasks) + 7 * num_tasks; }

// The vector u [T]: `values`, or `value` for each task if that is NULL. If only >= 0, u is 0 for all other tasks.
struct Start {
  const double* values;
  double value;
  int64_t only;
  GS_HOST_DEVICE double operator()(int64_t i) const { return only >= 0 && i != only ? 0 : values ? values[i] : value; }
};

// argmin v^T H v with v >= u, H = G / trace(G) + ridge I, ridge > 0: the weights of the point nearest to J^T u among
// those d with g_t . d >= 0 for all t. With z = v - u and y = H v the conditions are z >= 0, y >= 0, z^T y = 0: the
// tasks of a set F have y = 0, the others z = 0. Block principal pivoting (Judice and Pires 1994) moves all tasks with
// a negative z or y into or out of F at once, as long as their number falls; otherwise Lawson and Hanson's method
// (1974) starts from the beginning, which lowers v^T H v at each step.
template <class Team>
class DualCone {
 public:
  // scratch holds dual_cone_scratch(num_tasks) values.
  GS_HOST_DEVICE DualCone(const Team& team, const double* gram, int64_t num_tasks, double ridge, double* scratch)
      : team_(team),
        gram_(gram),
        tasks_(num_tasks),
        v_(scratch),
        product_(v_ + num_tasks),
        best_(product_ + num_tasks),
        root_(best_ + num_tasks),
        free_(root_ + num_tasks),
        index_(free_ + num_tasks),
        target_(index_ + num_tasks),
        rows_(target_ + num_tasks) {
    double trace = 0;
    for (int64_t i = 0; i < num_tasks; i++) trace += gram[i * num_tasks + i];
    scale_ = trace > 0 ? 1 / trace : 0;
    set_ridge(ridge);
  }

  // weights += v. If H turns out to be indefinite, because G was rounded, tries again with a larger ridge.
  GS_HOST_DEVICE_CALL void add_solution(const Start& u, double* weights) {
    const double given = ridge_;
    for (int attempts = 12; attempts > 0; attempts--) {
      indefinite_ = false;
      if (!pivot(u) && !indefinite_) descend(u);
      if (!indefinite_) break;
      set_ridge(std::fmax(8 * ridge_, 0x1p-33));
    }
    // By rounding, v may be slightly below u.
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      weights[i] += best_[i] > u(i) ? best_[i] : u(i);
    }
    team_.sync();
    if (ridge_ != given) set_ridge(given);
  }

 private:
  static constexpr int kPatience = 4;
  static constexpr double kRounding = 1e-13;

  GS_HOST_DEVICE double entry(int64_t i, int64_t j) const {
    return gram_[i * tasks_ + j] * scale_ + (i == j ? ridge_ : 0);
  }

  GS_HOST_DEVICE void set_ridge(double ridge) {
    ridge_ = ridge;
    team_.sync();
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) root_[i] = std::sqrt(entry(i, i));
    team_.sync();
  }

  GS_HOST_DEVICE void start(const Start& u) {
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      v_[i] = u(i);
      free_[i] = 0;
    }
    team_.sync();
  }

  GS_HOST_DEVICE void keep() {
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) best_[i] = v_[i];
  }

  // Block principal pivoting. Returns true if it found the solution, now in best_.
  GS_HOST_DEVICE bool pivot(const Start& u) {
    start(u);
    keep();
    int64_t fewest = tasks_ + 1;
    for (int patience = kPatience; patience > 0 && !indefinite_; patience--) {
      multiply_v();
      const int64_t wrong = count_wrong(u);
      if (wrong == 0) {
        keep();
        return true;
      }
      if (wrong < fewest) {
        fewest = wrong;
        patience = kPatience + 1;
      }
      team_.sync();
      GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
        if (is_wrong(u, i)) free_[i] = 1 - free_[i];
      }
      team_.sync();
      solve(u, v_);
    }
    return false;
  }

  // Lawson and Hanson's method. The task with the most negative y joins F; tasks whose z would become negative on the
  // way to the minimum over F leave it. Ends when, by rounding, v^T H v no longer descends; best_ holds the last v with
  // a smaller value.
  GS_HOST_DEVICE void descend(const Start& u) {
    start(u);
    keep();
    double shortest = INFINITY;
    for (int64_t solves = 4 * tasks_ + 32; solves > 0;) {
      multiply_v();
      if (!(length_ < shortest)) return;
      shortest = length_;
      keep();
      double least = INFINITY;
      int64_t joining = -1;
      GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
        const double slope = product_[i] / root_[i];
        if (free_[i] == 0 && slope < -kConeOptimal * length_ && slope < least) {
          least = slope;
          joining = i;
        }
      }
      team_.least(least, joining);
      if (joining < 0) return;
      team_.sync();
      if (team_.rank() == 0) free_[joining] = 1;
      team_.sync();
      for (bool blocked = true; blocked && solves > 0; solves--) {
        solve(u, target_);
        if (indefinite_) return;
        double reach = INFINITY;
        int64_t leaving = -1;
        GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
          const double ratio = (v_[i] - u(i)) / (v_[i] - target_[i]);
          if (free_[i] != 0 && target_[i] < u(i) && ratio < reach) {
            reach = ratio;
            leaving = i;
          }
        }
        team_.least(reach, leaving);
        blocked = leaving >= 0;
        team_.sync();
        GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
          v_[i] = i == leaving ? u(i) : blocked ? v_[i] + reach * (target_[i] - v_[i]) : target_[i];
          if (i == leaving) free_[i] = 0;
        }
        team_.sync();
      }
    }
  }

  // y = H v, and its length sqrt(v^T H v).
  GS_HOST_DEVICE void multiply_v() {
    multiply(team_, gram_, tasks_, v_, product_);
    double squared = 0, terms = 0;
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      const double along = v_[i] * root_[i];
      product_[i] = product_[i] * scale_ + ridge_ * v_[i];
      squared += v_[i] * product_[i];
      terms += along * along;
    }
    team_.sum_each(squared, terms);
    length_ = std::sqrt(std::fmax(squared, 0.0));
    indefinite_ = indefinite_ || squared < -kRounding * terms;
    team_.sync();
  }

  GS_HOST_DEVICE int64_t count_wrong(const Start& u) const {
    double wrong = 0;
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) wrong += is_wrong(u, i);
    return static_cast<int64_t>(team_.sum(wrong));
  }

  // Whether y_i (outside F) or z_i (in F) is negative by more than rounding. |y_i| is at most |H^(1/2) v| H_ii^(1/2).
  GS_HOST_DEVICE bool is_wrong(const Start& u, int64_t i) const {
    if (free_[i] == 0) return product_[i] < -kConeOptimal * length_ * root_[i];
    return (v_[i] - u(i)) * root_[i] < -kConeFeasible * length_;
  }

  // target = u outside F, and H target = 0 on F.
  GS_HOST_DEVICE_CALL void solve(const Start& u, double* target) {
    const int64_t stride = padded(tasks_);
    int64_t size = 0;
    for (int64_t i = 0; i < tasks_; i++) {
      if (free_[i] == 0) continue;
      if (team_.rank() == 0) index_[size] = static_cast<double>(i);
      size++;
    }
    team_.sync();
    GS_ROLLED for (int64_t r = team_.rank(); r < size; r += team_.size()) {
      const auto i = static_cast<int64_t>(index_[r]);
      double right = 0;
      for (int64_t j = 0; j < tasks_; j++) right -= free_[j] == 0 ? entry(i, j) * u(j) : 0;
      rows_[size * stride + r] = right;
    }
    team_.sync();
    const auto of_free = [&](int64_t r, int64_t c) {
      return entry(static_cast<int64_t>(index_[r]), static_cast<int64_t>(index_[c]));
    };
    if (!solve_positive(team_, of_free, rows_, stride, size, kMinPivot)) {
      indefinite_ = true;
      return;
    }
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      if (free_[i] == 0) target[i] = u(i);
    }
    GS_ROLLED for (int64_t r = team_.rank(); r < size; r += team_.size()) {
      target[static_cast<int64_t>(index_[r])] = rows_[size * stride + r];
    }
    team_.sync();
  }

  const Team team_;
  const double* gram_;
  const int64_t tasks_;
  double ridge_, scale_;
  double *v_, *product_, *best_, *root_;  // root: of H_ii
  double *free_, *index_;                 // 1 for the tasks in F, 0 for the others; the tasks in F
  double* target_;                        // the minimum over F
  double* rows_;
  double length_ = 0;
  bool indefinite_ = false;  // a pivot or v^T H v was not positive
};

// DualProj: the projection of sum_t p_t g_t. preference NULL: 1 / T each.
template <class Team>
GS_HOST_DEVICE void dual_proj(const Team& team, const double* gram, int64_t num_tasks, const double* preference,
                              double ridge, double* weights, double* scratch) {
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) weights[i] = 0;
  team.sync();
  DualCone(team, gram, num_tasks, ridge, scratch)
      .add_solution({preference, 1 / static_cast<double>(num_tasks), -1}, weights);
}

// UPGrad: the sum of the projections of p_t g_t over t; this call adds those of t = first, first + step, ...
template <class Team>
GS_HOST_DEVICE void upgrad(const Team& team, const double* gram, int64_t num_tasks, const double* preference,
                           double ridge, int64_t first, int64_t step, double* weights, double* scratch) {
  GS_ROLLED for (int64_t i = team.rank(); i < num_tasks; i += team.size()) weights[i] = 0;
  team.sync();
  DualCone cone(team, gram, num_tasks, ridge, scratch);
  for (int64_t t = first; t < num_tasks; t += step) {
    cone.add_solution({preference, 1 / static_cast<double>(num_tasks), t}, weights);
  }
}

}  // namespace gs
