// SPDX-License-Identifier: MIT
// Problems for a few tasks whose solution lies inside some face of a simplex or a cone: each face is solved by itself.
// A face is a set of tasks, given as a bit mask; matrices are kTasks x kTasks.
#pragma once
#include "dual_cone.h"

namespace gs {

// The factor of a face's rows and columns of a matrix, with those of the identity for the tasks outside.
template <int kTasks, class Entry>
GS_HOST_DEVICE SmallFactor<kTasks> factor_face(const Entry& entry, uint32_t face) {
  return SmallFactor<kTasks>([&](int i, int j) {
    const bool inside = (face >> i & 1) != 0 && (face >> j & 1) != 0;
    return inside ? entry(i, j) : i == j ? 1.0 : 0.0;
  });
}

// Min-norm on one face: w = the weights of the shortest point of the affine hull of the face's tasks. Returns w^T G w,
// or infinity if the point lies outside the simplex or the tasks are affinely dependent to working precision; then a
// smaller face attains the minimum, by Caratheodory's theorem. The equations are those of MinNorm, whose c = min_i G_ii
// is `shift`.
template <int kTasks>
GS_HOST_DEVICE double face_min_norm(const double* gram, double shift, uint32_t face, double (&w)[kTasks]) {
  const auto inside = [&](int i) { return (face >> i & 1) != 0; };
  const auto shifted = [&](int i, int j) { return gram[i * kTasks + j] + shift; };
  const SmallFactor<kTasks> factor = factor_face<kTasks>(shifted, face);
  GS_UNROLL for (int i = 0; i < kTasks; i++) w[i] = inside(i) ? 1 : 0;
  factor.solve(w);
  bool valid = factor.definite;
  double total = 0;
  GS_UNROLL for (int k = kTasks - 1; k >= 0; k--) {
    valid = valid && w[k] >= 0;
    total += w[k];
  }
  // A single task is its own shortest point, even if its gradient is zero and the equations have no unique solution.
  const bool alone = (face & (face - 1)) == 0;
  const double scale = 1 / total;
  double value = 0;
  GS_UNROLL for (int i = 0; i < kTasks; i++) w[i] = alone ? (inside(i) ? 1 : 0) : w[i] * scale;
  GS_UNROLL for (int i = 0; i < kTasks; i++) {
    double sum = 0;
    GS_UNROLL for (int j = 0; j < kTasks; j++) sum += gram[i * kTasks + j] * w[j];
    value += w[i] * sum;
  }
  return alone || (valid && shift > 0 && value < INFINITY) ? value : INFINITY;
}

// CAGrad's problem (cagrad.h) on one face: minimize x^T b + kappa |g_x|, b = G 1 / T, kappa = c |g_0|. With lambda =
// kappa / |g_x| the conditions on a face are (lambda G x + b)_i = mu, so that with M = G + shift 1 1^T, u = M^-1 1, v =
// M^-1 b and s = 1 / lambda, x = (1 + s sum(v)) / sum(u) u - s v. Then |g_x| = s kappa is an equation for s. Sets x to
// lambda x, and returns how far that is from the minimum over all faces: the largest amount by which g_i . d / |g_i|
// violates the conditions, divided by kappa. Returns infinity if rounding errors are too large, the tasks are affinely
// dependent, or lambda is larger than find_root of cagrad.h admits.
template <int kTasks>
GS_HOST_DEVICE double face_cagrad(const double* gram, const double* mean, int num_tasks, double c, uint32_t face,
                                  double (&x)[kTasks]) {
  const auto inside = [&](int i) { return (face >> i & 1) != 0; };
  const double even = 1.0 / num_tasks;
  double trace = 0, mean_squared = 0, shift = INFINITY;
  GS_UNROLL for (int i = 0; i < kTasks; i++) {
    trace += gram[i * (kTasks + 1)];
    mean_squared += mean[i] * even;
    if (i < num_tasks) shift = std::fmin(shift, gram[i * (kTasks + 1)]);
  }
  const double squared = c * c * mean_squared;  // kappa^2
  const auto shifted = [&](int i, int j) { return gram[i * kTasks + j] + shift; };
  const SmallFactor<kTasks> factor = factor_face<kTasks>(shifted, face);
  double u[kTasks];
  GS_UNROLL for (int i = 0; i < kTasks; i++) {
    u[i] = inside(i) ? 1 : 0;
    x[i] = inside(i) ? mean[i] : 0;
  }
  factor.solve(u);
  factor.solve(x);
  double sum_u = 0, sum_v = 0, product = 0;
  GS_UNROLL for (int i = 0; i < kTasks; i++) {
    sum_u += u[i];
    sum_v += x[i];
    product += mean[i] * x[i];
  }
  const double s = std::sqrt((1 / sum_u - shift) / (squared + sum_v * sum_v / sum_u - product));
  const double ratio = (1 + s * sum_v) / sum_u;
  bool valid = factor.definite && mean_squared > 1e-15 * trace;
  GS_UNROLL for (int i = 0; i < kTasks; i++) {
    x[i] = ratio * u[i] - s * x[i];
    valid = valid && x[i] >= 0;
  }
  double slope[kTasks], length_squared = 0;  // G x; g_x . g_x
  GS_UNROLL for (int i = 0; i < kTasks; i++) {
    slope[i] = 0;
    GS_UNROLL for (int j = 0; j < kTasks; j++) slope[i] += gram[i * kTasks + j] * x[j];
    length_squared += x[i] * slope[i];
  }
  valid = valid && length_squared > 1e-14 * trace;
  const double lambda = std::sqrt(squared / length_squared);
  double level = 0, total = 0, excess = 0;
  GS_UNROLL for (int i = 0; i < kTasks; i++) {
    slope[i] = mean[i] + lambda * slope[i];
    level += x[i] * slope[i];
    total += x[i];
  }
  level /= total;
  GS_UNROLL for (int i = 0; i < kTasks; i++) {
    if (i >= num_tasks) continue;
    const double below = level - slope[i], inverse = inverse_root(gram[i * (kTasks + 1)]);
    excess = std::fmax(excess, (inside(i) ? std::fabs(below) : below) * inverse);  // fmax ignores NaN (0 / 0)
    x[i] *= lambda;
  }
  const double kappa = std::sqrt(squared);
  return valid && excess <= 1e-9 * kappa ? excess / kappa : INFINITY;
}

// The lower triangle of a symmetric matrix, in registers.
template <int kTasks>
struct Triangle {
  double entries[kTasks * (kTasks + 1) / 2];

  GS_HOST_DEVICE explicit Triangle(const double* matrix) {
    GS_UNROLL for (int i = 0; i < kTasks; i++) {
      GS_UNROLL for (int j = 0; j <= i; j++) entries[i * (i + 1) / 2 + j] = matrix[i * kTasks + j];
    }
  }
  GS_HOST_DEVICE double at(int i, int j) const { return entries[i < j ? j * (j + 1) / 2 + i : i * (i + 1) / 2 + j]; }
};

// DualCone's problem on one face: v = u + z with z = 0 for the tasks outside the face and (H v)_i = 0 inside, by the
// face's factor of H. pull = H u, root_i = sqrt(H_ii). Returns whether v solves the whole problem, up to rounding.
template <int kTasks>
GS_HOST_DEVICE bool face_projection(const SmallFactor<kTasks>& factor, const Triangle<kTasks>& h, const double* u,
                                    const double* pull, const double* root, uint32_t face, double (&v)[kTasks]) {
  const auto inside = [&](int i) { return (face >> i & 1) != 0; };
  double z[kTasks], y[kTasks], squared = 0;
  GS_UNROLL for (int i = 0; i < kTasks; i++) z[i] = inside(i) ? -pull[i] : 0;
  factor.solve(z);
  GS_UNROLL for (int i = 0; i < kTasks; i++) {
    y[i] = pull[i];
    GS_UNROLL for (int j = 0; j < kTasks; j++) y[i] += h.at(i, j) * z[j];
    v[i] = u[i] + z[i];
    squared += v[i] * y[i];
  }
  const double length = std::sqrt(std::fmax(squared, 0.0));
  bool valid = true;
  GS_UNROLL for (int i = 0; i < kTasks; i++) {
    const double least = inside(i) ? z[i] * root[i] : y[i];
    valid = valid & (least >= -(inside(i) ? kConeFeasible : kConeOptimal * root[i]) * length);  // false for NaN
  }
  return valid;
}

}  // namespace gs
