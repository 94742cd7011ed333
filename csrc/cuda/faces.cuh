// SPDX-License-Identifier: MIT
// Problems on the simplex for a few tasks by a block of 2^T threads, or if that is less by a warp: all faces at once,
// each by a thread.
#pragma once
#include "cuda/teams.cuh"
#include "solvers/faces.h"

namespace gs::gpu {

constexpr int kFaceTasks = 8;  // at most as many

template <int kTasks>
struct FaceMemory {
  double gram[kTasks * kTasks];  // with zeros for absent tasks
  double value[(1 << kTasks) / kWarp + 1];
  int64_t face[(1 << kTasks) / kWarp + 1];
};

// Copies G; whether it is finite.
template <int kTasks>
GS_DEVICE bool load_gram(FaceMemory<kTasks>& memory, const double* gram, int num_tasks) {
  bool finite = true;
  for (int e = thread(); e < kTasks * kTasks; e += threads()) {
    const int i = e / kTasks, j = e % kTasks;
    memory.gram[e] = i < num_tasks && j < num_tasks ? gram[i * num_tasks + j] : 0;
    finite = finite && std::isfinite(memory.gram[e]);
  }
  return !any_of_block(!finite);
}

// The face whose value is least, for every thread, and that value; of equal ones the first face. solve(face, w) returns
// a face's value, and its weights.
template <int kTasks, class Solve>
GS_DEVICE int64_t least_face(FaceMemory<kTasks>& memory, int num_tasks, const Solve& solve, double& value,
                             double (&w)[kTasks]) {
  value = INFINITY;
  int64_t face = thread();
  if (face > 0 && face < 1 << num_tasks) value = solve(static_cast<uint32_t>(face), w);
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
  value = memory.value[best];
  return memory.face[best];
}

// The exact min-norm weights.
template <int kTasks>
GS_DEVICE void solve_min_norm_faces(FaceMemory<kTasks>& memory, int num_tasks, double* result) {
  double shift = memory.gram[0], value, w[kTasks];
  for (int i = 1; i < num_tasks; i++) shift = std::fmin(shift, memory.gram[i * (kTasks + 1)]);
  const auto solve = [&](uint32_t face, double (&x)[kTasks]) {
    return face_min_norm<kTasks>(memory.gram, shift, face, x);
  };
  if (thread() != least_face(memory, num_tasks, solve, value, w)) return;
  for (int i = 0; i < kTasks; i++) {
    if (i < num_tasks) result[i] = w[i];
  }
}

}  // namespace gs::gpu
