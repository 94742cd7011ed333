// SPDX-License-Identifier: MIT
#pragma once
#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define GS_HOST_DEVICE __host__ __device__
#define GS_HOST_DEVICE_CALL __host__ __device__ __noinline__  // long, and called in several places
#define GS_UNROLL _Pragma("unroll")
#define GS_ROLLED _Pragma("unroll 1")  // most such loops have one iteration: unrolling only adds code to fetch
#else
#define GS_HOST_DEVICE
#define GS_HOST_DEVICE_CALL
#define GS_UNROLL
#define GS_ROLLED
#endif

namespace gs {

// NaN and Inf entries make every weight NaN, so that the direction is NaN and a gradient scaler skips the step.
GS_HOST_DEVICE inline bool all_finite(const double* values, int64_t count) {
  bool finite = true;
  for (int64_t i = 0; i < count; i++) finite = finite && std::isfinite(values[i]);
  return finite;
}

// 1 / sqrt(x), on a GPU in half the time of a division.
GS_HOST_DEVICE inline double inverse_root(double x) {
#if defined(__CUDA_ARCH__)
  return rsqrt(x);
#else
  return 1 / std::sqrt(x);
#endif
}

template <class Team>
GS_HOST_DEVICE void fill_nan(const Team& team, double* values, int64_t count) {
  GS_ROLLED for (int64_t i = team.rank(); i < count; i += team.size()) values[i] = NAN;
}

// The solvers run on a team: the threads of a warp or a block on a GPU, one thread on the CPU. Members share the arrays
// and divide the iterations of loops over tasks; a sync() separates a write from another member's read, and a read from
// another member's write. Scalars that every member computes, and results of sums and least(), are the same for all
// members, so they take the same branches.
struct SerialTeam {
  static constexpr int kColumns = 8;      // columns that a member sums at a time
  static constexpr int kSmall = 0;        // up to so many rows each member factors a matrix itself; at most size()
  static constexpr int kPanel = 1;        // columns that are factored together; at most size()
  static constexpr int kPairMembers = 1;  // members that rotate a pair of rows together; divides size()
  GS_HOST_DEVICE int64_t rank() const { return 0; }
  GS_HOST_DEVICE int64_t size() const { return 1; }
  GS_HOST_DEVICE void sync() const {}
  GS_HOST_DEVICE double sum(double value) const { return value; }
  // Several sums at once; each replaces the member's part.
  template <class... Values>
  GS_HOST_DEVICE void sum_each(Values&...) const {}
  // The least value and its index; among equal values, the smallest index.
  GS_HOST_DEVICE void least(double&, int64_t&) const {}
};

// Calls body(i, j) for the entries of a [T, T] matrix, then sync().
template <class Team, class Body>
GS_HOST_DEVICE void each_entry(const Team& team, int64_t num_tasks, const Body& body) {
  // 32 bits, as 64-bit divisions take a GPU hundreds of cycles.
  const auto side = static_cast<uint32_t>(num_tasks), step = static_cast<uint32_t>(team.size());
  GS_ROLLED for (auto e = static_cast<uint32_t>(team.rank()); e < side * side; e += step) body(e / side, e % side);
  team.sync();
}

// out_i = sum_k weight(k) G_{row(k), i} over k = 0..count-1; a member sums several columns i at a time.
template <class Team, class Row, class Weight>
GS_HOST_DEVICE void sum_rows(const Team& team, const double* gram, int64_t num_tasks, int64_t count, const Row& row,
                             const Weight& weight, double* out) {
  constexpr int64_t kColumns = Team::kColumns;
  const int64_t step = team.size();
  for (int64_t base = 0; base < num_tasks; base += kColumns * step) {
    const int64_t first = base + team.rank();
    const bool whole = base + kColumns * step <= num_tasks;
    double sum[kColumns] = {};
    for (int64_t k = 0; k < count; k++) {
      const double* entries = gram + row(k) * num_tasks + first;
      const double factor = weight(k);
      if (whole) {
        for (int64_t c = 0; c < kColumns; c++) sum[c] += entries[c * step] * factor;
      } else {
        for (int64_t c = 0; c < kColumns; c++) {
          if (first + c * step < num_tasks) sum[c] += entries[c * step] * factor;
        }
      }
    }
    for (int64_t c = 0; c < kColumns; c++) {
      if (first + c * step < num_tasks) out[first + c * step] = sum[c];
    }
  }
  team.sync();
}

}  // namespace gs
