// SPDX-License-Identifier: MIT
// The Gram kernel. Two paths, by the number of rows:
//   * few rows are memory-bound: register tiles straight from memory, all products and sums in float64;
//   * many rows are compute-bound: blocks of columns are packed into cache as float (float64 for float64 inputs), in
//     the order in which the tiles read them, so that no stride of the rows can collide in the cache. A float
//     accumulator takes 16 products and is then folded into float64, so the error is at most 16 * 2^-24 < 1e-6 of
//     |g_i| |g_j|. A block whose values would leave the range of float products is packed as float64 instead.
namespace gs::GS_ISA {

constexpr int kPanel = GS_PANEL;
constexpr int64_t kDirectRows = 8;
constexpr int64_t kDirectColumns = 1024;  // 8 rows of float fit the level-1 cache
constexpr int64_t kFold = 16;
constexpr int64_t kMaxPackedColumns = 512;
constexpr int64_t kPackedElements = 32768;  // per block: 256 KiB as double
constexpr int64_t kPaddedElements = kPackedElements + kMaxPackedColumns * kPanel;

// Zeroes in registers: an initialiser would go through memory.
template <class V, int R, int C>
GS_INLINE void clear(V (&acc)[R][C]) {
#pragma GCC unroll 4
  for (int r = 0; r < R; r++) {
#pragma GCC unroll 4
    for (int c = 0; c < C; c++) acc[r][c] = V{};
  }
}

// Writes the tile of lane sums to gram. Below the diagonal nothing is written.
template <int R, int C, bool Diagonal>
GS_INLINE void scatter(const vdouble (&acc)[R][C], const int32_t* row, const int32_t* column, double* gram,
                       int64_t ld) {
  for (int r = 0; r < R; r++) {
    const vdouble zero = {};
    double sums[4];
    lane_sums(acc[r][0], C > 1 ? acc[r][C > 1 ? 1 : 0] : zero, C > 2 ? acc[r][C > 2 ? 2 : 0] : zero,
              C > 3 ? acc[r][C > 3 ? 3 : 0] : zero, sums);
    for (int c = Diagonal ? r : 0; c < C; c++) gram[row[r] * ld + column[c]] += sums[c];
  }
}

template <class In, int R, int C, bool Diagonal>
__attribute__((noinline)) void direct_tile(const In* const* a, const In* const* b, int64_t n, const int32_t* row,
                                           const int32_t* column, double* gram, int64_t ld) {
  vdouble acc[R][C];
  clear(acc);
  for (int64_t k = 0; k < n; k += kStep) {
    for (int r = 0; r < R; r++) __builtin_prefetch(a[r] + k + kDirectColumns);
    if (!Diagonal) {
      for (int c = 0; c < C; c++) __builtin_prefetch(b[c] + k + kDirectColumns);
    }
#pragma GCC unroll 2
    for (int64_t h = 0; h < kStep; h += kLanes) {
      vdouble x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) x[r] = load_doubles(a[r] + k + h);
#pragma GCC unroll 4
      for (int c = 0; c < C; c++) {
        const vdouble y = Diagonal ? x[Diagonal ? c : 0] : load_doubles(b[c] + k + h);
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
          if (!Diagonal || r <= c) acc[r][c] += x[r] * y;
        }
      }
    }
  }
  scatter<R, C, Diagonal>(acc, row, column, gram, ld);
}

template <class In, int R, bool Diagonal>
void direct_columns(const In* const* a, const In* const* b, int64_t columns, int64_t n, const int32_t* row,
                    const int32_t* column, double* gram, int64_t ld) {
  switch (columns) {
    case 1:
      return direct_tile<In, R, 1, Diagonal>(a, b, n, row, column, gram, ld);
    case 2:
      return direct_tile<In, R, 2, Diagonal>(a, b, n, row, column, gram, ld);
    case 3:
      return direct_tile<In, R, 3, Diagonal>(a, b, n, row, column, gram, ld);
#if GS_PANEL == 4
    case 4:
      return direct_tile<In, R, 4, Diagonal>(a, b, n, row, column, gram, ld);
#endif
  }
}

template <class In>
void direct_diagonal(const In* const* a, int64_t rows, int64_t n, const int32_t* row, double* gram, int64_t ld) {
  switch (rows) {
    case 1:
      return direct_tile<In, 1, 1, true>(a, a, n, row, row, gram, ld);
    case 2:
      return direct_tile<In, 2, 2, true>(a, a, n, row, row, gram, ld);
    case 3:
      return direct_tile<In, 3, 3, true>(a, a, n, row, row, gram, ld);
#if GS_PANEL == 4
    case 4:
      return direct_tile<In, 4, 4, true>(a, a, n, row, row, gram, ld);
#endif
  }
}

// All tiles of one block of columns, n a multiple of kStep.
template <class In>
void direct_block(const In* const* rows, const int32_t* index, int64_t k, int64_t n, double* gram, int64_t ld) {
  for (int64_t i = 0; i < k; i += kPanel) {
    direct_diagonal(rows + i, std::min<int64_t>(kPanel, k - i), n, index + i, gram, ld);
    for (int64_t j = i + kPanel; j < k; j += kPanel) {
      direct_columns<In, kPanel, false>(rows + i, rows + j, std::min<int64_t>(kPanel, k - j), n, index + i, index + j,
                                        gram, ld);
    }
  }
}

template <class In>
void gram_direct(const void* const* rows, const int32_t* index, int64_t k, int64_t n, double* gram, int64_t ld) {
  const In* block[kDirectRows];
  const int64_t whole = n / kStep * kStep;
  for (int64_t start = 0; start < whole; start += kDirectColumns) {
    for (int64_t r = 0; r < k; r++) block[r] = static_cast<const In*>(rows[r]) + start;
    direct_block(block, index, k, std::min(kDirectColumns, whole - start), gram, ld);
  }
  if (whole < n) {
    In tail[kDirectRows][kStep];
    std::memset(tail, 0, sizeof(tail));
    for (int64_t r = 0; r < k; r++) {
      std::memcpy(tail[r], static_cast<const In*>(rows[r]) + whole, (n - whole) * sizeof(In));
      block[r] = tail[r];
    }
    direct_block(block, index, k, kStep, gram, ld);
  }
}

// The rows of the next block, at most two, that one tile fetches, so that memory works while the registers do.
struct NextBlock {
  const char *first, *second;
  GS_INLINE void line(int64_t i) const {
    if (first) __builtin_prefetch(first + 64 * i);
    if (second) __builtin_prefetch(second + 64 * i);
  }
};

// A packed panel holds, for each step of V-many columns, one vector of each of its kPanel rows.
template <bool Diagonal>
GS_INLINE void packed_products(const vdouble* a, const vdouble* b, int64_t steps, const NextBlock& prefetch,
                               vdouble (&acc)[kPanel][kPanel]) {
  for (int64_t k = 0; k < steps; k++) {
    prefetch.line(k);
#pragma GCC unroll 4
    for (int c = 0; c < kPanel; c++) {
      const vdouble y = b[k * kPanel + c];
#pragma GCC unroll 4
      for (int r = 0; r < (Diagonal ? c + 1 : kPanel); r++) acc[r][c] += a[k * kPanel + r] * y;
    }
  }
}

template <bool Diagonal>
GS_INLINE void packed_products(const vfloat* a, const vfloat* b, int64_t steps, const NextBlock& prefetch,
                               vdouble (&acc)[kPanel][kPanel]) {
  for (int64_t k0 = 0; k0 < steps; k0 += kFold) {
    vfloat part[kPanel][kPanel];
    clear(part);
    for (int64_t k = k0; k < std::min(k0 + kFold, steps); k++) {
      prefetch.line(k);
#pragma GCC unroll 4
      for (int c = 0; c < kPanel; c++) {
        const vfloat y = b[k * kPanel + c];
#pragma GCC unroll 4
        for (int r = 0; r < (Diagonal ? c + 1 : kPanel); r++) part[r][c] += a[k * kPanel + r] * y;
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < kPanel; r++) {
#pragma GCC unroll 4
      for (int c = Diagonal ? r : 0; c < kPanel; c++) {
        vhalf halves[2];
        __builtin_memcpy(halves, &part[r][c], sizeof(halves));
        acc[r][c] += widen(halves[0]) + widen(halves[1]);
      }
    }
  }
}

template <class V, bool Diagonal>
__attribute__((noinline)) void packed_tile(const V* a, const V* b, int64_t steps, const NextBlock& prefetch,
                                           const int32_t* row, int64_t rows, const int32_t* column, int64_t columns,
                                           double* gram, int64_t ld) {
  vdouble acc[kPanel][kPanel];
  clear(acc);
  packed_products<Diagonal>(a, b, steps, prefetch, acc);
  double sums[kPanel][4];
  for (int r = 0; r < kPanel; r++) {
    lane_sums(acc[r][0], acc[r][1], acc[r][2], acc[r][kPanel - 1], sums[r]);
  }
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t c = Diagonal ? r : 0; c < columns; c++) gram[row[r] * ld + column[c]] += sums[r][c];
  }
}

template <class V, class In>
void packed_tiles(const V* packed, const In* const* rows, const int32_t* index, int64_t k, int64_t width, double* gram,
                  int64_t ld) {
  const int64_t steps = width / (std::is_same<V, vdouble>::value ? kLanes : kStep);
  const int64_t panels = (k + kPanel - 1) / kPanel;
  const int64_t rows_per_tile = panels * (panels + 1) / 2 < k ? 2 : 1;
  const auto next_block = [&](int64_t row) {
    return row < k ? reinterpret_cast<const char*>(rows[row] + width) : nullptr;
  };
  int64_t row = 0;
  for (int64_t i = 0; i < k; i += kPanel) {
    for (int64_t j = i; j < k; j += kPanel) {
      const NextBlock prefetch = {next_block(row), rows_per_tile == 2 ? next_block(row + 1) : nullptr};
      row += rows_per_tile;
      const auto run = i == j ? &packed_tile<V, true> : &packed_tile<V, false>;
      run(packed + i * steps, packed + j * steps, steps, prefetch, index + i, std::min<int64_t>(kPanel, k - i),
          index + j, std::min<int64_t>(kPanel, k - j), gram, ld);
    }
  }
}

// Calls visit on each Width elements of a row of n elements, zero-padded to width elements.
template <int64_t Width, class In, class Visit>
GS_INLINE void for_each_vector(const In* row, int64_t n, int64_t width, Visit visit) {
  int64_t c = 0;
  for (; c + Width <= n; c += Width) visit(row + c);
  for (; c < width; c += Width) {
    In tail[Width] = {};
    if (c < n) std::memcpy(tail, row + c, (n - c) * sizeof(In));
    visit(tail);
  }
}

// Packs the n columns of k rows, zero-padded to width columns (a multiple of kStep) and whole panels.
template <class In>
void pack_doubles(const In* const* rows, int64_t k, int64_t n, int64_t width, double* packed) {
  for (int64_t i = 0; i < k; i += kPanel, packed += width * kPanel) {
    for (int r = 0; r < kPanel; r++) {
      const bool present = i + r < k;
      double* next = packed + r * kLanes;
      for_each_vector<kLanes>(rows[present ? i + r : i], present ? n : 0, width, [&](const In* x) {
        store_as(next, load_doubles(x));
        next += kLanes * kPanel;
      });
    }
  }
}

// As pack_doubles; false if a product of two values, or a sum of them, could leave the range of float.
template <class In>
bool pack_floats(const In* const* rows, int64_t k, int64_t n, int64_t width, float* packed) {
  constexpr float kSmallest = 0x1p-40f, kLargest = 0x1p55f;
  bool in_range = true;
  for (int64_t i = 0; i < k; i += kPanel, packed += width * kPanel) {
    for (int r = 0; r < kPanel; r++) {
      const bool present = i + r < k;
      float* next = packed + r * kStep;
      vhalf largest = {};
      for_each_vector<kStep>(rows[present ? i + r : i], present ? n : 0, width, [&](const In* x) {
        const vhalf first = load_floats(x), second = load_floats(x + kLanes);
        store_as(next, first);
        store_as(next + kLanes, second);
        next += kStep * kPanel;
        largest = larger_magnitude(larger_magnitude(largest, first), second);
      });
      float row_largest = 0;
      for (int64_t lane = 0; lane < kLanes; lane++) row_largest = std::max(row_largest, largest[lane]);
      in_range = in_range && (row_largest == 0 || (row_largest >= kSmallest && row_largest <= kLargest));
    }
  }
  return in_range;
}

template <class In>
void gram_packed(const void* const* rows, const int32_t* index, int64_t k, int64_t n, double* gram, int64_t ld) {
  alignas(64) double packed[kPaddedElements];
  const int64_t columns = std::min(kMaxPackedColumns, kPackedElements / k / 64 * 64);
  const In* block[GS_MAX_TASKS];
  for (int64_t start = 0; start < n; start += columns) {
    const int64_t width = std::min(columns, n - start), padded = (width + kStep - 1) / kStep * kStep;
    for (int64_t r = 0; r < k; r++) block[r] = static_cast<const In*>(rows[r]) + start;
    if constexpr (!std::is_same<In, double>::value) {
      if (pack_floats(block, k, width, padded, reinterpret_cast<float*>(packed))) {
        packed_tiles(reinterpret_cast<const vfloat*>(packed), block, index, k, padded, gram, ld);
        continue;
      }
    }
    pack_doubles(block, k, width, padded, packed);
    packed_tiles(reinterpret_cast<const vdouble*>(packed), block, index, k, padded, gram, ld);
  }
}

void gram(const void* const* rows, const int32_t* index, int64_t k, gs_dtype dtype, int64_t n, double* gram,
          int64_t ld) {
  const auto run = [&](auto direct, auto packed) { (k <= kDirectRows ? direct : packed)(rows, index, k, n, gram, ld); };
  switch (dtype) {
    case GS_FLOAT64:
      return run(&gram_direct<double>, &gram_packed<double>);
    case GS_FLOAT32:
      return run(&gram_direct<float>, &gram_packed<float>);
    case GS_BFLOAT16:
      return run(&gram_direct<bfloat16>, &gram_packed<bfloat16>);
    case GS_FLOAT16:
      return run(&gram_direct<float16>, &gram_packed<float16>);
  }
}

}  // namespace gs::GS_ISA
