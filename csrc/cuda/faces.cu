// SPDX-License-Identifier: MIT
// The weights of CAGrad, UPGrad and DualProj for a few tasks, with a thread per face. If rounding keeps every face from
// meeting the conditions, a warp solves the problem with the solver for any number of tasks.
#include <algorithm>

#include "cuda/faces.cuh"
#include "cuda/launch.cuh"
#include "solvers/cagrad.h"

namespace gs::gpu {
namespace {

template <int kTasks>
struct CAGradMemory {
  FaceMemory<kTasks> faces;
  double mean[kTasks];  // the products of the mean gradient with each gradient
  double scratch[cagrad_scratch(kTasks)];
};

// Problems with Pareto-stationary gradients are left to a warp, too.
template <int kTasks>
GS_KERNEL cagrad_faces_kernel(const double* gram, int num_tasks, double c, double* weights) {
  wait_for_previous_kernel();
  auto& memory = shared<CAGradMemory<kTasks>>();
  const double* problem = gram + block() * num_tasks * num_tasks;
  double* result = weights + block() * num_tasks;
  const bool finite = load_gram<kTasks>(memory.faces.gram, problem, num_tasks);
  let_next_kernel_start();
  if (!finite) {
    if (thread() < kWarp) fill_nan(WarpTeam{}, result, num_tasks);
    return;
  }
  const double even = 1.0 / num_tasks;
  if (thread() < kTasks) {
    double sum = 0;
    for (int j = 0; j < kTasks; j++) sum += memory.faces.gram[thread() * kTasks + j];
    memory.mean[thread()] = sum * even;
  }
  sync_block();
  double value, w[kTasks];
  const auto solve = [&](uint32_t face, double (&x)[kTasks]) {
    return face_cagrad<kTasks>(memory.faces.gram, memory.mean, num_tasks, c, face, x);
  };
  const int64_t face = least_face(memory.faces, num_tasks, solve, value, w);
  if (!(value < INFINITY)) {
    if (thread() < kWarp) CAGrad(WarpTeam{}, problem, num_tasks, memory.scratch).solve(c, result);
  } else if (thread() == face) {
    for (int i = 0; i < kTasks; i++) {
      if (i < num_tasks) result[i] = even + w[i];
    }
  }
}

template <int kTasks>
struct ConeMemory {
  static constexpr int kWarps = FaceMemory<kTasks>::kWarps;
  double h[kTasks * kTasks], root[kTasks];         // as in DualCone
  double u[kTasks][kTasks], pull[kTasks][kTasks];  // u and H u, for each vector u
  double v[kTasks][kWarps][kTasks];                // the solution of the first face in each warp that has one
  uint32_t face[kTasks][kWarps];                   // that face
  bool definite;
  double scratch[dual_cone_scratch(kTasks)];
};

constexpr uint32_t kNoFace = 0xffffffff;

// UPGrad takes one vector u per task, DualProj one. If H is definite, all faces that solve a problem have the same v.
template <int kTasks>
GS_KERNEL GS_BLOCKS(kFaceThreads<kTasks>, 1)
    projection_faces_kernel(const double* gram, int num_tasks, bool alone, const double* preference, double ridge,
                            double* weights) {
  wait_for_previous_kernel();
  auto& memory = shared<ConeMemory<kTasks>>();
  const double* problem = gram + block() * num_tasks * num_tasks;
  double* result = weights + block() * num_tasks;
  const int warp = thread() / kWarp, warps = threads() / kWarp, vectors = alone ? num_tasks : 1;
  const double even = 1.0 / num_tasks;
  const bool finite = load_gram<kTasks>(memory.h, problem, num_tasks);
  for (int e = thread(); e < vectors * kTasks; e += threads()) {
    const int k = e / kTasks, i = e % kTasks;
    memory.u[k][i] = i >= num_tasks || (alone && i != k) ? 0 : preference ? preference[i] : even;
  }
  let_next_kernel_start();
  if (!finite) {
    if (thread() < kWarp) fill_nan(WarpTeam{}, result, num_tasks);
    return;
  }
  double trace = 0;
#pragma unroll
  for (int i = 0; i < kTasks; i++) trace += memory.h[i * (kTasks + 1)];
  const double scale = trace > 0 ? 1 / trace : 0;
  sync_block();
  for (int e = thread(); e < kTasks * kTasks; e += threads()) {
    const int i = e / kTasks, j = e % kTasks;
    const double value = memory.h[e] * scale + (i == j && i < num_tasks ? ridge : 0);
    memory.h[e] = value;
    if (i == j) memory.root[i] = std::sqrt(value);
  }
  sync_block();
  for (int e = thread(); e < vectors * kTasks; e += threads()) {
    const int k = e / kTasks, i = e % kTasks;
    double sum = 0;
#pragma unroll
    for (int j = 0; j < kTasks; j++) sum += memory.h[i * kTasks + j] * memory.u[k][j];
    memory.pull[k][i] = sum;
  }
  const auto face = static_cast<uint32_t>(thread()), faces = 1u << num_tasks;
  const Triangle<kTasks> h(memory.h);
  const SmallFactor<kTasks> factor = factor_face<kTasks>([&](int i, int j) { return h.at(i, j); }, face);
  if (face == faces - 1) memory.definite = factor.definite;
  sync_block();
#pragma unroll 1
  for (int k = 0; k < vectors; k++) {
    double v[kTasks];
    const bool found = face_projection(factor, h, memory.u[k], memory.pull[k], memory.root, face, v);
    const bool solves = found && face < faces;
    const uint32_t first = min_of_warp(solves ? face : kNoFace);
    if (thread() % kWarp == 0) memory.face[k][warp] = first;
    if (solves && face == first) {
#pragma unroll
      for (int i = 0; i < kTasks; i++) memory.v[k][warp][i] = v[i];
    }
  }
  sync_block();
  bool solved = memory.definite;
  double weight = 0;
#pragma unroll 1
  for (int k = 0; k < vectors; k++) {
    int best = 0;
    for (int w = 1; w < warps; w++) best = memory.face[k][w] < memory.face[k][best] ? w : best;
    solved = solved && memory.face[k][best] != kNoFace;
    if (solved && thread() < num_tasks) {
      weight += std::fmax(memory.v[k][best][thread()], memory.u[k][thread()]);  // below u only by rounding
    }
  }
  if (solved) {
    if (thread() < num_tasks) result[thread()] = weight;
  } else if (warp == 0 && alone) {
    upgrad(WarpTeam{}, problem, num_tasks, preference, ridge, 0, 1, result, memory.scratch);
  } else if (warp == 0) {
    dual_proj(WarpTeam{}, problem, num_tasks, preference, ridge, result, memory.scratch);
  }
}

}  // namespace

gs_status launch_cagrad_faces(const double* gram, int64_t batch, int num_tasks, double c, double* weights,
                              gs_stream stream) {
  const auto launch_kernel = [&](auto kernel, int64_t bytes) {
    return launch(kernel, batch, std::max(kWarp, 1 << num_tasks), bytes, stream, gram, num_tasks, c, weights);
  };
  return num_tasks <= 4 ? launch_kernel(cagrad_faces_kernel<4>, sizeof(CAGradMemory<4>))
                        : launch_kernel(cagrad_faces_kernel<kFaceTasks>, sizeof(CAGradMemory<kFaceTasks>));
}

gs_status launch_projection_faces(const double* gram, int64_t batch, int num_tasks, bool alone,
                                  const double* preference, double ridge, double* weights, gs_stream stream) {
  const auto launch_kernel = [&](auto kernel, int64_t bytes) {
    return launch(kernel, batch, std::max(kWarp, 1 << num_tasks), bytes, stream, gram, num_tasks, alone, preference,
                  ridge, weights);
  };
  return num_tasks <= 4 ? launch_kernel(projection_faces_kernel<4>, sizeof(ConeMemory<4>))
                        : launch_kernel(projection_faces_kernel<kFaceTasks>, sizeof(ConeMemory<kFaceTasks>));
}

}  // namespace gs::gpu
