// SPDX-License-Identifier: MIT
// The rules that work coordinate by coordinate, on a few vectors of columns at a time: each row is read once, and the
// running values stay in registers or in the level-1 cache.
namespace gs::GS_ISA {

typedef uint64_t vuint64 __attribute__((vector_size(8 * GS_LANES)));
typedef int32_t vint32half __attribute__((vector_size(4 * GS_LANES)));

// The lower 32 bits of each lane times the factor.
GS_INLINE vuint64 multiply_lower(vuint64 x, uint32_t factor) {
#if GS_LANES == 8
  return (vuint64)_mm512_mul_epu32((__m512i)x, _mm512_set1_epi64(factor));
#elif GS_LANES == 4
  return (vuint64)_mm256_mul_epu32((__m256i)x, _mm256_set1_epi64x(factor));
#else
  return (x & 0xffffffff) * uint64_t{factor};
#endif
}

// Stores a[0], b[0], a[1], b[1], ...
GS_INLINE void store_interleaved(void* p, vuint64 a, vuint64 b) {
  const vdouble x = (vdouble)a, y = (vdouble)b;
#if GS_LANES == 8
  const vdouble pairs[2] = {GS_SHUFFLE(x, y, 0, 8, 1, 9, 2, 10, 3, 11), GS_SHUFFLE(x, y, 4, 12, 5, 13, 6, 14, 7, 15)};
#elif GS_LANES == 4
  const vdouble pairs[2] = {GS_SHUFFLE(x, y, 0, 4, 1, 5), GS_SHUFFLE(x, y, 2, 6, 3, 7)};
#else
  const vdouble pairs[2] = {GS_SHUFFLE(x, y, 0, 2), GS_SHUFFLE(x, y, 1, 3)};
#endif
  std::memcpy(p, pairs, sizeof(pairs));
}

// The random words of blocks first, first + 1, ... (as solvers/philox.h numbers them, 4 words each), kLanes blocks at a
// time. The upper halves of the 64-bit lanes may hold anything: they never affect the lower ones.
GS_INLINE void draw_words(uint64_t seed, uint64_t step, uint64_t first, int64_t blocks, uint32_t* words) {
  vuint64 lane;
  for (int64_t l = 0; l < kLanes; l++) lane[l] = l;
  for (int64_t b = 0; b < blocks; b += kLanes) {
    const vuint64 block = first + b + lane;
    vuint64 c0 = step - vuint64{}, c1 = (step >> 32) - vuint64{}, c2 = 0x80000000 + (block >> 32), c3 = block;
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; round++) {
      const vuint64 product0 = multiply_lower(c0, 0xD2511F53), product1 = multiply_lower(c2, 0xCD9E8D57);
      c0 = (product1 >> 32) ^ c1 ^ uint64_t{key0};
      c2 = (product0 >> 32) ^ c3 ^ uint64_t{key1};
      c1 = product1;
      c3 = product0;
      key0 += 0x9E3779B9;
      key1 += 0xBB67AE85;
    }
    store_interleaved(words + 4 * b, (c0 & 0xffffffff) | (c1 << 32), (c2 & 0xffffffff) | (c3 << 32));
  }
}

// uniform_of(word) for each word. Converts signed integers, as not every instruction set converts unsigned ones.
GS_INLINE vdouble load_uniform(const uint32_t* words) {
  const auto signs = (vint32half)(load_as<vuint32>(words) ^ 0x80000000u);
  return (__builtin_convertvector(signs, vdouble) + (0x1p31 + 0.5)) * 0x1p-32;
}

// Rounds a vector of results to a column of the block.
template <class In>
GS_INLINE void store_result(const Block<In>& block, In* destination, int64_t column, vdouble result) {
  if (block.accumulate) result += load_doubles(block.out + column);
  store_doubles(destination + column, result);
}

// With p the sum of the positive values and n that of the negative ones, P > u means (1 - u) p > u |n|.
template <class In, bool kLeaks>
GS_INLINE void graddrop_block(const Block<In>& block, int64_t k, const gs_rule& rule, int64_t coordinate) {
  uint32_t words[kBlockColumns + 4 * kLanes];
  alignas(64) In rounded[kBlockColumns];
  const uint64_t first = static_cast<uint64_t>(coordinate + block.begin);
  const int64_t before = first % 4;
  draw_words(rule.seed, static_cast<uint64_t>(*rule.step), first / 4, (before + block.columns + 3) / 4, words);
  In* destination = block.stream ? rounded : block.out;
  for (int64_t c = 0; c < block.columns; c += kStep) {
    vdouble positive[2] = {}, negative[2] = {}, leaked_positive[2] = {}, leaked_negative[2] = {};
    for (int64_t r = 0; r < k; r++) {
      if (!block.rows[r]) continue;
      const In* const from = block.rows[r] + c;
      for (int64_t line = 0; line < kStep; line += kLine<In>) __builtin_prefetch(from + kBlockColumns + line, 0, 2);
      for (int h = 0; h < 2; h++) {
        const vdouble x = load_doubles(from + h * kLanes), zero = {};
        // NaN is counted with the negative values.
        const vdouble above = x > zero ? x : zero, below = x > zero ? zero : x;
        positive[h] += above;
        negative[h] += below;
        if (kLeaks) {
          leaked_positive[h] += block.weights[r] * above;
          leaked_negative[h] += block.weights[r] * below;
        }
      }
    }
    for (int h = 0; h < 2; h++) {
      const vdouble u = load_uniform(words + before + c + h * kLanes), all = positive[h] - negative[h];
      const vdouble up = (1 - u) * positive[h], down = -u * negative[h];
      vdouble result = leaked_positive[h] + leaked_negative[h];
      result = up > down ? positive[h] + leaked_negative[h] : result;
      result = up < down ? leaked_positive[h] + negative[h] : result;
      result += all - all;  // NaN if `all` is not finite
      store_result(block, destination, c + h * kLanes, result);
    }
  }
  if (block.stream) stream_copy(block.out, rounded, block.columns * sizeof(In));
}

// Values are compared as floats (float64 as doubles) and converted to doubles for the sum. Both conversions are exact.
template <class In>
using Compared = std::conditional_t<std::is_same<In, double>::value, vdouble, vfloat>;
GS_INLINE vdouble load_wide(const double* p) { return load_as<vdouble>(p); }
GS_INLINE void add_doubles(vdouble* sums, vdouble x) { sums[0] += x; }
GS_INLINE void add_doubles(vdouble* sums, vfloat x) {
  vhalf halves[2];
  __builtin_memcpy(halves, &x, sizeof(halves));
  for (int h = 0; h < 2; h++) sums[h] += widen(halves[h]);
}

template <class V>
GS_INLINE void order(V& low, V& high) {
  const V least = low < high ? low : high;
  high = low < high ? high : low;
  low = least;
}

// kVectors vectors of columns. Two unordered lists hold the `trimmed` least and the `trimmed` largest values so far. A
// value pushed out of both has at least `trimmed` values on either side, whatever follows, so it counts in the mean.
template <class In, int kVectors>
GS_INLINE void trimmed_mean_tile(const Block<In>& block, int64_t k, int64_t trimmed, int64_t column, In* destination) {
  using V = Compared<In>;
  constexpr int64_t kColumns = sizeof(V) / sizeof(V{}[0]);
  constexpr int64_t kHalves = kColumns / kLanes;
  V low[GS_MAX_TASKS / 2][kVectors], high[GS_MAX_TASKS / 2][kVectors], broken[kVectors] = {};
  vdouble sums[kVectors * kHalves] = {};
  const auto load = [&](int64_t r, V(&x)[kVectors]) {
    for (int v = 0; v < kVectors; v++) {
      x[v] = V{};
      if (!block.rows[r]) continue;
      const In* const from = block.rows[r] + column + v * kColumns;
      __builtin_prefetch(from + kBlockColumns, 0, 2);
      x[v] = load_wide(from);
      broken[v] += x[v] * 0;  // NaN for good, where x is not finite
    }
  };
  // Exchanges x with the largest value of the list if that is larger.
  const auto pass_low = [&](V(&x)[kVectors]) {
    for (int64_t i = 0; i < trimmed; i++) {
      for (int v = 0; v < kVectors; v++) order(low[i][v], x[v]);
    }
  };
  const auto pass_high = [&](V(&x)[kVectors]) {
    for (int64_t i = 0; i < trimmed; i++) {
      for (int v = 0; v < kVectors; v++) order(x[v], high[i][v]);
    }
  };
  V x[kVectors];
  for (int64_t r = 0; r < trimmed; r++) load(r, low[r]);
  for (int64_t r = trimmed; r < 2 * trimmed; r++) {
    load(r, high[r - trimmed]);
    pass_low(high[r - trimmed]);
  }
  for (int64_t r = 2 * trimmed; r < k; r++) {
    load(r, x);
    pass_low(x);
    pass_high(x);
    for (int v = 0; v < kVectors; v++) add_doubles(sums + v * kHalves, x[v]);
  }
  const double count = static_cast<double>(k - 2 * trimmed);
  for (int v = 0; v < kVectors; v++) {
    add_doubles(sums + v * kHalves, broken[v]);
    for (int64_t h = 0; h < kHalves; h++) {
      store_result(block, destination, column + v * kColumns + h * kLanes, sums[v * kHalves + h] / count);
    }
  }
}

template <class In>
GS_INLINE void trimmed_mean_block(const Block<In>& block, int64_t k, int64_t trimmed) {
  constexpr int kVectors = 4;  // independent chains of comparisons, which need not wait for each other
  constexpr int64_t kColumns = sizeof(Compared<In>) / sizeof(Compared<In>{}[0]);
  alignas(64) In rounded[kBlockColumns];
  In* destination = block.stream ? rounded : block.out;
  int64_t c = 0;
  for (; c + kVectors * kColumns <= block.columns; c += kVectors * kColumns) {
    trimmed_mean_tile<In, kVectors>(block, k, trimmed, c, destination);
  }
  for (; c < block.columns; c += kColumns) trimmed_mean_tile<In, 1>(block, k, trimmed, c, destination);
  if (block.stream) stream_copy(block.out, rounded, block.columns * sizeof(In));
}

template <class In>
void combine_by_rule_as(const void* const* rows, const gs_rule& rule, int64_t k, int64_t n, int64_t coordinate,
                        void* out, bool accumulate, bool stream) {
  Block<In> shared;
  shared.weights = rule.leak;
  shared.accumulate = accumulate;
  shared.stream = stream;
  if (rule.kind == GS_TRIMMED_MEAN) {
    each_block(rows, k, n, out, shared,
               [&](const Block<In>& block) { trimmed_mean_block(block, k, rule.num_trimmed); });
  } else if (rule.leak) {
    each_block(rows, k, n, out, shared,
               [&](const Block<In>& block) { graddrop_block<In, true>(block, k, rule, coordinate); });
  } else {
    each_block(rows, k, n, out, shared,
               [&](const Block<In>& block) { graddrop_block<In, false>(block, k, rule, coordinate); });
  }
}

void combine_by_rule(const void* const* rows, const gs_rule& rule, int64_t k, gs_dtype dtype, int64_t n,
                     int64_t coordinate, void* out, bool accumulate, bool stream) {
  const auto run = [&](auto as) { as(rows, rule, k, n, coordinate, out, accumulate, stream); };
  switch (dtype) {
    case GS_FLOAT64:
      return run(&combine_by_rule_as<double>);
    case GS_FLOAT32:
      return run(&combine_by_rule_as<float>);
    case GS_BFLOAT16:
      return run(&combine_by_rule_as<bfloat16>);
    case GS_FLOAT16:
      return run(&combine_by_rule_as<float16>);
  }
}

}  // namespace gs::GS_ISA
