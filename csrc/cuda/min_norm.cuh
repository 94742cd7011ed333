// SPDX-License-Identifier: MIT
// Min-norm weights on the GPU: by a warp with the solvers of csrc/solvers, or for few tasks by a block, all faces at
// once.
#pragma once
#include "cuda/device.cuh"
#include "solvers/faces.h"
#include "solvers/frank_wolfe.h"
#include "solvers/min_norm.h"

namespace gs::gpu {

struct WarpTeam {
  static constexpr int kColumns = 2;
  GS_DEVICE int64_t rank() const { return thread() % kWarp; }
  GS_DEVICE int64_t size() const { return kWarp; }
  GS_DEVICE void sync() const { sync_warp(); }
  GS_DEVICE double sum(double value) const {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
  }
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

constexpr int kFaceTasks = 8;  // at most as many have all their faces solved at once

template <int kTasks>
struct FaceMemory {
  double gram[kTasks * kTasks];  // with zeros for absent tasks
  double value[(1 << kTasks) / kWarp + 1];
  int64_t face[(1 << kTasks) / kWarp + 1];
};

// The exact solution for up to kTasks tasks by a block of 2^T threads, one per face, or if that is less by a warp. Of
// equal minima the first face's counts.
template <int kTasks>
GS_DEVICE void solve_faces(FaceMemory<kTasks>& memory, int num_tasks, double* result) {
  double shift = memory.gram[0], w[kTasks], value = INFINITY;
  for (int i = 1; i < num_tasks; i++) shift = std::fmin(shift, memory.gram[i * (kTasks + 1)]);
  int64_t face = thread();
  if (face > 0 && face < 1 << num_tasks) {
    value = face_min_norm<kTasks>(memory.gram, shift, static_cast<uint32_t>(face), w);
  }
  WarpTeam{}.least(value, face);
  if (thread() % kWarp == 0) {
    memory.value[thread() / kWarp] = value;
    memory.face[thread() / kWarp] = face;
  }
  sync_block();
  int best = 0;
  for (int warp = 1; warp < threads() / kWarp; warp++) {
    if (memory.value[warp] < memory.value[best]) best = warp;
  }
  if (thread() == memory.face[best]) {
    for (int i = 0; i < kTasks; i++) {
      if (i < num_tasks) result[i] = w[i];
    }
  }
}

}  // namespace gs::gpu
