// SPDX-License-Identifier: MIT
// The N-sized kernels in every instruction set that this machine can run, in all dtypes, against plain loops. Buffers
// have their exact size, so that the sanitizers see any access outside them.
#include <algorithm>
#include <numeric>
#include <set>

#include "cpu/kernels.h"
#include "rows.h"
#include "rules.h"

namespace {

constexpr int64_t kLengths[] = {0, 1, 7, 8, 15, 16, 17, 63, 65, 511, 513, 1025, 2100};

// With mixed, every third row is zero and every third one 1e-25 as large.
std::vector<Row> make_rows(int64_t k, int64_t n, gs_dtype dtype, double scale, bool mixed = false) {
  std::mt19937 random(11);
  std::vector<Row> rows;
  for (int64_t r = 0; r < k; r++) {
    const double factor = !mixed || r % 3 == 0 ? 1 : r % 3 == 1 ? 0 : 1e-25;
    rows.emplace_back(n, dtype, factor * scale, random);
  }
  return rows;
}

std::vector<const void*> pointers_to(const std::vector<Row>& rows) {
  std::vector<const void*> pointers;
  for (const Row& row : rows) pointers.push_back(row.data());
  return pointers;
}

void test_gram(const gs::KernelTable& table, gs_dtype dtype, int64_t k, int64_t n, double scale, bool mixed = false) {
  const std::vector<Row> rows = make_rows(k, n, dtype, scale, mixed);
  const std::vector<const void*> pointers = pointers_to(rows);
  // The rows belong to consecutive tasks, or to every other one.
  const int64_t spread = 1 + (k + n) % 2, ld = spread * k + 1;
  std::vector<int32_t> index;
  for (int64_t r = 0; r < k; r++) index.push_back(spread * r + 1);
  std::vector<double> gram(ld * ld, 0.0);
  table.gram(pointers.data(), index.data(), k, dtype, n, gram.data(), ld);
  std::vector<std::vector<double>> values(k);
  std::vector<double> squares;
  for (int64_t i = 0; i < k; i++) {
    for (int64_t c = 0; c < n; c++) values[i].push_back(rows[i].at(c));
    squares.push_back(std::inner_product(values[i].begin(), values[i].end(), values[i].begin(), 0.0));
  }
  for (int64_t i = 0; i < k; i++) {
    for (int64_t j = i; j < k; j++) {
      const double exact = std::inner_product(values[i].begin(), values[i].end(), values[j].begin(), 0.0);
      const double tolerance = (dtype == GS_FLOAT64 ? 1e-13 : 1e-6) * std::sqrt(squares[i] * squares[j]);
      const double error = std::abs(gram[index[i] * ld + index[j]] - exact);
      CHECK(error <= tolerance, "%s dtype %d k %ld n %ld scale %g (%ld, %ld): error %g", table.isa, dtype, (long)k,
            (long)n, scale, (long)i, (long)j, error);
    }
  }
  double elsewhere = 0;
  const auto is_task = [&](int64_t i) { return i > 0 && (i - 1) % spread == 0; };
  for (int64_t i = 0; i < ld; i++) {
    for (int64_t j = 0; j < ld; j++) elsewhere += is_task(i) && is_task(j) && i <= j ? 0 : std::abs(gram[i * ld + j]);
  }
  CHECK(elsewhere == 0, "%s wrote outside the upper triangle, k %ld n %ld", table.isa, (long)k, (long)n);
}

void test_combine(const gs::KernelTable& table, gs_dtype dtype, int64_t k, int64_t n, bool accumulate, bool stream) {
  const std::vector<Row> rows = make_rows(k, n, dtype, 1);
  const std::vector<const void*> pointers = pointers_to(rows);
  std::vector<double> weights;
  for (int64_t r = 0; r < k; r++) weights.push_back(0.75 - 0.5 * (r % 3));
  const Row before = make_rows(1, n, dtype, 2)[0];
  Row out = before;
  char* destination = out.storage.data() + bytes_of(dtype);
  table.combine(pointers.data(), weights.data(), k, dtype, n, destination, accumulate, stream);
  for (int64_t c = 0; c < n; c++) {
    double exact = accumulate ? before.at(c) : 0, magnitude = std::abs(exact);
    for (int64_t r = 0; r < k; r++) {
      exact += weights[r] * rows[r].at(c);
      magnitude += std::abs(weights[r] * rows[r].at(c));
    }
    const double half_ulp = dtype == GS_FLOAT64    ? 0x1p-53
                            : dtype == GS_FLOAT32  ? 0x1p-24
                            : dtype == GS_BFLOAT16 ? 0x1p-8
                                                   : 0x1p-11;
    const double tolerance =
        1.001 * half_ulp * std::abs(exact) + 1e-15 * magnitude + (dtype == GS_FLOAT16 ? 0x1p-25 : 0);
    CHECK(std::abs(out.at(c) - exact) <= tolerance, "%s dtype %d k %ld n %ld at %ld: %g, exact %g", table.isa, dtype,
          (long)k, (long)n, (long)c, out.at(c), exact);
  }
}

void test_rule(const gs::KernelTable& table, const gs_rule& rule, gs_dtype dtype, const std::vector<Row>& rows,
               int64_t n) {
  const auto k = static_cast<int64_t>(rows.size());
  std::vector<const void*> pointers = pointers_to(rows);
  if (k > 2) pointers[1] = nullptr;
  const int64_t coordinate = (int64_t{1} << 34) - 7 * n % 13;  // in some of the cases b exceeds 2^32
  const Row before = make_rows(1, n, dtype, 2)[0];
  Row outs[2] = {before, before};
  const bool accumulate = n % 2 == 1;
  for (const bool stream : {false, true}) {
    table.combine_by_rule(pointers.data(), rule, k, dtype, n, coordinate, outs[stream].storage.data() + bytes_of(dtype),
                          accumulate && !stream, stream);
  }
  for (int64_t c = 0; c < n; c++) {
    std::vector<double> values;
    for (int64_t r = 0; r < k; r++) values.push_back(pointers[r] ? rows[r].at(c) : 0);
    const double direction = expected(rule, values, coordinate + c);
    for (const bool stream : {false, true}) {
      const double exact = direction + (accumulate && !stream ? before.at(c) : 0), got = outs[stream].at(c);
      CHECK(std::abs(got - exact) <= rounding(dtype, exact), "%s rule %d dtype %d k %ld n %ld at %ld: %g, exact %g",
            table.isa, rule.kind, dtype, (long)k, (long)n, (long)c, got, exact);
    }
  }
}

void test_rules(const gs::KernelTable& table, gs_dtype dtype, int64_t k, int64_t n) {
  int64_t step = (int64_t{5} << 32) + 3;
  std::vector<double> leak;
  for (int64_t r = 0; r < k; r++) leak.push_back(r % 5 / 4.0);
  const std::vector<Row> rows = make_rows(k, n, dtype, 1);
  test_rule(table, {GS_GRADDROP, 77, &step, nullptr, 0}, dtype, rows, n);
  test_rule(table, {GS_GRADDROP, 78, &step, leak.data(), 0}, dtype, rows, n);
  const std::set<int64_t> trimmed = {0, k > 2 ? 1 : 0, k / 4, (k - 1) / 2};
  for (const int64_t each : trimmed) {
    test_rule(table, {GS_TRIMMED_MEAN, 0, nullptr, nullptr, each}, dtype, rows, n);
  }
}

// Every 16-bit pattern comes back from one row of weight 1.
void test_every_pattern(const gs::KernelTable& table, gs_dtype dtype) {
  std::vector<uint16_t> in(65536), out(65536);
  for (int i = 0; i < 65536; i++) in[i] = i;
  const void* row = in.data();
  const double one = 1;
  table.combine(&row, &one, 1, dtype, 65536, out.data(), false, false);
  for (int i = 0; i < 65536; i++) {
    const double expected = dtype == GS_FLOAT16 ? decode_half(i) : decode_bfloat(i);
    const double got = dtype == GS_FLOAT16 ? decode_half(out[i]) : decode_bfloat(out[i]);
    CHECK(got == expected || (std::isnan(got) && std::isnan(expected)), "%s dtype %d: %04x became %04x", table.isa,
          dtype, i, out[i]);
  }
}

// Rounding to 16 bits: ties go to even, overflow to infinity, and subnormals are kept.
void test_rounding(const gs::KernelTable& table) {
  const double cases[][2] = {
      {1 + 0x1p-11, 1}, {1 + 3 * 0x1p-11, 1 + 0x1p-9}, {65519, 65504},         {65520, INFINITY},
      {0x1p-25, 0},     {0x1.8p-25, 0x1p-24},          {3 * 0x1p-25, 0x1p-23}, {-0x1p-14 + 0x1p-26, -0x1p-14}};
  for (const auto& [value, expected] : cases) {
    const uint16_t one = 15 << 10;
    uint16_t result;
    const void* row = &one;
    table.combine(&row, &value, 1, GS_FLOAT16, 1, &result, false, false);
    CHECK(decode_half(result) == expected, "%s: %a became %a", table.isa, value, decode_half(result));
  }
}

void test_grams(const gs::KernelTable& table) {
  for (const gs_dtype dtype : kDtypes) {
    for (const int64_t n : kLengths) {
      for (const int64_t k : {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 16, 17, 25, 33}) test_gram(table, dtype, k, n, 1);
    }
  }
  for (const double scale : {1e-30, 1e-20, 3e-15, 1e-10, 1e10, 1e18, 1e30}) {
    for (const gs_dtype dtype : {GS_FLOAT32, GS_BFLOAT16}) {
      for (const int64_t k : {3, 8, 17, 32}) {
        for (const bool mixed : {false, true}) test_gram(table, dtype, k, 700, scale, mixed);
      }
    }
  }
  for (const int64_t k : {64, 147, 200, GS_MAX_TASKS}) {
    test_gram(table, GS_FLOAT32, k, 500, 1);
    test_gram(table, GS_FLOAT32, k, 500, 1e-20);
  }
  test_gram(table, GS_BFLOAT16, 64, 500, 1e-20);
  test_gram(table, GS_BFLOAT16, GS_MAX_TASKS, 500, 1);
  std::printf("%s: gram ok\n", table.isa);
}

void test_directions(const gs::KernelTable& table) {
  for (const gs_dtype dtype : kDtypes) {
    for (const int64_t n : kLengths) {
      for (const int64_t k : {0, 1, 3, 4, 6, 9}) {
        for (const bool accumulate : {false, true}) test_combine(table, dtype, k, n, accumulate, false);
        test_combine(table, dtype, k, n, false, true);
      }
      for (const int64_t k : {1, 2, 3, 6, 9}) test_rules(table, dtype, k, n);
    }
  }
  test_rules(table, GS_FLOAT32, GS_MAX_TASKS, 70);
  test_every_pattern(table, GS_BFLOAT16);
  test_every_pattern(table, GS_FLOAT16);
  test_rounding(table);
  std::printf("%s: directions ok\n", table.isa);
}

void test_table(const gs::KernelTable& table) {
  test_grams(table);
  test_directions(table);
}

}  // namespace

int main() {
  test_table(gs::kBaselineKernels);
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) test_table(gs::kAvx2Kernels);
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) {
    test_table(gs::kAvx512Kernels);
#if defined(GS_HAS_TILES)
    test_grams(gs::kAmxKernels);  // its tiles are emulated
#endif
  }
#endif
  return 0;
}
