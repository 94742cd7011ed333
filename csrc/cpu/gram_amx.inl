// SPDX-License-Identifier: MIT
// The Gram kernel of many bfloat16 rows on the matrix unit, which multiplies bfloat16 numbers and adds in float. Such a
// product is exact, and a block's sum has three levels: chains of 8 products, sums of two such chains, and a chain of 8
// of these sums. So at most 15 roundings follow each other before the sum continues in float64, and the error is at
// most 15 * 2^-24 < 1e-6 of |g_i| |g_j|. This holds for a range of squared norms; blocks with one outside of it are
// left to the vector kernel.
#include "simd.inl"

namespace gs {

namespace avx512 {
std::remove_pointer_t<decltype(KernelTable::gram)> gram;
std::remove_pointer_t<decltype(KernelTable::combine)> combine;
std::remove_pointer_t<decltype(KernelTable::combine_by_rule)> combine_by_rule;
}  // namespace avx512

namespace GS_ISA {

typedef uint32_t vpairs __attribute__((vector_size(64)));  // 16 pairs of bfloat16

constexpr int64_t kRows = 16;           // of a tile
constexpr int64_t kTileColumns = 16;    // half of what a tile could hold, to make the chains half as long
constexpr int64_t kPairColumns = 32;    // in a vector of pairs
constexpr int64_t kBlockColumns = 128;  // packed, and summed in float, in one go
constexpr int64_t kMaxPanels = (GS_MAX_TASKS + kRows - 1) / kRows;

// A block's columns of 16 rows, and their transpose by pairs of columns.
struct alignas(64) Panel {
  uint16_t left[kRows][kBlockColumns];
  vpairs right[kBlockColumns / 2];
};

// The products of the rows of two panels.
struct alignas(64) Products {
  float of[kRows][kRows];
};

struct Space {
  Panel panels[kMaxPanels];
  Products diagonal[kMaxPanels], others[2];
};

enum Tile { kSum, kLeft, kRight };

inline void set_shapes() {
  tiles::Shapes shapes;
  const auto set = [&](Tile tile, int64_t rows, int64_t bytes) {
    shapes.rows[tile] = static_cast<uint8_t>(rows);
    shapes.bytes[tile] = static_cast<uint16_t>(bytes);
  };
  set(kSum, kRows, kRows * sizeof(float));
  set(kLeft, kRows, kTileColumns * sizeof(bfloat16));
  set(kRight, kTileColumns / 2, sizeof(vpairs));
  tiles::configure(shapes);
}

// to[c] = pair c of each of the 16 rows.
GS_INLINE void transpose(const __m512i (&rows)[kRows], vpairs* to) {
  __m512i fours[4][4];  // [r][c]: of rows 4 r.., pairs c, 4 + c, 8 + c and 12 + c
#pragma GCC unroll 4
  for (int r = 0; r < 4; r++) {
    const __m512i* const x = rows + 4 * r;
    const __m512i low[2] = {_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpacklo_epi32(x[2], x[3])};
    const __m512i high[2] = {_mm512_unpackhi_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[2], x[3])};
    fours[r][0] = _mm512_unpacklo_epi64(low[0], low[1]);
    fours[r][1] = _mm512_unpackhi_epi64(low[0], low[1]);
    fours[r][2] = _mm512_unpacklo_epi64(high[0], high[1]);
    fours[r][3] = _mm512_unpackhi_epi64(high[0], high[1]);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; c++) {
    const __m512i even[2] = {_mm512_shuffle_i32x4(fours[0][c], fours[1][c], 0x88),
                             _mm512_shuffle_i32x4(fours[2][c], fours[3][c], 0x88)};
    const __m512i odd[2] = {_mm512_shuffle_i32x4(fours[0][c], fours[1][c], 0xdd),
                            _mm512_shuffle_i32x4(fours[2][c], fours[3][c], 0xdd)};
    to[c] = (vpairs)_mm512_shuffle_i32x4(even[0], even[1], 0x88);
    to[4 + c] = (vpairs)_mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
    to[8 + c] = (vpairs)_mm512_shuffle_i32x4(even[0], even[1], 0xdd);
    to[12 + c] = (vpairs)_mm512_shuffle_i32x4(odd[0], odd[1], 0xdd);
  }
}

// Packs n columns of up to 16 rows, with zeros up to a whole vector of columns, and prefetches the next block. The last
// row is repeated to fill the panel; products of these copies are ignored.
inline void pack(const bfloat16* const* rows, int64_t count, int64_t n, Panel& panel) {
  for (int64_t c = 0; c < n; c += kPairColumns) {
    const __mmask32 present = n - c >= kPairColumns ? ~0u : (1u << (n - c)) - 1;
    __m512i values[kRows];
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRows; r++) {
      const bfloat16* const from = rows[std::min(r, count - 1)] + c;
      values[r] = _mm512_maskz_loadu_epi16(present, from);
      store_as(panel.left[r] + c, values[r]);
      __builtin_prefetch(from + kBlockColumns, 0, 2);
    }
    transpose(values, panel.right + c / 2);
  }
}

inline void multiply(const Panel& a, const Panel& b, int64_t n, Products& products) {
  tiles::zero<kSum>();
  for (int64_t c = 0; c < n; c += kTileColumns) {
    tiles::load<kLeft>(a.left[0] + c, sizeof(a.left[0]));
    tiles::load<kRight>(b.right + c / 2, sizeof(vpairs));
    tiles::multiply<kSum, kLeft, kRight>();
  }
  tiles::store<kSum>(products.of, sizeof(products.of[0]));
}

// Adds the products of two panels to gram; with `diagonal`, only the upper triangle.
inline void add(const Products& products, bool diagonal, const int32_t* row, int64_t rows, const int32_t* column,
                int64_t columns, double* gram, int64_t ld) {
  const bool adjacent = column[columns - 1] - column[0] == columns - 1;
  for (int64_t r = 0; r < rows; r++) {
    const float* const sums = products.of[r];
    double* const to = gram + row[r] * ld;
    const int64_t first = diagonal ? r : 0;
    if (!adjacent) {
      for (int64_t c = first; c < columns; c++) to[column[c]] += sums[c];
      continue;
    }
    const unsigned all = ((1u << columns) - 1) & (~0u << first);
    for (int64_t c = 0; c < columns; c += kLanes) {
      double* const lanes = to + column[0] + c;
      const __mmask8 present = all >> c & 0xff;
      const vdouble sum = (vdouble)_mm512_maskz_loadu_pd(present, lanes) + load_doubles(sums + c);
      _mm512_mask_storeu_pd(lanes, present, (__m512d)sum);
    }
  }
}

// Adds the products of n columns to gram; returns false, with nothing added, if float cannot hold them.
inline bool add_block(const bfloat16* const* rows, const int32_t* index, int64_t k, int64_t n, Space& space,
                      double* gram, int64_t ld) {
  const int64_t panels = (k + kRows - 1) / kRows;
  const auto rows_of = [&](int64_t p) { return std::min(kRows, k - p * kRows); };
  for (int64_t p = 0; p < panels; p++) pack(rows + p * kRows, rows_of(p), n, space.panels[p]);
  for (int64_t p = 0; p < panels; p++) multiply(space.panels[p], space.panels[p], n, space.diagonal[p]);
  for (int64_t r = 0; r < k; r++) {
    const float square = space.diagonal[r / kRows].of[r % kRows][r % kRows];
    if (square >= 0x1p-88f && square <= 0x1p126f) continue;
    if (!std::all_of(rows[r], rows[r] + n, [](bfloat16 x) { return is_zero_value(x); })) return false;
  }
  const auto add_products = [&](const Products& products, int64_t p, int64_t q) {
    add(products, p == q, index + p * kRows, rows_of(p), index + q * kRows, rows_of(q), gram, ld);
  };
  // The next two panels are multiplied before the last product is added to gram: matrix and vector units overlap.
  for (int64_t p = 0; p < panels; p++) {
    const Products* before = &space.diagonal[p];
    for (int64_t q = p + 1; q < panels; q++) {
      multiply(space.panels[p], space.panels[q], n, space.others[q % 2]);
      add_products(*before, p, q - 1);
      before = &space.others[q % 2];
    }
    add_products(*before, p, panels - 1);
  }
  return true;
}

// Adds the products of the columns from start on; returns the first column of a block that float cannot hold, else n.
// Not inlined, so that its large stack frame is gone when the vector kernel, with one as large, takes that block.
__attribute__((noinline)) int64_t add_blocks(const void* const* rows, const int32_t* index, int64_t k, int64_t start,
                                             int64_t n, double* gram, int64_t ld) {
  Space space;
  set_shapes();
  for (; start < n; start += kBlockColumns) {
    const bfloat16* block[GS_MAX_TASKS];
    for (int64_t r = 0; r < k; r++) block[r] = static_cast<const bfloat16*>(rows[r]) + start;
    if (!add_block(block, index, k, std::min(kBlockColumns, n - start), space, gram, ld)) break;
  }
  tiles::release();
  return std::min(start, n);
}

inline bool is_granted() {
  static const bool granted = tiles::request();
  return granted;
}

void gram(const void* const* rows, const int32_t* index, int64_t k, gs_dtype dtype, int64_t n, double* gram,
          int64_t ld) {
  // A panel of fewer than 16 rows takes as long as a full one.
  const bool pays = dtype == GS_BFLOAT16 && (k == kRows || k >= 24);
  if (!pays || !is_granted()) return avx512::gram(rows, index, k, dtype, n, gram, ld);
  for (int64_t start = 0; (start = add_blocks(rows, index, k, start, n, gram, ld)) < n;) {
    // float probably cannot hold the next blocks either, so the vector kernel takes eight.
    const int64_t columns = std::min(8 * kBlockColumns, n - start);
    const void* rest[GS_MAX_TASKS];
    for (int64_t r = 0; r < k; r++) rest[r] = static_cast<const bfloat16*>(rows[r]) + start;
    avx512::gram(rest, index, k, dtype, columns, gram, ld);
    start += columns;
  }
}

}  // namespace GS_ISA
}  // namespace gs
