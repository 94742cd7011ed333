// SPDX-License-Identifier: MIT
// How the kernels that write a direction walk over its columns.
namespace gs::GS_ISA {

constexpr int64_t kBlockColumns = 1024;

template <class In>
struct Block {
  const In* rows[GS_MAX_TASKS];  // null: zeros
  const double* weights;         // a number for each row
  int64_t begin;                 // number of the first column
  int64_t columns;               // a multiple of kStep, at most kBlockColumns
  In* out;
  bool accumulate;
  bool stream;  // writes past the cache
};

// Calls run(block) for the n columns of k rows, block after block. Columns after the last whole step are copied to
// zero-padded buffers of one step. `block` holds the members that are the same for all blocks.
template <class In, class Run>
GS_INLINE void each_block(const void* const* rows, int64_t k, int64_t n, void* out, Block<In> block, const Run& run) {
  const int64_t whole = n / kStep * kStep;
  const auto row_at = [&](int64_t r, int64_t column) {
    return rows[r] ? static_cast<const In*>(rows[r]) + column : nullptr;
  };
  for (block.begin = 0; block.begin < whole; block.begin += kBlockColumns) {
    for (int64_t r = 0; r < k; r++) block.rows[r] = row_at(r, block.begin);
    block.columns = std::min(kBlockColumns, whole - block.begin);
    block.out = static_cast<In*>(out) + block.begin;
    run(block);
  }
  if (block.stream) stream_fence();
  if (whole < n) {
    const int64_t bytes = (n - whole) * sizeof(In);
    In tails[GS_MAX_TASKS][kStep], last[kStep] = {};
    for (int64_t r = 0; r < k; r++) {
      std::memset(tails[r], 0, sizeof(tails[r]));
      if (rows[r]) std::memcpy(tails[r], row_at(r, whole), bytes);
      block.rows[r] = tails[r];
    }
    std::memcpy(last, static_cast<In*>(out) + whole, bytes);
    block.begin = whole;
    block.columns = kStep;
    block.out = last;
    block.stream = false;
    run(block);
    std::memcpy(static_cast<In*>(out) + whole, last, bytes);
  }
}

}  // namespace gs::GS_ISA
