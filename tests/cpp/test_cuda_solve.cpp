// SPDX-License-Identifier: MIT
// The CUDA solvers, compiled for the host (emulated.h), against the CPU's results, in several orders of threads and
// blocks: the same bits in each.
#include <string>

#include "emulation.h"

namespace {

void test_task_order(int64_t num_tasks) {
  const int64_t step = (int64_t{1} << 33) + 7;
  std::vector<int64_t> expected(num_tasks * num_tasks), got(num_tasks * num_tasks, -1);
  CHECK(gs_task_order_cpu(num_tasks, 42, step, expected.data()) == GS_OK, "%s", gs_last_error());
  CHECK(gs_task_order_cuda(num_tasks, 42, &step, got.data(), nullptr) == GS_OK, "%s", gs_last_error());
  CHECK(got == expected, "T = %ld", static_cast<long>(num_tasks));
}

void test_random(int64_t num_tasks) {
  const Values grams = grams_of(num_tasks);
  int64_t step = 0;
  for (const int64_t batch : {kGrams, int64_t{1}}) {
    Values expected(batch * num_tasks);
    const int64_t now = (int64_t{1} << 33) + 7;
    step = now;
    CHECK(gs_random_cpu(grams.data(), batch, num_tasks, 42, &step, expected.data()) == GS_OK, "%s", gs_last_error());
    const Values got = in_every_order(batch * num_tasks, [&](double* out) {
      step = now;
      return gs_random_cuda(grams.data(), batch, num_tasks, 42, &step, out, nullptr);
    });
    CHECK(step == now + 1, "step %ld", static_cast<long>(step));
    check_close(got, expected, 1e-15, "random");
    CHECK(std::isnan(got.back()) == (batch == kGrams), "NaN in, %g out", got.back());
  }
}

// Matrices that are not symmetric, the last one not finite, and steps that reach the faces of the simplex.
void test_simplex_steps(int64_t num_tasks, double lr) {
  Values matrices = grams_of(num_tasks);
  for (size_t i = 0; i < matrices.size(); i += 3) matrices[i] *= 0.7;
  const int64_t bytes = gs_simplex_steps_workspace_bytes(kGrams, num_tasks);
  const Values uniform(kGrams * num_tasks, 1.0 / static_cast<double>(num_tasks));
  Values expected = uniform;
  CHECK(gs_simplex_steps_cpu(matrices.data(), kGrams, num_tasks, lr, 0.4, 9, expected.data(), allocate(bytes).get(),
                             bytes, nullptr) == GS_OK,
        "%s", gs_last_error());
  const int64_t gpu_bytes = gs_simplex_steps_cuda_workspace_bytes(kGrams, num_tasks);
  CHECK((gpu_bytes == 0) == (num_tasks < 70), "workspace of %ld bytes", static_cast<long>(gpu_bytes));
  const Values got = in_every_order(kGrams * num_tasks, [&](double* out) {
    std::copy(uniform.begin(), uniform.end(), out);
    return gs_simplex_steps_cuda(matrices.data(), kGrams, num_tasks, lr, 0.4, 9, out, allocate(gpu_bytes).get(),
                                 gpu_bytes, nullptr);
  });
  check_close(got, expected, 1e-9, "simplex steps");
  CHECK(std::isnan(got.back()), "NaN in, %g out", got.back());
}

// From 17 tasks on several blocks share a problem.
void test_pcgrad(int64_t num_tasks, bool own_order) {
  const Values grams = grams_of(num_tasks);
  std::vector<int64_t> order(num_tasks * num_tasks);
  CHECK(gs_task_order_cpu(num_tasks, 3, 9, order.data()) == GS_OK, "%s", gs_last_error());
  const int64_t* given = own_order ? order.data() : nullptr;
  for (int64_t batch = 1; batch <= (num_tasks < 64 ? kGrams : 1); batch += kGrams - 1) {
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

// A NaN in the last entry must be found, however the entries are divided among threads.
void test_late_nan(int64_t num_tasks) {
  Values gram(num_tasks * num_tasks, 1.0);
  gram.back() = NAN;
  const Values got = in_every_order(num_tasks, [&](double* out) {
    return gs_pcgrad_cuda(gram.data(), 1, num_tasks, nullptr, 1, nullptr, 0, 0, out, nullptr);
  });
  CHECK(std::all_of(got.begin(), got.end(), [](double w) { return std::isnan(w); }), "NaN in, %g out", got[0]);
}

// Entries of order that name no task are skipped; the projected g_0 may conflict with g_0, but is not projected on it;
// for a subnormal G_jj the inverse is infinite, but the quotient v_j / G_jj is not.
void test_odd_pcgrad() {
  int64_t step = 0;
  const auto solve = [&](const double* gram, int64_t num_tasks, const int64_t* order) {
    return in_every_order(num_tasks, [&](double* out) {
      return gs_pcgrad_cuda(gram, 1, num_tasks, order, 0, &step, 0, 0, out, nullptr);
    });
  };
  const double gram[9] = {1, -0.5, -0.5, -0.5, 1, -0.5, -0.5, -0.5, 1};
  const int64_t outside[9] = {-1, 1, int64_t{1} << 40, 0, 1, 3, 3, 4, -(int64_t{1} << 40)};
  check_close(solve(gram, 3, outside), {1.5, 1.5, 1}, 1e-15, "pcgrad");
  const double turned = -std::sqrt(0.75), turning[9] = {1, turned, turned, turned, 1, 0.5, turned, 0.5, 1};
  const int64_t order[9] = {1, 2, 0, 1, 2, 0, 2, 1, 0};
  double weights[3];
  CHECK(gs_pcgrad_cuda(gram, 1, 3, order, 0, nullptr, 1, 0, weights, nullptr) == GS_INVALID_ARGUMENT, "no step");
  check_close(in_every_order(
                  3, [&](double* out) { return gs_pcgrad_cuda(gram, 1, 3, outside, 0, nullptr, 0, 0, out, nullptr); }),
              {1.5, 1.5, 1}, 1e-15, "pcgrad without a step counter");
  Values expected(3);
  CHECK(gs_pcgrad_cpu(turning, 1, 3, order, 0, 0, 0, expected.data(), nullptr) == GS_OK, "%s", gs_last_error());
  check_close(solve(turning, 3, order), expected, 1e-15, "pcgrad");
  const double tiny[4] = {1, -1e-155, -1e-155, 1e-310};
  expected.resize(2);
  CHECK(gs_pcgrad_cpu(tiny, 1, 2, nullptr, 0, 0, 0, expected.data(), nullptr) == GS_OK, "%s", gs_last_error());
  check_close(solve(tiny, 2, nullptr), expected, 1e-14 * expected[1], "pcgrad");
}

void test_min_norm(int64_t num_tasks, gs_solver solver) {
  const Values grams = grams_of(num_tasks);
  const int64_t bytes = gs_min_norm_workspace_bytes(kGrams, num_tasks);
  Values expected(kGrams * num_tasks);
  CHECK(gs_min_norm_cpu(grams.data(), kGrams, num_tasks, solver, 60, 1e-9, expected.data(), allocate(bytes).get(),
                        bytes, nullptr) == GS_OK,
        "%s", gs_last_error());
  const int64_t gpu_bytes = gs_min_norm_cuda_workspace_bytes(kGrams, num_tasks);
  CHECK((gpu_bytes == 0) == (num_tasks < 70), "workspace of %ld bytes", static_cast<long>(gpu_bytes));
  const Values got = in_every_order(kGrams * num_tasks, [&](double* out) {
    return gs_min_norm_cuda(grams.data(), kGrams, num_tasks, solver, 60, 1e-9, out, allocate(gpu_bytes).get(),
                            gpu_bytes, nullptr);
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

// A gradient whose 1 / G_ii overflows counts as zero, and so is the shortest point.
void test_tiny(int64_t num_tasks) {
  Values gram(num_tasks * num_tasks), expected(num_tasks);
  for (int64_t i = 0; i < num_tasks; i++) gram[i * (num_tasks + 1)] = i == 1 ? 1e-310 : 1;
  expected[1] = 1;
  check_close(in_every_order(num_tasks,
                             [&](double* out) {
                               return gs_min_norm_cuda(gram.data(), 1, num_tasks, GS_EXACT, 1, 0, out, nullptr, 0,
                                                       nullptr);
                             }),
              expected, 0, "tiny");
}

// Zero, duplicate, opposite, nearly parallel and dependent rows, and rows of other scales, against the CPU's answer.
void test_faces(int64_t num_tasks) {
  std::mt19937 random(num_tasks);
  constexpr int64_t kProblems = 40;
  Values grams;
  for (int64_t b = 0; b < kProblems; b++) {
    const int64_t columns = b % 2 ? num_tasks : num_tasks / 2 + 1;
    const double scale = std::pow(10, b % 5 * 6 - 12);
    Values rows(num_tasks * columns);
    for (int64_t i = 0; i < num_tasks; i++) {
      const double likeness = i == 0 || b % 4 == 0 ? 0 : i % 4 == 1 ? 1 : i % 4 == 2 ? -1 : 0;
      const double size = b % 8 == 7 && i == 1 ? 0 : scale * std::pow(10, b % 3 == 0 ? i % 3 * 2 : 0);
      for (int64_t c = 0; c < columns; c++) {
        const double noise = std::normal_distribution<double>(0.3)(random);
        const double own = likeness == 0 ? size : b % 4 == 2 ? 1e-3 * scale : 0;
        rows[i * columns + c] = likeness * rows[c] + own * noise;
      }
    }
    for (int64_t i = 0; i < num_tasks * num_tasks; i++) {
      double sum = 0;
      for (int64_t c = 0; c < columns; c++) {
        sum += rows[i / num_tasks * columns + c] * rows[i % num_tasks * columns + c];
      }
      grams.push_back(sum);
    }
  }
  const int64_t bytes = gs_min_norm_workspace_bytes(kProblems, num_tasks);
  const auto space = allocate(bytes);
  Values expected(kProblems * num_tasks);
  CHECK(gs_min_norm_cpu(grams.data(), kProblems, num_tasks, GS_EXACT, 1, 0, expected.data(), space.get(), bytes,
                        nullptr) == GS_OK,
        "%s", gs_last_error());
  const Values got = in_every_order(expected.size(), [&](double* out) {
    return gs_min_norm_cuda(grams.data(), kProblems, num_tasks, GS_EXACT, 1, 0, out, space.get(), bytes, nullptr);
  });
  for (int64_t b = 0; b < kProblems; b++) {
    const double* gram = &grams[b * num_tasks * num_tasks];
    double difference = 0, magnitude = 0, total = 0;
    for (int64_t i = 0; i < num_tasks; i++) {
      const double w = got[b * num_tasks + i], other = expected[b * num_tasks + i];
      CHECK(w >= 0, "T %ld problem %ld: %g", static_cast<long>(num_tasks), static_cast<long>(b), w);
      total += w;
      magnitude += std::max(w, other) * std::sqrt(gram[i * num_tasks + i]);
      for (int64_t j = 0; j < num_tasks; j++) {
        difference += gram[i * num_tasks + j] * (w * got[b * num_tasks + j] - other * expected[b * num_tasks + j]);
      }
    }
    CHECK(std::abs(difference) <= 2e-14 * magnitude * magnitude && std::abs(total - 1) < 1e-14,
          "T %ld problem %ld: %g of %g", static_cast<long>(num_tasks), static_cast<long>(b), difference,
          magnitude * magnitude);
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

// A step after which all weights would be 0.
void test_gradnorm_in_place() {
  const double ones[2] = {1, 1}, losses[2] = {0.2, 1.8};
  const Values got = in_every_order(2, [&](double* out) {
    out[0] = 0.5;
    out[1] = 1.5;
    return gs_gradnorm_cuda(out, ones, losses, ones, 1, 2, 0.5, 100, out, nullptr);
  });
  check_close(got, {0.5, 1.5}, 0, "gradnorm in place");
}

void test_errors() {
  const auto check_null = [](int64_t bytes) {
    CHECK(bytes == -1 && std::string(gs_last_error()) == "grads must not be NULL", "%s", gs_last_error());
  };
  check_null(gs_gram_cuda_workspace_bytes(nullptr));
  check_null(gs_combine_cuda_workspace_bytes(nullptr));
  check_null(gs_combine_by_rule_cuda_workspace_bytes(nullptr));
  const int64_t most = int64_t{1} << 40;
  CHECK(gs_weights_cuda_workspace_bytes(GS_UPGRAD, most, GS_MAX_TASKS) > 0, "%s", gs_last_error());
  CHECK(gs_weights_cuda_workspace_bytes(GS_UPGRAD, most + 1, GS_MAX_TASKS) == -1, "batch");
  const double gram[4] = {1, 0, 0, 1}, ones[2] = {1, 1};
  const int64_t order[4] = {0, 1, 1, 0};
  double w[2], targets[4] = {}, state[2] = {1, 1}, initial[2] = {1, 1};
  const auto check_invalid = [](gs_status status, const char* what) {
    CHECK(status == GS_INVALID_ARGUMENT, "%s", what);
  };
  check_invalid(gs_min_norm_cuda(gram, 1, 2, GS_FRANK_WOLFE, 0, 0, w, nullptr, 0, nullptr), "max_iter");
  check_invalid(gs_min_norm_cuda(gram, 1, 2, GS_FRANK_WOLFE, 1, -1, w, nullptr, 0, nullptr), "tol");
  check_invalid(gs_gradvac_cuda(gram, 1, 2, order, 1.1, targets, w, nullptr), "beta");
  check_invalid(gs_gradnorm_cuda(ones, ones, ones, ones, 1, 2, -1, 0, w, nullptr), "alpha");
  check_invalid(gs_gradnorm_step_cuda(gram, ones, 1, 2, 0, INFINITY, state, initial, w, nullptr), "lr");
  check_invalid(gs_weights_cuda(gram, 1, 2, GS_KRUM, nullptr, 0.5, 1, w, nullptr, 0, nullptr), "Krum's parameter");
}

}  // namespace

int main() {
  test_errors();
  test_odd_pcgrad();
  test_gradnorm_in_place();
  for (const int64_t num_tasks : {2, 9}) test_tiny(num_tasks);
  for (const int64_t num_tasks : {1, 2, 3, 5, 8, 9, 17}) {
    test_task_order(num_tasks);
    for (const bool own_order : {false, true}) test_pcgrad(num_tasks, own_order);
    test_min_norm(num_tasks, GS_EXACT);
    test_min_norm(num_tasks, GS_FRANK_WOLFE);
    test_gradnorm(num_tasks);
    test_random(num_tasks);
    for (const double lr : {1e-4, 0.1}) test_simplex_steps(num_tasks, lr);
  }
  for (int64_t num_tasks = 1; num_tasks <= 8; num_tasks++) test_faces(num_tasks);
  test_task_order(GS_MAX_TASKS);
  test_random(GS_MAX_TASKS);
  for (const int64_t num_tasks : {33, 90}) test_simplex_steps(num_tasks, 1e-3);  // 90: scratch in the workspace
  for (const int64_t num_tasks : {33, 70, 130}) {
    for (const bool own_order : {false, true}) test_pcgrad(num_tasks, own_order);
  }
  test_late_nan(66);
  // One block for each problem: if there is no room for clusters, and on GPUs that have none.
  Emulator::get().refuses = true;
  test_pcgrad(33, true);
  Emulator::get().refuses = false;
  Emulator::get().overlaps = false;
  for (const int64_t num_tasks : {17, 70}) test_pcgrad(num_tasks, false);
  test_late_nan(66);
  Emulator::get().overlaps = true;
  test_min_norm(33, GS_EXACT);
  for (const gs_solver solver : {GS_EXACT, GS_FRANK_WOLFE}) test_min_norm(110, solver);  // scratch in the workspace
  std::printf("ok\n");
  return 0;
}
