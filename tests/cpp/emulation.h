// SPDX-License-Identifier: MIT
// Shared code of the tests of the emulated CUDA kernels.
#pragma once
#include <algorithm>
#include <functional>
#include <limits>
#include <memory>

#include "emulated.h"
#include "rows.h"

using gs::gpu::Emulator;
using gs::gpu::Order;
using Values = std::vector<double>;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

inline std::unique_ptr<void, Free> allocate(int64_t bytes) {
  return std::unique_ptr<void, Free>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
}

// Returns what `run` writes to an output full of NaN, and checks that it is the same in every order of the threads.
inline Values in_every_order(int64_t count, const std::function<gs_status(double*)>& run) {
  Values first;
  for (const Order order : {Order::kForward, Order::kBackward, Order::kInterleaved, Order::kAhead}) {
    Emulator::get().order = order;
    Values out(count, std::numeric_limits<double>::quiet_NaN());
    CHECK(run(out.data()) == GS_OK, "%s", gs_last_error());
    if (order == Order::kForward) first = out;
    CHECK(std::equal(out.begin(), out.end(), first.begin(),
                     [](double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }),
          "order %d gives other bits", static_cast<int>(order));
  }
  return first;
}

inline void check_close(const Values& got, const Values& expected, double tolerance, const char* what) {
  for (size_t i = 0; i < got.size(); i++) {
    const bool same = std::isnan(expected[i]) ? std::isnan(got[i])
                                              : got[i] == expected[i] || std::abs(got[i] - expected[i]) <= tolerance;
    CHECK(same, "%s at %zu: %.17g, expected %.17g", what, i, got[i], expected[i]);
  }
}

// Gram matrices of random rows: conflicting, of mixed scales, dependent, with zero rows, and one with a NaN.
inline Values grams_of(int64_t num_tasks) {
  std::mt19937 random(5);
  Values grams;
  for (int kind = 0; kind < 5; kind++) {
    const int64_t columns = kind == 2 ? std::max<int64_t>(1, num_tasks / 2) : num_tasks + 3;
    Values rows(num_tasks * columns);
    for (int64_t i = 0; i < num_tasks * columns; i++) {
      rows[i] = std::normal_distribution<double>(i % 3 == 0 ? -0.5 : 0.2)(random);
      if (kind == 1) rows[i] *= std::pow(10, i / columns % 7 - 3);
      if (kind == 3 && i / columns % 4 == num_tasks / 2 % 4) rows[i] = 0;
    }
    for (int64_t i = 0; i < num_tasks; i++) {
      for (int64_t j = 0; j < num_tasks; j++) {
        double sum = 0;
        for (int64_t c = 0; c < columns; c++) sum += rows[i * columns + c] * rows[j * columns + c];
        grams.push_back(kind == 4 && i + j == 0 ? NAN : sum);
      }
    }
  }
  return grams;
}
constexpr int64_t kGrams = 5;
