// SPDX-License-Identifier: MIT
// Stage 4 on the GPU: rows are summed in float64, in ascending order, and rounded once. Rows of weight 0 are not read.
// The blocks go from the last column to the first, so that what the Gram kernel read last is still in the level-2
// cache.
#include <algorithm>

#include "cuda/table.cuh"

namespace gs::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // rows whose loads are in flight together
constexpr int64_t kSlotColumns = 8192;

int64_t slots_of(int64_t columns) { return (columns + kSlotColumns - 1) / kSlotColumns; }

// The rows that count in a block's segment.
struct Terms {
  double weight[GS_MAX_TASKS];
  int32_t row[GS_MAX_TASKS];
  int32_t count;
};

template <class In>
GS_KERNEL combine_kernel(const GS_GRID_CONSTANT Table table, int64_t num_tasks, const double* weights,
                         bool accumulate) {
  wait_for_previous_kernel();
  auto& terms = shared<Terms>();
  const int64_t slot = table.slots - 1 - block();
  if (thread() == 0) {
    const double* own = weights + table.run_of(slot).segment * num_tasks;
    int32_t count = 0;
    for (int32_t t = 0; t < num_tasks; t++) {
      if (own[t] == 0) continue;
      terms.weight[count] = own[t];
      terms.row[count++] = t;
    }
    terms.count = count;
  }
  sync_block();
  let_next_kernel_start();
  for_each_piece<In>(table, slot, [&](const Piece<In>& piece) {
    auto* out = static_cast<In*>(const_cast<void*>(piece.rows[num_tasks]));
    for (int64_t c = piece.first_vector + thread() * kVector<In>; c < piece.end; c += kThreads * kVector<In>) {
      double sum[kVector<In>] = {};
      for (int first = 0; first < terms.count; first += kUnroll) {
        Vector<In> x[kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
          if (first + u < terms.count) x[u] = piece.load(terms.row[first + u], c);
        }
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
          if (first + u >= terms.count) break;
          const double weight = terms.weight[first + u];
          // An absent row counts as zero, also where its weight is not finite.
          if (!piece.rows[terms.row[first + u]]) continue;
#pragma unroll
          for (int e = 0; e < kVector<In>; e++) sum[e] += weight * to_double(x[u].value[e]);
        }
      }
      Vector<In> result;
      if (accumulate) {
        const Vector<In> before = piece.load(num_tasks, c);
#pragma unroll
        for (int e = 0; e < kVector<In>; e++) sum[e] += to_double(before.value[e]);
      }
#pragma unroll
      for (int e = 0; e < kVector<In>; e++) from_double(sum[e], result.value[e]);
      if (piece.is_whole(c)) {
        *reinterpret_cast<Vector<In>*>(out + c) = result;
      } else {
#pragma unroll
        for (int e = 0; e < kVector<In>; e++) {
          if (c + e >= piece.begin && c + e < piece.end) out[c + e] = result.value[e];
        }
      }
    }
  });
}

}  // namespace
}  // namespace gs::gpu

gs_status gs_combine_cuda(const gs_gradients* grads, const double* weights, void* const* out, int accumulate,
                          gs_stream stream) {
  using namespace gs::gpu;
  GS_REQUIRE(grads && weights && out, "grads, weights and out must not be NULL");
  if (const gs_status status = gs::check(*grads)) return status;
  TableBuilder tables(*grads, out, slots_of);
  Table table;
  while (tables.fill(table)) {
    const gs_status status = with_dtype(tables.dtype(), [&](auto in) {
      return launch(&combine_kernel<decltype(in)>, table.slots, kThreads, sizeof(Terms), stream, table,
                    grads->num_tasks, weights, accumulate != 0);
    });
    if (status != GS_OK) return status;
  }
  return GS_OK;
}
