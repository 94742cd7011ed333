// SPDX-License-Identifier: MIT
// The solvers of gs_weighting and Gradient Vaccine on the GPU, compiled for the host (emulated.h), against the CPU's
// results, in several orders of threads and blocks: the same bits in each.
#include "cuda/teams.cuh"
#include "emulation.h"
#include "solvers/faces.h"
#include "solvers/spectral.h"

namespace {

// Compares the directions of two sets of weights, as dependent rows have several weights for one direction.
void check_directions(const Values& grams, const Values& got, const Values& expected, int64_t num_tasks,
                      double tolerance, int method) {
  for (int64_t b = 0; b < kGrams; b++) {
    const double *gram = &grams[b * num_tasks * num_tasks], *w = &got[b * num_tasks], *v = &expected[b * num_tasks];
    if (b == kGrams - 1) {
      for (int64_t i = 0; i < num_tasks; i++) CHECK(std::isnan(w[i]), "NaN in, %g out", w[i]);
      continue;
    }
    double error = 0, size = 0;
    for (int64_t i = 0; i < num_tasks; i++) {
      for (int64_t j = 0; j < num_tasks; j++) {
        error += (w[i] - v[i]) * gram[i * num_tasks + j] * (w[j] - v[j]);
        size += v[i] * gram[i * num_tasks + j] * v[j];
      }
    }
    // The length of d can be computed from G only to the square root of the rounding error.
    double spread = 0;
    for (int64_t i = 0; i < num_tasks; i++) spread += std::abs(v[i]) * std::sqrt(gram[i * num_tasks + i]);
    CHECK(std::sqrt(std::max(error, 0.0)) <= tolerance * std::sqrt(std::max(size, 0.0)) + 3e-8 * spread,
          "method %d T %ld problem %ld: |difference| %g of %g", method, static_cast<long>(num_tasks),
          static_cast<long>(b), std::sqrt(std::max(error, 0.0)), std::sqrt(std::max(size, 0.0)));
  }
}

void test_weights(int64_t num_tasks, gs_weighting method, bool preferred) {
  const Values grams = grams_of(num_tasks);
  Values preference(num_tasks);
  for (int64_t i = 0; i < num_tasks; i++) preference[i] = 0.5 + 0.1 * static_cast<double>(i);
  const double* given = preferred ? preference.data() : nullptr;
  const double parameter = method == GS_CAGRAD ? 0.4 : method == GS_FAIRGRAD || method == GS_KRUM ? 1.0 : 1e-4;
  const double limit = method == GS_KRUM ? static_cast<double>(std::min<int64_t>(num_tasks, 2)) : 1;
  const int64_t bytes = gs_weights_workspace_bytes(method, kGrams, num_tasks);
  Values expected(kGrams * num_tasks);
  CHECK(gs_weights_cpu(grams.data(), kGrams, num_tasks, method, given, parameter, limit, expected.data(),
                       allocate(bytes).get(), bytes, nullptr) == GS_OK,
        "%s", gs_last_error());
  const int64_t gpu_bytes = gs_weights_cuda_workspace_bytes(method, kGrams, num_tasks);
  const Values got = in_every_order(expected.size(), [&](double* out) {
    return gs_weights_cuda(grams.data(), kGrams, num_tasks, method, given, parameter, limit, out,
                           allocate(gpu_bytes).get(), gpu_bytes, nullptr);
  });
  check_directions(grams, got, expected, num_tasks, 1e-6, method);
}

// Opposite gradients and an error of 1e-6: the team must give up a factorization and begin again together.
void test_indefinite(int64_t num_tasks, gs_weighting method, double parameter) {
  Values gram(num_tasks * num_tasks), expected(num_tasks);
  const auto length = [](int64_t i) { return i == 0 ? -1 : 0.3 + 0.07 * static_cast<double>(i % 9); };
  for (int64_t e = 0; e < num_tasks * num_tasks; e++) {
    const int64_t i = e / num_tasks, j = e % num_tasks;
    gram[e] = length(i) * length(j) * (i == j || i * j == 0 ? 1 : 1 - 1e-6);
  }
  const int64_t bytes = gs_weights_workspace_bytes(method, 1, num_tasks);
  CHECK(gs_weights_cpu(gram.data(), 1, num_tasks, method, nullptr, parameter, 1e30, expected.data(),
                       allocate(bytes).get(), bytes, nullptr) == GS_OK,
        "%s", gs_last_error());
  const int64_t gpu_bytes = gs_weights_cuda_workspace_bytes(method, 1, num_tasks);
  const Values got = in_every_order(num_tasks, [&](double* out) {
    return gs_weights_cuda(gram.data(), 1, num_tasks, method, nullptr, parameter, 1e30, out, allocate(gpu_bytes).get(),
                           gpu_bytes, nullptr);
  });
  for (int64_t i = 0; i < num_tasks; i++) {
    CHECK(std::abs(got[i] - expected[i]) <= 1e-6 * expected[i], "method %d T %ld: weight %g, expected %g", method,
          static_cast<long>(num_tasks), got[i], expected[i]);
  }
}

// If H is not positive definite, several faces may meet the conditions; the ridge decides, as on the CPU. With NaN
// preferences no face meets them.
void test_left_to_a_warp() {
  const double cross = -1.5 * (1 - 1e-3), gram[] = {9, cross, cross, cross, 0.25, 0.25025, cross, 0.25025, 0.25};
  for (const double preference : {0.5, double{NAN}}) {
    const Values given(3, preference);
    Values expected(3);
    const int64_t bytes = gs_weights_workspace_bytes(GS_UPGRAD, 1, 3);
    CHECK(gs_weights_cpu(gram, 1, 3, GS_UPGRAD, given.data(), 1e-9, 1, expected.data(), allocate(bytes).get(), bytes,
                         nullptr) == GS_OK,
          "%s", gs_last_error());
    const Values got = in_every_order(3, [&](double* out) {
      return gs_weights_cuda(gram, 1, 3, GS_UPGRAD, given.data(), 1e-9, 1, out, nullptr, 0, nullptr);
    });
    for (int i = 0; i < 3; i++) {
      const bool same = std::isnan(preference) ? std::isnan(got[i]) : std::abs(got[i] - expected[i]) <= 1e-9;
      CHECK(same, "weight %g, expected %g", got[i], expected[i]);
    }
  }
}

// For independent gradients the faces suffice: one of them meets the conditions of a projection.
void test_projection_faces(int num_tasks) {
  const Values grams = grams_of(num_tasks);
  for (int kind = 0; kind < 2; kind++) {
    double h[64] = {}, u[8] = {}, pull[8] = {}, root[8] = {}, v[8];
    for (int i = 0; i < num_tasks; i++) {
      for (int j = 0; j < num_tasks; j++) {
        h[i * 8 + j] = grams[(kind * num_tasks + i) * num_tasks + j] + (i == j ? 1e-4 : 0);
      }
      root[i] = std::sqrt(h[i * 9]);
    }
    for (int t = 0; t < num_tasks; t++) {
      for (int i = 0; i < num_tasks; i++) {
        u[i] = i == t ? 1 : 0;
        pull[i] = h[i * 8 + t];
      }
      int meet = 0;
      for (uint32_t face = 0; face < 1u << num_tasks; face++) {
        const gs::Triangle<8> triangle(h);
        const auto factor = gs::factor_face<8>([&](int i, int j) { return triangle.at(i, j); }, face);
        if (!gs::face_projection(factor, triangle, u, pull, root, face, v)) continue;
        meet++;
        for (int i = 0; i < num_tasks; i++) {
          double slope = 0;
          for (int j = 0; j < num_tasks; j++) slope += h[i * 8 + j] * v[j];
          CHECK(v[i] >= u[i] - 1e-12 && slope >= -1e-12 * root[i] * root[t], "face %u: %g, %g", face, v[i], slope);
          CHECK(std::abs((v[i] - u[i]) * slope) <= 1e-12 * h[t * 9], "face %u: neither is 0", face);
        }
      }
      CHECK(meet == 1, "T = %d kind %d task %d: %d faces", num_tasks, kind, t, meet);
    }
  }
}

// The tasks repeat three vectors of which a convex combination is 0, and the ball around their mean just contains 0:
// CAGrad's direction must conflict with none of them and stay in the ball.
void test_stationary(int64_t num_tasks) {
  const double plane[3][2] = {{-2, 2}, {0, 3}, {2, -3}};
  Values rows, gram(num_tasks * num_tasks);
  for (int64_t i = 0; i < num_tasks; i++) rows.insert(rows.end(), plane[i % 3], plane[i % 3] + 2);
  for (int64_t e = 0; e < num_tasks * num_tasks; e++) {
    const double *const a = &rows[e / num_tasks * 2], *const b = &rows[e % num_tasks * 2];
    gram[e] = a[0] * b[0] + a[1] * b[1];
  }
  const int64_t bytes = gs_weights_cuda_workspace_bytes(GS_CAGRAD, 1, num_tasks);
  const double radius = 1.0001, even = 1 / static_cast<double>(num_tasks);
  const Values w = in_every_order(num_tasks, [&](double* out) {
    return gs_weights_cuda(gram.data(), 1, num_tasks, GS_CAGRAD, nullptr, radius, 1, out, allocate(bytes).get(), bytes,
                           nullptr);
  });
  double mean[2] = {}, d[2] = {};
  for (int64_t i = 0; i < num_tasks * 2; i++) {
    mean[i % 2] += even * rows[i];
    d[i % 2] += w[i / 2] * rows[i];
  }
  for (int64_t i = 0; i < num_tasks; i++) {
    const double product = rows[2 * i] * d[0] + rows[2 * i + 1] * d[1];
    CHECK(product >= -1e-8, "T %ld: product %g with task %ld", static_cast<long>(num_tasks), product,
          static_cast<long>(i));
  }
  const double away = std::hypot(d[0] - mean[0], d[1] - mean[1]), most = radius * std::hypot(mean[0], mean[1]);
  CHECK(away <= (1 + 1e-8) * most, "T %ld: %g from the mean, %g are allowed", static_cast<long>(num_tasks), away, most);
}

// Such a problem is not left to a warp either: warp_syncs would count its synchronizations.
void test_faces_suffice(int64_t num_tasks, gs_weighting method, double parameter) {
  const Values grams = grams_of(num_tasks);
  Values weights(2 * num_tasks);
  const int64_t before = Emulator::get().warp_syncs;
  CHECK(gs_weights_cuda(grams.data(), 2, num_tasks, method, nullptr, parameter, 1, weights.data(), nullptr, 0,
                        nullptr) == GS_OK,
        "%s", gs_last_error());
  CHECK(Emulator::get().warp_syncs == before, "method %d T %ld: a warp has solved it", method,
        static_cast<long>(num_tasks));
}

// For independent gradients the faces suffice: exactly one of them meets CAGrad's conditions to rounding.
void test_cagrad_faces(int num_tasks) {
  const Values grams = grams_of(num_tasks);
  for (int kind = 0; kind < 2; kind++) {
    const double* given = &grams[kind * num_tasks * num_tasks];
    double gram[64] = {}, mean[8] = {}, x[8];
    for (int i = 0; i < num_tasks; i++) {
      for (int j = 0; j < num_tasks; j++) {
        gram[i * 8 + j] = given[i * num_tasks + j];
        mean[i] += given[i * num_tasks + j] / num_tasks;
      }
    }
    for (const double c : {0.1, 0.4, 0.9, 3.0}) {
      int meet = 0;
      for (uint32_t face = 1; face < 1u << num_tasks; face++) {
        const double excess = gs::face_cagrad<8>(gram, mean, num_tasks, c, face, x);
        if (excess < 1e-14) meet++;
        CHECK(excess < 1e-14 || !std::isfinite(excess), "face %u: %g", face, excess);
      }
      CHECK(meet == 1, "T = %d kind %d c = %g: %d faces", num_tasks, kind, c, meet);
    }
  }
}

// Gradients that are one vector with either sign, to six digits, have large weights that are mostly rounding. A face's
// result must still meet CAGrad's conditions: no gradient's product with d is below those of the face's gradients.
void test_faces_of_near_copies() {
  constexpr int kTasks = 4, kColumns = 6;
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  for (int trial = 0; trial < 2000; trial++) {
    double row[kColumns], rows[kTasks][kColumns], gram[64] = {}, mean[8] = {}, x[8];
    for (double& value : row) value = normal(random);
    for (auto& copy : rows) {
      const double sign = normal(random) < 0 ? -1 : 1;
      for (int k = 0; k < kColumns; k++) copy[k] = sign * row[k] + 1e-6 * normal(random);
    }
    double squared = 0;
    for (int e = 0; e < kTasks * kTasks; e++) {
      const int i = e / kTasks, j = e % kTasks;
      for (int k = 0; k < kColumns; k++) gram[i * 8 + j] += rows[i][k] * rows[j][k];
      mean[i] += gram[i * 8 + j] / kTasks;
      squared += gram[i * 8 + j] / (kTasks * kTasks);
    }
    for (const double c : {0.5, 10.0}) {
      for (uint32_t face = 1; face < 1u << kTasks; face++) {
        if (!std::isfinite(gs::face_cagrad<8>(gram, mean, kTasks, c, face, x))) continue;
        long double least = INFINITY, level = 0, total = 0;
        for (int i = 0; i < kTasks; i++) {
          long double product = 0;
          for (int j = 0; j < kTasks; j++) product += (0.25L + x[j]) * gram[i * 8 + j];
          level += x[i] * product;
          total += x[i];
          least = std::min(least, product);
        }
        const double missed = static_cast<double>(level / total - least);
        CHECK(missed <= 1e-8 * c * std::sqrt(squared * gram[0]), "trial %d c %g face %u: %g", trial, c, face, missed);
      }
    }
  }
}

// A team of `threads` threads must compute the factor and the solution of one thread. If the last row equals the one
// before to 12 digits, it must fail with the limit 1e-8 for pivots, and succeed without a limit.
template <class Make>
void test_factor(int64_t size, int threads, const Make& make_team) {
  const int64_t stride = gs::padded(size);
  std::mt19937 random(7);
  std::normal_distribution<double> normal;
  Values points(size * size), rows((size + 1) * stride, NAN);
  for (double& value : points) value = normal(random);
  for (int64_t i = 0; i < size; i++) {
    rows[size * stride + i] = normal(random);
    for (int64_t j = 0; j <= i; j++) {
      rows[i * stride + j] = i == j ? 0.1 : 0;
      for (int64_t k = 0; k < size; k++) rows[i * stride + j] += points[i * size + k] * points[j * size + k];
    }
  }
  const auto solve = [=](const auto& team, Values& values, double least) {
    return gs::factor_and_solve(team, [&](int64_t i) { return &values[i * stride]; }, size, least);
  };
  Values expected = rows;
  CHECK(solve(gs::SerialTeam(), expected, 0), "not positive");
  const auto by_team = [&](Values& values, double least) {
    std::vector<char> solved(threads);
    Emulator& emulator = Emulator::get();
    const auto kernel = [&] { solved[emulator.thread()] = solve(make_team(), values, least); };
    emulator.run(1, threads, gs::gpu::BlockTeam::kValues * 8, kernel, 1);
    CHECK(std::count(solved.begin(), solved.end(), solved[0]) == threads, "threads differ");
    return solved[0] != 0;
  };
  const Values got = in_every_order(static_cast<int64_t>(rows.size()), [&](double* out) {
    Values values = rows;
    CHECK(by_team(values, 0), "not positive");
    std::copy(values.begin(), values.end(), out);
    return GS_OK;
  });
  check_close(got, expected, 1e-9, "factor");
  double *const last = &rows[(size - 1) * stride], *const before = last - stride;
  std::copy(before, before + size - 1, last);
  last[size - 2] = before[size - 2];
  last[size - 1] = before[size - 2] * (1 + 1e-12);
  Values copy = rows;
  CHECK(by_team(copy, -INFINITY), "a small pivot");
  CHECK(!by_team(rows, 1e-8), "a small pivot");
}

// A team of one that runs the Jacobi sweeps of larger teams.
struct Member : gs::SerialTeam {
  double sum(double value, int = 1) const { return value; }
};

// Eigenvalues close together: rows are rotated by large angles even if they are almost orthogonal already.
void test_clustered_eigenvalues() {
  constexpr int64_t kTasks = 8, kStride = gs::padded(kTasks);
  std::mt19937 random(3);
  std::normal_distribution<double> normal;
  for (int trial = 0; trial < 40; trial++) {
    double rows[(kTasks + 1) * kStride], values[kTasks];
    for (int64_t i = 0; i < kTasks; i++) {
      for (int64_t j = 0; j <= i; j++) rows[i * kStride + j] = rows[j * kStride + i] = (i == j) + 1e-6 * normal(random);
    }
    gs::diagonalize(Member{}, rows, kTasks, values);
    for (int64_t i = 0; i < kTasks; i++) {
      for (int64_t j = 0; j < i; j++) {
        const double cosine = gs::dot(rows + i * kStride, rows + j * kStride, kTasks) / values[i] / values[j];
        CHECK(std::abs(cosine) <= 4e-15, "trial %d: %g", trial, cosine);
      }
    }
  }
}

void test_gradvac(int64_t num_tasks) {
  const Values grams = grams_of(num_tasks);
  std::vector<int64_t> order(num_tasks * num_tasks);
  CHECK(gs_task_order_cpu(num_tasks, 3, 9, order.data()) == GS_OK, "%s", gs_last_error());
  Values start(grams.size());
  for (size_t e = 0; e < start.size(); e++) start[e] = 0.1 * static_cast<double>(e % 7) - 0.2;
  Values targets = start, expected(kGrams * num_tasks), gpu_targets;
  CHECK(gs_gradvac_cpu(grams.data(), kGrams, num_tasks, order.data(), 0.3, targets.data(), expected.data(), nullptr) ==
            GS_OK,
        "%s", gs_last_error());
  const Values got = in_every_order(expected.size(), [&](double* out) {
    gpu_targets = start;
    return gs_gradvac_cuda(grams.data(), kGrams, num_tasks, order.data(), 0.3, gpu_targets.data(), out, nullptr);
  });
  check_directions(grams, got, expected, num_tasks, 1e-9, -1);
  check_close(gpu_targets, targets, 1e-9, "targets");
  // With an invalid order no memory outside the arrays is read or written.
  for (const int64_t wrong : {num_tasks, num_tasks * num_tasks, int64_t{-1}}) {
    order[num_tasks - 1] = wrong;
    CHECK(gs_gradvac_cuda(grams.data(), kGrams, num_tasks, order.data(), 0.3, gpu_targets.data(), expected.data(),
                          nullptr) == GS_OK,
          "%s", gs_last_error());
  }
}

void test_arguments() {
  const double one = 1;
  double weight = 0;
  const auto call = [&](gs_weighting method, double parameter, double limit) {
    const int64_t bytes = gs_weights_cuda_workspace_bytes(GS_UPGRAD, 1, 1);
    return gs_weights_cuda(&one, 1, 1, method, nullptr, parameter, limit, &weight, allocate(64).get(), bytes, nullptr);
  };
  CHECK(call(GS_UPGRAD, 1e-4, 1) == GS_OK && weight == 1, "%g", weight);
  CHECK(call(GS_UPGRAD, 0, 1) == GS_INVALID_ARGUMENT, "ridge");
  CHECK(call(GS_CAGRAD, -1, 1) == GS_INVALID_ARGUMENT, "c");
  CHECK(call(GS_FAIRGRAD, 1, 0) == GS_INVALID_ARGUMENT, "limit");
  CHECK(call(static_cast<gs_weighting>(11), 1, 1) == GS_INVALID_ARGUMENT, "method");
}

}  // namespace

int main() {
  test_arguments();
  for (const int num_tasks : {2, 3, 5, 8}) test_cagrad_faces(num_tasks);
  for (const int num_tasks : {1, 2, 5, 8}) test_projection_faces(num_tasks);
  for (const int64_t num_tasks : {2, 4, 5, 8}) {
    test_faces_suffice(num_tasks, GS_UPGRAD, 1e-4);
    test_faces_suffice(num_tasks, GS_DUALPROJ, 1e-4);
    test_faces_suffice(num_tasks, GS_CAGRAD, 0.4);
  }
  for (const int64_t num_tasks : {3, 6, 9, 21, 39}) test_stationary(num_tasks);
  test_left_to_a_warp();
  test_faces_of_near_copies();
  test_clustered_eigenvalues();
  for (const int64_t size : {2, 3, 4, 9, 31, 32, 33, 70}) {
    test_factor(size, 32, [] { return gs::gpu::WarpTeam(); });
    test_factor(size, 96, [] { return gs::gpu::BlockTeam(&gs::gpu::shared<double>()); });
  }
  for (const int64_t num_tasks : {1, 2, 3, 6, 8, 17}) {
    for (int method = GS_UPGRAD; method <= GS_PCD; method++) {
      test_weights(num_tasks, static_cast<gs_weighting>(method), method % 2 == 1);
    }
    test_gradvac(num_tasks);
  }
  test_weights(17, GS_PCD, true);
  test_weights(40, GS_UPGRAD, false);  // scratch in the workspace
  for (const gs_weighting method : {GS_CAGRAD, GS_CONFIG, GS_FAIRGRAD}) test_weights(70, method, false);
  test_weights(78, GS_CONFIG, false);  // likewise, by a block
  test_gradvac(70);
  for (const int64_t num_tasks : {3, 5, 20, 40}) {
    test_indefinite(num_tasks, GS_FAIRGRAD, 3);
    test_indefinite(num_tasks, GS_DUALPROJ, 1e-12);
    test_indefinite(num_tasks, GS_UPGRAD, 1e-12);
  }
  std::printf("ok\n");
  return 0;
}
