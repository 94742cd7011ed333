// SPDX-License-Identifier: MIT
// How the host launches kernels: the device's capabilities, and launches that overlap, have grid barriers or form
// clusters.
#pragma once
#include <type_traits>

#include "cpu/status.h"
#include "cuda/device.cuh"

#if defined(__CUDACC__)
#include <algorithm>
#include <iterator>
#include <utility>

namespace gs::gpu {

// The properties of the current device that the choice of kernels depends on.
struct Traits {
  bool overlaps;     // a kernel may start before the one ahead of it has ended, and blocks may form clusters
  bool fast_double;  // float64 at half of the rate of float32, not a 32nd or less
  int processors;
  int64_t shared_bytes;  // the most shared memory of a block
  int device;
};

inline gs_status fail_cuda(const char* what, cudaError_t error) {
  cudaGetLastError();  // clears the error, or somebody else's next launch would report it
  return fail(GS_UNSUPPORTED, "%s: %s", what, cudaGetErrorString(error));
}

gs_status get_traits(Traits& traits);  // in entry.cu

inline gs_status clear(double* values, int64_t count, gs_stream stream) {
  const cudaError_t error =
      cudaMemsetAsync(values, 0, static_cast<size_t>(count) * sizeof(double), reinterpret_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? GS_OK : fail_cuda("clear failed", error);
}

// Allows a kernel more than 48 KB of shared memory per block, once for each (kernel, device) among the last 64 that
// this thread used. The values are always the same, so threads that launch at the same time do not undo each other's.
inline gs_status allow_much_memory(const void* kernel, const Traits& traits) {
  thread_local std::pair<const void*, int> allowed[64];
  thread_local unsigned oldest = 0;
  const std::pair<const void*, int> mine = {kernel, traits.device};
  if (std::find(std::begin(allowed), std::end(allowed), mine) != std::end(allowed)) return GS_OK;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(traits.shared_bytes));
  // Makes room for as many blocks on a multiprocessor as its memory allows.
  if (error == cudaSuccess) {
    error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  }
  if (error != cudaSuccess) return fail_cuda("shared memory", error);
  allowed[oldest++ % std::size(allowed)] = mine;
  return GS_OK;
}

template <class... P>
gs_status launch_as(bool together, int cluster, void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes,
                    gs_stream stream, const std::type_identity_t<P>&... arguments) {
  if (blocks == 0) return GS_OK;
  if (blocks > INT32_MAX)
    return fail(GS_UNSUPPORTED, "a launch takes at most 2^31 - 1 blocks, got %lld", (long long)blocks);
  Traits traits;
  if (const gs_status status = get_traits(traits)) return status;
  if (shared_bytes > 48 * 1024) {
    if (const gs_status status = allow_much_memory(reinterpret_cast<const void*>(kernel), traits)) return status;
  }
  cudaLaunchAttribute attributes[2];
  unsigned count = 0;
  if (together) {
    attributes[count].id = cudaLaunchAttributeCooperative;
    attributes[count++].val.cooperative = 1;
  } else if (traits.overlaps) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = count;
  const void* pointers[] = {&arguments...};  // pointers save another copy of the table
  const cudaError_t error =
      cudaLaunchKernelExC(&config, reinterpret_cast<const void*>(kernel), const_cast<void**>(pointers));
  return error == cudaSuccess ? GS_OK : fail_cuda("launch failed", error);
}

}  // namespace gs::gpu
#endif

namespace gs::gpu {

// Adds 1 to a counter on the device. Defined in entry.cu.
gs_status advance(int64_t* step, gs_stream stream);

template <class... P>
gs_status launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, gs_stream stream,
                 const std::type_identity_t<P>&... arguments) {
  return launch_as(false, 1, kernel, blocks, threads, shared_bytes, stream, arguments...);
}
// For kernels with sync_grid(): runs all blocks at once, or returns GS_UNSUPPORTED.
template <class... P>
gs_status launch_together(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, gs_stream stream,
                          const std::type_identity_t<P>&... arguments) {
  return launch_as(true, 1, kernel, blocks, threads, shared_bytes, stream, arguments...);
}
// In clusters of `cluster` blocks, at most 8; returns GS_UNSUPPORTED if the GPU has no room for one cluster.
template <class... P>
gs_status launch_clusters(int cluster, void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes,
                          gs_stream stream, const std::type_identity_t<P>&... arguments) {
  return launch_as(false, cluster, kernel, blocks, threads, shared_bytes, stream, arguments...);
}

}  // namespace gs::gpu
