// SPDX-License-Identifier: MIT
// argmin w^T G w over the simplex: the shortest convex combination of the task gradients (MGDA), exactly.
#pragma once
#include "active_set.h"

namespace gs {

constexpr int64_t min_norm_scratch_bytes(int64_t num_tasks) {
  return (ActiveSet<SerialTeam>::scratch(num_tasks) + 2 * num_tasks + 7) / 8 * 64;
}

// Wolfe's algorithm (P. Wolfe, "Finding the nearest point in a polytope", Math. Programming 11, 1976) in Gram form.
// It keeps a set S of tasks whose affine hull has its shortest point inside the simplex, adds the task that most
// violates the optimality condition (G w)_j >= w^T G w, and drops tasks whose weight reaches zero. c = min_i G_ii keeps
// rows of every scale in range. Once S has more than a few tasks, the solver jumps: it starts from all tasks and
// removes all those with negative u at once (drop_negative), which takes one or two factorizations of M. For
// independent gradients the result is usually the answer, and R is never needed.
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
        set_(team, gram, num_tasks, w_ + num_tasks) {}

  // If `warm`, `weights` holds the weights of a similar problem, and S begins with the tasks of positive weight.
  GS_HOST_DEVICE void solve(bool warm = false) {
    double least = INFINITY;
    int64_t shortest = 0;
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      norm_[i] = std::sqrt(at(i, i));
      if (at(i, i) < least) {
        least = at(i, i);
        shortest = i;
      }
    }
    team_.least(least, shortest);
    set_.set_shift(least);
    const bool descends = least >= 0x1p-1000;  // otherwise u, of the order of 1 / least, would overflow
    warm = warm && descends;
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      w_[i] = warm ? weights_[i] : i == shortest ? 1 : 0;
      weights_[i] = w_[i];
    }
    team_.sync();
    if (descends) descend(shortest, warm);  // otherwise the zero gradient is the shortest point itself
  }

 private:
  GS_HOST_DEVICE double at(int64_t i, int64_t j) const { return gram_[i * tasks_ + j]; }

  // Calls each function from as few places as possible, so that the inlined code stays small enough for a GPU's
  // instruction cache.
  GS_HOST_DEVICE void descend(int64_t shortest, bool warm) {
    int64_t solves = 8 * tasks_ + 32;
    // lowest: the lowest w^T G w; stalls: face minima since then that were no lower, as rounding causes for nearly
    // dependent gradients, where S could cycle forever. least: the smallest missing_ so far, whose w is in weights_.
    double lowest = INFINITY, least = INFINITY;
    int64_t stalls = 0;
    // The size of S at which a cold start jumps, once: fewer tasks take less time one after the other.
    int64_t few = warm ? 0 : 2 + tasks_ / 16;
    const auto positive = [w = w_](int64_t i) { return w[i] > 0; };
    int64_t j = shortest;  // the task to join S; -1 if there is none
    bool jumped = false, begins = false;
    if (warm) {
      j = -1;
      set_.choose(positive);
      begins = !set_.enter_together();
    }
    for (;;) {
      if (j >= 0) {
        if (jumped) set_.invert_factor();
        jumped = false;
        if (set_.size() == few) {
          few = 0;
          jumped = jump();
          begins = !jumped;
          if (begins) set_.choose(positive);
        } else {
          set_.enter(j);
        }
      }
      if (begins) set_.enter_by_pivots(w_);
      begins = !jumped && !set_.solve_accurately();
      j = -1;
      if (begins || (!jumped && solves-- > 0 && !move_to_face_minimum())) continue;
      j = most_violating();
      if (missing_ <= least || least == INFINITY) {  // the first w in any case: missing_ is NaN if G overflows
        least = missing_;
        GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) weights_[i] = w_[i];
        team_.sync();
      }
      stalls = value_ < lowest ? 0 : stalls + 1;
      if (stalls == 0) lowest = value_;
      if (j < 0 || solves <= 0 || stalls == 8 + tasks_ / 8) return;
    }
  }

  // Sets S and w to the result of drop_negative(); false, with w unchanged, if that fails.
  GS_HOST_DEVICE bool jump() {
    if (!set_.drop_negative()) return false;
    total_ = set_.sum_of_u();
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) w_[i] = 0;
    team_.sync();
    GS_ROLLED for (int64_t k = team_.rank(); k < set_.size(); k += team_.size()) {
      w_[set_.member(k)] = set_.u(k) / total_;
    }
    team_.sync();
    return true;
  }

  // The task j outside S with the largest (w^T G w - (G w)_j) relative to the rounding error of (G w)_j; -1 if no task
  // exceeds that error.
  GS_HOST_DEVICE int64_t most_violating() {
    double* const gw = set_.spare();
    sum_rows(
        team_, gram_, tasks_, set_.size(), [&](int64_t k) { return set_.member(k); },
        [&](int64_t k) { return w_[set_.member(k)]; }, gw);
    double spread = 0, value = 0;
    GS_ROLLED for (int64_t i = team_.rank(); i < tasks_; i += team_.size()) {
      spread += w_[i] * norm_[i];
      value += w_[i] * gw[i];
    }
    team_.sum_each(spread, value);
    value_ = value;
    double worst = -kTolerance * spread, inside = 0;
    int64_t worst_task = -1, unused = 0;
    GS_ROLLED for (int64_t j = team_.rank(); j < tasks_; j += team_.size()) {
      const double excess = (gw[j] - value) / norm_[j];
      if (w_[j] == 0) {
        if (excess < worst) {
          worst = excess;
          worst_task = j;
        }
      } else if (-std::fabs(excess) < inside) {
        inside = -std::fabs(excess);
      }
    }
    team_.least(worst, worst_task);
    team_.least(inside, unused);
    missing_ = -std::fmin(worst, inside) / spread;
    team_.sync();
    return worst_task;
  }

  // Moves w towards the shortest point of S's affine hull. Returns true if w reached it, false if a task left S first.
  GS_HOST_DEVICE bool move_to_face_minimum() {
    total_ = set_.sum_of_u();
    double reach = INFINITY;
    int64_t blocking = -1;
    GS_ROLLED for (int64_t k = team_.rank(); k < set_.size(); k += team_.size()) {
      const double w = w_[set_.member(k)], target = set_.u(k) / total_;
      const double ratio = w > 0 ? w / (w - target) : 0;
      if (target <= 0 && ratio < reach) {
        reach = ratio;
        blocking = k;
      }
    }
    team_.least(reach, blocking);
    if (blocking < 0) reach = 1;
    GS_ROLLED for (int64_t k = team_.rank(); k < set_.size(); k += team_.size()) {
      double& w = w_[set_.member(k)];
      w += reach * (set_.u(k) / total_ - w);
    }
    team_.sync();
    if (blocking < 0) return true;
    if (team_.rank() == 0) w_[set_.member(blocking)] = 0;
    set_.leave(blocking);
    return false;
  }

  static constexpr double kTolerance = 1e-14;

  const Team team_;
  const double* gram_;
  const int64_t tasks_;
  double* weights_;
  double *norm_, *w_;  // |g_i| and the weight of each task
  ActiveSet<Team> set_;
  double total_ = 0;  // sum(u)
  double value_ = 0;  // w^T G w
  // The largest violation of (G w)_t >= w^T G w (of = where w_t > 0), relative to |g_t| sum_s w_s |g_s|.
  double missing_ = 0;
};

}  // namespace gs
