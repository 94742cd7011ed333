// SPDX-License-Identifier: MIT
// Everything that the kernels need of a GPU: indices, barriers, shuffles, tickets, streaming accesses, matrix
// instructions and launches. tests/cpp/emulated.h implements the same functions on the host, so that the kernels also
// compile with a C++ compiler and run under its sanitizers.
#pragma once
#include <cstdint>

#include "cpu/status.h"

#if !defined(__CUDACC__)
#include "emulated.h"
#else
#include <cuda_runtime.h>

#define GS_KERNEL __global__ void
#define GS_DEVICE __device__ __forceinline__

namespace gs::gpu {

constexpr int kWarp = 32;

GS_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
GS_DEVICE int threads() { return static_cast<int>(blockDim.x); }
GS_DEVICE int64_t block() { return blockIdx.x; }

GS_DEVICE void sync_block() { __syncthreads(); }
GS_DEVICE void sync_warp() { __syncwarp(); }

// The value of the lane whose number differs by mask.
GS_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

// The block's dynamic shared memory.
template <class T>
GS_DEVICE T& shared() {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  return *reinterpret_cast<T*>(shared_bytes);
}

// Counts the blocks that have arrived, after everything they wrote is visible to the device; true for the last one, which
// leaves the counter at 0 for the next launch. Called by one thread between two sync_block().
GS_DEVICE bool is_last_arrival(uint32_t* counter, uint32_t arrivals) {
  __threadfence();
  const bool last = atomicInc(counter, arrivals - 1) == arrivals - 1;
  __threadfence();
  return last;
}

// Memory that is read once: not kept in the level-1 cache. V is a type of 2 to 16 bytes, p aligned to it.
template <class V>
GS_DEVICE V load_once(const V* p) {
  return __ldcs(p);
}

// Kernels that were launched with kOverlap start before the one ahead of them in the stream has ended. The wait comes
// before the first access to anything that an earlier kernel writes or reads.
GS_DEVICE void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaGridDependencySynchronize();
#endif
}
GS_DEVICE void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
#endif
}

template <class... P, class... A>
gs_status launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, gs_stream stream, A... arguments) {
  if (blocks == 0) return GS_OK;
  if (blocks > INT32_MAX) return fail(GS_UNSUPPORTED, "a launch takes at most 2^31 - 1 blocks, got %lld", (long long)blocks);
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return fail(GS_UNSUPPORTED, "shared memory of %lld bytes: %s", (long long)shared_bytes, cudaGetErrorString(error));
  }
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
  return error == cudaSuccess ? GS_OK : fail(GS_UNSUPPORTED, "launch failed: %s", cudaGetErrorString(error));
}

}  // namespace gs::gpu
#endif
