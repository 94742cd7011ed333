// SPDX-License-Identifier: MIT
// The table of the kernel that does stages 2 to 4 in one launch (fused.cu). aggregate.cu decides when to use it.
#pragma once
#include "cuda/gram.cuh"
#include "cuda/rows.cuh"

namespace gs::gpu {

constexpr int64_t kFusedTasks = 16;
constexpr int64_t kFusedUnit = 64;  // parameters are padded to a multiple of this many columns
constexpr int64_t kSmallTableBytes = 2048;

// The sizes of a problem, and the solver's options.
struct FusedProblem {
  int num_tasks, params, slots;
  int64_t columns, width;  // of all parameters, and of a slot
  gs_method method;
  bool accumulate, mean;
  uint64_t seed;
  int64_t* step;
};

// Passed as an argument: the smaller it is, the faster the launch.
template <int64_t kBytes>
struct FusedTable : FusedProblem {
  // For each parameter its first column, its size, and the addresses of its rows and of its output.
  alignas(16) unsigned char bytes[kBytes];

  static int64_t bytes_of(int64_t params, int64_t num_tasks) { return params * 8 * (num_tasks + 3); }
  GS_HOST_DEVICE int64_t first_column(int p) const { return words()[p]; }
  GS_HOST_DEVICE int64_t numel(int p) const { return words()[params + p]; }
  template <class In>
  GS_HOST_DEVICE In* pointer(int p, int t) const {
    return reinterpret_cast<In*>(words()[2 * params + p * (num_tasks + 1) + t]);
  }
  // The parameter that holds a column.
  GS_HOST_DEVICE int param_of(int64_t column) const {
    int low = 0, high = params;
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      (first_column(middle) <= column ? low : high) = middle;
    }
    return low;
  }
  GS_HOST_DEVICE const int64_t* words() const { return reinterpret_cast<const int64_t*>(bytes); }
};
using AnyTable = FusedTable<kTableBytes>;

// Whether one launch is faster: not for solvers that take longer than several launches.
bool has_fused_solver(const gs_solve& solve, int64_t num_tasks);
// The widest slot that a block's shared memory holds.
int64_t fused_width_at_most(int32_t dtype, int64_t num_tasks, int64_t shared_bytes);

// partials is [slots][pairs].
gs_status launch_fused(const AnyTable& table, int32_t dtype, double* partials, double* gram, double* weights,
                       gs_stream stream);

}  // namespace gs::gpu
