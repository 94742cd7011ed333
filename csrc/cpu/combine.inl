// SPDX-License-Identifier: MIT
// The combine kernel: rows are summed in float64 and rounded once to the output. Up to kGroup rows take one pass; with
// more rows, the partial sums of a block of columns stay in the level-1 cache between passes.
namespace gs::GS_ISA {

constexpr int kGroup = 8;  // rows streamed together
// How far ahead of the sums rows are prefetched: this many bytes of a pass's rows together, at most a page of each row.
constexpr int64_t kFetchBytes = 8192, kPageBytes = 4096;

// Adds R rows, from `row` on, to the sums of the earlier rows (First: there are none), and rounds them to out (Last).
// The loops over rows are unrolled: processors detect a stream by its load instruction, so each row needs its own.
template <class In, int R, bool First, bool Last>
void add_rows(const Block<In>& block, int64_t row, double* sums) {
  constexpr int kRows = std::max(R, 1);
  constexpr int64_t kAhead = std::min(kPageBytes, kFetchBytes / kRows) / sizeof(In);
  alignas(64) In rounded[kBlockColumns];
  In* destination = block.stream ? rounded : block.out;
  const In* rows[kRows];
  vdouble weights[kRows];
  for (int r = 0; r < R; r++) {
    rows[r] = block.rows[row + r];
    weights[r] = block.weights[row + r] - vdouble{};
  }
  for (int64_t c = 0; c < block.columns; c += kStep) {
    for (int64_t line = 0; line < kStep; line += kLine<In>) {
      for (int r = 0; r < R; r++) __builtin_prefetch(rows[r] + c + kAhead + line, 0, 2);
    }
    vdouble sum[2] = {};
    for (int h = 0; !First && h < 2; h++) sum[h] = load_as<vdouble>(sums + c + h * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 2
      for (int h = 0; h < 2; h++) sum[h] += weights[r] * load_doubles(rows[r] + c + h * kLanes);
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; h++) {
      const int64_t column = c + h * kLanes;
      if (Last) {
        if (block.accumulate) sum[h] += load_doubles(block.out + column);
        store_doubles(destination + column, sum[h]);
      } else {
        store_as(sums + column, sum[h]);
      }
    }
  }
  if (Last && block.stream) stream_copy(block.out, rounded, block.columns * sizeof(In));
}

// add_rows for the last rows, `count` <= R of them.
template <class In, bool First, int R = kGroup>
void add_last_rows(const Block<In>& block, int64_t row, int64_t count, double* sums) {
  if constexpr (R > 0) {
    if (count < R) return add_last_rows<In, First, R - 1>(block, row, count, sums);
  }
  add_rows<In, R, First, true>(block, row, sums);
}

template <class In>
void combine_block(const Block<In>& block, int64_t k) {
  if (k <= kGroup) return add_last_rows<In, true>(block, 0, k, nullptr);
  alignas(64) double sums[kBlockColumns];
  add_rows<In, kGroup, true, false>(block, 0, sums);
  int64_t row = kGroup;
  for (; row + kGroup < k; row += kGroup) add_rows<In, kGroup, false, false>(block, row, sums);
  add_last_rows<In, false>(block, row, k - row, sums);
}

template <class In>
void combine_as(const void* const* rows, const double* weights, int64_t k, int64_t n, void* out, bool accumulate,
                bool stream) {
  Block<In> shared;
  shared.weights = weights;
  shared.accumulate = accumulate;
  shared.stream = stream;
  each_block(rows, k, n, out, shared, [&](const Block<In>& block) { combine_block(block, k); });
}

void combine(const void* const* rows, const double* weights, int64_t k, gs_dtype dtype, int64_t n, void* out,
             bool accumulate, bool stream) {
  const auto run = [&](auto rows_of) { rows_of(rows, weights, k, n, out, accumulate, stream); };
  switch (dtype) {
    case GS_FLOAT64:
      return run(&combine_as<double>);
    case GS_FLOAT32:
      return run(&combine_as<float>);
    case GS_BFLOAT16:
      return run(&combine_as<bfloat16>);
    case GS_FLOAT16:
      return run(&combine_as<float16>);
  }
}

}  // namespace gs::GS_ISA
