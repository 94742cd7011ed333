// SPDX-License-Identifier: MIT
#include "cuda/table.cuh"

int gs_has_cuda(void) { return 1; }

namespace gs::gpu {
namespace {

GS_KERNEL write_table_kernel(GS_ARGUMENT(TableChunk) chunk, int64_t words, uint64_t* to) {
  wait_for_previous_kernel();
  let_next_kernel_start();
  const int64_t i = block() * threads() + thread();
  if (i < words) to[i] = reinterpret_cast<const uint64_t*>(chunk.bytes)[i];
}

}  // namespace

gs_status write_table(const TableChunk& chunk, int64_t bytes, unsigned char* to, gs_stream stream) {
  constexpr int kThreads = 256;
  const int64_t words = bytes / 8;
  return launch(&write_table_kernel, (words + kThreads - 1) / kThreads, kThreads, 0, stream, chunk, words,
                reinterpret_cast<uint64_t*>(to));
}

}  // namespace gs::gpu

#if defined(__CUDACC__)
#include <atomic>

namespace gs::gpu {
namespace {

// Compiled for the same architectures as all kernels.
GS_KERNEL compiled_kernel() {}

gs_status ask_device(int device, Traits& traits) {
  int major = 0, ratio = 0;
  cudaFuncAttributes compiled = {};
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&ratio, cudaDevAttrSingleToDoublePrecisionPerfRatio, device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&compiled, &compiled_kernel);
  if (error != cudaSuccess) return fail_cuda("no kernels for this CUDA device", error);
  // Code for an older architecture does not wait, so that it must not start early on a newer GPU either.
  traits = {major >= 9 && compiled.ptxVersion >= 90, ratio <= 4};
  return GS_OK;
}

}  // namespace

gs_status get_traits(Traits& traits) {
  constexpr int kDevices = 64, kKnown = 1, kOverlaps = 2, kFastDouble = 4;
  static std::atomic<int> known[kDevices];
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return fail_cuda("no CUDA device", error);
  const int bits = device < kDevices ? known[device].load() : 0;
  if (bits & kKnown) {
    traits = {(bits & kOverlaps) != 0, (bits & kFastDouble) != 0};
    return GS_OK;
  }
  const gs_status status = ask_device(device, traits);
  if (status == GS_OK && device < kDevices) {
    known[device] = kKnown | (traits.overlaps ? kOverlaps : 0) | (traits.fast_double ? kFastDouble : 0);
  }
  return status;
}

}  // namespace gs::gpu
#endif
