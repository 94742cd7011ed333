// SPDX-License-Identifier: MIT
#include "cuda/device.cuh"

int gs_has_cuda(void) { return 1; }

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
