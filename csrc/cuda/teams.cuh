// SPDX-License-Identifier: MIT
// The teams of the solvers of csrc/solvers on the GPU: a warp, or all of a block.
#pragma once
#include "cuda/device.cuh"
#include "solvers/common.h"

namespace gs::gpu {

// Scratch beyond this lies in the workspace: every GPU has so much shared memory.
constexpr int64_t kSharedBytes = 48 * 1024;

// For so many problems' scratch.
inline int64_t workspace_bytes(int64_t batch, int64_t scratch_bytes) {
  return scratch_bytes <= kSharedBytes ? 0 : batch * scratch_bytes;
}

struct WarpTeam {
  static constexpr int kColumns = 2;
  static constexpr int kSmall = 8;
  static constexpr int kPanel = 4;
  static constexpr int kPairMembers = 4;
  GS_DEVICE int64_t rank() const { return thread() % kWarp; }
  GS_DEVICE int64_t size() const { return kWarp; }
  GS_DEVICE void sync() const { sync_warp(); }
  // Of each so many neighbours, a power of two.
  GS_DEVICE double sum(double value, int members = kWarp) const {
    for (int mask = members / 2; mask > 0; mask /= 2) value += shuffle_xor(value, mask);
    return value;
  }
  template <class... Values>
  GS_DEVICE void sum_each(Values&... values) const {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) ((values += shuffle_xor(values, mask)), ...);
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

// Whole warps. Solvers that look for a least value have no use for it: most of their loops have a turn for each task.
class BlockTeam {
 public:
  static constexpr int kColumns = 1;
  static constexpr int kSmall = 0;
  static constexpr int kPanel = 4;
  static constexpr int kPairMembers = 8;
  static constexpr int kValues = kMaxThreads / kWarp;
  // With kValues of shared memory.
  GS_DEVICE explicit BlockTeam(double* values) : values_(values) {}
  GS_DEVICE int64_t rank() const { return thread(); }
  GS_DEVICE int64_t size() const { return threads(); }
  GS_DEVICE void sync() const { sync_block(); }
  // Of so many neighbours in a warp, or of all.
  GS_DEVICE double sum(double value, int members) const { return WarpTeam().sum(value, members); }
  GS_DEVICE double sum(double value) const {
    value = WarpTeam().sum(value);
    sync_block();
    if (thread() % kWarp == 0) values_[thread() / kWarp] = value;
    sync_block();
    double total = 0;
    for (int w = 0; w < threads() / kWarp; w++) total += values_[w];
    return total;
  }
  template <class... Values>
  GS_DEVICE void sum_each(Values&... values) const {
    ((values = sum(values)), ...);
  }

 private:
  double* values_;
};

}  // namespace gs::gpu
