// SPDX-License-Identifier: MIT
// Random loss weighting (Lin et al., TMLR 2022).
#pragma once
#include "philox.h"

namespace gs {

// cos(2 pi v); on a GPU by cospi, which needs no code for large angles.
GS_HOST_DEVICE inline double cos_of_turn(double v) {
#if defined(__CUDA_ARCH__)
  return cospi(2 * v);
#else
  return std::cos(6.283185307179586 * v);
#endif
}

// softmax(z) with standard normal z_t = sqrt(-2 ln u) cos(2 pi v) (Box & Muller 1958), where u and v are the random
// words 2t and 2t + 1 of the step.
template <class Team>
GS_HOST_DEVICE void random_weights(const Team& team, int64_t num_tasks, uint64_t seed, uint64_t step, double* weights) {
  double sum = 0;
  GS_ROLLED for (int64_t t = team.rank(); t < num_tasks; t += team.size()) {
    const PhiloxBlock words = philox(weights_counter(step, t / 2), seed);
    const double u = uniform_of(words.word[t % 2 * 2]), v = uniform_of(words.word[t % 2 * 2 + 1]);
    weights[t] = std::exp(std::sqrt(-2 * std::log(u)) * cos_of_turn(v));  // |z| < 7
    sum += weights[t];
  }
  sum = team.sum(sum);
  GS_ROLLED for (int64_t t = team.rank(); t < num_tasks; t += team.size()) weights[t] /= sum;
}

}  // namespace gs
