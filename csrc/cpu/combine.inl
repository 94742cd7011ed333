// SPDX-License-Identifier: MIT
// The combine kernel: a block of columns is summed in float64 in the level-1 cache, a few rows at a time, and rounded
// once to the output.
namespace gs::GS_ISA {

constexpr int64_t kCombineColumns = 1024;
constexpr int64_t kGroup = 4;  // rows streamed together

// sums += sum_r weights[r] rows[r] over n columns, a multiple of kLanes.
template <class In, int R>
GS_INLINE void add_rows(const In* const* rows, const double* weights, int64_t n, double* sums) {
  const In* row[R];
  vdouble weight[R];
  for (int r = 0; r < R; r++) {
    row[r] = rows[r];
    weight[r] = weights[r] - (vdouble){};
  }
  for (int64_t c = 0; c < n; c += kLanes) {
    vdouble sum = load_as<vdouble>(sums + c);
#pragma GCC unroll 4
    for (int r = 0; r < R; r++) {
      __builtin_prefetch(row[r] + c + kCombineColumns);
      sum += weight[r] * load_doubles(row[r] + c);
    }
    store_as(sums + c, sum);
  }
}

template <class In>
void combine_block(const In* const* rows, const double* weights, int64_t k, int64_t n, In* out, bool accumulate,
                   bool stream) {
  alignas(64) double sums[kCombineColumns];
  std::fill(sums, sums + n, 0.0);
  for (int64_t r = 0; r < k; r += kGroup) {
    switch (std::min(kGroup, k - r)) {
      case 1:
        add_rows<In, 1>(rows + r, weights + r, n, sums);
        break;
      case 2:
        add_rows<In, 2>(rows + r, weights + r, n, sums);
        break;
      case 3:
        add_rows<In, 3>(rows + r, weights + r, n, sums);
        break;
      default:
        add_rows<In, 4>(rows + r, weights + r, n, sums);
    }
  }
  alignas(64) In rounded[kCombineColumns];
  In* destination = stream ? rounded : out;
  for (int64_t c = 0; c < n; c += kLanes) {
    vdouble sum = load_as<vdouble>(sums + c);
    if (accumulate) sum += load_doubles(out + c);
    store_doubles(destination + c, sum);
  }
  if (destination != out) stream_copy(out, destination, n * sizeof(In));
}

template <class In>
void combine_rows(const void* const* rows, const double* weights, int64_t k, int64_t n, void* out, bool accumulate,
                  bool stream) {
  const In* block[GS_MAX_TASKS];
  In* destination = static_cast<In*>(out);
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t start = 0; start < whole; start += kCombineColumns) {
    for (int64_t r = 0; r < k; r++) block[r] = static_cast<const In*>(rows[r]) + start;
    combine_block(block, weights, k, std::min(kCombineColumns, whole - start), destination + start, accumulate, stream);
  }
  if (stream) stream_fence();
  if (whole < n) {
    const int64_t bytes = (n - whole) * sizeof(In);
    In tails[GS_MAX_TASKS][kLanes], sum[kLanes] = {};
    for (int64_t r = 0; r < k; r++) {
      std::memset(tails[r], 0, sizeof(tails[r]));
      std::memcpy(tails[r], static_cast<const In*>(rows[r]) + whole, bytes);
      block[r] = tails[r];
    }
    std::memcpy(sum, destination + whole, bytes);
    combine_block(block, weights, k, kLanes, sum, accumulate, false);
    std::memcpy(destination + whole, sum, bytes);
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
