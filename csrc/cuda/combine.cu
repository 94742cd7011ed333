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

// The rows that count in a block's segment: those with a weight other than 0 in one of the directions.
template <int K>
struct Terms {
  double weight[K][GS_MAX_TASKS];  // by task
  int32_t row[GS_MAX_TASKS];
  int32_t count;
};

// weights: [K][stride], of which a segment's begin at `own`.
template <int K>
GS_DEVICE void find_terms(const double* own, int64_t stride, int num_tasks, Terms<K>& terms) {
  static_assert(kThreads >= GS_MAX_TASKS);
  const int t = thread();
  if (t < num_tasks) {
#pragma unroll
    for (int k = 0; k < K; k++) terms.weight[k][t] = own[k * stride + t];
  }
  sync_block();
  if (t >= num_tasks) return;
  const auto counts = [&](int task) {
    bool any = false;
#pragma unroll
    for (int k = 0; k < K; k++) any = any || terms.weight[k][task] != 0;
    return any;
  };
  int before = 0;
  for (int task = 0; task < t; task++) before += counts(task);
  if (counts(t)) terms.row[before] = t;
  if (t == num_tasks - 1) terms.count = before + counts(t);
}

// sum += the k-th weight of a task times x, unless the weight is 0: x may be anything then.
template <int K>
GS_DEVICE void add_term(const Terms<K>& terms, int task, double x, double (&sum)[K]) {
#pragma unroll
  for (int k = 0; k < K; k++) {
    const double weight = terms.weight[k][task];
    if (K == 1 || weight != 0) sum[k] += weight * x;
  }
}

template <class In, int K>
GS_KERNEL GS_BLOCKS(kThreads, K == 1 ? 4 : 1) combine_kernel(const GS_GRID_CONSTANT Table table, int num_tasks,
                                                             const double* weights, int64_t stride, bool accumulate) {
  wait_for_previous_kernel();
  auto& terms = shared<Terms<K>>();
  const int64_t slot = table.slots - 1 - block();
  find_terms(weights + table.run_of(slot).segment * num_tasks, stride, num_tasks, terms);
  sync_block();
  let_next_kernel_start();
  using Rows = Piece<In, kThreads>;
  for_each_piece<In, kThreads>(table, slot, [&](const Rows& piece) {
    In* out[K];
#pragma unroll
    for (int k = 0; k < K; k++) out[k] = const_cast<In*>(piece.row(num_tasks + k));
    const Steps steps(piece, Rows::kStep);
    for (int64_t i = steps.count - 1; i >= 0; i--) {
      double sum[kVector<In>][K] = {};
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
          const int task = terms.row[first + u];
#pragma unroll
          for (int e = 0; e < kVector<In>; e++) add_term(terms, task, to_double(x[0][u].get(e)), sum[e]);
        }
      }
#pragma unroll
      for (int k = 0; k < K; k++) {
        if (!out[k]) continue;
        if (accumulate) {
          const In* const before[1] = {out[k]};
          Vector<In> x[1][1];
          load_steps<kThreads>(before, steps.step(i), piece.aligned, thread(), load_last<Vector<In>>, x);
#pragma unroll
          for (int e = 0; e < kVector<In>; e++) sum[e][k] += to_double(x[0][0].get(e));
        }
        Vector<In> result = {};
#pragma unroll
        for (int e = 0; e < kVector<In>; e++) result.set(e, from_double<In>(sum[e][k]));
        store_step<kThreads>(out[k] + steps.step(i), piece.aligned, thread(), result);
      }
    }
    for (int64_t i = thread(); i < steps.rest; i += kThreads) {
      const int64_t column = steps.rest_column(i);
      double sum[K] = {};
      for (int term = 0; term < terms.count; term++) {
        const In* row = piece.row(terms.row[term]);
        if (row) add_term(terms, terms.row[term], to_double(row[column]), sum);
      }
#pragma unroll
      for (int k = 0; k < K; k++) {
        if (!out[k]) continue;
        if (accumulate) sum[k] += to_double(out[k][column]);
        out[k][column] = from_double<In>(sum[k]);
      }
    }
  });
}

// Directions that one pass over the gradients yields.
constexpr int kMaxDirections = 4;

// K: as many as there are, from the first one on.
template <int K>
gs_status launch_pass(const gs_gradients& grads, const double* weights, int64_t directions, void* const* out,
                      bool accumulate, gs_stream stream) {
  if constexpr (K < kMaxDirections) {
    if (directions > K) return launch_pass<K + 1>(grads, weights, directions, out, accumulate, stream);
  }
  TableBuilder tables(grads, out, K, width_of);
  Table table;
  while (tables.fill(table)) {
    const gs_status status = with_dtype(table.dtype, [&](auto in) {
      return launch(&combine_kernel<decltype(in), K>, table.slots, kThreads, sizeof(Terms<K>), stream, table,
                    static_cast<int>(grads.num_tasks), weights, grads.num_segments * grads.num_tasks, accumulate);
    });
    if (status != GS_OK) return status;
  }
  return GS_OK;
}

}  // namespace
}  // namespace gs::gpu

gs_status gs_combine_cuda(const gs_gradients* grads, const double* weights, int64_t num_directions, void* const* out,
                          int accumulate, gs_stream stream) {
  using namespace gs::gpu;
  GS_REQUIRE(grads && weights && out, "grads, weights and out must not be NULL");
  GS_REQUIRE(num_directions >= 1, "num_directions must be at least 1, got %lld", (long long)num_directions);
  if (const gs_status status = gs::check(*grads)) return status;
  for (int64_t first = 0; first < num_directions; first += kMaxDirections) {
    const int64_t count = std::min<int64_t>(kMaxDirections, num_directions - first);
    const gs_status status = launch_pass<1>(*grads, weights + first * grads->num_segments * grads->num_tasks, count,
                                            out + first * grads->num_params, accumulate != 0, stream);
    if (status != GS_OK) return status;
  }
  return GS_OK;
}
