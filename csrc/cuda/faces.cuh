// SPDX-License-Identifier: MIT
// Problems on the simplex and on cones for a few tasks, solved by a block of at least 2^T threads: all faces at once,
// each by one thread.
#pragma once
#include "cpu/status.h"
#include "cuda/teams.cuh"
#include "solvers/faces.h"

namespace gs::gpu {

constexpr int kFaceTasks = 8;  // the most tasks

template <int kTasks>
constexpr int kFaceThreads = (1 << kTasks) > kWarp ? 1 << kTasks : kWarp;

template <int kTasks>
struct FaceMemory {
  static constexpr int kWarps = kFaceThreads<kTasks> / kWarp;  // the most warps that have faces
  double gram[kTasks * kTasks];                                // with zeros for absent tasks
  double value[kWarps];
  int64_t face[kWarps];
};

// Copies G; returns whether it is finite.
template <int kTasks>
GS_DEVICE bool load_gram(double (&target)[kTasks * kTasks], const double* gram, int num_tasks) {
  bool finite = true;
  for (int e = thread(); e < kTasks * kTasks; e += threads()) {
    const int i = e / kTasks, j = e % kTasks;
    target[e] = i < num_tasks && j < num_tasks ? gram[i * num_tasks + j] : 0;
    finite = finite && std::isfinite(target[e]);
  }
  return !any_of_block(!finite);
}

// Returns the face of least value (the first of equal ones), and sets that value, for every thread. solve(face, w)
// returns a face's value and sets its weights.
template <int kTasks, class Solve>
GS_DEVICE int64_t least_face(FaceMemory<kTasks>& memory, int num_tasks, const Solve& solve, double& value,
                             double (&w)[kTasks]) {
  value = INFINITY;
  int64_t face = thread();
  if (face > 0 && face < 1 << num_tasks) value = solve(static_cast<uint32_t>(face), w);
  WarpTeam{}.least(value, face);
  constexpr int kWarps = FaceMemory<kTasks>::kWarps;
  if (thread() % kWarp == 0 && thread() / kWarp < kWarps) {
    memory.value[thread() / kWarp] = value;
    memory.face[thread() / kWarp] = face;
  }
  sync_block();
  int best = 0;
  for (int warp = 1; warp < kWarps && warp < threads() / kWarp; warp++) {
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

// The weights of CAGrad, and of UPGrad (`alone`) or DualProj, from batch Gram matrices of at most kFaceTasks tasks.
gs_status launch_cagrad_faces(const double* gram, int64_t batch, int num_tasks, double c, double* weights,
                              gs_stream stream);
gs_status launch_projection_faces(const double* gram, int64_t batch, int num_tasks, bool alone,
                                  const double* preference, double ridge, double* weights, gs_stream stream);

}  // namespace gs::gpu
