// SPDX-License-Identifier: MIT
// Stage 4 on the GPU: rows are summed in float64, in ascending order, and rounded once. Rows of weight 0 are not read.
#include "cuda/fill_tables.cuh"
#include "cuda/gram.cuh"
#include "cuda/launch.cuh"
#include "cuda/turns.cuh"

namespace gs::gpu {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
// A lane loads `rows` rows together, over `steps` steps; a multiprocessor runs `blocks` blocks at once. With many
// columns, more blocks hide the latency of memory better than more loads per block; with few columns there are no more
// blocks, so each loads more. Rows that are read element by element take more registers.
struct Shape {
  int steps, rows, blocks;
};
enum class Layout { kFew, kMany, kShifted };  // few or many columns; rows of different alignments
constexpr Shape shape_of(int64_t bytes, int64_t num_tasks, Layout layout) {
  if (num_tasks <= 2) return bytes == 2 ? Shape{2, 2, 3} : Shape{4, 2, 2};
  if (num_tasks <= 4 || (num_tasks > 8 && num_tasks <= 12)) return {1, 4, 4};  // eight rows would be half absent
  if (layout == Layout::kMany) return {1, 8, 3};
  if (num_tasks <= 16) return {1, 4, 4};
  return layout == Layout::kFew ? Shape{1, 16, 1} : Shape{1, 8, 2};
}

// A block's columns per turn, and whether there are more columns than all blocks take in one turn.
constexpr int64_t turn_of(int64_t bytes, const Shape& shape) { return kThreads * 16 / bytes * shape.steps; }
bool are_many(int64_t columns, int64_t bytes, int64_t num_tasks, int64_t processors) {
  const Shape shape = shape_of(bytes, num_tasks, Layout::kFew);
  return columns > processors * shape.blocks * turn_of(bytes, shape);
}

// With many columns a slot is a few turns of a block (fewer for more rows), as many as leave the fewest blocks idle in
// the last wave. With few columns, which may belong to many short rows, slots are multiples of a warp's turn.
int64_t width_of(int64_t columns, int64_t bytes, int64_t num_tasks, int64_t processors) {
  const bool many = are_many(columns, bytes, num_tasks, processors);
  const Shape shape = shape_of(bytes, num_tasks, many ? Layout::kMany : Layout::kFew);
  const int64_t turn = turn_of(bytes, shape), turns = (columns + turn - 1) / turn, at_once = processors * shape.blocks;
  if (turns < at_once) {
    const int64_t own = turn / kWarps;
    return (columns + own * at_once - 1) / (own * at_once) * own;
  }
  const auto time = [&](int64_t share) {
    const int64_t slots = (turns + share - 1) / share, waves = (slots + at_once - 1) / at_once;
    return waves * (2 * share + 1);  // starting a block takes half as long as a turn
  };
  int64_t best = 1;
  for (int64_t share = 2; share <= 64 / (num_tasks * shape.steps) && share <= 8 / shape.steps; share++) {
    if (time(share) <= time(best)) best = share;
  }
  return turn * best;
}

// The order in which blocks take the slots. The level-2 cache still holds what the Gram kernel read last: the ends of
// all its own (wider) slots, which it processes in parallel. So the first blocks take the last slot within each of
// those, the next blocks the slots before, and so on.
struct SlotOrder {
  static constexpr int kShift = 20;
  int32_t groups = 1;  // Gram slots
  int32_t slots;
  int64_t ratio;  // slots per group (may be a fraction), times 2^kShift

  SlotOrder(const Table& table, int64_t columns, int64_t gram_width) : slots(table.slots) {
    // With several runs, or if a Gram slot holds few slots, a single group: from the last slot to the first.
    if (table.runs == 1 && gram_width >= 3 * table.width) {
      groups = static_cast<int32_t>((columns + gram_width - 1) / gram_width);
    } else {
      gram_width = table.slots * table.width;
    }
    ratio = (gram_width << kShift) / table.width;
  }
  GS_HOST_DEVICE int64_t begin(int64_t group) const {
    const int64_t first = group * ratio >> kShift;
    return group == groups || first > slots ? slots : first;
  }
  int64_t blocks() const {
    int64_t most = 0;
    for (int64_t group = 0; group < groups; group++) most = std::max(most, begin(group + 1) - begin(group));
    return groups * most;
  }
  // -1 if there is none.
  GS_DEVICE int64_t slot(int64_t block) const {
    const auto number = static_cast<uint32_t>(block), all = static_cast<uint32_t>(groups);
    const int64_t group = number % all, slot = begin(group + 1) - 1 - number / all;
    return slot < begin(group) ? -1 : slot;
  }
};

// The rows of a block's segment that have a weight other than 0.
struct Terms {
  double weight[GS_MAX_TASKS];
  int32_t of_warp[kWarps];  // not shared with `row`, which other warps may write while this is read
  int32_t row[GS_MAX_TASKS];
  int32_t count;
};

// own: the segment's weights.
GS_DEVICE void find_terms(const double* own, int num_tasks, Terms& terms) {
  static_assert(kThreads >= GS_MAX_TASKS);
  const int t = thread(), warp = t / kWarp;
  const double weight = t < num_tasks ? own[t] : 0;
  const bool counts = weight != 0;
  const uint32_t lanes = ballot_of_warp(counts);
  if (t % kWarp == 0) terms.of_warp[warp] = count_bits(lanes);
  sync_block();
  int before = count_bits(lanes & ((1u << t % kWarp) - 1)), all = 0;
#pragma unroll
  for (int w = 0; w < kWarps; w++) {
    before += w < warp ? terms.of_warp[w] : 0;
    all += terms.of_warp[w];
  }
  if (counts) {
    terms.row[before] = t;
    terms.weight[before] = weight;
  }
  if (t == 0) terms.count = all;
}

// With more than one step kRows >= T: all rows of all steps are loaded together, so no step waits for another.
template <class In, int kSteps, int kRows, int kBlocks>
GS_KERNEL GS_BLOCKS(kThreads, kBlocks)
    combine_kernel(GS_ARGUMENT(Table) table, SlotOrder order, int num_tasks, const double* weights, bool accumulate) {
  wait_for_table(table);
  auto& terms = shared<Terms>();
  const int64_t slot = order.slot(block());
  if (slot < 0) return wait_for_previous_kernel();
  const int lane = thread() % kWarp;
  const double* own = weights + table.run_of(slot).segment * int64_t{num_tasks};
  Turns<In, kWarp, kSteps> turns(table, slot, thread() / kWarp, kWarps);
  wait_for_previous_kernel();
  find_terms(own, num_tasks, terms);
  sync_block();
  let_next_kernel_start();
  for (; !turns.done(); turns.next()) {
    Unit unit[kSteps] = {};
    turns.get_units(lane, unit);
    double sum[kSteps][kVector<In>] = {};
    for (int first = 0; first < (kSteps > 1 ? 1 : terms.count); first += kRows) {
      int task[kRows];
#pragma unroll
      for (int u = 0; u < kRows; u++) task[u] = first + u < terms.count ? terms.row[first + u] : -1;
      const In* row[kRows];
      turns.get_rows(task, row);
      Vector<In> x[kSteps][kRows];
      turns.load(row, lane, unit, load_last<Vector<In>>, x);
#pragma unroll
      for (int u = 0; u < kRows; u++) {
        // An absent row counts as zero, even if its weight is not finite.
        if (!row[u]) continue;
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
#pragma unroll
          for (int e = 0; e < kVector<In>; e++) sum[s][e] += terms.weight[first + u] * to_double(x[s][u].get(e));
        }
      }
    }
    const int output[1] = {num_tasks};
    In* out[1];
    turns.get_rows(output, out);
    if (!out[0]) continue;  // never NULL (fill_tables.cuh), but this saves tests in load and store
    if (accumulate) {
      const In* const before[1] = {out[0]};
      Vector<In> x[kSteps][1];
      turns.load(before, lane, unit, load_last<Vector<In>>, x);
#pragma unroll
      for (int s = 0; s < kSteps; s++) {
#pragma unroll
        for (int e = 0; e < kVector<In>; e++) sum[s][e] += to_double(x[s][0].get(e));
      }
    }
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
      Vector<In> result = {};
#pragma unroll
      for (int e = 0; e < kVector<In>; e++) result.set(e, from_double<In>(sum[s][e]));
      turns.store(out[0], lane, s, unit[s], result);
    }
  }
}

// Launches with the shape for kTasks tasks.
template <class In, int64_t kTasks, Layout kLayout>
gs_status launch_combine(const Table& table, const SlotOrder& order, const gs_gradients& grads, const double* weights,
                         bool accumulate, gs_stream stream) {
  constexpr Shape kShape = shape_of(sizeof(In), kTasks, kLayout);
  static_assert(kShape.steps == 1 || kTasks <= kShape.rows);
  return launch(&combine_kernel<In, kShape.steps, kShape.rows, kShape.blocks>, order.blocks(), kThreads, sizeof(Terms),
                stream, table, order, static_cast<int>(grads.num_tasks), weights, accumulate);
}

}  // namespace
}  // namespace gs::gpu

int64_t gs_combine_cuda_workspace_bytes(const gs_gradients* grads) {
  if (gs::check(grads) != GS_OK) return -1;
  return gs::gpu::table_workspace_bytes(grads->num_params, grads->num_tasks + 1);
}

gs_status gs_combine_cuda(const gs_gradients* grads, const double* weights, void* const* out, int accumulate,
                          void* workspace, int64_t workspace_bytes, gs_stream stream) {
  using namespace gs::gpu;
  GS_REQUIRE(grads && weights && (out || grads->num_params == 0), "grads, weights and out must not be NULL");
  if (const gs_status status = gs::check(*grads)) return status;
  if (const gs_status status = gs::check_workspace(workspace, workspace_bytes, gs_combine_cuda_workspace_bytes(grads)))
    return status;
  Traits traits;
  if (const gs_status status = get_traits(traits)) return status;
  const SlotWidth gram_width{grads->num_tasks, traits.fast_double, traits.overlaps};
  int64_t columns = 0;  // of the next table
  const auto width = [&](int64_t all_columns, int32_t dtype) {
    columns = all_columns;
    return width_of(columns, gs::element_bytes(dtype), grads->num_tasks, traits.processors);
  };
  Tables tables(*grads, out, width);
  Table table;
  while (tables.next(table)) {
    gs_status status = tables.fill(table, workspace, stream);
    if (status != GS_OK) return status;
    const SlotOrder order(table, columns, aligned_width(gram_width(columns, table.dtype)));
    const bool many = are_many(columns, gs::element_bytes(table.dtype), grads->num_tasks, traits.processors);
    status = with_dtype(table.dtype, [&](auto in) {
      using In = decltype(in);
      const auto run = [&](auto tasks) {
        constexpr int64_t kTasks = decltype(tasks)::value;
        const auto run_in = table.shifted ? &launch_combine<In, kTasks, Layout::kShifted>
                            : many        ? &launch_combine<In, kTasks, Layout::kMany>
                                          : &launch_combine<In, kTasks, Layout::kFew>;
        return run_in(table, order, *grads, weights, accumulate != 0, stream);
      };
      if (grads->num_tasks <= 2) return run(std::integral_constant<int64_t, 2>());
      if (grads->num_tasks <= 4) return run(std::integral_constant<int64_t, 4>());
      if (grads->num_tasks <= 8) return run(std::integral_constant<int64_t, 8>());
      if (grads->num_tasks <= 12) return run(std::integral_constant<int64_t, 12>());
      if (grads->num_tasks <= 16) return run(std::integral_constant<int64_t, 16>());
      return run(std::integral_constant<int64_t, GS_MAX_TASKS>());
    });
    if (status != GS_OK) return status;
  }
  return GS_OK;
}
