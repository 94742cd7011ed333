// SPDX-License-Identifier: MIT
// GradNorm (Chen et al., ICML 2018, equations 1-2 and Algorithm 1) in closed form.
#pragma once
#include "common.h"

namespace gs {

// With n_i = |grad L_i|, G_i = w_i n_i, r_i = (L_i / L_i(0)) / mean_k (L_k / L_k(0)) and target_i = mean(G) r_i^alpha
// held constant, sum_i |G_i - target_i| has the derivative sign(G_i - target_i) n_i in w_i. Takes one descent step of
// size lr, with weights below 0 set to 0, and scales the weights to sum to T. If every weight would be 0, the weights
// stay as they were; new_weights must not be weights, which are read again for that.
GS_HOST_DEVICE inline void gradnorm_update(const double* weights, const double* norms, const double* losses,
                                           const double* initial_losses, int64_t num_tasks, double alpha, double lr,
                                           double* new_weights) {
  const double tasks = static_cast<double>(num_tasks);
  double mean_norm = 0, mean_ratio = 0;
  for (int64_t i = 0; i < num_tasks; i++) {
    mean_norm += weights[i] * norms[i] / tasks;
    mean_ratio += losses[i] / initial_losses[i] / tasks;
  }
  double total = 0;
  for (int64_t i = 0; i < num_tasks; i++) {
    const double target = mean_norm * std::pow(losses[i] / initial_losses[i] / mean_ratio, alpha);
    const double difference = weights[i] * norms[i] - target;
    const double sign = difference > 0 ? 1 : difference < 0 ? -1 : difference;  // 0 or NaN
    const double moved = weights[i] - lr * sign * norms[i];
    new_weights[i] = moved < 0 ? 0 : moved;
    total += new_weights[i];
  }
  for (int64_t i = 0; i < num_tasks; i++) {
    new_weights[i] = total == 0 ? weights[i] : new_weights[i] * (tasks / total);
  }
}

// One step of training, from G: current receives a copy of weights, the state, which is then updated. norms and updated
// are scratch of num_tasks values. The state stays as it was if values are not finite (as in a step that a gradient
// scaler will skip) or a loss is negative. A loss of 0 (of a task without samples in the first batch) is not kept as
// L(0).
GS_HOST_DEVICE inline void gradnorm_step(const double* gram, const double* losses, int64_t num_tasks, double alpha,
                                         double lr, double* weights, double* initial_losses, double* current,
                                         double* norms, double* updated) {
  for (int64_t i = 0; i < num_tasks; i++) {
    norms[i] = std::sqrt(gram[i * num_tasks + i]);
    current[i] = weights[i];
    if (!(std::isfinite(initial_losses[i]) && initial_losses[i] > 0)) initial_losses[i] = losses[i];
  }
  gradnorm_update(weights, norms, losses, initial_losses, num_tasks, alpha, lr, updated);
  bool steps = all_finite(updated, num_tasks);
  for (int64_t i = 0; i < num_tasks; i++) steps = steps && losses[i] >= 0 && std::isfinite(losses[i]);
  if (steps) {
    for (int64_t i = 0; i < num_tasks; i++) weights[i] = updated[i];
  }
  if (!all_finite(norms, num_tasks)) fill_nan(SerialTeam{}, current, num_tasks);
}

}  // namespace gs
