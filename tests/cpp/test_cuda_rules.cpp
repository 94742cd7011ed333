// SPDX-License-Identifier: MIT
// The CUDA kernels of the rules that work coordinate by coordinate, compiled for the host (emulated.h), and the CPU's,
// against plain code after the papers (rules.h). In every order of threads and blocks the bits are the same.
#include "emulation.h"
#include "model.h"
#include "rules.h"

namespace {

using Bytes = std::vector<std::vector<char>>;

struct Call {
  const Model& model;
  gs_rule rule;
  bool accumulate = false;
  int64_t alias = -1;    // the parameter whose output is a row
  int64_t without = -1;  // the one that has no output
};

constexpr int64_t kStep = (int64_t{5} << 32) + 3;

// One element of space before each output gives it another alignment than the rows.
Bytes run(const Call& call, bool gpu) {
  const Model& model = call.model;
  Model copy = model;  // rows that the direction may overwrite
  Bytes outs;
  std::vector<void*> pointers;
  for (size_t p = 0; p < model.numel.size(); p++) {
    const int64_t bytes = bytes_of(static_cast<gs_dtype>(model.dtype[p]));
    outs.emplace_back((model.numel[p] + 1) * bytes, 1);
    pointers.push_back(static_cast<int64_t>(p) == call.without ? nullptr : outs.back().data() + bytes);
    if (static_cast<int64_t>(p) != call.alias) continue;
    std::memcpy(pointers[p], model.data[p * model.num_tasks], model.numel[p] * bytes);
    copy.data[p * model.num_tasks] = pointers[p];
  }
  const gs_gradients view = copy.view();
  int64_t step = kStep;
  gs_rule rule = call.rule;
  rule.step = &step;
  const int64_t bytes =
      gpu ? gs_combine_by_rule_cuda_workspace_bytes(&view) : gs_combine_by_rule_workspace_bytes(&view);
  const auto space = allocate(bytes);
  std::memset(space.get(), 0xff, bytes);
  const gs_status status =
      gpu ? gs_combine_by_rule_cuda(&view, &rule, pointers.data(), call.accumulate, space.get(), bytes, nullptr)
          : gs_combine_by_rule_cpu(&view, &rule, pointers.data(), call.accumulate, space.get(), bytes, nullptr);
  CHECK(status == GS_OK, "%s", gs_last_error());
  CHECK(step == kStep + (rule.kind == GS_GRADDROP), "step %ld", static_cast<long>(step));
  return outs;
}

void check(const Call& call, const Bytes& outs, const char* where) {
  const Model& model = call.model;
  int64_t step = kStep, coordinate = 0;
  gs_rule rule = call.rule;
  rule.step = &step;
  for (size_t p = 0; p < model.numel.size(); coordinate += model.numel[p], p++) {
    const auto type = static_cast<gs_dtype>(model.dtype[p]);
    const std::vector<char> space(bytes_of(type), 1);
    CHECK(std::equal(space.begin(), space.end(), outs[p].begin()), "%s wrote before output %zu", where, p);
    for (int64_t c = 0; c < model.numel[p] && static_cast<int64_t>(p) != call.without; c++) {
      Values values;
      for (int64_t t = 0; t < model.num_tasks; t++) values.push_back(model.at(p, t, c));
      const double before = static_cast<int64_t>(p) == call.alias ? model.at(p, 0, c) : decode(space.data(), type);
      const double exact = expected(rule, values, coordinate + c) + (call.accumulate ? before : 0);
      const double got = decode(&outs[p][(c + 1) * bytes_of(type)], type);
      CHECK(std::isnan(exact) ? std::isnan(got) : std::abs(got - exact) <= rounding(type, exact),
            "%s: T %ld rule %d trimmed %ld output %zu at %ld: %g, expected %g", where,
            static_cast<long>(model.num_tasks), rule.kind, static_cast<long>(rule.num_trimmed), p, static_cast<long>(c),
            got, exact);
    }
  }
}

void test(const Call& call) {
  check(call, run(call, false), "CPU");
  Emulator::get().order = Order::kForward;
  const Bytes first = run(call, true);
  check(call, first, "GPU");
  for (const Order order : {Order::kBackward, Order::kInterleaved}) {
    Emulator::get().order = order;
    CHECK(run(call, true) == first, "order %d gives other bits", static_cast<int>(order));
  }
}

void test_rules(const Model& model) {
  const int64_t tasks = model.num_tasks, median = (tasks - 1) / 2;
  Values leak;
  for (int64_t t = 0; t < tasks; t++) leak.push_back(t % 5 / 4.0);
  test({model, {GS_GRADDROP, 77, nullptr, nullptr, 0}});
  test({model, {GS_GRADDROP, ~uint64_t{0}, nullptr, leak.data(), 0}, true, 3, 5});
  test({model, {GS_TRIMMED_MEAN, 0, nullptr, nullptr, median}});
  for (int64_t trimmed = 0; trimmed <= 4 && trimmed < median; trimmed++) {
    test({model, {GS_TRIMMED_MEAN, 0, nullptr, nullptr, trimmed}, trimmed % 2 == 0, 3, 5});
  }
}

// A row with values that are not finite.
void test_not_finite() {
  for (const double scale : {double{NAN}, double{INFINITY}, -double{INFINITY}}) {
    const Model model(9, {GS_FLOAT32}, {40}, [=](int64_t t) { return t == 3 ? scale : 1; });
    for (const int64_t trimmed : {0, 1, 3, 4}) test({model, {GS_TRIMMED_MEAN, 0, nullptr, nullptr, trimmed}});
    test({model, {GS_GRADDROP, 1, nullptr, nullptr, 0}});
  }
}

// The numbers of coordinates count a parameter that is too large for any memory and has no output.
void test_many_coordinates() {
  Model model(2, {GS_FLOAT32}, {1, 60});
  model.numel[0] = (int64_t{1} << 34) + 5;
  model.data[0] = model.data[1] = nullptr;
  const gs_gradients view = model.view();
  for (const bool gpu : {false, true}) {
    int64_t step = kStep;
    const gs_rule rule = {GS_GRADDROP, 9, &step, nullptr, 0};
    std::vector<float> out(60, 7);
    void* pointers[2] = {nullptr, out.data()};
    const auto space = allocate(64);
    CHECK((gpu ? gs_combine_by_rule_cuda(&view, &rule, pointers, 0, space.get(), 64, nullptr)
               : gs_combine_by_rule_cpu(&view, &rule, pointers, 0, space.get(), 64, nullptr)) == GS_OK,
          "%s", gs_last_error());
    for (int64_t c = 0; c < 60; c++) {
      step = kStep;
      const double exact = expected(rule, {model.at(1, 0, c), model.at(1, 1, c)}, model.numel[0] + c);
      CHECK(std::abs(out[c] - exact) <= rounding(GS_FLOAT32, exact), "gpu %d at %ld", gpu, static_cast<long>(c));
    }
  }
}

void test_errors() {
  const Model model(4, {GS_FLOAT32}, {5});
  const gs_gradients view = model.view();
  float out[5];
  void* pointers[1] = {out};
  const auto space = allocate(64);
  const gs_rule wrong[] = {{GS_GRADDROP, 0, nullptr, nullptr, 0},
                           {GS_TRIMMED_MEAN, 0, nullptr, nullptr, -1},
                           {GS_TRIMMED_MEAN, 0, nullptr, nullptr, 2}};
  const auto is_refused = [&](const gs_rule* rule, void* const* targets, int64_t bytes) {
    return gs_combine_by_rule_cpu(&view, rule, targets, 0, space.get(), bytes, nullptr) == GS_INVALID_ARGUMENT &&
           gs_combine_by_rule_cuda(&view, rule, targets, 0, space.get(), bytes, nullptr) == GS_INVALID_ARGUMENT;
  };
  for (const gs_rule& rule : wrong) CHECK(is_refused(&rule, pointers, 64), "kind %d", rule.kind);
  const gs_rule right = {GS_TRIMMED_MEAN, 0, nullptr, nullptr, 1};
  CHECK(is_refused(nullptr, pointers, 64) && is_refused(&right, nullptr, 64), "NULL");
  CHECK(gs_combine_by_rule_cpu(&view, &right, pointers, 0, space.get(), 8, nullptr) == GS_INVALID_ARGUMENT,
        "workspace");
  CHECK(gs_combine_by_rule_workspace_bytes(nullptr) == -1 && gs_combine_by_rule_cuda_workspace_bytes(nullptr) == -1,
        "NULL");
}

}  // namespace

int main() {
  for (const int64_t num_tasks : {1, 2, 3, 4, 7, 8, 17}) {
    for (const gs_dtype dtype : kDtypes) {
      test_rules(Model(num_tasks, {dtype}, {1, 0, 7, 250, 64, 33, num_tasks < 8 ? 3003 : 900}));
    }
  }
  test_rules(Model(5, {GS_FLOAT32, GS_FLOAT32, GS_BFLOAT16, GS_FLOAT64, GS_FLOAT16}, {9, 5, 9, 40, 9, 5, 300, 5}));
  test_rules(Model(2, {GS_BFLOAT16}, std::vector<int64_t>(1100, 2)));  // more parameters than arguments take
  for (const gs_dtype dtype : {GS_FLOAT64, GS_BFLOAT16}) test_rules(Model(GS_MAX_TASKS, {dtype}, {0, 0, 0, 9, 0, 1}));
  test_not_finite();
  test_many_coordinates();
  test_errors();
  std::printf("ok\n");
  return 0;
}
