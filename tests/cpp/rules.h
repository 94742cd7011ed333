// SPDX-License-Identifier: MIT
// The rules that work coordinate by coordinate, written as in the papers.
#pragma once
#include <algorithm>
#include <cmath>
#include <vector>

#include "gradsurgery/gradsurgery.h"
#include "solvers/philox.h"

// The result of the rule for the T values of one coordinate.
inline double expected(const gs_rule& rule, std::vector<double> values, int64_t coordinate) {
  for (const double value : values) {
    if (!std::isfinite(value)) return NAN;
  }
  double sum = 0, magnitude = 0, direction = 0;
  if (rule.kind == GS_TRIMMED_MEAN) {
    std::sort(values.begin(), values.end());
    const auto end = values.end() - rule.num_trimmed;
    for (auto value = values.begin() + rule.num_trimmed; value != end; value++) sum += *value;
    return sum / (values.size() - 2 * rule.num_trimmed);
  }
  for (const double value : values) {
    sum += value;
    magnitude += std::abs(value);
  }
  if (magnitude == 0) return 0;
  const auto step = static_cast<uint64_t>(*rule.step), block = static_cast<uint64_t>(coordinate / 4);
  const gs::PhiloxBlock words = gs::philox(
      {{uint32_t(step), uint32_t(step >> 32), uint32_t((uint64_t{1} << 31) + (block >> 32)), uint32_t(block)}},
      rule.seed);
  const double purity = (1 + sum / magnitude) / 2, u = (words.word[coordinate % 4] + 0.5) / 4294967296.0;
  for (size_t t = 0; t < values.size(); t++) {
    const double leak = rule.leak ? rule.leak[t] : 0;
    const bool kept = (values[t] > 0 && purity > u) || (values[t] < 0 && purity < u);
    direction += (leak + (1 - leak) * kept) * values[t];
  }
  return direction;
}

// How far a float64 result near `exact` may be off after rounding to a dtype (by way of float for the 16-bit ones). The
// values are of the order of 1.
inline double rounding(gs_dtype dtype, double exact) {
  const double half_ulp = dtype == GS_FLOAT64    ? 0x1p-53
                          : dtype == GS_FLOAT32  ? 0x1p-24
                          : dtype == GS_BFLOAT16 ? 0x1p-8
                                                 : 0x1p-11;
  return 1.001 * half_ulp * std::abs(exact) + 1e-13 + (dtype == GS_FLOAT16 ? 0x1p-25 : 0);
}
