// SPDX-License-Identifier: MIT
#include "cuda/launch.cuh"
#include "cuda/table.cuh"
#include "solvers/philox.h"

int gs_has_cuda(void) { return 1; }

namespace gs::gpu {
namespace {

// The kernels that write one table run in parallel: only the first one waits, before it lets the next one start, for
// the kernels ahead, which may still read the workspace. The others wait at their end, so that a kernel that waits for
// the last one has waited for all.
GS_KERNEL write_table_kernel(GS_ARGUMENT(TableChunk) chunk, int64_t words, bool first, uint64_t* to) {
  if (first) wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t i = block() * threads() + thread();
  if (i < words) to[i] = reinterpret_cast<const uint64_t*>(chunk.bytes)[i];
  if (!first) wait_for_previous_kernel();
}

GS_KERNEL advance_kernel(int64_t* step) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  *step = next_step(*step);
}

}  // namespace

gs_status advance(int64_t* step, gs_stream stream) { return launch(advance_kernel, 1, 1, 0, stream, step); }

gs_status write_table(const TableChunk& chunk, int64_t bytes, bool first, unsigned char* to, gs_stream stream) {
  constexpr int kThreads = 256;
  const int64_t words = bytes / 8;
  return launch(&write_table_kernel, (words + kThreads - 1) / kThreads, kThreads, 0, stream, chunk, words, first,
                reinterpret_cast<uint64_t*>(to));
}

}  // namespace gs::gpu

#if defined(__CUDACC__)
#include <atomic>
#include <mutex>

namespace gs::gpu {
namespace {

// Tells for which architecture the kernels were compiled: the same for all of them.
GS_KERNEL compiled_kernel() {}

gs_status ask_device(int device, Traits& traits) {
  int major = 0, ratio = 0, processors = 0, shared_bytes = 0;
  cudaFuncAttributes compiled = {};
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&ratio, cudaDevAttrSingleToDoublePrecisionPerfRatio, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&compiled, &compiled_kernel);
  if (error != cudaSuccess) return fail_cuda("no kernels for this CUDA device", error);
  // Code compiled for an older architecture does not wait, so it must not start early, even on a newer GPU.
  traits = {major >= 9 && compiled.ptxVersion >= 90, ratio <= 4, processors, shared_bytes, device};
  return GS_OK;
}

}  // namespace

gs_status get_traits(Traits& traits) {
  constexpr int kDevices = 64;
  static Traits kept[kDevices];
  static std::atomic<bool> known[kDevices];
  static std::mutex mutex;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return fail_cuda("no CUDA device", error);
  if (device >= kDevices) return ask_device(device, traits);
  if (!known[device].load(std::memory_order_acquire)) {
    const std::lock_guard<std::mutex> lock(mutex);
    if (!known[device].load(std::memory_order_relaxed)) {
      if (const gs_status status = ask_device(device, kept[device])) return status;
      known[device].store(true, std::memory_order_release);
    }
  }
  traits = kept[device];
  return GS_OK;
}

}  // namespace gs::gpu
#endif
