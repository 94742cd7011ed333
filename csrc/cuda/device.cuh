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
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define GS_KERNEL __global__ void
#define GS_DEVICE __device__ __forceinline__
#define GS_GRID_CONSTANT __grid_constant__  // an argument that stays in constant memory

namespace gs::gpu {

constexpr int kWarp = 32;

GS_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
GS_DEVICE int threads() { return static_cast<int>(blockDim.x); }
GS_DEVICE int64_t block() { return blockIdx.x; }

GS_DEVICE void sync_block() { __syncthreads(); }
GS_DEVICE void sync_warp() { __syncwarp(); }

// The value of the lane whose number differs by mask.
GS_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }

GS_DEVICE bool all_of_warp(bool value) { return __all_sync(0xffffffffu, value); }

// d += a b^T for 8 x 4 matrices a and b: lane 4 g + k holds a[g][k], b[g][k] and d[g][2 k], d[g][2 k + 1].
GS_DEVICE void multiply_8x8x4(double (&d)[2], double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
      : "+d"(d[0]), "+d"(d[1])
      : "d"(a), "d"(b));
}

GS_DEVICE float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
GS_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// To nearest even.
GS_DEVICE uint16_t float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
GS_DEVICE uint16_t float_to_bfloat(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

// The block's dynamic shared memory.
template <class T>
GS_DEVICE T& shared() {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  return *reinterpret_cast<T*>(shared_bytes);
}

// Counts the blocks that have arrived, after everything they wrote is visible to the device; true for the last one,
// which leaves the counter at 0 for the next launch. Called by one thread between two sync_block().
GS_DEVICE bool is_last_arrival(uint32_t* counter, uint32_t arrivals) {
  __threadfence();
  const bool last = atomicInc(counter, arrivals - 1) == arrivals - 1;
  __threadfence();
  return last;
}

// 16 aligned bytes of memory that is read once.
template <class V>
GS_DEVICE V load_once(const V* p) {
  static_assert(sizeof(V) == 16);
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
  V value;
  memcpy(&value, &bits, 16);
  return value;
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
gs_status launch(void (*kernel)(P...), int64_t blocks, int threads, int64_t shared_bytes, gs_stream stream,
                 A... arguments) {
  if (blocks == 0) return GS_OK;
  if (blocks > INT32_MAX)
    return fail(GS_UNSUPPORTED, "a launch takes at most 2^31 - 1 blocks, got %lld", (long long)blocks);
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(shared_bytes));
    if (error != cudaSuccess)
      return fail(GS_UNSUPPORTED, "shared memory of %lld bytes: %s", (long long)shared_bytes,
                  cudaGetErrorString(error));
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
