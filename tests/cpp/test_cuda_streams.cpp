// SPDX-License-Identifier: MIT
// The CUDA kernels of stages 2 and 4, compiled for the host (emulated.h), against float64 sums and the CPU's results,
// in several orders of threads and blocks: the same bits in each.
#include "emulation.h"
#include "model.h"

namespace {

void test_gram(const Model& model) {
  const int64_t tasks = model.num_tasks, count = model.num_segments * tasks * tasks;
  Values expected(count), scale(count);
  for (size_t p = 0; p < model.numel.size(); p++) {
    const int64_t columns = model.numel[p];
    Values rows;
    for (int64_t i = 0; i < tasks; i++) {
      for (int64_t c = 0; c < columns; c++) rows.push_back(model.at(p, i, c));
    }
    for (int64_t i = 0; i < tasks; i++) {
      for (int64_t j = 0; j < tasks; j++) {
        const double *const a = rows.data() + i * columns, *const b = rows.data() + j * columns;
        double sum = 0, magnitude = 0;
        for (int64_t c = 0; c < columns; c++) {
          sum += a[c] * b[c];
          magnitude += std::abs(a[c] * b[c]);
        }
        expected[(model.segment[p] * tasks + i) * tasks + j] += sum;
        scale[(model.segment[p] * tasks + i) * tasks + j] += magnitude;
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
  for (int64_t s = 0; s < model.num_segments; s++) {
    const double* squares = &expected[s * tasks * tasks];
    for (int64_t i = 0; i < tasks * tasks; i++) {
      const double norms = std::sqrt(squares[i / tasks * (tasks + 1)] * squares[i % tasks * (tasks + 1)]);
      const int64_t at = s * tasks * tasks + i;
      check_close({got[at]}, {expected[at]}, model.is_exact() ? 1e-13 * scale[at] : 1e-6 * norms, "gram");
    }
  }
}

gs_status combine(const gs_gradients& grads, const double* weights, void* const* out, bool accumulate) {
  const int64_t bytes = gs_combine_cuda_workspace_bytes(&grads);
  const auto space = allocate(bytes);
  std::memset(space.get(), 0xff, bytes);
  return gs_combine_cuda(&grads, weights, out, accumulate, space.get(), bytes, nullptr);
}

void test_combine(const Model& model, bool accumulate, bool alias) {
  const auto params = static_cast<int64_t>(model.numel.size()), tasks = model.num_tasks;
  Values weights;
  for (int64_t i = 0; i < model.num_segments * tasks; i++) weights.push_back(i % 3 == 1 ? 0 : 0.5 * (i % 7) - 1);
  std::vector<std::vector<char>> results[2];
  for (const bool gpu : {false, true}) {
    Model copy = model;  // rows that the direction may overwrite
    std::vector<std::vector<char>> outs;
    std::vector<void*> pointers;
    for (int64_t p = 0; p < params; p++) {
      const auto type = static_cast<gs_dtype>(model.dtype[p]);
      // One element of space before the output gives it another alignment than the rows.
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
        gpu ? combine(own, weights.data(), pointers.data(), accumulate)
            : gs_combine_cpu(&own, weights.data(), pointers.data(), accumulate, allocate(bytes).get(), bytes, nullptr);
    CHECK(status == GS_OK, "%s", gs_last_error());
    results[gpu] = outs;
  }
  for (int64_t p = 0; p < params; p++) {
    const auto type = static_cast<gs_dtype>(model.dtype[p]);
    for (int64_t c = 0; c < model.numel[p]; c++) {
      const double expected = decode(&results[0][p][(c + 1) * bytes_of(type)], type);
      const double got = decode(&results[1][p][(c + 1) * bytes_of(type)], type);
      // Contraction to fused multiply-adds may differ, so a result may round the other way.
      const double ulp = type == GS_FLOAT32 ? 0x1p-23 : type == GS_FLOAT16 ? 0x1p-10 : type == GS_BFLOAT16 ? 0x1p-7 : 0;
      CHECK(std::abs(got - expected) <= ulp * std::max(std::abs(expected), 1e-4) + 1e-13,
            "combine output %ld at %ld: %g, expected %g", static_cast<long>(p), static_cast<long>(c), got, expected);
    }
  }
}

// Every kernel of stage 2 in every dtype; with more columns for cheaper numbers of tasks.
void test_kernels() {
  for (const int64_t num_tasks : {1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 25, 33, 57}) {
    for (const gs_dtype dtype : kDtypes) {
      if ((num_tasks == 6 || num_tasks == 7) && (dtype == GS_FLOAT64 || dtype == GS_FLOAT16)) continue;
      if (num_tasks > 20 && num_tasks != 33 && num_tasks % 2 != dtype % 2) continue;
      // The fourth parameter is long enough for whole steps of rows of different alignments.
      std::vector<int64_t> sizes = {1, 0, 7, 90, 64, 3, 600, 33, 300};
      if (num_tasks < 9) sizes = {1, 0, 7, 1300, 64, 3, 900, 33, 500};
      if (num_tasks < 5) sizes = {1, 0, 7, 2500, 64, 3, 5003, 33, 900};
      const Model model(num_tasks, {dtype}, sizes);
      test_gram(model);
      if (num_tasks == 3 || num_tasks == 6 || num_tasks == 17 || num_tasks == 33) {
        Emulator& gpu = Emulator::get();
        for (const auto [overlaps, fast_double] : {std::pair{false, true}, {false, false}, {true, false}}) {
          gpu.overlaps = overlaps;
          gpu.fast_double = fast_double;
          test_gram(model);
        }
        gpu.overlaps = gpu.fast_double = true;
      }
    }
  }
  // All shapes of the circle of row blocks, and slots that several blocks share.
  const std::pair<int64_t, gs_dtype> many[] = {{49, GS_BFLOAT16}, {64, GS_FLOAT16},  {72, GS_FLOAT64},
                                               {81, GS_FLOAT32},  {97, GS_BFLOAT16}, {128, GS_FLOAT32},
                                               {130, GS_FLOAT16}, {190, GS_FLOAT32}};
  for (const auto& [num_tasks, dtype] : many) test_gram(Model(num_tasks, {dtype}, {170, 200, 90}));
  test_gram(Model(60, {GS_FLOAT64}, {100, 1, 30}));     // the most tiles in a warp
  test_gram(Model(36, {GS_BFLOAT16}, {1500, 1, 700}));  // many stages
  test_gram(Model(1, {GS_FLOAT64}, {210 << 10}));       // as many slots as there may be
}

// Every kernel of stage 2, for rows that are aligned alike and others, fits the shared memory that there is at least.
void test_shared_memory() {
  Emulator& gpu = Emulator::get();
  gpu.runs = false;
  for (const int kind : {0, 1, 2, 3}) {
    gpu.overlaps = kind % 2 != 0;
    gpu.fast_double = kind / 2 != 0;
    for (int64_t num_tasks = 1; num_tasks <= GS_MAX_TASKS; num_tasks += num_tasks < 64 ? 1 : 32) {
      for (const gs_dtype dtype : kDtypes) {
        for (const int64_t odd : {0, 3}) {
          const Model model(num_tasks, {dtype}, {3 - odd, odd});
          const gs_gradients view = model.view();
          const int64_t bytes = gs_gram_cuda_workspace_bytes(&view);
          Values gram(model.num_segments * num_tasks * num_tasks);
          const gs_status status = gs_gram_cuda(&view, gram.data(), allocate(bytes).get(), bytes, nullptr);
          CHECK(status == GS_OK, "%ld tasks: %s", static_cast<long>(num_tasks), gs_last_error());
        }
      }
    }
  }
  gpu.runs = true;
}

// Rows whose squares float32 cannot hold, beside others, and rows of zeros.
void test_scales() {
  const std::function<double(int64_t)> scales[] = {[](int64_t) { return 1e-20; }, [](int64_t) { return 1e20; },
                                                   [](int64_t t) {
                                                     return t % 3 == 0 ? 1e-25 : t % 3 == 1 ? 1e15 : 0.0;
                                                   }};
  Emulator::get().fast_double = false;  // float32 goes through float32 sums as well
  for (const auto& scale : scales) {
    for (const int64_t num_tasks : {6, 20, 36}) {
      for (const gs_dtype dtype : {GS_FLOAT32, GS_BFLOAT16}) {
        if (num_tasks == 36 && dtype == GS_FLOAT32) continue;
        test_gram(Model(num_tasks, {dtype}, {130, 0, 20}, scale));
      }
    }
  }
  Emulator::get().fast_double = true;
  test_gram(Model(20, {GS_BFLOAT16}, {100}, [](int64_t t) { return t == 1 ? NAN : 1; }));
}

// A row with the weight 0 is not read.
void test_hidden_row() {
  const Model model(2, {GS_FLOAT32}, {900}, [](int64_t t) { return t == 1 ? NAN : 1; });
  const double weights[3][2] = {{1, 0}, {1, 0}, {1, 0}};
  std::vector<float> out(900, NAN);
  void* pointers[] = {out.data()};
  CHECK(combine(model.view(), &weights[0][0], pointers, false) == GS_OK, "%s", gs_last_error());
  CHECK(std::none_of(out.begin(), out.end(), [](float x) { return std::isnan(x); }), "a weight of 0 counts");
}

void test_streams() {
  for (const int64_t num_tasks : {1, 2, 5, 9, 17}) {
    for (const gs_dtype dtype : kDtypes) {
      const Model model(num_tasks, {dtype}, {1, 0, 7, 250, 64, 33, num_tasks < 9 ? 5003 : 2100});
      for (const bool alias : {false, true}) test_combine(model, alias, alias);
      test_combine(model, true, false);
    }
  }
  test_combine(Model(70, {GS_BFLOAT16}, {700, 3, 40}), false, false);
  // More columns than all blocks take at once.
  test_combine(Model(6, {GS_BFLOAT16}, {25000}), false, false);
  test_combine(Model(17, {GS_FLOAT32}, {6200}), true, false);
  // Three and a half of combine's slots in each of the Gram kernel's 263. Accumulates, so that a slot done twice shows.
  Emulator::get().processors = 400;
  test_combine(Model(9, {GS_FLOAT32}, {263 * 448}), true, false);
  Emulator::get().processors = 3;
  const Model mixed(3, {GS_FLOAT32, GS_FLOAT32, GS_BFLOAT16, GS_FLOAT64, GS_FLOAT16}, {9, 5, 9, 5, 9, 5, 9, 5});
  test_gram(mixed);
  test_combine(mixed, true, false);
  const Model many(2, {GS_FLOAT32}, std::vector<int64_t>(1100, 2));  // more parameters than fit a launch's arguments
  test_gram(many);
  test_combine(many, false, false);
  // Slots that begin in the last of a run's parameters, with another run after it.
  std::vector<int64_t> sizes(1100, 2);
  sizes[1056] = 5000;
  Model runs(2, {GS_FLOAT32}, sizes);
  for (int32_t p = 0; p < 1100; p++) runs.segment[p] = p <= 1056 ? 0 : 2;
  test_gram(runs);
  // Segments that occur again later, and segments in descending order; then more than fit a launch's arguments.
  for (const bool descends : {false, true}) {
    Model segmented(2, {GS_FLOAT32}, std::vector<int64_t>(20, 2));
    for (int32_t p = 0; p < 20; p++) segmented.segment[p] = descends ? 19 - p : p / 2 % 3;
    segmented.num_segments = 20;
    test_gram(segmented);
  }
  Model segmented(40, {GS_BFLOAT16}, std::vector<int64_t>(90, 2));
  for (int32_t p = 0; p < 90; p++) segmented.segment[p] = p % 50;
  segmented.num_segments = 50;
  test_gram(segmented);
}

}  // namespace

int main() {
  test_kernels();
  test_shared_memory();
  test_scales();
  test_streams();
  test_hidden_row();
  std::printf("ok\n");
  return 0;
}
