// SPDX-License-Identifier: MIT
// PCGrad on the GPU. The step counter is read on the device, and advanced there, so that a captured graph draws new
// orders at each replay.
#include <algorithm>

#include "cpu/boundary.h"
#include "cuda/launch.cuh"
#include "cuda/pcgrad.cuh"

namespace gs::gpu {
namespace {

GS_KERNEL task_order_kernel(int64_t num_tasks, uint64_t seed, const int64_t* step, int64_t* order) {
  wait_for_previous_kernel();
  const int64_t row = block() * threads() + thread();
  if (row < num_tasks) task_order_row(num_tasks, seed, static_cast<uint64_t>(*step), row, order + row * num_tasks);
}

// G is held in shared memory if a lane has at most two tasks, which takes 48 KB with the rest; a larger G is read
// through the level-1 cache.
template <int kPerLane>
constexpr bool kHoldsGram = kPerLane <= 2;
template <int kPerLane>
constexpr int kBlockThreads = kPerLane <= 2 ? kMaxThreads : kMaxThreads / 2;

// A cluster of `blocks` blocks shares the tasks of a problem. Each warp projects some of them; a block adds its warps'
// parts in their order, and the first block adds the blocks' sums in their order.
template <int kPerLane, bool kShares>
GS_KERNEL GS_BLOCKS(kBlockThreads<kPerLane>, 1)
    pcgrad_kernel(const double* gram, int num_tasks, int blocks, const int64_t* order, uint64_t seed, int64_t* step,
                  bool advance, bool mean, double* weights) {
  wait_for_previous_kernel();
  const int entries = num_tasks * num_tasks, member = static_cast<int>(block() % blocks), warps = threads() / kWarp;
  const int64_t problem = block() / blocks;
  const double* g = gram + problem * entries;
  double* const sums = &shared<double>();  // used in the first block only
  double* const parts = sums + (kShares ? blocks * num_tasks : 0);
  double* const copy = parts + warps * num_tasks;
  const uint64_t now = order || !step ? 0 : static_cast<uint64_t>(*step);
  if (kShares) arrive_cluster();

  // Loads the first entries of G while the warp draws its first orders.
  constexpr int kAhead = kShares ? 16 : 4;  // a shared problem has few warps per block, and each block loads all of G
  double ahead[kAhead];
  const auto load = [&](int first) {
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      const int e = first + a * threads();
      ahead[a] = e < entries ? g[e] : 0;
    }
  };
  load(thread());
  const WarpTasks own = {member * warps + thread() / kWarp, blocks * warps};
  if (!order) draw_first_orders(num_tasks, seed, now, own, parts);
  bool finite = true;
  for (int first = thread();;) {
#pragma unroll
    for (int a = 0; a < kAhead; a++) {
      const int e = first + a * threads();
      finite = finite && std::isfinite(ahead[a]);
      if (kHoldsGram<kPerLane> && e < entries) copy[e] = ahead[a];
    }
    first += kAhead * threads();
    if (first >= entries) break;
    load(first);
  }
  const bool broken = any_of_block(!finite);
  let_next_kernel_start();

  if (!broken) project_tasks<kPerLane>(kHoldsGram<kPerLane> ? copy : g, num_tasks, order, seed, now, own, parts);
  sync_block();
  if (kShares) {
    wait_cluster();
    for (int j = thread(); j < num_tasks; j += threads()) {
      shared_of(0, sums)[member * num_tasks + j] = sum_parts(parts, warps, num_tasks, j);
    }
    arrive_cluster();
    wait_cluster();
    if (member > 0) return;
  }
  for (int j = thread(); j < num_tasks; j += threads()) {
    const double added = kShares ? sum_parts(sums, blocks, num_tasks, j) : sum_parts(parts, warps, num_tasks, j);
    weights[problem * num_tasks + j] = pcgrad_weight(added, num_tasks, broken, mean);
  }
  if (advance && thread() == 0) *step = next_step(*step);
}

// With at least kSharedTasks tasks and at most kFewProblems problems, sharing a problem is faster despite the
// synchronization. kFewProblems makes four blocks for each of 132 multiprocessors; it is the same on every GPU, as the
// order of the sums depends on it.
constexpr int kSharedTasks = 17, kSharingBlocks = 8, kFewProblems = 66;

template <int kPerLane>
gs_status launch_pcgrad(const double* gram, int64_t batch, int num_tasks, const int64_t* order, uint64_t seed,
                        int64_t* step, bool advance, bool mean, double* weights, gs_stream stream) {
  Traits traits;
  if (const gs_status status = get_traits(traits)) return status;
  const auto launch_with = [&](auto kernel, int blocks) {
    const int warps = std::min((num_tasks + blocks - 1) / blocks, kBlockThreads<kPerLane> / kWarp);
    const int64_t values = (blocks > 1 ? blocks : 0) + warps + (kHoldsGram<kPerLane> ? num_tasks : 0);  // per task
    static_assert(kWarpBytesPerTask == 8);
    return launch_clusters(blocks, kernel, batch * blocks, warps * kWarp, 8 * values * num_tasks, stream, gram,
                           num_tasks, blocks, order, seed, step, advance, mean, weights);
  };
  if (traits.overlaps && num_tasks >= kSharedTasks && batch <= kFewProblems) {
    const gs_status status = launch_with(&pcgrad_kernel<kPerLane, true>, kSharingBlocks);
    // GS_UNSUPPORTED: a part of a GPU may have no room for a cluster.
    if (status != GS_UNSUPPORTED) return status;
  }
  return launch_with(&pcgrad_kernel<kPerLane, false>, 1);
}

}  // namespace
}  // namespace gs::gpu

gs_status gs_task_order_cuda(int64_t num_tasks, uint64_t seed, const int64_t* step, int64_t* order, gs_stream stream) {
  if (const gs_status status = gs::check_tasks(num_tasks)) return status;
  GS_REQUIRE(step && order, "step and order must not be NULL");
  return gs::gpu::launch(gs::gpu::task_order_kernel, (num_tasks + 31) / 32, 32, 0, stream, num_tasks, seed, step,
                         order);
}

gs_status gs_pcgrad_cuda(const double* gram, int64_t batch, int64_t num_tasks, const int64_t* order, uint64_t seed,
                         int64_t* step, int advance, int mean, double* weights, gs_stream stream) {
  using namespace gs::gpu;
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (gram && weights), "gram and weights must not be NULL");
  GS_REQUIRE(!advance || step, "step must not be NULL to advance");
  static_assert(GS_MAX_TASKS <= 8 * kWarp);
  const auto launch_kernel = num_tasks <= kWarp       ? launch_pcgrad<1>
                             : num_tasks <= 2 * kWarp ? launch_pcgrad<2>
                             : num_tasks <= 4 * kWarp ? launch_pcgrad<4>
                                                      : launch_pcgrad<8>;
  const gs_status status = launch_kernel(gram, batch, static_cast<int>(num_tasks), order, seed, step,
                                         advance != 0 && batch == 1, mean != 0, weights, stream);
  if (status != GS_OK || !advance || batch == 1) return status;
  return gs::gpu::advance(step, stream);  // a separate launch: every block has read the counter by then
}
