// SPDX-License-Identifier: MIT
// The combine kernel: rows are summed in float64, a few at a time, and rounded once to the output. Up to kGroup rows
// need one pass; with more, the sums of a block of columns wait in the level-1 cache between passes.
namespace gs::GS_ISA {

constexpr int64_t kCombineColumns = 1024;
constexpr int64_t kGroup = 4;  // rows streamed together

template <class In>
struct Block {
  const In* rows[GS_MAX_TASKS];
  const double* weights;
  int64_t columns;  // a multiple of kStep, at most kCombineColumns
  In* out;
  bool accumulate;
  bool stream;
};

// Adds R rows, from row on, to the sums of the earlier ones (First: there are none), and rounds them to out (Last).
template <class In, int R, bool First, bool Last>
void add_rows(const Block<In>& block, int64_t row, double* sums) {
  alignas(64) In rounded[kCombineColumns];
  In* destination = block.stream ? rounded : block.out;
  const In* rows[R > 0 ? R : 1];
  vdouble weights[R > 0 ? R : 1];
  for (int r = 0; r < R; r++) {
    rows[r] = block.rows[row + r];
    weights[r] = block.weights[row + r] - vdouble{};
  }
  for (int64_t c = 0; c < block.columns; c += kStep) {
    for (int r = 0; r < R; r++) __builtin_prefetch(rows[r] + c + kCombineColumns, 0, 2);
#pragma GCC unroll 2
    for (int64_t h = c; h < c + kStep; h += kLanes) {
      vdouble sum = {};
      if (!First) sum = load_as<vdouble>(sums + h);
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) sum += weights[r] * load_doubles(rows[r] + h);
      if (Last) {
        if (block.accumulate) sum += load_doubles(block.out + h);
        store_doubles(destination + h, sum);
      } else {
        store_as(sums + h, sum);
      }
    }
  }
  if (Last && block.stream) stream_copy(block.out, rounded, block.columns * sizeof(In));
}

template <class In, bool First>
void add_last_rows(const Block<In>& block, int64_t row, int64_t count, double* sums) {
  switch (count) {
    case 0:
      return add_rows<In, 0, First, true>(block, row, sums);
    case 1:
      return add_rows<In, 1, First, true>(block, row, sums);
    case 2:
      return add_rows<In, 2, First, true>(block, row, sums);
    case 3:
      return add_rows<In, 3, First, true>(block, row, sums);
    default:
      return add_rows<In, 4, First, true>(block, row, sums);
  }
}

template <class In>
void combine_block(const Block<In>& block, int64_t k) {
  if (k <= kGroup) return add_last_rows<In, true>(block, 0, k, nullptr);
  alignas(64) double sums[kCombineColumns];
  add_rows<In, kGroup, true, false>(block, 0, sums);
  int64_t row = kGroup;
  for (; row + kGroup < k; row += kGroup) add_rows<In, kGroup, false, false>(block, row, sums);
  add_last_rows<In, false>(block, row, k - row, sums);
}

template <class In>
void combine_rows(const void* const* rows, const double* weights, int64_t k, int64_t n, void* out, bool accumulate,
                  bool stream) {
  Block<In> block;
  block.weights = weights;
  block.accumulate = accumulate;
  block.stream = stream;
  const int64_t whole = n / kStep * kStep;
  for (int64_t start = 0; start < whole; start += kCombineColumns) {
    for (int64_t r = 0; r < k; r++) block.rows[r] = static_cast<const In*>(rows[r]) + start;
    block.columns = std::min(kCombineColumns, whole - start);
    block.out = static_cast<In*>(out) + start;
    combine_block(block, k);
  }
  if (stream) stream_fence();
  if (whole < n) {
    const int64_t bytes = (n - whole) * sizeof(In);
    In tails[GS_MAX_TASKS][kStep], sum[kStep] = {};
    for (int64_t r = 0; r < k; r++) {
      std::memset(tails[r], 0, sizeof(tails[r]));
      std::memcpy(tails[r], static_cast<const In*>(rows[r]) + whole, bytes);
      block.rows[r] = tails[r];
    }
    std::memcpy(sum, static_cast<In*>(out) + whole, bytes);
    block.columns = kStep;
    block.out = sum;
    block.stream = false;
    combine_block(block, k);
    std::memcpy(static_cast<In*>(out) + whole, sum, bytes);
  }
}

void combine(const void* const* rows, const double* weights, int64_t k, gs_dtype dtype, int64_t n, void* out,
             bool accumulate, bool stream) {
  const auto run = [&](auto rows_of) { rows_of(rows, weights, k, n, out, accumulate, stream); };
  switch (dtype) {
    case GS_FLOAT64:
      return run(&combine_rows<double>);
    case GS_FLOAT32:
      return run(&combine_rows<float>);
    case GS_BFLOAT16:
      return run(&combine_rows<bfloat16>);
    case GS_FLOAT16:
      return run(&combine_rows<float16>);
  }
}

}  // namespace gs::GS_ISA
