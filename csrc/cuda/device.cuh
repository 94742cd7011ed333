// SPDX-License-Identifier: MIT
// Everything that the kernels need of a GPU: indices, barriers, shuffles, streaming accesses and matrix instructions.
// tests/cpp/emulated.h implements the same functions, and launch.cuh's, on the host, so that the kernels also compile
// with a C++ compiler and run under its sanitizers.
#pragma once
#include <cstdint>

#if !defined(__CUDACC__)
#include "emulated.h"
#else
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define GS_KERNEL __global__ void
#define GS_DEVICE __device__ __forceinline__
#define GS_RARE __device__ __noinline__                 // called rarely: must not add to the caller's registers
#define GS_ARGUMENT(type) const __grid_constant__ type  // an argument that stays in constant memory
#define GS_BLOCKS(threads, blocks) __launch_bounds__(threads, blocks)  // threads a block, blocks a multiprocessor

namespace gs::gpu {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;  // of a block

GS_DEVICE int thread() { return static_cast<int>(threadIdx.x); }
GS_DEVICE int threads() { return static_cast<int>(blockDim.x); }
GS_DEVICE int64_t block() { return blockIdx.x; }

GS_DEVICE void sync_block() { __syncthreads(); }
GS_DEVICE void sync_warp() { __syncwarp(); }
// A barrier for all threads of a launch_together; after it they see what the others wrote to memory.
GS_DEVICE void sync_grid() { cooperative_groups::this_grid().sync(); }
// A barrier for the blocks of a cluster (launch_clusters) in two halves: wait_cluster() waits until all threads have
// called arrive_cluster(), and then sees what they wrote to shared memory before that.
GS_DEVICE void arrive_cluster() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_arrive();
#endif
}
GS_DEVICE void wait_cluster() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().barrier_wait();
#endif
}
// The address of p's counterpart in the shared memory of another block of the cluster.
template <class T>
GS_DEVICE T* shared_of(int block_of_cluster, T* p) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(p, block_of_cluster);
#else
  return p;
#endif
}
// sync_block(); returns whether any thread passed true.
GS_DEVICE bool any_of_block(bool value) { return __syncthreads_or(value); }

// The value of the lane whose number is this lane's xor mask.
GS_DEVICE double shuffle_xor(double value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
// The value of one lane.
GS_DEVICE double shuffle(double value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }
GS_DEVICE uint32_t min_of_warp(uint32_t value) { return __reduce_min_sync(0xffffffffu, value); }

GS_DEVICE bool all_of_warp(bool value) { return __all_sync(0xffffffffu, value); }
// Bit i: whether lane i passed true.
GS_DEVICE uint32_t ballot_of_warp(bool value) { return __ballot_sync(0xffffffffu, value); }
GS_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

// d += a b for a 16 x 8 matrix a and an 8 x 8 matrix b: lane 4 g + k holds a[g][k], a[g + 8][k], a[g][k + 4],
// a[g + 8][k + 4]; b[k][g], b[k + 4][g]; d[g][2 k], d[g][2 k + 1], d[g + 8][2 k], d[g + 8][2 k + 1].
GS_DEVICE void multiply_double(double (&d)[4], const double (&a)[4], const double (&b)[2]) {
#if __CUDA_ARCH__ >= 900
  asm("mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
      : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#else
#pragma unroll
  for (int part = 0; part < 4; part++) {
    const int row = part % 2, k = part / 2;
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
        : "+d"(d[2 * row]), "+d"(d[2 * row + 1])
        : "d"(a[2 * k + row]), "d"(b[k]));
  }
#endif
}

// d = a b + c for a 16 x 16 matrix a and a 16 x 8 matrix b of 16-bit values, two to a word; lane 4 g + k holds
// a[g][2 k, 2 k + 1], a[g + 8][..], a[g][2 k + 8, 2 k + 9], a[g + 8][..]; b[2 k, 2 k + 1][g], b[2 k + 8, 2 k + 9][g];
// c and d[g][2 k], d[g][2 k + 1], d[g + 8][2 k], d[g + 8][2 k + 1]. The sums may be truncated instead of rounded.
GS_DEVICE void multiply_bfloat(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
GS_DEVICE void multiply_half(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
// The same for a 16 x 8 matrix a, an 8 x 8 matrix b and tf32 values, one to a word.
GS_DEVICE void multiply_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
}
// Loads four 8 x 8 matrices of 16-bit values from shared memory. Lanes 0 to 7 pass the addresses of the first one's
// rows, lanes 8 to 15 those of the second one's, and so on; lane 4 g + k gets word k of row g of each.
GS_DEVICE void load_matrices(uint32_t (&word)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(row)))
               : "memory");
}

GS_DEVICE float float_from_bits(uint32_t bits) { return __uint_as_float(bits); }
GS_DEVICE uint32_t bits_of_float(float value) { return __float_as_uint(value); }
GS_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// Rounds to nearest even.
GS_DEVICE uint16_t float_to_half(float value) { return __half_as_ushort(__float2half_rn(value)); }
GS_DEVICE uint16_t float_to_bfloat(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }

// The block's dynamic shared memory.
template <class T>
GS_DEVICE T& shared() {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  return *reinterpret_cast<T*>(shared_bytes);
}

// Load 16 aligned bytes of memory: load_first if a later kernel will read them again, so that the level-2 cache should
// keep them, load_last if this is the last read.
template <class V>
GS_DEVICE V load_first(const V* p) {
  static_assert(sizeof(V) == 16);
  uint32_t bits[4];
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3])
               : "l"(p));
  V value;
  memcpy(&value, bits, 16);
  return value;
}
template <class V>
GS_DEVICE V load_last(const V* p) {
  static_assert(sizeof(V) == 16);
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
  V value;
  memcpy(&value, &bits, 16);
  return value;
}

// Stores a vector in one instruction; the compiler might split one that was just assembled into words.
template <class V>
GS_DEVICE void store(V* p, const V& value) {
  static_assert(sizeof(V) == 16);
  uint32_t bits[4];
  memcpy(bits, &value, 16);
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(bits[0]), "r"(bits[1]), "r"(bits[2]),
               "r"(bits[3])
               : "memory");
}

// 8 bytes of memory that an earlier kernel wrote.
GS_DEVICE uint64_t load_word(const void* p) {
  uint64_t word;
  asm volatile("ld.global.b64 %0, [%1];" : "=l"(word) : "l"(p));
  return word;
}

// Starts to copy 16 aligned bytes to shared memory; with fewer bytes given, the first of them and zeros; zeros only if
// p is null. A thread's copies up to a close_copies() form a group, and wait_for_copies<n>() waits for all the thread's
// groups except the last n; after a sync_block() the other threads see them.
template <class V>
GS_DEVICE void copy_to_shared(V* shared, const V* p, uint32_t bytes = 16) {
  static_assert(sizeof(V) == 16);
  const auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(p), "r"(p ? bytes : 0)
               : "memory");
}
GS_DEVICE void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kOpen>
GS_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

// From compute capability 9.0 on, a kernel may start before the one ahead of it in the stream has ended. Every thread
// of every kernel waits before it ends; so after a wait all kernels ahead have ended, not only the last one. Kernels
// wait before their first access to memory, except those that write a table (entry.cu).
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

}  // namespace gs::gpu
#endif
