// SPDX-License-Identifier: MIT
// The Gram kernel, which works on one block of columns after the other. It reads its operands in one of two ways:
//   * few rows are read in place;
//   * many rows are packed into the cache in the order in which the tiles read them, so that rows cannot evict each
//     other, whatever their stride. The diagonal tiles, which come first and have the fewest products, pack as they
//     read.
// The arithmetic is float64 for float64 inputs and where that costs nothing (kDoubleRows), else float: after at most 16
// roundings in a row a sum continues in float64, so the error is at most 16 * 2^-24 < 1e-6 of |g_i| |g_j|. This holds
// for a range of squared norms; a block with one outside of it is computed again in float64.
#include "gram_tile.inl"

namespace gs::GS_ISA {

// Up to this many rows float64 arithmetic is no slower than memory. Only for float32: a byte of a 16-bit format holds
// twice as many values.
template <class In>
constexpr int64_t kDoubleRows = sizeof(In) == 4 ? 4 : 0;
// Up to this many rows are read in place. 16-bit formats would be converted at each use, so more than one panel of them
// is packed.
template <class In>
constexpr int64_t kDirectRows = sizeof(In) == 2 ? kPanel : 15;
// Columns of a block that several tiles read in place, 28 cache lines of a row: fewer make more tiles; with more,
// memory works in bursts, as each tile prefetches rows of its own.
template <class In>
constexpr int64_t kDirectColumns = 1792 / sizeof(In);
constexpr int64_t kTileColumns = 16 * kFold * kStep;  // the same if a single tile reads the rows
constexpr int64_t kPackedBytes = 262144;
// Packed columns, 14 cache lines of a row: fewer make more tiles, more do not fit the level-1 cache.
template <class In>
constexpr int64_t kMaxPackedColumns = 896 / sizeof(In);
constexpr int64_t kMaxPanels = (GS_MAX_TASKS + kPanel - 1) / kPanel;

// The rows of one block of columns. The tiles share the prefetching of the data `ahead` elements later, mostly the next
// block; diagonal tiles, which have fewer products, prefetch fewer rows.
template <class In>
struct BlockRows {
  const In* const* rows;
  int64_t k, n, ahead;
  int64_t fetched = 0;
  int64_t panels = (k + kPanel - 1) / kPanel, others = panels * (panels - 1) / 2;
  int64_t rows_of_diagonal = std::max<int64_t>(1, k / (panels + others));
  int64_t rows_of_other = others ? (k - panels * rows_of_diagonal + others - 1) / others : 0;

  Fetch<In> fetch_rows(bool diagonal) {
    Fetch<In> fetch = {};
    for (; fetch.count < (diagonal ? rows_of_diagonal : rows_of_other) && fetched < k; fetched++) {
      fetch.row[fetch.count++] = rows[fetched] + ahead;
    }
    return fetch;
  }
  bool is_zero(int64_t r) const {
    return std::all_of(rows[r], rows[r] + n, [](In x) { return is_zero_value(x); });
  }
};

// Rows that are read in place; n is a multiple of kStep.
template <class V, class In>
struct DirectBlock : BlockRows<In> {
  template <int R, int C, bool Diagonal>
  __attribute__((noinline)) void run(int64_t i, int64_t j, double (&sums)[kPanel][4]) {
    tile<Diagonal, R, C>(Rows<V, In>{this->rows + i}, Rows<V, In>{this->rows + j}, this->n / kStep,
                         this->fetch_rows(Diagonal), sums, V{});
  }
  void diagonal(int64_t i, double (&sums)[kPanel][4]) {
    switch (std::min<int64_t>(kPanel, this->k - i)) {
      case 1:
        return run<1, 1, true>(i, i, sums);
      case 2:
        return run<2, 2, true>(i, i, sums);
      case 3:
        return run<3, 3, true>(i, i, sums);
#if GS_PANEL == 4
      case 4:
        return run<4, 4, true>(i, i, sums);
#endif
    }
  }
  void products(int64_t i, int64_t j, double (&sums)[kPanel][4]) {
    switch (std::min<int64_t>(kPanel, this->k - j)) {
      case 1:
        return run<kPanel, 1, false>(i, j, sums);
      case 2:
        return run<kPanel, 2, false>(i, j, sums);
      case 3:
        return run<kPanel, 3, false>(i, j, sums);
#if GS_PANEL == 4
      case 4:
        return run<kPanel, 4, false>(i, j, sums);
#endif
    }
  }
};

// Rows that the diagonal tiles pack; n is a multiple of kStep. The last row is repeated to fill the last panel; the
// products of these copies are ignored.
template <class V, class In>
struct PackedBlock : BlockRows<In> {
  V* packed;

  V* panel(int64_t i) { return packed + i * (this->n / kWidth<V>); }
  __attribute__((noinline)) void diagonal(int64_t i, double (&sums)[kPanel][4]) {
    PackingRows<V, In> rows;
    for (int r = 0; r < kPanel; r++) rows.row[r] = this->rows[std::min(i + r, this->k - 1)];
    rows.panel = panel(i);
    tile<true, kPanel, kPanel>(rows, rows, this->n / kStep, this->fetch_rows(true), sums, V{});
  }
  __attribute__((noinline)) void products(int64_t i, int64_t j, double (&sums)[kPanel][4]) {
    tile<false, kPanel, kPanel>(Panel<V>{panel(i)}, Panel<V>{panel(j)}, this->n / kStep, this->fetch_rows(false), sums,
                                V{});
  }
};

// Adds a tile's sums to gram, in the upper triangle only.
template <bool Diagonal>
GS_INLINE void scatter(const double (&sums)[kPanel][4], const int32_t* row, int64_t rows, const int32_t* column,
                       int64_t columns, double* gram, int64_t ld) {
  const bool adjacent = !Diagonal && columns == 4 && column[3] - column[0] == 3;
  for (int64_t r = 0; r < rows; r++) {
    double* const to = gram + row[r] * ld;
    if (adjacent) {
      store_as(to + column[0], load_as<vquad>(to + column[0]) + load_as<vquad>(sums[r]));
    } else {
      for (int64_t c = Diagonal ? r : 0; c < columns; c++) to[column[c]] += sums[r][c];
    }
  }
}

// Adds all products of a block to gram; returns false, with nothing added, if float cannot hold them.
template <class V, class Block>
bool add_block(Block block, const int32_t* index, int64_t k, double* gram, int64_t ld) {
  double diagonal[kMaxPanels][kPanel][4];
  for (int64_t i = 0; i < k; i += kPanel) block.diagonal(i, diagonal[i / kPanel]);
  if constexpr (std::is_same<V, vfloat>::value) {
    for (int64_t r = 0; r < k; r++) {
      const double square = diagonal[r / kPanel][r % kPanel][r % kPanel];
      if (!(square >= 0x1p-88 && square <= 0x1p126) && !(square == 0 && block.is_zero(r))) return false;
    }
  }
  for (int64_t i = 0; i < k; i += kPanel) {
    const int64_t rows = std::min<int64_t>(kPanel, k - i);
    scatter<true>(diagonal[i / kPanel], index + i, rows, index + i, rows, gram, ld);
    for (int64_t j = i + kPanel; j < k; j += kPanel) {
      double sums[kPanel][4];
      block.products(i, j, sums);
      scatter<false>(sums, index + i, rows, index + j, std::min<int64_t>(kPanel, k - j), gram, ld);
    }
  }
  return true;
}

// Calls add(block) for the columns of the rows, block after block. Columns after the last whole step are copied to
// zero-padded buffers of one step.
template <class In, class Row, class Add>
GS_INLINE void each_block_of_rows(const Row* rows, int64_t k, int64_t n, int64_t columns, int64_t ahead,
                                  const Add& add) {
  const In* block[GS_MAX_TASKS];
  const int64_t whole = n / kStep * kStep;
  for (int64_t start = 0; start < whole; start += columns) {
    for (int64_t r = 0; r < k; r++) block[r] = static_cast<const In*>(rows[r]) + start;
    add(BlockRows<In>{block, k, std::min(columns, whole - start), ahead});
  }
  if (whole < n) {
    In tails[GS_MAX_TASKS][kStep];
    for (int64_t r = 0; r < k; r++) {
      std::memset(tails[r], 0, sizeof(tails[r]));
      std::memcpy(tails[r], static_cast<const In*>(rows[r]) + whole, (n - whole) * sizeof(In));
      block[r] = tails[r];
    }
    add(BlockRows<In>{block, k, kStep, 0});
  }
}

template <class V, class In>
void add_direct(const void* const* rows, const int32_t* index, int64_t k, int64_t n, double* gram, int64_t ld) {
  // A single tile reads each value once; several tiles need it in the level-1 cache, so their blocks are shorter.
  const int64_t columns = k <= kPanel ? kTileColumns : kDirectColumns<In>;
  const int64_t ahead = k <= kPanel ? kTileColumns / 4 : columns;
  each_block_of_rows<In>(rows, k, n, columns, ahead, [&](const BlockRows<In>& block) {
    if (k > kDoubleRows<In> && add_block<V>(DirectBlock<V, In>{block}, index, k, gram, ld)) return;
    add_block<vdouble>(DirectBlock<vdouble, In>{block}, index, k, gram, ld);
  });
}

template <class V, class In, class Row>
void add_packed(const Row* rows, const int32_t* index, int64_t k, int64_t n, void* space, double* gram, int64_t ld) {
  constexpr int64_t kWhole = kFold * kStep;
  const int64_t fitting = kPackedBytes / static_cast<int64_t>(sizeof(V) / kWidth<V>) / k;
  const int64_t columns = std::min(kMaxPackedColumns<In>, fitting - fitting % (fitting < kWhole ? kStep : kWhole));
  each_block_of_rows<In>(rows, k, n, columns, columns, [&](const BlockRows<In>& block) {
    if (add_block<V>(PackedBlock<V, In>{block, static_cast<V*>(space)}, index, k, gram, ld)) return;
    if constexpr (std::is_same<V, vfloat>::value) {
      add_packed<vdouble, In>(block.rows, index, k, block.n, space, gram, ld);
    }
  });
}

template <class In>
void gram_of(const void* const* rows, const int32_t* index, int64_t k, int64_t n, double* gram, int64_t ld) {
  using V = std::conditional_t<std::is_same<In, double>::value, vdouble, vfloat>;
  if (k <= kDirectRows<In>) return add_direct<V, In>(rows, index, k, n, gram, ld);
  constexpr int64_t kPadding = kMaxPackedColumns<In> * kPanel * sizeof(double);  // for the fill of the last panel
  alignas(64) char space[kPackedBytes + kPadding];
  add_packed<V, In>(rows, index, k, n, space, gram, ld);
}

void gram(const void* const* rows, const int32_t* index, int64_t k, gs_dtype dtype, int64_t n, double* gram,
          int64_t ld) {
  switch (dtype) {
    case GS_FLOAT64:
      return gram_of<double>(rows, index, k, n, gram, ld);
    case GS_FLOAT32:
      return gram_of<float>(rows, index, k, n, gram, ld);
    case GS_BFLOAT16:
      return gram_of<bfloat16>(rows, index, k, n, gram, ld);
    case GS_FLOAT16:
      return gram_of<float16>(rows, index, k, n, gram, ld);
  }
}

}  // namespace gs::GS_ISA
