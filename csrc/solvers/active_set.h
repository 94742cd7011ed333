// SPDX-License-Identifier: MIT
// A set S of tasks, and the shortest point of the affine hull of their gradients.
#pragma once
#include "cholesky.h"

namespace gs {

// The weights of the shortest point are w = u / sum(u), where M u = 1 and M = G_S + c 1 1^T for any c > 0. With L the
// Cholesky factor of M and R = L^-1, u = R^T z, z = R 1. R is kept instead of L because products with R are sums that
// the team's members compute in parallel, while substitutions with L are chains of divisions. R gets a row when a task
// enters, and Givens rotations repair it when one leaves. Its rows lie packed, one after the other, which on a GPU also
// spreads a column over the banks of shared memory.
template <class Team>
class ActiveSet {
 public:
  static constexpr int64_t scratch(int64_t num_tasks) { return (num_tasks + 1) * (num_tasks + 2) / 2 + 6 * num_tasks; }

  // memory holds scratch(num_tasks) values.
  GS_HOST_DEVICE ActiveSet(const Team& team, const double* gram, int64_t num_tasks, double* memory)
      : team_(team),
        gram_(gram),
        tasks_(num_tasks),
        u_(memory),
        z_(u_ + num_tasks),
        a_(z_ + num_tasks),
        b_(a_ + num_tasks),
        c_(b_ + num_tasks),
        members_(reinterpret_cast<int64_t*>(c_ + num_tasks)),
        inverse_(c_ + 2 * num_tasks) {}

  GS_HOST_DEVICE int64_t size() const { return size_; }
  GS_HOST_DEVICE int64_t member(int64_t k) const { return members_[k]; }
  GS_HOST_DEVICE double u(int64_t k) const { return u_[k]; }
  GS_HOST_DEVICE void set_shift(double shift) { shift_ = shift; }
  GS_HOST_DEVICE double* spare() const { return a_; }  // [T], overwritten by every change of the set

  GS_HOST_DEVICE double sum_of_u() const {
    double total = 0;
    GS_ROLLED for (int64_t k = team_.rank(); k < size_; k += team_.size()) total += u_[k];
    return team_.sum(total);
  }

  // S = the tasks for which counts(i) holds. Does not set up R.
  template <class Counts>
  GS_HOST_DEVICE void choose(const Counts& counts) {
    size_ = 0;
    for (int64_t i = 0; i < tasks_; i++) {
      if (!counts(i)) continue;
      if (team_.rank() == 0) members_[size_] = i;
      size_++;
    }
    team_.sync();
  }

  // Computes R for all of S at once; false if gradients are so nearly dependent that tasks should enter one by one.
  GS_HOST_DEVICE bool enter_together() {
    if (!factor()) return false;
    invert_factor();
    return true;
  }

  // Computes R for S task by task: the next one is always the one with the largest pivot, the least dependent on those
  // before, so that R keeps most digits. Tasks that depend on others to working precision leave S; their w becomes 0.
  GS_HOST_DEVICE void enter_by_pivots(double* w) {
    double* const left = c_;  // p^2 / M_ii of the tasks still to enter
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) left[i] = 0;
    team_.sync();
    GS_ROLLED for (int64_t k = team_.rank(); k < size_; k += team_.size()) left[members_[k]] = 1;
    team_.sync();
    updated_ = false;
    for (size_ = 0;;) {
      double least = -1e-13;
      int64_t next = -1;
      GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
        if (-left[i] >= least) continue;
        least = -left[i];
        next = i;
      }
      team_.least(least, next);
      team_.sync();
      if (next < 0) break;
      enter(next);
      const double* const added = row(size_ - 1);
      GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
        if (i == next) left[i] = -1;
        if (!(left[i] > 0)) continue;
        double l = 0;
        for (int64_t k = 0; k < size_; k++) l += added[k] * (at(i, members_[k]) + shift_);
        left[i] = std::fmax(left[i] - l * l / (at(i, i) + shift_), 0.0);
      }
    }
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      if (left[i] >= 0) w[i] = 0;
    }
    team_.sync();
  }

  // Starts with all tasks in S, and removes all those with negative u at once until there are none. Leaves L in the
  // place of R. False if gradients are nearly dependent; single steps handle those better.
  GS_HOST_DEVICE bool drop_negative() {
    GS_ROLLED for (int64_t k = team_.rank(); k < tasks_; k += team_.size()) members_[k] = k;
    size_ = 0;
    for (int64_t left = tasks_; size_ != left;) {
      size_ = left;
      team_.sync();
      if (!factor()) return false;
      const double* const u = row(size_);
      left = 0;
      for (int64_t k = 0; k < size_; k++) {
        if (!(u[k] > 0)) continue;
        if (team_.rank() == 0) {
          members_[left] = members_[k];
          u_[left] = u[k];
        }
        left++;
      }
    }
    team_.sync();
    return true;
  }

  // Replaces L by R, row by row.
  GS_HOST_DEVICE void invert_factor() {
    const int64_t count = size_;
    for (size_ = 0; size_ < count;) {
      const double* const factor = row(size_);
      const double scale = factor[size_];
      GS_ROLLED for (int64_t c = team_.rank(); c < size_; c += team_.size()) b_[c] = factor[c];
      team_.sync();
      append(scale);
    }
  }

  // Task j enters S. With g its column of M, its row of L is (l, p), where l = R g and p^2 = M_jj - |l|^2.
  GS_HOST_DEVICE void enter(int64_t j) {
    double *g = a_, *l = b_;
    GS_ROLLED for (int64_t k = team_.rank(); k < size_; k += team_.size()) g[k] = at(j, members_[k]) + shift_;
    team_.sync();
    double squares = 0;
    GS_ROLLED for (int64_t r = team_.rank(); r < size_; r += team_.size()) {
      l[r] = dot(row(r), g, r + 1);
      squares += l[r] * l[r];
    }
    const double diagonal = at(j, j) + shift_, pivot = diagonal - team_.sum(squares);
    const double floor = 1e-14 * diagonal;  // below it, j is affinely dependent on S to working precision
    if (team_.rank() == 0) members_[size_] = j;
    team_.sync();
    append(1 / std::sqrt(pivot > floor ? pivot : floor));
  }

  // Removes member k. Row k is rotated with rows k+1, k+2, ...; after that column k is zero except in the carried row.
  // Without that row and column k, R^T R is the inverse of the rest of M (a Schur complement).
  GS_HOST_DEVICE void leave(int64_t k) {
    double *carried = a_, *cosine = b_, *sine = u_, *squares = c_;
    updated_ = true;
    size_--;
    double total = 0;
    for (int64_t r = k; r <= size_; r++) {
      total += row(r)[k] * row(r)[k];
      if (r % team_.size() == team_.rank()) squares[r] = total;
    }
    GS_ROLLED for (int64_t c = team_.rank(); c <= k; c += team_.size()) carried[c] = row(k)[c];
    team_.sync();
    GS_ROLLED for (int64_t r = k + team_.rank(); r < size_; r += team_.size()) {
      cosine[r] = row(r + 1)[k] / std::sqrt(squares[r + 1]);
      sine[r] = std::sqrt(squares[r] / squares[r + 1]);
    }
    double carried_z = z_[k];
    for (int64_t r = k; r < size_; r++) {
      team_.sync();
      const double a = cosine[r], b = sine[r], z = z_[r + 1];
      const double* from = row(r + 1);
      double* to = row(r);
      const auto rotate = [&](int64_t begin, int64_t end, double* target) {
        GS_ROLLED for (int64_t c = begin + team_.rank(); c < end; c += team_.size()) {
          const double value = from[c], other = carried[c];
          target[c] = b * value - a * other;
          carried[c] = a * value + b * other;
        }
      };
      rotate(0, k, to);
      rotate(k + 1, r + 1, to - 1);
      if (team_.rank() == 0) {
        to[r] = b * from[r + 1];
        carried[r + 1] = a * from[r + 1];
        z_[r] = b * z - a * carried_z;
        members_[r] = members_[r + 1];
      }
      carried_z = a * z + b * carried_z;
    }
    team_.sync();
    multiply_transposed(z_, u_);
  }

  // Iterative refinement: if pivots are small, corrects u by the residual of M u = 1, as the relative error of u is
  // R's rounding error divided by the least pivot. False if removals have cost R too many digits for that.
  GS_HOST_DEVICE bool solve_accurately() {
    double *missing = b_, *product = c_;
    for (int turn = 0; least_pivot_ < 1e-4; turn++) {
      const double shift = shift_ * sum_of_u();
      double least = 0;  // -|residual| / sum of |terms|
      int64_t unused = 0;
      GS_ROLLED for (int64_t k = team_.rank(); k < size_; k += team_.size()) {
        double sum = 1 - shift, terms = 1;
        for (int64_t l = 0; l < size_; l++) {
          const double term = at(members_[l], members_[k]) * u_[l];
          sum -= term;
          terms += std::fabs(term);
        }
        missing[k] = sum;
        least = std::fmin(least, -std::fabs(sum) / terms);
      }
      team_.least(least, unused);
      team_.sync();
      if (least >= -4e-16) break;
      if (turn == 3) return least >= -1e-13 || !updated_;
      GS_ROLLED for (int64_t r = team_.rank(); r < size_; r += team_.size()) product[r] = dot(row(r), missing, r + 1);
      team_.sync();
      multiply_transposed(product, missing);
      GS_ROLLED for (int64_t k = team_.rank(); k < size_; k += team_.size()) u_[k] += missing[k];
      team_.sync();
    }
    return true;
  }

 private:
  GS_HOST_DEVICE double at(int64_t i, int64_t j) const { return gram_[i * tasks_ + j]; }
  GS_HOST_DEVICE double* row(int64_t r) const { return inverse_ + r * (r + 1) / 2; }

  // Puts L in the place of R, and u in the row after it. False if gradients are nearly dependent.
  GS_HOST_DEVICE bool factor() {
    const auto row_of = [rows = inverse_](int64_t r) { return rows + r * (r + 1) / 2; };
    const auto entry = [gram = gram_, tasks = tasks_, members = members_, shift = shift_](int64_t k, int64_t c) {
      return gram[members[k] * tasks + members[c]] + shift;
    };
    GS_ROLLED for (int64_t k = team_.rank(); k < size_; k += team_.size()) row(size_)[k] = 1;
    fill_lower(team_, row_of, size_, entry);
    return factor_and_solve(team_, row_of, size_, 1e-8);
  }

  // Appends the row (-l^T R, 1) / p to R, with l in b_ and scale = 1 / p, and adds its part to u.
  GS_HOST_DEVICE void append(double scale) {
    double* const added = row(size_);
    multiply_transposed(b_, added);
    double sum = 0;
    GS_ROLLED for (int64_t c = team_.rank(); c < size_; c += team_.size()) {
      added[c] *= -scale;
      sum += added[c];
    }
    const double z = team_.sum(sum) + scale;
    const int64_t j = members_[size_];
    const double pivot = 1 / (scale * scale * (at(j, j) + shift_));  // 0 if the divisor overflows
    least_pivot_ = size_ == 0 || pivot < least_pivot_ ? pivot : least_pivot_;
    GS_ROLLED for (int64_t c = team_.rank(); c < size_; c += team_.size()) u_[c] += z * added[c];
    if (team_.rank() == 0) {
      added[size_] = scale;
      z_[size_] = z;
      u_[size_] = z * scale;
    }
    size_++;
    team_.sync();
  }

  // out = R^T x.
  GS_HOST_DEVICE void multiply_transposed(const double* x, double* out) {
    constexpr int64_t kColumns = Team::kColumns;
    const int64_t step = team_.size();
    for (int64_t base = 0; base < size_; base += kColumns * step) {
      const int64_t first = base + team_.rank();
      const int64_t whole = base + kColumns * step < size_ ? base + kColumns * step : size_;
      double sum[kColumns] = {};
      for (int64_t r = base; r < whole; r++) {
        for (int64_t c = 0; c < kColumns; c++) {
          if (first + c * step <= r) sum[c] += row(r)[first + c * step] * x[r];
        }
      }
      for (int64_t r = whole; r < size_; r++) {
        for (int64_t c = 0; c < kColumns; c++) sum[c] += row(r)[first + c * step] * x[r];
      }
      for (int64_t c = 0; c < kColumns; c++) {
        if (first + c * step < size_) out[first + c * step] = sum[c];
      }
    }
    team_.sync();
  }

  const Team team_;
  const double* gram_;
  const int64_t tasks_;
  double *u_, *z_;       // one value per member
  double *a_, *b_, *c_;  // scratch of one function at a time
  int64_t* members_;
  double* inverse_;   // R
  double shift_ = 0;  // c
  int64_t size_ = 0;
  bool updated_ = false;    // R was changed because a task left
  double least_pivot_ = 1;  // the least p^2 / M_jj of all tasks that entered since S was empty, even if they left again
};

}  // namespace gs
