// SPDX-License-Identifier: MIT
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define GS_HOST_DEVICE __host__ __device__
#else
#define GS_HOST_DEVICE
#endif

namespace gs {

// NaN and Inf entries make every weight NaN, so that the direction is NaN and a gradient scaler skips the step.
GS_HOST_DEVICE inline bool all_finite(const double* values, int64_t count) {
  bool finite = true;
  for (int64_t i = 0; i < count; i++) finite = finite && std::isfinite(values[i]);
  return finite;
}

GS_HOST_DEVICE inline void fill_nan(double* values, int64_t count) {
  for (int64_t i = 0; i < count; i++) values[i] = NAN;
}

GS_HOST_DEVICE inline double dot(const double* a, const double* b, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; i++) sum += a[i] * b[i];
  return sum;
}

}  // namespace gs
