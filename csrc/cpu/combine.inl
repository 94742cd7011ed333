// SPDX-License-Identifier: MIT
// The combine kernel: rows are summed in float64, a few at a time, and rounded once to the output. Up to kGroup rows
// need one pass; with more, the sums of a block of columns wait in the level-1 cache between passes.
namespace gs::GS_ISA {

constexpr int64_t kGroup = 4;  // rows streamed together

// Adds R rows, from row on, to the sums of the earlier ones (First: there are none), and rounds them to out (Last).
template <class In, int R, bool First, bool Last>
void add_rows(const Block<In>& block, int64_t row, double* sums) {
  alignas(64) In rounded[kBlockColumns];
  In* destination = block.stream ? rounded : block.out;
  const In* rows[R > 0 ? R : 1];
  vdouble weights[R > 0 ? R : 1];
  for (int r = 0; r < R; r++) {
    rows[r] = block.rows[row + r];
    weights[r] = block.weights[row + r] - vdouble{};
  }
  for (int64_t c = 0; c < block.columns; c += kStep) {
    for (int r = 0; r < R; r++) __builtin_prefetch(rows[r] + c + kBlockColumns, 0, 2);
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
