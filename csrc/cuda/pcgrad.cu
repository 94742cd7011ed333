// SPDX-License-Identifier: MIT
// PCGrad on the GPU. The step counter is read on the device, and advanced there, so that a captured graph draws new
// orders at each replay.
#include <algorithm>

#include "cpu/schedule.h"
#include "cuda/pcgrad.cuh"

namespace gs::gpu {
namespace {

GS_KERNEL task_order_kernel(int64_t num_tasks, uint64_t seed, const int64_t* step, int64_t* order) {
  wait_for_previous_kernel();
  const int64_t row = block() * threads() + thread();
  if (row < num_tasks) task_order_row(num_tasks, seed, static_cast<uint64_t>(*step), row, order + row * num_tasks);
}

// G lies in shared memory where a lane has at most two tasks, 48 KB with the rest; a larger one is read through the
// level-1 cache.
template <int kPerLane>
constexpr bool kHoldsGram = kPerLane <= 2;
template <int kPerLane>
constexpr int kBlockThreads = kPerLane <= 2 ? kMaxThreads : kMaxThreads / 2;

// One block per problem. Each warp projects its share of the tasks; the parts are added in the order of the warps.
template <int kPerLane>
GS_KERNEL GS_BLOCKS(kBlockThreads<kPerLane>, 1)
    pcgrad_kernel(const double* gram, int num_tasks, const int64_t* order, uint64_t seed, int64_t* step, bool advance,
                  bool mean, double* weights) {
  wait_for_previous_kernel();
  const int64_t entries = int64_t{num_tasks} * num_tasks;
  const double* problem = gram + block() * entries;
  double* copy = &shared<double>();
  double* parts = copy + (kHoldsGram<kPerLane> ? entries : 0);
  const uint64_t now = order ? 0 : static_cast<uint64_t>(*step);

  // The first entries of G are on their way while the warp draws its first orders.
  constexpr int kAhead = 4;
  double ahead[kAhead];
  for (int a = 0; a < kAhead; a++) {
    const int64_t e = thread() + a * threads();
    ahead[a] = e < entries ? problem[e] : 0;
  }
  if (!order) draw_first_orders(num_tasks, seed, now, parts);
  bool finite = true;
  const auto take = [&](int64_t e, double value) {
    finite = finite && std::isfinite(value);
    if (kHoldsGram<kPerLane> && e < entries) copy[e] = value;
  };
  for (int a = 0; a < kAhead; a++) take(thread() + a * threads(), ahead[a]);
  for (int64_t e = thread() + kAhead * threads(); e < entries; e += threads()) take(e, problem[e]);
  const bool broken = any_of_block(!finite);
  let_next_kernel_start();

  const double* g = kHoldsGram<kPerLane> ? copy : problem;
  solve_pcgrad<kPerLane>(g, num_tasks, order, seed, now, broken, mean, parts, weights + block() * num_tasks);
  if (advance && thread() == 0) ++*step;
}

template <int kPerLane>
gs_status launch_pcgrad(const double* gram, int64_t batch, int num_tasks, const int64_t* order, uint64_t seed,
                        int64_t* step, bool advance, bool mean, double* weights, gs_stream stream) {
  const int warps = std::min(num_tasks, kBlockThreads<kPerLane> / kWarp);
  const int64_t bytes = num_tasks * (warps * kWarpBytesPerTask + (kHoldsGram<kPerLane> ? 8 * num_tasks : 0));
  return launch(pcgrad_kernel<kPerLane>, batch, warps * kWarp, bytes, stream, gram, num_tasks, order, seed, step,
                advance, mean, weights);
}

}  // namespace
}  // namespace gs::gpu

gs_status gs_task_order_cuda(int64_t num_tasks, uint64_t seed, const int64_t* step, int64_t* order, gs_stream stream) {
  if (const gs_status status = gs::check_problems(1, num_tasks)) return status;
  GS_REQUIRE(step && order, "step and order must not be NULL");
  return gs::gpu::launch(gs::gpu::task_order_kernel, (num_tasks + 31) / 32, 32, 0, stream, num_tasks, seed, step,
                         order);
}

gs_status gs_pcgrad_cuda(const double* gram, int64_t batch, int64_t num_tasks, const int64_t* order, uint64_t seed,
                         int64_t* step, int advance, int mean, double* weights, gs_stream stream) {
  using namespace gs::gpu;
  if (const gs_status status = gs::check_problems(batch, num_tasks)) return status;
  GS_REQUIRE(batch == 0 || (gram && weights && step), "gram, weights and step must not be NULL");
  static_assert(GS_MAX_TASKS <= 8 * kWarp);
  const auto launch_kernel = num_tasks <= kWarp       ? launch_pcgrad<1>
                             : num_tasks <= 2 * kWarp ? launch_pcgrad<2>
                             : num_tasks <= 4 * kWarp ? launch_pcgrad<4>
                                                      : launch_pcgrad<8>;
  const gs_status status = launch_kernel(gram, batch, static_cast<int>(num_tasks), order, seed, step,
                                         advance != 0 && batch == 1, mean != 0, weights, stream);
  if (status != GS_OK || !advance || batch == 1) return status;
  return gs::gpu::advance(step, stream);  // after every block has read the counter
}
