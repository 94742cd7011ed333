// SPDX-License-Identifier: MIT
// Stage 2 on the GPU: the choice of kernels, and the sum over slots.
#include "cuda/gram.cuh"

namespace gs::gpu {
namespace {

constexpr int64_t kMaxParts = kMaxThreads / kWarp;

// The table of one run, as most are: an argument of 32 KB takes time.
struct OneRun {
  int32_t runs, slots;
  Run only;
  GS_HOST_DEVICE const Run& run(int64_t) const { return only; }
};

// Sets the Gram matrices of a table's segments, or adds to them: block = (run, kWarp pairs), of which those of a
// segment's first run do the work. Each warp sums a part of the slots, and the parts are added in order.
template <class Runs>
GS_KERNEL GS_BLOCKS(kMaxThreads, 1) sum_slots_kernel(const GS_GRID_CONSTANT Runs table, int64_t num_tasks,
                                                     const double* partials, bool accumulate, double* gram) {
  wait_for_previous_kernel();
  const int64_t pairs = pairs_of(num_tasks), blocks = (pairs + kWarp - 1) / kWarp;
  const int64_t pair = block() % blocks * kWarp + thread() % kWarp, first = block() / blocks;
  const int part = thread() / kWarp, parts = threads() / kWarp;
  if (!table.run(first).is_first) return;
  double sum = 0;
  for (int64_t r = first; r >= 0 && pair < pairs; r = table.run(r).next) {
    const int64_t next = r + 1 < table.runs ? table.run(r + 1).first_slot : table.slots;
    for (int64_t slot = table.run(r).first_slot + part; slot < next; slot += parts) {
      sum += partials[slot * pairs + pair];
    }
  }
  double* sums = &shared<double>();  // [parts][kWarp]
  sums[thread()] = sum;
  sync_block();
  let_next_kernel_start();
  if (part > 0 || pair >= pairs) return;
  for (int p = 1; p < parts; p++) sum += sums[p * kWarp + thread()];
  int64_t i = 0;
  while (pair_index(i + 1, i + 1, num_tasks) <= pair) i++;
  const int64_t j = i + pair - pair_index(i, i, num_tasks);
  double* out = gram + table.run(first).segment * num_tasks * num_tasks;
  const double value = accumulate ? out[i * num_tasks + j] + sum : sum;
  out[i * num_tasks + j] = value;
  out[j * num_tasks + i] = value;
}

gs_status sum_slots(const Table& table, int64_t num_tasks, const double* partials, bool accumulate, double* gram,
                    gs_stream stream) {
  const int64_t blocks = table.runs * ((pairs_of(num_tasks) + kWarp - 1) / kWarp);
  int64_t parts = 1;  // as many as the longest run has slots
  for (int64_t r = 0; r < table.runs; r++) {
    parts = std::max(
        parts, (r + 1 < table.runs ? table.run(r + 1).first_slot : table.slots) - int64_t{table.run(r).first_slot});
  }
  const int threads = kWarp * static_cast<int>(std::min(parts, kMaxParts));
  if (table.runs > 1) {
    return launch(&sum_slots_kernel<Table>, blocks, threads, threads * 8, stream, table, num_tasks, partials,
                  accumulate, gram);
  }
  const OneRun one = {1, table.slots, table.run(0)};
  return launch(&sum_slots_kernel<OneRun>, blocks, threads, threads * 8, stream, one, num_tasks, partials, accumulate,
                gram);
}

// float32 and shorter formats in fewer tasks than this are cheaper pair by pair.
int64_t direct_tasks(int32_t dtype, bool fast_double) {
  return dtype == GS_FLOAT64 || fast_double ? kDirectTasks : kSlowDirectTasks;
}

gs_status launch_products(const Table& table, int64_t num_tasks, bool fast_double, double* partials, gs_stream stream) {
  if (num_tasks <= direct_tasks(table.dtype, fast_double)) return launch_direct(table, num_tasks, partials, stream);
  const bool in_float = !in_double(table.dtype, fast_double);
  if (num_tasks <= (in_float ? kFloatTileTasks : kDoubleTileTasks)) {
    return launch_tiles(table, num_tasks, fast_double, partials, stream);
  }
  return launch_staged(table, num_tasks, fast_double, partials, stream);
}

// The width of slots for so many columns in all.
struct SlotWidth {
  static constexpr int64_t kMaxSlots = 528;      // four for each of the 132 multiprocessors of an H200
  static constexpr int64_t kSlotColumns = 1024;  // a slot smaller than this is not worth a block
  static constexpr int64_t kPartialBytes = 16 << 20;
  int64_t max_slots;

  explicit SlotWidth(int64_t num_tasks)
      : max_slots(std::clamp<int64_t>(kPartialBytes / (pairs_of(num_tasks) * 8), kMaxSlots / 4, kMaxSlots)) {}
  int64_t operator()(int64_t columns) const { return std::max(kSlotColumns, (columns + max_slots - 1) / max_slots); }
};

}  // namespace
}  // namespace gs::gpu

int64_t gs_gram_cuda_workspace_bytes(const gs_gradients* grads) {
  using namespace gs::gpu;
  if (!grads || gs::check(*grads) != GS_OK) return -1;
  // No table has more columns or runs than all parameters do, and a run adds at most one slot to those of its columns.
  int64_t columns = 0, runs = 0, last_segment[GS_FLOAT16 + 1] = {-1, -1, -1, -1};
  for (int64_t p = 0; p < grads->num_params; p++) {
    if (grads->numel[p] == 0) continue;
    columns += grads->numel[p];
    runs += last_segment[grads->dtype[p]] != gs::segment_of(*grads, p);
    last_segment[grads->dtype[p]] = gs::segment_of(*grads, p);
  }
  const SlotWidth width(grads->num_tasks);
  return (std::min(columns / SlotWidth::kSlotColumns, width.max_slots) + runs) * pairs_of(grads->num_tasks) * 8;
}

gs_status gs_gram_cuda(const gs_gradients* grads, double* gram, void* workspace, int64_t workspace_bytes,
                       gs_stream stream) {
  using namespace gs::gpu;
  GS_REQUIRE(grads && gram, "grads and gram must not be NULL");
  if (const gs_status status = gs::check(*grads)) return status;
  GS_REQUIRE_WORKSPACE(workspace, workspace_bytes, gs_gram_cuda_workspace_bytes(grads));
  Traits traits;
  if (const gs_status status = get_traits(traits)) return status;
  const int64_t tasks = grads->num_tasks;
  auto* partials = static_cast<double*>(workspace);
  const SlotWidth width(tasks);
  TableBuilder tables(*grads, nullptr, 0, width);
  Table table;
  // Where the first table has all segments it sets G, else all tables add to 0.
  bool more = tables.fill(table), accumulate = table.segments < grads->num_segments;
  if (accumulate) {
    const gs_status status = clear(gram, grads->num_segments * tasks * tasks, stream);
    if (status != GS_OK) return status;
  }
  for (; more; more = tables.fill(table), accumulate = true) {
    gs_status status = launch_products(table, tasks, traits.fast_double, partials, stream);
    if (status == GS_OK) status = sum_slots(table, tasks, partials, accumulate, gram, stream);
    if (status != GS_OK) return status;
  }
  return GS_OK;
}
