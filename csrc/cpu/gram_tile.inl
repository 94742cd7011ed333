// SPDX-License-Identifier: MIT
// Register tiles of the Gram kernel: the products of up to kPanel rows with up to kPanel rows over one block of
// columns.
namespace gs::GS_ISA {

constexpr int kPanel = GS_PANEL;
constexpr int64_t kFold = 14;  // steps

template <class V>
constexpr int64_t kWidth = std::is_same<V, vfloat>::value ? kStep : kLanes;  // columns in a vector

// Operands of a tile: vector k of row r. Rows are read in place and converted.
template <class V, class In>
struct Rows {
  const In* const* row;
  GS_INLINE V operator()(int r, int64_t k) const {
    if constexpr (std::is_same<V, vfloat>::value) return load_wide(row[r] + k * kStep);
    if constexpr (std::is_same<V, vdouble>::value) return load_doubles(row[r] + k * kLanes);
  }
};

// A packed panel holds, for each k, one vector of each of its kPanel rows.
template <class V>
struct Panel {
  const V* base;
  GS_INLINE V operator()(int r, int64_t k) const { return base[k * kPanel + r]; }
};

// Rows that are packed as they are read.
template <class V, class In>
struct PackingRows {
  const In* row[kPanel];
  V* panel;
  GS_INLINE V operator()(int r, int64_t k) const {
    const V x = Rows<V, In>{row}(r, k);
    panel[k * kPanel + r] = x;
    return x;
  }
};

// Rows of the next block that a tile prefetches, so that loads overlap with arithmetic. Into the level-2 cache: the
// level-1 cache allows too few outstanding misses.
template <class In>
struct Fetch {
  const In* row[4];
  int count;
  GS_INLINE void operator()(int64_t step) const {
#pragma GCC unroll 4
    for (int r = 0; r < 4; r++) {
      if (r == count) break;
      for (int64_t c = 0; c < kStep; c += kLine<In>) __builtin_prefetch(row[r] + step * kStep + c, 0, 2);
    }
  }
};

// Zeroes in registers: an initialiser would go through memory.
template <class V, int R, int C>
GS_INLINE void clear(V (&acc)[R][C]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) acc[r][c] = V{};
  }
}

// acc[r][c] = a_r b_c summed over steps begin..end; on the diagonal a is b, and only r <= c is computed. Small tiles
// use several sets of accumulators, so that a product need not wait for the one before.
template <bool Diagonal, class V, int R, int C, class A, class B, class F>
GS_INLINE void sum_products(const A& a, const B& b, int64_t begin, int64_t end, const F& fetch, V (&acc)[R][C]) {
  constexpr int kSets = R * C == 1 ? 8 : R * C <= 4 ? 4 : 1;
  constexpr int kVectors = kStep / kWidth<V>, kGroup = std::max(1, kSets / kVectors);
  V sets[kSets][R][C];
#pragma GCC unroll 8
  for (int set = 0; set < kSets; set++) clear(sets[set]);
  const auto add_step = [&](int64_t step, int first_set) {
    fetch(step);
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; v++) {
      auto& sum = sets[(first_set + v) % kSets];
      V x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) x[r] = a(r, step * kVectors + v);
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        const V y = Diagonal ? x[Diagonal ? c : 0] : b(c, step * kVectors + v);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          if (!Diagonal || r <= c) sum[r][c] += x[r] * y;
        }
      }
    }
  };
  int64_t step = begin;
  for (; step + kGroup <= end; step += kGroup) {
#pragma GCC unroll 8
    for (int s = 0; s < kGroup; s++) add_step(step + s, s * kVectors);
  }
  for (; kGroup > 1 && step < end; step++) add_step(step, 0);
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) {
      acc[r][c] = sets[0][r][c];
#pragma GCC unroll 8
      for (int set = 1; set < kSets; set++) acc[r][c] += sets[set][r][c];
    }
  }
}

// sums[r][c] = a_r . b_c over steps of kStep columns, in float64.
template <bool Diagonal, int R, int C, class A, class B, class F>
GS_INLINE void tile(const A& a, const B& b, int64_t steps, const F& fetch, double (&sums)[kPanel][4], vdouble zero) {
  vdouble acc[R][C];
  sum_products<Diagonal>(a, b, 0, steps, fetch, acc);
  const auto column = [&](int r, int c) { return c < C ? acc[r][c < C ? c : 0] : zero; };
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) lane_sums(column(r, 0), column(r, 1), column(r, 2), column(r, 3), sums[r]);
}

// The same in float, up to the rounding of kFold products in a chain and of the two additions in quad_sums.
template <bool Diagonal, int R, int C, class A, class B, class F>
GS_INLINE void tile(const A& a, const B& b, int64_t steps, const F& fetch, double (&sums)[kPanel][4], vfloat zero) {
  QuadSums total[R];
  for (int64_t k = 0; k < steps; k += kFold) {
    vfloat part[R][C];
    sum_products<Diagonal>(a, b, k, std::min(k + kFold, steps), fetch, part);
    const auto column = [&](int r, int c) { return c < C ? part[r][c < C ? c : 0] : zero; };
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) total[r].add(quad_sums(column(r, 0), column(r, 1), column(r, 2), column(r, 3)));
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) total[r].store(sums[r]);
}

}  // namespace gs::GS_ISA
