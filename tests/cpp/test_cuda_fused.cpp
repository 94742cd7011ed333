// SPDX-License-Identifier: MIT
// The CUDA kernel of stages 2 to 4, compiled for the host (emulated.h), against the CPU's stages: the same bits in each
// order of threads, and one launch where that is promised.
#include "emulation.h"

namespace {

// Parameters of several sizes, rows in buffers of their exact size, some absent.
struct Problem {
  int64_t num_tasks;
  std::vector<int64_t> numel;
  std::vector<int32_t> dtype, segment;
  std::vector<std::unique_ptr<void, Free>> memory;
  std::vector<const void*> data;
  std::vector<int64_t> out_bytes;
  int64_t out_shift = 0;  // how far outputs are off a 16-byte boundary

  Problem(int64_t tasks, std::vector<int64_t> sizes, std::vector<gs_dtype> dtypes, int64_t shift = 0)
      : num_tasks(tasks), numel(std::move(sizes)) {
    std::mt19937 random(7);
    for (size_t p = 0; p < numel.size(); p++) {
      const gs_dtype type = dtypes[p % dtypes.size()];
      dtype.push_back(type);
      out_bytes.push_back(numel[p] * bytes_of(type));
      for (int64_t t = 0; t < tasks; t++) {
        if ((t + p) % 5 == 4) {
          data.push_back(nullptr);
          continue;
        }
        const int64_t bytes = numel[p] * bytes_of(type);
        // The row ends where the allocation ends, so that the sanitizer sees a read beyond it.
        memory.emplace_back(std::aligned_alloc(16, (bytes + shift + 31) / 16 * 16));
        char* start = static_cast<char*>(memory.back().get()) + shift;
        const Row row(numel[p], type, 1 + t, random);
        std::memcpy(start, row.data(), bytes);
        data.push_back(start);
      }
    }
  }
  gs_gradients view() const {
    return {num_tasks,    static_cast<int64_t>(numel.size()),        segment.empty() ? 1 : 2, data.data(), numel.data(),
            dtype.data(), segment.empty() ? nullptr : segment.data()};
  }
};

struct Result {
  Values gram, weights, out;
};

// Returns all outputs, decoded. Before the call they hold ones.
template <class Run>
Result results_of(const Problem& problem, const Run& run) {
  const gs_gradients view = problem.view();
  const int64_t tasks = problem.num_tasks, segments = view.num_segments;
  Result result;
  std::vector<std::unique_ptr<void, Free>> memory;
  std::vector<void*> out;
  for (size_t p = 0; p < problem.numel.size(); p++) {
    memory.emplace_back(std::aligned_alloc(16, (problem.out_bytes[p] + problem.out_shift + 31) / 16 * 16));
    out.push_back(static_cast<char*>(memory.back().get()) + problem.out_shift);
    const auto type = static_cast<gs_dtype>(problem.dtype[p]);
    for (int64_t i = 0; i < problem.numel[p]; i++) {
      const double one = 1;
      const float single = 1;
      const uint16_t narrow = type == GS_FLOAT16 ? 0x3c00 : 0x3f80;
      const void* source = type == GS_FLOAT64   ? static_cast<const void*>(&one)
                           : type == GS_FLOAT32 ? &single
                                                : (const void*)&narrow;
      std::memcpy(static_cast<char*>(out.back()) + i * bytes_of(type), source, bytes_of(type));
    }
  }
  result.gram.assign(segments * tasks * tasks, NAN);
  result.weights.assign(segments * tasks, NAN);
  CHECK(run(view, result.gram.data(), result.weights.data(), out.data()) == GS_OK, "%s", gs_last_error());
  for (size_t p = 0; p < problem.numel.size(); p++) {
    const auto type = static_cast<gs_dtype>(problem.dtype[p]);
    for (int64_t i = 0; i < problem.numel[p]; i++) {
      result.out.push_back(decode(static_cast<char*>(out[p]) + i * bytes_of(type), type));
    }
  }
  return result;
}

bool same_bits(const Values& a, const Values& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](double x, double y) { return x == y || (std::isnan(x) && std::isnan(y)); });
}

void check(const Problem& problem, const gs_solve& options, bool accumulate, bool one_launch, const char* what,
           bool counts = true) {
  int64_t step = 5;
  gs_solve solve = options;
  if (counts) solve.step = &step;
  const Result expected = results_of(problem, [&](const gs_gradients& view, double* gram, double* weights, void** out) {
    const int64_t bytes = gs_aggregate_workspace_bytes(&view, &solve);
    return gs_aggregate_cpu(&view, &solve, gram, weights, out, accumulate, allocate(bytes).get(), bytes, nullptr);
  });
  const int64_t advanced = step;
  Result first;
  for (const Order order : {Order::kForward, Order::kBackward, Order::kInterleaved}) {
    Emulator::get().order = order;
    Emulator::get().launches = 0;
    step = 5;
    const Result got = results_of(problem, [&](const gs_gradients& view, double* gram, double* weights, void** out) {
      const int64_t bytes = gs_aggregate_cuda_workspace_bytes(&view, &solve);
      const auto space = allocate(bytes);
      std::memset(space.get(), 0xff, bytes);
      return gs_aggregate_cuda(&view, &solve, gram, weights, out, accumulate, space.get(), bytes, nullptr);
    });
    CHECK((Emulator::get().launches == 1) == one_launch, "%s: %d launches", what, Emulator::get().launches);
    CHECK(step == advanced, "%s: step %ld", what, static_cast<long>(step));
    if (order == Order::kForward) first = got;
    CHECK(same_bits(got.gram, first.gram) && same_bits(got.weights, first.weights) && same_bits(got.out, first.out),
          "%s: order %d gives other bits", what, static_cast<int>(order));
  }
  double scale = 0, largest = 0;
  for (const double entry : expected.gram) scale = std::max(scale, std::abs(entry));
  for (const double entry : expected.out) largest = std::max(largest, std::abs(entry));
  check_close(first.gram, expected.gram, 2e-6 * scale, what);
  check_close(first.weights, expected.weights, 2e-5, what);
  for (size_t i = 0, p = 0, end = problem.numel[0]; i < first.out.size(); i++) {
    while (i >= end) end += problem.numel[++p];
    const double unit = problem.dtype[p] == GS_BFLOAT16 ? 0x1p-7 : problem.dtype[p] == GS_FLOAT16 ? 0x1p-10 : 1e-4;
    check_close({first.out[i]}, {expected.out[i]}, unit * (1 + largest), what);
  }
}

gs_solve pcgrad_of(int mean) {
  gs_solve solve = {};
  solve.method = GS_PCGRAD;
  solve.seed = 3;
  solve.mean = mean;
  return solve;
}

gs_solve min_norm_by(gs_solver solver) {
  gs_solve solve = {};
  solve.method = GS_MIN_NORM;
  solve.solver = solver;
  solve.max_iter = 250;
  solve.tol = 1e-6;
  return solve;
}

gs_solve weighting_of(gs_weighting weighting, const double* preference, double parameter) {
  gs_solve solve = {};
  solve.method = GS_WEIGHTING;
  solve.weighting = weighting;
  solve.preference = preference;
  solve.parameter = parameter;
  solve.limit = INFINITY;
  return solve;
}

}  // namespace

int main() {
  const gs_solve pcgrad = pcgrad_of(0), mean = pcgrad_of(1);
  const gs_solve exact = min_norm_by(GS_EXACT), steps = min_norm_by(GS_FRANK_WOLFE);
  Emulator& gpu = Emulator::get();
  for (const gs_dtype type : kDtypes) {
    for (const int64_t tasks : {1, 2, 3, 5, 8, 9, 16}) {
      const Problem problem(tasks, {1, 64, 200, 0, 333, 7}, {type});
      check(problem, pcgrad, false, true, "pcgrad");
      check(problem, exact, tasks % 2 == 0, tasks <= 8, "min-norm");
    }
    check(Problem(4, {1500}, {type}), mean, true, true, "mean");
    check(Problem(3, {700, 90}, {type}), steps, false, false, "Frank-Wolfe");
  }
  check(Problem(2, {15000, 700}, {GS_FLOAT32}), pcgrad, true, true, "many parts");
  check(Problem(1, {30000}, {GS_FLOAT32}), pcgrad, false, true, "parts wider than a block's threads");
  check(Problem(7, {2700}, {GS_BFLOAT16}), exact, false, true, "several parts");
  check(Problem(16, {1500}, {GS_FLOAT32}), pcgrad, false, true, "four small parts");
  // Cases that one launch cannot handle.
  check(Problem(17, {100, 30}, {GS_FLOAT32}), pcgrad, false, false, "17 tasks");
  check(Problem(3, {100, 30}, {GS_FLOAT32, GS_FLOAT64}), pcgrad, false, false, "two dtypes");
  check(Problem(3, {100, 30}, {GS_FLOAT32}, 4), exact, false, false, "misaligned");
  Problem shifted(3, {100, 30}, {GS_FLOAT32});
  shifted.out_shift = 8;
  check(shifted, pcgrad, true, false, "misaligned outputs");
  check(Problem(3, {100000}, {GS_FLOAT32}), exact, false, false, "too large");
  check(Problem(3, std::vector<int64_t>(700, 3), {GS_FLOAT32}), pcgrad, true, false, "too many parameters");
  Problem cut(3, {100, 30, 65}, {GS_FLOAT32});
  cut.segment = {0, 1, 0};
  check(cut, exact, false, false, "segments");
  gpu.fast_double = false;
  check(Problem(3, {100, 30}, {GS_FLOAT32}), pcgrad, false, false, "slow float64");
  gpu.fast_double = true;
  for (const int64_t tasks : {3, 8, 70}) {  // 70: with scratch in the workspace
    const Values preference(tasks, 0.5);
    const Problem problem(tasks, {100, 30}, {GS_FLOAT32});
    check(problem, weighting_of(GS_UPGRAD, preference.data(), 1e-4), tasks == 8, false, "upgrad");
    check(problem, weighting_of(GS_CONFIG, preference.data(), 0), false, false, "config");
    check(problem, weighting_of(GS_FAIRGRAD, nullptr, 2), false, false, "fairgrad");
  }
  check(cut, weighting_of(GS_CAGRAD, nullptr, 0.4), false, false, "segments");
  const gs_gradients view = cut.view();
  const gs_solve wrong = weighting_of(GS_UPGRAD, nullptr, 0);
  CHECK(gs_aggregate_cuda_workspace_bytes(&view, &wrong) == -1 && gs_aggregate_workspace_bytes(&view, &wrong) == -1,
        "a ridge of 0 has workspace");
  // More blocks, and a table that does not fit the small one.
  gpu.processors = 23;
  check(Problem(3, std::vector<int64_t>(60, 100), {GS_FLOAT32}), pcgrad, false, true, "large table");
  Problem broken(3, {100, 30}, {GS_FLOAT32});
  const float infinite = INFINITY;
  std::memcpy(const_cast<void*>(broken.data[1]), &infinite, 4);
  check(broken, pcgrad, false, true, "Inf");
  check(broken, exact, false, true, "Inf");
  // A parameter without any gradient gets no NaN.
  Problem absent(1, {100, 30, 5, 5, 20}, {GS_FLOAT32});
  std::memcpy(const_cast<void*>(absent.data[0]), &infinite, 4);
  check(absent, pcgrad, true, true, "absent");
  for (const int64_t tasks : {5, 17}) {
    check(Problem(tasks, {100, 30}, {GS_FLOAT32}), pcgrad, false, tasks == 5, "no step counter", false);
  }
  gpu.refuses = true;
  check(Problem(3, {100, 30}, {GS_FLOAT32}), pcgrad, false, false, "no room for blocks together");
  std::printf("ok\n");
  return 0;
}
