// SPDX-License-Identifier: MIT
// Task gradients for the tests of the emulated CUDA kernels.
#pragma once
#include <algorithm>
#include <functional>

#include "rows.h"

// Parameters of the given sizes, some without a gradient from one or all tasks. Rows begin at any multiple of their
// element's size. The rows of even-numbered parameters have the same alignment, so that they are read by vectors.
struct Model {
  std::vector<Row> rows;
  std::vector<const void*> data;
  std::vector<int64_t> numel;
  std::vector<int32_t> dtype, segment;
  int64_t num_tasks, num_segments = 3;

  // scale(t): the scale of task t's rows.
  Model(
      int64_t tasks, std::vector<gs_dtype> dtypes, std::vector<int64_t> sizes,
      const std::function<double(int64_t)>& scale = [](int64_t) { return 1; })
      : numel(sizes), num_tasks(tasks) {
    std::mt19937 random(8);
    rows.reserve(sizes.size() * tasks);
    for (size_t p = 0; p < sizes.size(); p++) {
      dtype.push_back(dtypes[p % dtypes.size()]);
      segment.push_back(p < 3 ? 0 : 2);
      for (int64_t t = 0; t < tasks; t++) {
        rows.emplace_back(sizes[p] + p % 3 + (p % 2 ? t % 4 : 0), static_cast<gs_dtype>(dtype[p]), scale(t), random);
        const bool absent = p == 4 || (p + t) % 5 == 4;
        // Rows end where their buffer ends.
        data.push_back(absent ? nullptr
                              : rows.back().storage.data() + rows.back().storage.size() -
                                    sizes[p] * bytes_of(static_cast<gs_dtype>(dtype[p])));
      }
    }
  }
  gs_gradients view() const {
    return {num_tasks,     static_cast<int64_t>(numel.size()), num_segments, data.data(), numel.data(), dtype.data(),
            segment.data()};
  }
  // Whether sums must be accurate to float64.
  bool is_exact() const {
    return std::all_of(dtype.begin(), dtype.end(), [](int32_t d) { return d == GS_FLOAT64; });
  }
  double at(size_t p, int64_t t, int64_t c) const {
    const auto* row = static_cast<const char*>(data[p * num_tasks + t]);
    const auto type = static_cast<gs_dtype>(dtype[p]);
    return row ? decode(row + c * bytes_of(type), type) : 0;
  }
};
