// SPDX-License-Identifier: MIT
// Stage 2 on the GPU: the choice of kernels, and the sum over slots.
#include "cuda/fill_tables.cuh"
#include "cuda/gram.cuh"
#include "cuda/launch.cuh"

namespace gs::gpu {
namespace {

constexpr int kPartWarps = kMaxThreads / kWarp;

// A small table for the usual case of one run: passing an argument of 32 KB takes time.
struct OneRun {
  int32_t runs, slots;
  Run only;
  GS_DEVICE const Run& run(int64_t) const { return only; }
};

// Sets the Gram matrices of a table's segments, or adds to them. There is a block for each run and kWarp pairs; those
// of a segment's first run do the work for all its runs. Each warp sums a part of the slots, kAtOnce at a time, and
// then the parts of some pairs.
template <class Runs>
GS_KERNEL GS_BLOCKS(kMaxThreads, 1)
    sum_slots_kernel(GS_ARGUMENT(Runs) table, int num_tasks, const double* partials, bool accumulate, double* gram) {
  constexpr int kAtOnce = 9;  // 32 warps load all slots at once, if those make one wave of two blocks a multiprocessor
  const int pairs = static_cast<int>(pairs_of(num_tasks)), blocks = (pairs + kWarp - 1) / kWarp;
  const int64_t first = block() / blocks;
  const int lane = thread() % kWarp, warp = thread() / kWarp, warps = threads() / kWarp;
  const int first_pair = static_cast<int>(block() % blocks) * kWarp;
  wait_for_previous_kernel();
  if (!table.run(first).is_first) return;
  double sum = 0;
  for (int64_t r = first; r >= 0; r = table.run(r).next) {
    const int64_t end = r + 1 < table.runs ? table.run(r + 1).first_slot : table.slots;
    for (int64_t slot = table.run(r).first_slot + warp; slot < end; slot += kAtOnce * warps) {
      double part[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) {
        const bool exists = slot + k * warps < end && first_pair + lane < pairs;
        part[k] = exists ? partials[(slot + k * warps) * pairs + first_pair + lane] : 0;
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; k++) sum += part[k];
    }
  }
  double* sums = &shared<double>();  // [kWarp pairs][parts], padded by one double to avoid bank conflicts
  sums[lane * (kPartWarps + 1) + warp] = sum;
  sync_block();
  let_next_kernel_start();
  for (int own = warp; own < kWarp && first_pair + own < pairs; own += warps) {
    double total = lane < warps ? sums[own * (kPartWarps + 1) + lane] : 0;
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
    if (lane > 0) continue;
    const int pair = first_pair + own, i = row_of_pair(pair, num_tasks);
    const int j = i + pair - pair_index(i, i, num_tasks);
    double* out = gram + table.run(first).segment * int64_t{num_tasks} * num_tasks;
    const double value = accumulate ? out[i * num_tasks + j] + total : total;
    out[i * num_tasks + j] = value;
    out[j * num_tasks + i] = value;
  }
}

gs_status sum_slots(const Table& table, int num_tasks, const double* partials, bool accumulate, double* gram,
                    gs_stream stream) {
  const int64_t blocks = table.runs * ((pairs_of(num_tasks) + kWarp - 1) / kWarp);
  const int warps = static_cast<int>(std::min<int64_t>(table.most_slots, kPartWarps));
  constexpr int64_t kBytes = kWarp * (kPartWarps + 1) * 8;
  if (table.runs > 1) {
    return launch(&sum_slots_kernel<Table>, blocks, warps * kWarp, kBytes, stream, table, num_tasks, partials,
                  accumulate, gram);
  }
  const OneRun one = {1, table.slots, {0, 0, 0, table.first_segment, 0, -1, true}};
  return launch(&sum_slots_kernel<OneRun>, blocks, warps * kWarp, kBytes, stream, one, num_tasks, partials, accumulate,
                gram);
}

// Up to this many tasks, all pairs and the rows are held in registers (gram_direct.cu).
int64_t direct_tasks(int32_t dtype, bool fast_double) {
  return dtype == GS_FLOAT64 || fast_double ? kDirectTasks : kSlowDirectTasks;
}

gs_status launch_products(const Table& table, int64_t num_tasks, bool fast_double, double* partials, gs_stream stream) {
  if (num_tasks <= direct_tasks(table.dtype, fast_double)) return launch_direct(table, num_tasks, partials, stream);
  if (fast_double && num_tasks <= lanes_tasks(gs::element_bytes(table.dtype))) {
    return launch_lanes(table, num_tasks, partials, stream);
  }
  const bool in_float = !in_double(table.dtype, fast_double);
  if (num_tasks <= (in_float ? kFloatTileTasks : kDoubleTileTasks)) {
    return launch_tiles(table, num_tasks, fast_double, partials, stream);
  }
  return launch_staged(table, num_tasks, fast_double, partials, stream);
}

}  // namespace
}  // namespace gs::gpu

int64_t gs_gram_cuda_workspace_bytes(const gs_gradients* grads) {
  using namespace gs::gpu;
  if (gs::check(grads) != GS_OK) return -1;
  // An upper bound: a table has no more columns or runs than all parameters together, and each run rounds its number of
  // slots up by less than one.
  int64_t columns = 0, runs = 0, last_segment[GS_FLOAT16 + 1] = {-1, -1, -1, -1};
  for (int64_t p = 0; p < grads->num_params; p++) {
    if (grads->numel[p] == 0) continue;
    columns += grads->numel[p];
    runs += last_segment[grads->dtype[p]] != gs::segment_of(*grads, p);
    last_segment[grads->dtype[p]] = gs::segment_of(*grads, p);
  }
  const int64_t slots = std::min(columns / min_columns(grads->num_tasks), most_slots(grads->num_tasks)) + runs;
  gs::Workspace space(nullptr);
  space.take<double>(slots * pairs_of(grads->num_tasks));
  return space.bytes() + table_workspace_bytes(grads->num_params, grads->num_tasks);
}

gs_status gs_gram_cuda(const gs_gradients* grads, double* gram, void* workspace, int64_t workspace_bytes,
                       gs_stream stream) {
  using namespace gs::gpu;
  GS_REQUIRE(grads && gram, "grads and gram must not be NULL");
  if (const gs_status status = gs::check(*grads)) return status;
  if (const gs_status status = gs::check_workspace(workspace, workspace_bytes, gs_gram_cuda_workspace_bytes(grads)))
    return status;
  Traits traits;
  if (const gs_status status = get_traits(traits)) return status;
  const int64_t tasks = grads->num_tasks;
  auto* space = static_cast<unsigned char*>(workspace);
  auto* partials = reinterpret_cast<double*>(space + table_workspace_bytes(grads->num_params, tasks));
  const SlotWidth width{tasks, traits.fast_double, traits.overlaps};
  Tables tables(*grads, nullptr, width);
  Table table;
  // If the first table has all segments, it sets G; otherwise all tables add to zeros.
  bool more = tables.next(table), accumulate = table.segments < grads->num_segments;
  if (accumulate) {
    const gs_status status = clear(gram, grads->num_segments * tasks * tasks, stream);
    if (status != GS_OK) return status;
  }
  for (; more; more = tables.next(table), accumulate = true) {
    gs_status status = tables.fill(table, space, stream);
    if (status == GS_OK) status = launch_products(table, tasks, traits.fast_double, partials, stream);
    if (status == GS_OK) {
      status = sum_slots(table, static_cast<int>(tasks), partials, accumulate, gram, stream);
    }
    if (status != GS_OK) return status;
  }
  return GS_OK;
}
