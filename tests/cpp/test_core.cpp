// SPDX-License-Identifier: MIT
// The library alone, without torch: absent gradients, segments, threads, solvers and errors, against plain loops.
#include <gradsurgery/gradsurgery.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#define CHECK(condition)                                          \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                               \
    }                                                             \
  } while (0)

namespace {

const gs_parallel kTwoThreads = {[](void*, int64_t count, void (*body)(void*, int64_t), void* arg) {
                                   std::thread other([&] {
                                     for (int64_t i = 1; i < count; i += 2) body(arg, i);
                                   });
                                   for (int64_t i = 0; i < count; i += 2) body(arg, i);
                                   other.join();
                                 },
                                 nullptr};

struct Free {
  void operator()(void* p) const { std::free(p); }
};

std::unique_ptr<void, Free> workspace(int64_t bytes) {
  return std::unique_ptr<void, Free>(std::aligned_alloc(64, (bytes + 64) / 64 * 64));
}

// T x P gradients of float, some absent, in two segments.
struct Problem {
  int64_t tasks;
  std::vector<int64_t> numel;
  std::vector<std::vector<float>> values;
  std::vector<const void*> data;
  std::vector<int32_t> dtype, segment;

  Problem(int64_t num_tasks, std::vector<int64_t> sizes) : tasks(num_tasks), numel(sizes) {
    std::mt19937 random(7);
    std::normal_distribution<float> normal;
    for (size_t p = 0; p < numel.size(); p++) {
      dtype.push_back(GS_FLOAT32);
      segment.push_back(p % 2);
      for (int64_t t = 0; t < tasks; t++) {
        values.emplace_back(numel[p]);
        for (float& x : values.back()) x = normal(random);
        const bool absent = (p + t) % 5 == 4;
        data.push_back(absent ? nullptr : values.back().data());
      }
    }
  }

  gs_gradients view() const {
    return {tasks, (int64_t)numel.size(), 2, data.data(), numel.data(), dtype.data(), segment.data()};
  }

  const float* at(int64_t p, int64_t t) const { return static_cast<const float*>(data[p * tasks + t]); }
};

std::vector<double> gram_of(const Problem& problem, const gs_parallel* parallel) {
  const gs_gradients view = problem.view();
  const int64_t bytes = gs_gram_workspace_bytes(&view);
  CHECK(bytes >= 0);
  auto space = workspace(bytes);
  std::vector<double> gram(2 * problem.tasks * problem.tasks, NAN);
  CHECK(gs_gram_cpu(&view, gram.data(), space.get(), bytes, parallel) == GS_OK);
  return gram;
}

void test_gram(int64_t tasks, const std::vector<int64_t>& sizes = {70001, 0, 33, 1, 40000, 512}) {
  const Problem problem(tasks, sizes);
  const std::vector<double> gram = gram_of(problem, nullptr);
  const gs_parallel no_loop = {nullptr, nullptr};
  for (const gs_parallel* parallel : {&kTwoThreads, &no_loop}) {
    CHECK(std::memcmp(gram.data(), gram_of(problem, parallel).data(), gram.size() * sizeof(double)) == 0);
  }
  for (int64_t s = 0; s < 2; s++) {
    for (int64_t i = 0; i < tasks; i++) {
      for (int64_t j = 0; j < tasks; j++) {
        double expected = 0, magnitude = 0;
        for (size_t p = s; p < problem.numel.size(); p += 2) {
          const float *a = problem.at(p, i), *b = problem.at(p, j);
          for (int64_t k = 0; a && b && k < problem.numel[p]; k++) {
            expected += double(a[k]) * b[k];
            magnitude += 0.5 * (double(a[k]) * a[k] + double(b[k]) * b[k]);
          }
        }
        const double got = gram[(s * tasks + i) * tasks + j];
        CHECK(std::abs(got - expected) <= 1e-6 * magnitude);
        CHECK(got == gram[(s * tasks + j) * tasks + i]);
      }
    }
  }
}

void test_combine(int64_t tasks) {
  const Problem problem(tasks, {20001, 0, 33, 1, 4000, 512});
  const gs_gradients view = problem.view();
  const int64_t bytes = gs_combine_workspace_bytes(&view);
  auto space = workspace(bytes);
  std::vector<double> weights(2 * tasks);
  for (int64_t i = 0; i < 2 * tasks; i++) weights[i] = i % 3 - 0.5 * (i % 2);
  for (const int accumulate : {0, 1}) {
    std::vector<std::vector<float>> out;
    std::vector<void*> pointers;
    for (const int64_t n : problem.numel) out.emplace_back(n, accumulate ? 1.0f : NAN);
    for (auto& o : out) pointers.push_back(o.data());
    CHECK(gs_combine_cpu(&view, weights.data(), pointers.data(), accumulate, space.get(), bytes, &kTwoThreads) ==
          GS_OK);
    for (size_t p = 0; p < out.size(); p++) {
      for (int64_t k = 0; k < problem.numel[p]; k++) {
        double expected = accumulate;
        for (int64_t t = 0; t < tasks; t++) {
          if (problem.at(p, t)) expected += weights[(p % 2) * tasks + t] * problem.at(p, t)[k];
        }
        CHECK(std::abs(out[p][k] - expected) <= 1e-5);
      }
    }
  }
}

// Step counters are numbers modulo 2^64.
void test_last_step() {
  int64_t step = INT64_MAX;
  const double one = 1;
  double w = 0, space[8];
  CHECK(gs_random_cpu(&one, 1, 1, 1, &step, &w) == GS_OK && step == INT64_MIN);
  float gradient = 1, direction = 0;
  const void* data[1] = {&gradient};
  void* out[1] = {&direction};
  const int64_t numel = 1;
  const int32_t dtype = GS_FLOAT32;
  const gs_gradients grads = {1, 1, 1, data, &numel, &dtype, nullptr};
  const gs_rule rule = {GS_GRADDROP, 9, &step, nullptr, 0};
  const int64_t bytes = gs_combine_by_rule_workspace_bytes(&grads);
  const auto scratch = workspace(bytes);
  step = INT64_MAX;
  CHECK(gs_combine_by_rule_cpu(&grads, &rule, out, 0, scratch.get(), bytes, nullptr) == GS_OK && step == INT64_MIN);
  gs_solve solve = {};
  solve.method = GS_PCGRAD;
  solve.step = &step;
  const int64_t needed = gs_aggregate_workspace_bytes(&grads, &solve);
  const auto more = workspace(needed);
  step = INT64_MAX;
  CHECK(gs_aggregate_cpu(&grads, &solve, space, &w, out, 0, more.get(), needed, nullptr) == GS_OK && step == INT64_MIN);
}

void test_solvers() {
  // Two equal gradients, their opposite, and one across: the shortest combination is 0.
  const double gram[16] = {1, 1, -1, 0, 1, 1, -1, 0, -1, -1, 1, 0, 0, 0, 0, 9};
  const int64_t bytes = gs_min_norm_workspace_bytes(1, 4);
  auto space = workspace(bytes);
  double w[4];
  for (const gs_solver solver : {GS_EXACT, GS_FRANK_WOLFE}) {
    CHECK(gs_min_norm_cpu(gram, 1, 4, solver, 250, 1e-9, w, space.get(), bytes, nullptr) == GS_OK);
    double norm = 0;
    for (int i = 0; i < 4; i++) {
      for (int j = 0; j < 4; j++) norm += w[i] * gram[4 * i + j] * w[j];
    }
    CHECK(norm < (solver == GS_EXACT ? 1e-28 : 1e-2));
    CHECK(std::abs(w[0] + w[1] + w[2] + w[3] - 1) < 1e-14);
  }
  // A gradient whose 1 / G_ii overflows counts as zero, and so is the shortest point.
  const double tiny[4] = {1, 0, 0, 1e-310};
  CHECK(gs_min_norm_cpu(tiny, 1, 2, GS_EXACT, 250, 1e-9, w, space.get(), bytes, nullptr) == GS_OK);
  CHECK(w[0] == 0 && w[1] == 1);
  int64_t order[9];
  CHECK(gs_task_order_cpu(3, 1, 2, order) == GS_OK);
  for (int i = 0; i < 3; i++) CHECK(order[3 * i] + order[3 * i + 1] + order[3 * i + 2] == 3);
  int64_t step = 2;
  CHECK(gs_random_cpu(gram, 1, 4, 1, &step, w) == GS_OK && step == 3 &&
        std::abs(w[0] + w[1] + w[2] + w[3] - 1) < 1e-15);
  // A w = (2, 0, 3) at w = (1, 1, 1) / 3 with w - A w / 2 = (-2, 1, -3.5) / 3, whose projection is a vertex.
  const double sides[9] = {2, 4, 0, -1, 0, 1, 3, 3, 3};
  double third[3] = {1.0 / 3, 1.0 / 3, 1.0 / 3};
  const int64_t needed = gs_simplex_steps_workspace_bytes(1, 3);
  const auto scratch = workspace(needed);
  CHECK(gs_simplex_steps_cpu(sides, 1, 3, 0.5, 0.9, 1, third, scratch.get(), needed, nullptr) == GS_OK);
  CHECK(third[0] == 0 && third[1] == 1 && third[2] == 0);
  CHECK(gs_simplex_steps_cpu(sides, 1, 3, 0.5, 0.9, 1, third, nullptr, 0, nullptr) == GS_INVALID_ARGUMENT);
  const double one[2] = {1, 1}, norms[2] = {1, 3}, losses[2] = {1, 1};
  CHECK(gs_gradnorm_cpu(one, norms, losses, losses, 1, 2, 1.5, 0.1, w) == GS_OK);
  CHECK(std::abs(w[0] - 2 * 1.1 / 1.8) < 1e-15 && std::abs(w[1] - 2 * 0.7 / 1.8) < 1e-15);
  // In place: a normal step, and one after which all weights would be 0.
  double same[2] = {1, 1};
  CHECK(gs_gradnorm_cpu(same, norms, losses, losses, 1, 2, 1.5, 0.1, same) == GS_OK);
  CHECK(same[0] == w[0] && same[1] == w[1]);
  const double apart[2] = {0.2, 1.8};
  double kept[2] = {0.5, 1.5};
  CHECK(gs_gradnorm_cpu(kept, one, apart, one, 1, 2, 0.5, 100, kept) == GS_OK && kept[0] == 0.5 && kept[1] == 1.5);
  const double squares[4] = {1, 0, 0, 9};
  double state[2] = {1, 1}, initial[2] = {NAN, NAN}, current[2];
  CHECK(gs_gradnorm_step_cpu(squares, losses, 1, 2, 1.5, 0.1, state, initial, current) == GS_OK);
  CHECK(current[0] == 1 && current[1] == 1 && initial[0] == 1 && initial[1] == 1);
  CHECK(state[0] == w[0] && state[1] == w[1]);
}

// Checks the optimality condition (G w)_j >= w^T G w, to rounding, for rows that conflict, have several scales, or are
// pairs of near opposites in half as many dimensions, so that the shortest combination is all but 0.
void test_min_norm(int64_t tasks) {
  std::mt19937 random(11);
  std::normal_distribution<double> normal;
  const int64_t bytes = gs_min_norm_workspace_bytes(1, tasks);
  auto space = workspace(bytes);
  for (int kind = 0; kind < 3; kind++) {
    const int64_t columns = kind == 2 ? tasks / 2 + 1 : tasks + 3;
    std::vector<double> rows(tasks * columns), gram(tasks * tasks), w(tasks);
    for (int64_t i = 0; i < tasks * columns; i++) {
      const bool opposite = kind == 2 && i / columns % 2 == 1;
      rows[i] = opposite ? (i % columns == 1 ? 1e-5 : 0) - rows[i - columns] : normal(random);
      if (kind == 1) rows[i] *= std::pow(10, i / columns % 7 - 3);
    }
    for (int64_t i = 0; i < tasks * tasks; i++) {
      for (int64_t c = 0; c < columns; c++) gram[i] += rows[i / tasks * columns + c] * rows[i % tasks * columns + c];
    }
    CHECK(gs_min_norm_cpu(gram.data(), 1, tasks, GS_EXACT, 1, 0, w.data(), space.get(), bytes, nullptr) == GS_OK);
    double total = 0, value = 0, spread = 0;
    std::vector<double> gw(tasks);
    for (int64_t i = 0; i < tasks; i++) {
      CHECK(w[i] >= 0);
      for (int64_t j = 0; j < tasks; j++) gw[i] += gram[i * tasks + j] * w[j];
      total += w[i];
      value += w[i] * gw[i];
      spread += w[i] * std::sqrt(gram[i * tasks + i]);
    }
    CHECK(std::abs(total - 1) < 1e-14);
    for (int64_t j = 0; j < tasks; j++) CHECK(value - gw[j] <= 2e-14 * spread * std::sqrt(gram[j * tasks + j]));
  }
}

// A batch has the weights of each problem alone, whatever the threads, in a workspace of just the size it asks for.
void test_batch(gs_weighting weighting, int64_t tasks, int64_t batch) {
  std::mt19937 random(5);
  std::normal_distribution<double> normal;
  std::vector<double> grams(batch * tasks * tasks), got(batch * tasks), alone(tasks), rows(tasks * tasks);
  for (int64_t b = 0; b < batch; b++) {
    for (double& x : rows) x = normal(random);
    for (int64_t e = 0; e < tasks * tasks; e++) {
      double& sum = grams[b * tasks * tasks + e];
      for (int64_t c = 0; c < tasks; c++) sum += rows[e / tasks * tasks + c] * rows[e % tasks * tasks + c];
    }
  }
  const auto solve = [&](const double* gram, int64_t problems, double* w, const gs_parallel* parallel) {
    const int64_t bytes = gs_weights_workspace_bytes(weighting, problems, tasks);
    const auto space = workspace(bytes);
    CHECK(gs_weights_cpu(gram, problems, tasks, weighting, nullptr, 1e-4, 0, w, space.get(), bytes, parallel) == GS_OK);
  };
  solve(grams.data(), batch, got.data(), &kTwoThreads);
  for (int64_t b = 0; b < batch; b++) {
    solve(grams.data() + b * tasks * tasks, 1, alone.data(), nullptr);
    CHECK(std::memcmp(alone.data(), got.data() + b * tasks, tasks * sizeof(double)) == 0);
  }
}

void test_errors() {
  Problem problem(2, {4});
  gs_gradients view = problem.view();
  double gram[8];
  CHECK(gs_gram_cpu(&view, gram, nullptr, 0, nullptr) == GS_INVALID_ARGUMENT);
  CHECK(std::string(gs_last_error()).find("workspace must hold") == 0);
  problem.dtype[0] = 9;
  CHECK(gs_gram_workspace_bytes(&view) == -1);
  CHECK(std::string(gs_last_error()) == "dtype[0] must be a gs_dtype, got 9");
  view.numel = nullptr;
  CHECK(gs_gram_workspace_bytes(&view) == -1);
  CHECK(std::string(gs_last_error()) == "data, numel and dtype must not be NULL");
  view.num_tasks = GS_MAX_TASKS + 1;
  CHECK(gs_gram_cpu(&view, gram, nullptr, 0, nullptr) == GS_UNSUPPORTED);
  const int64_t twice[4] = {0, 1, 1, 1};
  const double square[4] = {1, 0, 0, 1};
  CHECK(gs_pcgrad_cpu(square, 1, 2, twice, 0, 0, 0, gram, nullptr) == GS_INVALID_ARGUMENT);
  CHECK(gs_gradvac_cpu(nullptr, 0, 2, nullptr, 0.5, nullptr, nullptr, nullptr) == GS_OK);
  CHECK(gs_gradvac_cpu(square, 1, 2, nullptr, 0.5, gram, gram, nullptr) == GS_INVALID_ARGUMENT);
}

bool last_error_is(const std::string& message) { return gs_last_error() == message; }

void test_sizes() {
  for (const auto bytes_of :
       {gs_gram_workspace_bytes, gs_combine_workspace_bytes, gs_combine_by_rule_workspace_bytes}) {
    CHECK(bytes_of(nullptr) == -1 && last_error_is("grads must not be NULL"));
    Problem problem(2, {4, 4});
    gs_gradients view = problem.view();
    view.num_segments = int64_t{1} << 31;
    CHECK(bytes_of(&view) == -1 && last_error_is("num_segments must be in 1..2^31-1, got 2147483648"));
    view.num_segments = INT32_MAX;
    CHECK(bytes_of(&view) > 0);
    problem.numel = {int64_t{1} << 52, 0};
    view.numel = problem.numel.data();
    CHECK(bytes_of(&view) > 0);
    problem.numel[1] = 1;
    CHECK(bytes_of(&view) == -1);
    CHECK(last_error_is("numel must sum to at most 2^52, got 1 in numel[1], where 0 are left"));
  }
  const int64_t most = int64_t{1} << 40;
  CHECK(gs_min_norm_workspace_bytes(most, GS_MAX_TASKS) > 0 &&
        gs_simplex_steps_workspace_bytes(most, GS_MAX_TASKS) > 0);
  for (int method = GS_UPGRAD; method <= GS_PCD; method++) {
    CHECK(gs_weights_workspace_bytes(static_cast<gs_weighting>(method), most, GS_MAX_TASKS) > 0);
  }
  CHECK(gs_min_norm_workspace_bytes(most + 1, 2) == -1);
  CHECK(last_error_is("batch must be in 0..2^40, got 1099511627777"));
}

void test_ranges() {
  const double gram[4] = {1, 0, 0, 1}, ones[2] = {1, 1};
  const int64_t order[4] = {0, 1, 1, 0}, bytes = gs_min_norm_workspace_bytes(1, 2);
  const auto space = workspace(4096);
  double w[2], targets[4] = {};
  const auto min_norm = [&](gs_solver solver, int64_t max_iter, double tol) {
    return gs_min_norm_cpu(gram, 1, 2, solver, max_iter, tol, w, space.get(), bytes, nullptr);
  };
  CHECK(min_norm(GS_FRANK_WOLFE, 0, 0) == GS_INVALID_ARGUMENT);
  CHECK(last_error_is("max_iter must be at least 1 and tol >= 0, got 0 and 0"));
  for (const double tol : {-1.0, double{NAN}}) CHECK(min_norm(GS_FRANK_WOLFE, 1, tol) == GS_INVALID_ARGUMENT);
  CHECK(min_norm(GS_FRANK_WOLFE, 1, 0) == GS_OK && min_norm(GS_EXACT, 0, NAN) == GS_OK);
  for (const double beta : {-0.1, 1.1, double{NAN}}) {
    CHECK(gs_gradvac_cpu(gram, 1, 2, order, beta, targets, w, nullptr) == GS_INVALID_ARGUMENT);
  }
  CHECK(gs_gradvac_cpu(gram, 1, 2, order, 1, targets, w, nullptr) == GS_OK);
  for (const double wrong : {-1.0, double{NAN}, double{INFINITY}}) {
    double state[2] = {1, 1}, initial[2] = {1, 1};
    CHECK(gs_gradnorm_cpu(ones, ones, ones, ones, 1, 2, wrong, 0, w) == GS_INVALID_ARGUMENT);
    CHECK(gs_gradnorm_cpu(ones, ones, ones, ones, 1, 2, 0, wrong, w) == GS_INVALID_ARGUMENT);
    CHECK(gs_gradnorm_step_cpu(gram, ones, 1, 2, wrong, 0, state, initial, w) == GS_INVALID_ARGUMENT);
    CHECK(gs_gradnorm_step_cpu(gram, ones, 1, 2, 0, wrong, state, initial, w) == GS_INVALID_ARGUMENT);
  }
  const auto krum = [&](double parameter, double limit) {
    return gs_weights_cpu(gram, 1, 2, GS_KRUM, nullptr, parameter, limit, w, space.get(), 4096, nullptr);
  };
  CHECK(krum(0.5, 1) == GS_INVALID_ARGUMENT && krum(0, 1.5) == GS_INVALID_ARGUMENT && krum(0, 1) == GS_OK);
  for (const double share : {-0.1, 1.1, double{NAN}}) {
    CHECK(gs_weights_cpu(gram, 1, 2, GS_PCD, nullptr, share, 1, w, space.get(), 4096, nullptr) == GS_INVALID_ARGUMENT);
  }
  CHECK(last_error_is("share must be in 0..1, got nan"));
  // With a preference the share is ignored.
  CHECK(gs_weights_cpu(gram, 1, 2, GS_PCD, ones, NAN, 1, w, space.get(), 4096, nullptr) == GS_OK);
}

}  // namespace

int main() {
  for (const int64_t tasks : {1, 2, 3, 8, 9, 17, 70}) {
    test_gram(tasks);
    test_combine(tasks);
  }
  for (const int64_t tasks : {1, 2, 5, 16, 64, 128, 256}) test_min_norm(tasks);
  test_gram(2, std::vector<int64_t>(4200, 1));  // a slot of several parts
  for (const gs_weighting weighting : {GS_UPGRAD, GS_DUALPROJ, GS_CONFIG, GS_ALIGNED_MTL_MIN}) {
    test_batch(weighting, 3, 700);
    test_batch(weighting, 30, 1);
    test_batch(weighting, 30, 20);
  }
  test_solvers();
  test_last_step();
  test_errors();
  test_sizes();
  test_ranges();
  std::printf("core: ok on %s\n", gs_cpu_isa());
  return 0;
}
