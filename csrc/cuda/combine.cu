// SPDX-License-Identifier: MIT
// Stage 4 on the GPU: rows are summed in float64, in ascending order, and rounded once. Rows of weight 0 are not read.
// The blocks go from the last column to the first, so that what the Gram kernel read last is still in the level-2
// cache.
#include "cuda/table.cuh"

namespace gs::gpu {
namespace {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;                                 // rows whose loads are in flight together
constexpr int64_t kMinColumns = 1024, kMaxColumns = 8192;  // of a slot
constexpr int64_t kMaxSlots = 1056;

// Small problems are spread over more blocks.
int64_t width_of(int64_t columns) { return std::clamp<int64_t>(columns / kMaxSlots, kMinColumns, kMaxColumns); }

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
  using Rows = Piece<In, kThreads>;
  for_each_piece<In, kThreads>(table, slot, [&](const Rows& piece) {
    auto* out = const_cast<In*>(piece.row(num_tasks));
    const Steps steps(piece, Rows::kStep, false);
    for (int64_t i = steps.count - 1; i >= 0; i--) {
      double sum[kVector<In>] = {};
      for (int first = 0; first < terms.count; first += kUnroll) {
        const In* row[kUnroll];
        Vector<In> x[1][kUnroll];
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
          row[u] = first + u < terms.count ? piece.row(terms.row[first + u]) : nullptr;
        }
        load_steps<kThreads>(row, steps.step(i), piece.aligned, thread(), load_last<Vector<In>>, x);
#pragma unroll
        for (int u = 0; u < kUnroll; u++) {
          // An absent row counts as zero, also where its weight is not finite.
          if (!row[u]) continue;
#pragma unroll
          for (int e = 0; e < kVector<In>; e++) sum[e] += terms.weight[first + u] * to_double(x[0][u].get(e));
        }
      }
      if (accumulate) {
        const In* const before[1] = {out};
        Vector<In> x[1][1];
        load_steps<kThreads>(before, steps.step(i), piece.aligned, thread(), load_last<Vector<In>>, x);
#pragma unroll
        for (int e = 0; e < kVector<In>; e++) sum[e] += to_double(x[0][0].get(e));
      }
      Vector<In> result = {};
#pragma unroll
      for (int e = 0; e < kVector<In>; e++) result.set(e, from_double<In>(sum[e]));
      store_step<kThreads>(out + steps.step(i), piece.aligned, thread(), result);
    }
    for (int64_t i = thread(); i < steps.rest; i += kThreads) {
      const int64_t column = steps.rest_column(i);
      double sum = 0;
      for (int term = 0; term < terms.count; term++) {
        const In* row = piece.row(terms.row[term]);
        if (row) sum += terms.weight[term] * to_double(row[column]);
      }
      if (accumulate) sum += to_double(out[column]);
      out[column] = from_double<In>(sum);
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
  TableBuilder tables(*grads, out, width_of);
  Table table;
  while (tables.fill(table)) {
    const gs_status status = with_dtype(table.dtype, [&](auto in) {
      return launch(&combine_kernel<decltype(in)>, table.slots, kThreads, sizeof(Terms), stream, table,
                    grads->num_tasks, weights, accumulate != 0);
    });
    if (status != GS_OK) return status;
  }
  return GS_OK;
}
