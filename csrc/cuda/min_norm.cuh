// SPDX-License-Identifier: MIT
// The team of the solvers of csrc/solvers on the GPU, a warp, and min-norm weights by one.
#pragma once
#include "cuda/device.cuh"
#include "solvers/frank_wolfe.h"
#include "solvers/min_norm.h"

namespace gs::gpu {

struct WarpTeam {
  static constexpr int kColumns = 2;
  static constexpr int kSmall = 8;
  GS_DEVICE int64_t rank() const { return thread() % kWarp; }
  GS_DEVICE int64_t size() const { return kWarp; }
  GS_DEVICE void sync() const { sync_warp(); }
  // Of each so many neighbours, a power of two.
  GS_DEVICE double sum(double value, int64_t members = kWarp) const {
    for (int mask = static_cast<int>(members) / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
  }
  GS_DEVICE double first(double value) const { return shuffle(value, 0); }
  GS_DEVICE void least(double& value, int64_t& index) const {
    auto position = static_cast<double>(index);
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      const double other = shuffle_xor(value, mask), other_position = shuffle_xor(position, mask);
      if (other < value || (other == value && other_position < position)) {
        value = other;
        position = other_position;
      }
    }
    index = static_cast<int64_t>(position);
  }
};

// By one warp; scratch holds min_norm_scratch_bytes(num_tasks).
GS_DEVICE void solve_min_norm(const WarpTeam& team, const double* gram, int64_t num_tasks, bool finite, bool exact,
                              int64_t max_iter, double tol, double* weights, double* scratch) {
  if (!finite) {
    fill_nan(team, weights, num_tasks);
  } else if (exact) {
    MinNorm(team, gram, num_tasks, weights, scratch).solve();
  } else {
    frank_wolfe(team, gram, num_tasks, max_iter, tol, weights, scratch);
  }
}

}  // namespace gs::gpu
