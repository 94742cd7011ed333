// SPDX-License-Identifier: MIT
// argmin w^T G w over the simplex: the shortest convex combination of the task gradients (MGDA), exactly.
#pragma once
#include "cholesky.h"

namespace gs {

constexpr int64_t min_norm_scratch_bytes(int64_t num_tasks) {
  return ((num_tasks + 1) * (num_tasks + 2) / 2 + 8 * num_tasks + 7) / 8 * 64;
}

// Wolfe's algorithm (P. Wolfe, "Finding the nearest point in a polytope", Math. Programming 11, 1976) in Gram form.
// It keeps a set S of tasks whose affine hull has its shortest point inside the simplex, adds the task that most
// violates the optimality condition (G w)_j >= w^T G w, and drops tasks whose weight reaches zero. The shortest point
// of the hull solves M u = 1, M = G_S + c 1 1^T, w = u / sum(u), for any c > 0; c = min_i G_ii keeps rows of every
// scale in range. With L the Cholesky factor of M and R = L^-1, u = R^T z, z = R 1: products with R are sums that
// members take side by side, where substitutions with L are chains of divisions. R grows by a row when a task enters
// and is repaired by Givens rotations when one leaves. Its rows lie packed, one after the other, which on a GPU also
// spreads a column over the banks of shared memory. Where S grows beyond a few tasks, it jumps to what is left of all
// tasks when those with negative u leave all at once, for one or two factorizations of M; where gradients are
// independent, mostly that is the answer, without R.
template <class Team>
class MinNorm {
 public:
  // scratch holds min_norm_scratch_bytes(num_tasks).
  GS_HOST_DEVICE MinNorm(const Team& team, const double* gram, int64_t num_tasks, double* weights, double* scratch)
      : team_(team),
        gram_(gram),
        tasks_(num_tasks),
        weights_(weights),
        norm_(scratch),
        w_(norm_ + num_tasks),
        u_(w_ + num_tasks),
        z_(u_ + num_tasks),
        a_(z_ + num_tasks),
        b_(a_ + num_tasks),
        c_(b_ + num_tasks),
        members_(reinterpret_cast<int64_t*>(c_ + num_tasks)),
        inverse_(c_ + 2 * num_tasks) {}

  // Where `warm`, weights hold those of a similar problem, with whose tasks S begins.
  GS_HOST_DEVICE void solve(bool warm = false) {
    double least = INFINITY;
    int64_t shortest = 0;
    for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      norm_[i] = std::sqrt(at(i, i));
      if (at(i, i) < least) {
        least = at(i, i);
        shortest = i;
      }
    }
    team_.least(least, shortest);
    shift_ = least;
    warm = warm && shift_ > 0;
    for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) w_[i] = warm ? weights_[i] : i == shortest ? 1 : 0;
    team_.sync();
    if (shift_ > 0) descend(warm);  // a zero gradient is the shortest point itself
    for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) weights_[i] = w_[i];
  }

 private:
  GS_HOST_DEVICE double at(int64_t i, int64_t j) const { return gram_[i * tasks_ + j]; }
  GS_HOST_DEVICE double* row(int64_t r) const { return inverse_ + r * (r + 1) / 2; }

  // Each function has one place here, as far as that goes: a GPU is to keep the instructions of all.
  GS_HOST_DEVICE void descend(bool warm) {
    int64_t solves = 8 * tasks_ + 32;
    // The size of S from which to jump, once, from a cold start: fewer tasks take less time one after the other.
    int64_t few = warm ? 0 : 2 + tasks_ / 16;
    bool jumped = false, begins = !warm || !enter_together();
    for (;;) {
      if (begins) enter_positive();
      begins = false;
      while (!jumped && solves-- > 0 && !move_to_face_minimum()) {
      }
      const int64_t j = most_violating();
      if (j < 0 || solves <= 0) return;
      if (jumped) invert_factor();
      jumped = false;
      if (size_ == few) {
        few = 0;
        jumped = drop_negative();
        begins = !jumped;
      } else if (uncertain_) {
        refine();
      } else {
        enter(j);
      }
    }
  }

  // S = the tasks with w > 0, but for those that nearly depend on others, whose w becomes 0: R would be noise, and what
  // is left of w moves to the minimum next.
  GS_HOST_DEVICE void enter_positive() {
    size_ = 0;
    for (int64_t i = 0; i < tasks_; i++) {
      if (!(w_[i] > 0) || enter(i, 1e-10)) continue;
      if (team_.rank() == 0) w_[i] = 0;
      team_.sync();
    }
  }

  // The same at once; false if tasks depend so much on others that they had better enter one by one.
  GS_HOST_DEVICE bool enter_together() {
    size_ = 0;
    for (int64_t i = 0; i < tasks_; i++) {
      if (!(w_[i] > 0)) continue;
      if (team_.rank() == 0) members_[size_] = i;
      size_++;
    }
    team_.sync();
    if (!factor()) return false;
    invert_factor();
    return true;
  }

  // L takes the place of R, and u that of the row after it. False if tasks nearly depend on others.
  GS_HOST_DEVICE bool factor() {
    const auto row_of = [rows = inverse_](int64_t r) { return rows + r * (r + 1) / 2; };
    const auto entry = [gram = gram_, tasks = tasks_, members = members_, shift = shift_](int64_t k, int64_t c) {
      return gram[members[k] * tasks + members[c]] + shift;
    };
    for (int64_t k = team_.rank(); k < size_; k += team_.size()) row(size_)[k] = 1;
    fill_lower(team_, row_of, size_, entry);
    return factor_and_solve(team_, row_of, size_, 1e-8);
  }

  // R in the place of L, row by row.
  GS_HOST_DEVICE void invert_factor() {
    const int64_t count = size_;
    for (size_ = 0; size_ < count;) {
      const double* const factor = row(size_);
      const double scale = factor[size_];
      for (int64_t c = team_.rank(); c < size_; c += team_.size()) b_[c] = factor[c];
      team_.sync();
      append(scale);
    }
  }

  // The S to jump to, its w and its L. False, and w as it was, if tasks nearly depend on others, which single steps are
  // better at.
  GS_HOST_DEVICE bool drop_negative() {
    for (int64_t k = team_.rank(); k < tasks_; k += team_.size()) members_[k] = k;
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
    sum_up();
    for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) w_[i] = 0;
    team_.sync();
    for (int64_t k = team_.rank(); k < size_; k += team_.size()) w_[members_[k]] = u_[k] / total_;
    team_.sync();
    return true;
  }

  // The task j outside S with the largest (w^T G w - (G w)_j) relative to the rounding error of (G w)_j; -1 if none is
  // above it. If it is not above the rounding error of w either, w is uncertain, and to be refined first.
  GS_HOST_DEVICE int64_t most_violating() {
    double* gw = a_;
    combine_rows(
        team_, gram_, tasks_, size_, [&](int64_t k) { return members_[k]; }, [&](int64_t k) { return w_[members_[k]]; },
        gw);
    double spread = 0, value = 0, error = 0;
    for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      spread += w_[i] * norm_[i];
      value += w_[i] * gw[i];
      if (w_[i] > 0) {  // (G w)_i + c is the same for all of S
        const double deviation = (gw[i] + shift_ - 1 / total_) / norm_[i];
        error += deviation * deviation;
      }
    }
    team_.sum_each(spread, value, error);
    error = std::sqrt(error);
    double worst = -kTolerance * spread;
    int64_t worst_task = -1;
    for (int64_t j = team_.rank(); j < tasks_; j += team_.size()) {
      const double excess = (gw[j] - value) / norm_[j];
      if (w_[j] == 0 && excess < worst) {
        worst = excess;
        worst_task = j;
      }
    }
    team_.least(worst, worst_task);
    uncertain_ = !refined_ && worst > -4 * error;
    team_.sync();
    return worst_task;
  }

  // Adds to u what is missing in M u = 1, from the G w that most_violating() left.
  GS_HOST_DEVICE void refine() {
    double *gw = a_, *missing = b_, *product = c_;
    for (int64_t k = team_.rank(); k < size_; k += team_.size()) {
      missing[k] = 1 - total_ * (gw[members_[k]] + shift_);
    }
    team_.sync();
    for (int64_t r = team_.rank(); r < size_; r += team_.size()) product[r] = dot(row(r), missing, r + 1);
    team_.sync();
    multiply_transposed(product, missing);
    for (int64_t k = team_.rank(); k < size_; k += team_.size()) u_[k] += missing[k];
    refined_ = true;
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

  // Task j enters S. With g its column of M its row of L is (l, p), l = R g, p^2 = M_jj - |l|^2. False, and j left out,
  // if p^2 is not above `least` M_jj.
  GS_HOST_DEVICE bool enter(int64_t j, double least = -INFINITY) {
    double *g = a_, *l = b_;
    for (int64_t k = team_.rank(); k < size_; k += team_.size()) g[k] = at(j, members_[k]) + shift_;
    team_.sync();
    double squares = 0;
    for (int64_t r = team_.rank(); r < size_; r += team_.size()) {
      l[r] = dot(row(r), g, r + 1);
      squares += l[r] * l[r];
    }
    const double diagonal = at(j, j) + shift_, pivot = diagonal - team_.sum(squares);
    if (!(pivot > least * diagonal)) return false;
    const double floor = 1e-14 * diagonal;  // below it, j is affinely dependent on S to working precision
    if (team_.rank() == 0) members_[size_] = j;
    team_.sync();
    append(1 / std::sqrt(pivot > floor ? pivot : floor));
    return true;
  }

  // Appends to R the row (-l^T R, 1) / p for the l in b_ and scale = 1 / p, and its part to u.
  GS_HOST_DEVICE void append(double scale) {
    double* const added = row(size_);
    multiply_transposed(b_, added);
    double sum = 0;
    for (int64_t c = team_.rank(); c < size_; c += team_.size()) {
      added[c] *= -scale;
      sum += added[c];
    }
    const double z = team_.sum(sum) + scale;
    for (int64_t c = team_.rank(); c < size_; c += team_.size()) u_[c] += z * added[c];
    if (team_.rank() == 0) {
      added[size_] = scale;
      z_[size_] = z;
      u_[size_] = z * scale;
    }
    size_++;
    refined_ = false;
    team_.sync();
  }

  // Removes member k. Rotations of row k with k+1, k+2, ... leave zeros in column k but in the row that was carried
  // along. Without that row and the column, R^T R is the inverse of the rest of M (a Schur complement).
  GS_HOST_DEVICE void leave(int64_t k) {
    double *carried = a_, *cosine = b_, *sine = u_, *squares = c_;
    size_--;
    double total = 0;
    for (int64_t r = k; r <= size_; r++) {
      total += row(r)[k] * row(r)[k];
      if (r % team_.size() == team_.rank()) squares[r] = total;
    }
    for (int64_t c = team_.rank(); c <= k; c += team_.size()) carried[c] = row(k)[c];
    if (team_.rank() == 0) w_[members_[k]] = 0;
    team_.sync();
    for (int64_t r = k + team_.rank(); r < size_; r += team_.size()) {
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
        for (int64_t c = begin + team_.rank(); c < end; c += team_.size()) {
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
    refined_ = false;
  }

  GS_HOST_DEVICE void sum_up() {
    double total = 0;
    for (int64_t k = team_.rank(); k < size_; k += team_.size()) total += u_[k];
    total_ = team_.sum(total);
  }

  // Moves w towards the shortest point of S's affine hull. True if it got there, false if a task left S on the way.
  GS_HOST_DEVICE bool move_to_face_minimum() {
    sum_up();
    double reach = INFINITY;
    int64_t blocking = -1;
    for (int64_t k = team_.rank(); k < size_; k += team_.size()) {
      const double w = w_[members_[k]], target = u_[k] / total_;
      const double ratio = w > 0 ? w / (w - target) : 0;
      if (target <= 0 && ratio < reach) {
        reach = ratio;
        blocking = k;
      }
    }
    team_.least(reach, blocking);
    if (blocking < 0) reach = 1;
    for (int64_t k = team_.rank(); k < size_; k += team_.size()) {
      double& w = w_[members_[k]];
      w += reach * (u_[k] / total_ - w);
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
  double *norm_, *w_;    // by task: |g_i|, the weights
  double *u_, *z_;       // by member
  double *a_, *b_, *c_;  // scratch of one function at a time
  int64_t* members_;
  double* inverse_;               // R
  double shift_ = 0, total_ = 0;  // c; sum(u)
  int64_t size_ = 0;
  bool refined_ = false, uncertain_ = false;
};

}  // namespace gs
