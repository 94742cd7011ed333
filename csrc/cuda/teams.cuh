// SPDX-License-Identifier: MIT
// The teams that run the solvers of csrc/solvers on the GPU: a warp, or a whole block.
#pragma once
#include "cuda/device.cuh"
#include "solvers/common.h"

namespace gs::gpu {

// Every GPU has this much shared memory; larger scratch lies in the workspace.
constexpr int64_t kSharedBytes = 48 * 1024;

// The workspace for the scratch of all problems.
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
  // The sum over each group of `members` neighbouring lanes, a power of two.
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

// A block of whole warps. Has no least(): solvers that need it gain nothing from a block, as most of their loops have
// only one iteration per task.
class BlockTeam {
 public:
  static constexpr int kColumns = 1;
  static constexpr int kSmall = 0;
  static constexpr int kPanel = 4;
  static constexpr int kPairMembers = 8;
  static constexpr int kValues = kMaxThreads / kWarp;
  // values: kValues doubles in shared memory.
  GS_DEVICE explicit BlockTeam(double* values) : values_(values) {}
  GS_DEVICE int64_t rank() const { return thread(); }
  GS_DEVICE int64_t size() const { return threads(); }
  GS_DEVICE void sync() const { sync_block(); }
  // The sum over `members` neighbouring lanes of a warp, or over the block.
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
