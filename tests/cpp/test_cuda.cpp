// SPDX-License-Identifier: MIT
// The CUDA kernels, compiled for the host (emulated.h), against the CPU's results, in several orders of threads and
// blocks: the same bits in each.
#include <algorithm>
#include <functional>
#include <limits>
#include <memory>

#include "emulated.h"
#include "rows.h"

namespace {

using gs::gpu::Emulator;
using gs::gpu::Order;
using Values = std::vector<double>;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

std::unique_ptr<void, Free> allocate(int64_t bytes) {
  return std::unique_ptr<void, Free>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
}

// What `run` writes to an output full of NaN; it must not depend on the order of the threads.
Values in_every_order(int64_t count, const std::function<gs_status(double*)>& run) {
  Values first;
  for (const Order order : {Order::kForward, Order::kBackward, Order::kInterleaved}) {
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

void check_close(const Values& got, const Values& expected, double tolerance, const char* what) {
  for (size_t i = 0; i < got.size(); i++) {
    const bool same = std::isnan(expected[i]) ? std::isnan(got[i]) : std::abs(got[i] - expected[i]) <= tolerance;
    CHECK(same, "%s at %zu: %.17g, expected %.17g", what, i, got[i], expected[i]);
  }
}

// Gram matrices of random rows: conflicting, of mixed scales, dependent, with zero rows, and one with a NaN.
Values grams_of(int64_t num_tasks) {
  std::mt19937 random(5);
  Values grams;
  for (int kind = 0; kind < 5; kind++) {
    const int64_t columns = kind == 2 ? std::max<int64_t>(1, num_tasks / 2) : num_tasks + 3;
    Values rows(num_tasks * columns);
    for (int64_t i = 0; i < num_tasks * columns; i++) {
      rows[i] = std::normal_distribution<double>(i % 3 == 0 ? -0.5 : 0.2)(random);
      if (kind == 1) rows[i] *= std::pow(10, i / columns % 7 - 3);
      if (kind == 3 && i / columns % 4 == 1) rows[i] = 0;
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

void test_task_order(int64_t num_tasks) {
  const int64_t step = (int64_t{1} << 33) + 7;
  std::vector<int64_t> expected(num_tasks * num_tasks), got(num_tasks * num_tasks, -1);
  CHECK(gs_task_order_cpu(num_tasks, 42, step, expected.data()) == GS_OK, "%s", gs_last_error());
  CHECK(gs_task_order_cuda(num_tasks, 42, &step, got.data(), nullptr) == GS_OK, "%s", gs_last_error());
  CHECK(got == expected, "T = %ld", static_cast<long>(num_tasks));
}

void test_pcgrad(int64_t num_tasks, bool own_order) {
  const Values grams = grams_of(num_tasks);
  std::vector<int64_t> order(num_tasks * num_tasks);
  CHECK(gs_task_order_cpu(num_tasks, 3, 9, order.data()) == GS_OK, "%s", gs_last_error());
  const int64_t* given = own_order ? order.data() : nullptr;
  for (const int64_t batch : {int64_t{1}, kGrams}) {
    Values expected(batch * num_tasks);
    CHECK(gs_pcgrad_cpu(grams.data(), batch, num_tasks, given, 1, 2, own_order, expected.data(), nullptr) == GS_OK,
          "%s", gs_last_error());
    int64_t step = 2;
    const Values got = in_every_order(batch * num_tasks, [&](double* out) {
      step = 2;
      return gs_pcgrad_cuda(grams.data(), batch, num_tasks, given, 1, &step, 1, own_order, out, nullptr);
    });
    CHECK(step == 3, "step %ld", static_cast<long>(step));
    for (size_t i = 0; i < got.size(); i++) {
      const double tolerance = 1e-9 * std::max(1.0, std::abs(expected[i]));
      check_close({got[i]}, {expected[i]}, tolerance, "pcgrad");
    }
  }
}

void test_min_norm(int64_t num_tasks, gs_solver solver) {
  const Values grams = grams_of(num_tasks);
  const int64_t bytes = gs_min_norm_workspace_bytes(kGrams, num_tasks);
  Values expected(kGrams * num_tasks);
  CHECK(gs_min_norm_cpu(grams.data(), kGrams, num_tasks, solver, 60, 1e-9, expected.data(), allocate(bytes).get(),
                        bytes, nullptr) == GS_OK,
        "%s", gs_last_error());
  const Values got = in_every_order(kGrams * num_tasks, [&](double* out) {
    return gs_min_norm_cuda(grams.data(), kGrams, num_tasks, solver, 60, 1e-9, out, allocate(bytes).get(), bytes,
                            nullptr);
  });
  for (int64_t b = 0; b < kGrams; b++) {
    // Dependent rows have several shortest combinations, so compare their length, relative to the longest row.
    double got_square = 0, expected_square = 0, longest = 0, total = 0;
    for (int64_t i = 0; i < num_tasks; i++) {
      const double* row = &grams[(b * num_tasks + i) * num_tasks];
      total += got[b * num_tasks + i];
      longest = std::max(longest, row[i]);
      for (int64_t j = 0; j < num_tasks; j++) {
        got_square += got[b * num_tasks + i] * row[j] * got[b * num_tasks + j];
        expected_square += expected[b * num_tasks + i] * row[j] * expected[b * num_tasks + j];
      }
    }
    if (b == kGrams - 1) {
      CHECK(std::isnan(total), "NaN in, %g out", total);
      continue;
    }
    CHECK(std::abs(got_square - expected_square) <= 1e-12 * longest && std::abs(total - 1) < 1e-12,
          "T %ld problem %ld: %g, expected %g", static_cast<long>(num_tasks), static_cast<long>(b), got_square,
          expected_square);
  }
}

void test_gradnorm(int64_t num_tasks) {
  const Values grams = grams_of(num_tasks);
  std::mt19937 random(6);
  const auto positive = [&] {
    Values values(kGrams * num_tasks);
    for (double& value : values) value = std::uniform_real_distribution<double>(0.1, 2)(random);
    return values;
  };
  const Values weights = positive(), norms = positive(), losses = positive(), initial = positive();
  Values expected(weights.size());
  CHECK(gs_gradnorm_cpu(weights.data(), norms.data(), losses.data(), initial.data(), kGrams, num_tasks, 1.5, 0.1,
                        expected.data()) == GS_OK,
        "%s", gs_last_error());
  check_close(in_every_order(expected.size(),
                             [&](double* out) {
                               return gs_gradnorm_cuda(weights.data(), norms.data(), losses.data(), initial.data(),
                                                       kGrams, num_tasks, 1.5, 0.1, out, nullptr);
                             }),
              expected, 1e-14, "gradnorm");
  Values state = weights, first(weights.size(), NAN), current(weights.size());
  CHECK(gs_gradnorm_step_cpu(grams.data(), losses.data(), kGrams, num_tasks, 1.5, 0.1, state.data(), first.data(),
                             current.data()) == GS_OK,
        "%s", gs_last_error());
  Values gpu_state, gpu_first;
  const Values got = in_every_order(current.size(), [&](double* out) {
    gpu_state = weights;
    gpu_first.assign(weights.size(), NAN);
    return gs_gradnorm_step_cuda(grams.data(), losses.data(), kGrams, num_tasks, 1.5, 0.1, gpu_state.data(),
                                 gpu_first.data(), out, nullptr);
  });
  check_close(got, current, 0, "gradnorm_step weights");
  check_close(gpu_state, state, 1e-14, "gradnorm_step state");
  check_close(gpu_first, first, 0, "gradnorm_step initial losses");
}

// Parameters of all sizes, some empty, some without a gradient from a task or from all; rows begin at any multiple of
// their element, the same one for all rows of even parameters.
struct Model {
  std::vector<Row> rows;
  std::vector<const void*> data;
  std::vector<int64_t> numel;
  std::vector<int32_t> dtype, segment;
  int64_t num_tasks, num_segments = 3;

  Model(int64_t tasks, std::vector<gs_dtype> dtypes, std::vector<int64_t> sizes) : numel(sizes), num_tasks(tasks) {
    std::mt19937 random(8);
    rows.reserve(sizes.size() * tasks);
    for (size_t p = 0; p < sizes.size(); p++) {
      dtype.push_back(dtypes[p % dtypes.size()]);
      segment.push_back(p < 3 ? 0 : 2);
      for (int64_t t = 0; t < tasks; t++) {
        rows.emplace_back(sizes[p] + p % 3 + (p % 2 ? t % 4 : 0), static_cast<gs_dtype>(dtype[p]), 1, random);
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
  double at(size_t p, int64_t t, int64_t c) const {
    const auto* row = static_cast<const char*>(data[p * num_tasks + t]);
    const auto type = static_cast<gs_dtype>(dtype[p]);
    return row ? decode(row + c * bytes_of(type), type) : 0;
  }
};

void test_gram(const Model& model) {
  const int64_t tasks = model.num_tasks, count = model.num_segments * tasks * tasks;
  Values expected(count), scale(count);
  for (size_t p = 0; p < model.numel.size(); p++) {
    for (int64_t i = 0; i < tasks; i++) {
      for (int64_t j = 0; j < tasks; j++) {
        for (int64_t c = 0; c < model.numel[p]; c++) {
          const double product = model.at(p, i, c) * model.at(p, j, c);
          expected[(model.segment[p] * tasks + i) * tasks + j] += product;
          scale[(model.segment[p] * tasks + i) * tasks + j] += std::abs(product);
        }
      }
    }
  }
  const gs_gradients view = model.view();
  const int64_t bytes = gs_gram_cuda_workspace_bytes(&view);
  const Values got = in_every_order(count, [&](double* out) {
    const auto space = allocate(bytes);
    std::memset(space.get(), 0xff, bytes);
    return gs_gram_cuda(&view, out, space.get(), bytes, nullptr);
  });
  for (int64_t i = 0; i < count; i++) check_close({got[i]}, {expected[i]}, 1e-13 * scale[i], "gram");
}

void test_combine(const Model& model, bool accumulate, bool alias) {
  const int64_t tasks = model.num_tasks;
  Values weights;
  for (int64_t i = 0; i < model.num_segments * tasks; i++) weights.push_back(i % 3 == 1 ? 0 : 0.5 * (i % 7) - 1);
  std::vector<std::vector<char>> results[2];
  for (const bool gpu : {false, true}) {
    Model copy = model;  // rows that the direction may overwrite
    std::vector<std::vector<char>> outs;
    std::vector<void*> pointers;
    for (size_t p = 0; p < model.numel.size(); p++) {
      const auto type = static_cast<gs_dtype>(model.dtype[p]);
      // One element of space before the output moves it off the rows' alignment.
      outs.emplace_back((model.numel[p] + 1) * bytes_of(type), 1);
      pointers.push_back(p == 5 ? nullptr : outs.back().data() + bytes_of(type));
    }
    if (alias) {
      const auto type = static_cast<gs_dtype>(model.dtype[3]);
      std::memcpy(pointers[3], model.data[3 * tasks], model.numel[3] * bytes_of(type));
      copy.data[3 * tasks] = pointers[3];
    }
    const gs_gradients own = copy.view();
    Emulator::get().order = Order::kBackward;
    const int64_t bytes = gs_combine_workspace_bytes(&own);
    const gs_status status =
        gpu ? gs_combine_cuda(&own, weights.data(), pointers.data(), accumulate, nullptr)
            : gs_combine_cpu(&own, weights.data(), pointers.data(), accumulate, allocate(bytes).get(), bytes, nullptr);
    CHECK(status == GS_OK, "%s", gs_last_error());
    results[gpu] = outs;
  }
  for (size_t p = 0; p < model.numel.size(); p++) {
    const auto type = static_cast<gs_dtype>(model.dtype[p]);
    for (int64_t c = 0; c < model.numel[p]; c++) {
      const double expected = decode(&results[0][p][(c + 1) * bytes_of(type)], type);
      const double got = decode(&results[1][p][(c + 1) * bytes_of(type)], type);
      // Contraction to fused multiply-adds may differ, so a rounding may fall the other way.
      const double ulp = type == GS_FLOAT32 ? 0x1p-23 : type == GS_FLOAT16 ? 0x1p-10 : type == GS_BFLOAT16 ? 0x1p-7 : 0;
      CHECK(std::abs(got - expected) <= ulp * std::max(std::abs(expected), 1e-4) + 1e-13,
            "combine parameter %zu at %ld: %g, expected %g", p, static_cast<long>(c), got, expected);
    }
  }
}

void test_streams() {
  for (const int64_t num_tasks : {1, 2, 3, 5, 8, 9, 17, 40}) {
    for (const gs_dtype dtype : kDtypes) {
      // The cheaper sizes in every dtype, the others in one each.
      if (num_tasks != 3 && num_tasks != 9 && dtype != kDtypes[num_tasks % 3]) continue;
      const Model model(num_tasks, {dtype}, {1, 0, 7, num_tasks < 9 ? 5003 : 2100, 64, 33, 250});
      test_gram(model);
      for (const bool alias : {false, true}) test_combine(model, alias, alias);
    }
  }
  const Model mixed(3, {GS_FLOAT32, GS_FLOAT32, GS_BFLOAT16, GS_FLOAT64, GS_FLOAT16}, {9, 5, 9, 5, 9, 5, 9, 5});
  test_gram(mixed);
  test_combine(mixed, true, false);
  const Model many(2, {GS_FLOAT32}, std::vector<int64_t>(1100, 2));  // more parameters than one table takes
  test_gram(many);
  test_combine(many, false, false);
}

}  // namespace

int main() {
  test_streams();
  for (const int64_t num_tasks : {1, 2, 3, 8, 17}) {
    test_task_order(num_tasks);
    for (const bool own_order : {false, true}) test_pcgrad(num_tasks, own_order);
    test_min_norm(num_tasks, GS_EXACT);
    test_min_norm(num_tasks, GS_FRANK_WOLFE);
    test_gradnorm(num_tasks);
  }
  test_task_order(GS_MAX_TASKS);
  test_pcgrad(40, false);
  test_min_norm(80, GS_FRANK_WOLFE);  // scratch in the workspace
  std::printf("ok\n");
  return 0;
}
