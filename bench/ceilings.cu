// SPDX-License-Identifier: MIT
// Measures the best that a GPU can do: bandwidths, instruction rates, barriers, the time from one kernel to the next.
// gpu_ceilings.py compiles this into a library and calls it through ctypes. Every function returns microseconds, the
// best of kRepeats, or -1 if CUDA reports an error.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int kRepeats = 5;
constexpr int kChains = 8;  // independent sums of a warp, so that an instruction need not wait for the last one

// A condition that random data practically never meets, which the compiler cannot know: loads are not removed.
__device__ bool keeps_alive(uint4 x) { return (x.x & x.y & x.z & x.w) == 0xffffffffu; }

__device__ uint4 exclusive_or(uint4 a, uint4 b) { return {a.x ^ b.x, a.y ^ b.y, a.z ^ b.z, a.w ^ b.w}; }

template <int kUnroll>
__global__ void read_kernel(const uint4* data, int64_t vectors, uint4* sink) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  uint4 sum = {};
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + (kUnroll - 1) * stride < vectors; i += kUnroll * stride) {
    uint4 x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) x[u] = __ldcs(data + i + u * stride);
#pragma unroll
    for (int u = 0; u < kUnroll; u++) sum = exclusive_or(sum, x[u]);
  }
  for (; i < vectors; i += stride) sum = exclusive_or(sum, __ldcs(data + i));
  if (keeps_alive(sum)) *sink = sum;
}

template <int kUnroll>
__global__ void copy_kernel(const uint4* from, int64_t vectors, uint4* to) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  for (; i + (kUnroll - 1) * stride < vectors; i += kUnroll * stride) {
    uint4 x[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; u++) x[u] = __ldcs(from + i + u * stride);
#pragma unroll
    for (int u = 0; u < kUnroll; u++) __stcs(to + i + u * stride, x[u]);
  }
  for (; i < vectors; i += stride) __stcs(to + i, __ldcs(from + i));
}

struct Dmma8x8x4 {
  using Word = double;
  using Sum = double;
  static constexpr int kLeft = 1, kRight = 1, kSums = 2;
  static __device__ void add(double (&d)[2], const double (&a)[1], const double (&b)[1]) {
    asm volatile("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0, %1}, {%2}, {%3}, {%0, %1};"
                 : "+d"(d[0]), "+d"(d[1])
                 : "d"(a[0]), "d"(b[0]));
  }
};

struct Dmma16x8x8 {
  using Word = double;
  using Sum = double;
  static constexpr int kLeft = 4, kRight = 2, kSums = 4;
  static __device__ void add(double (&d)[4], const double (&a)[4], const double (&b)[2]) {
#if __CUDA_ARCH__ >= 900
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f64.f64.f64.f64 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+d"(d[0]), "+d"(d[1]), "+d"(d[2]), "+d"(d[3])
        : "d"(a[0]), "d"(a[1]), "d"(a[2]), "d"(a[3]), "d"(b[0]), "d"(b[1]));
#endif
  }
};

struct HmmaBfloat {
  using Word = uint32_t;  // two bfloat16
  using Sum = float;
  static constexpr int kLeft = 4, kRight = 2, kSums = 4;
  static __device__ void add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

struct HmmaTf32 {
  using Word = uint32_t;
  using Sum = float;
  static constexpr int kLeft = 4, kRight = 2, kSums = 4;
  static __device__ void add(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

struct Dfma {
  using Word = double;
  using Sum = double;
  static constexpr int kLeft = 1, kRight = 1, kSums = 1;
  static __device__ void add(double (&d)[1], const double (&a)[1], const double (&b)[1]) {
    asm volatile("fma.rn.f64 %0, %1, %2, %0;" : "+d"(d[0]) : "d"(a[0]), "d"(b[0]));
  }
};

// Two conversions, and a sum, without which the pair of conversions would change nothing.
struct Conversions {
  using Word = double;
  using Sum = double;
  static constexpr int kLeft = 1, kRight = 1, kSums = 1;
  static __device__ void add(double (&d)[1], const double (&a)[1], const double (&b)[1]) {
    asm volatile("{ .reg .f32 t; cvt.rn.f32.f64 t, %0; cvt.f64.f32 %0, t; fma.rn.f64 %0, %1, %2, %0; }"
                 : "+d"(d[0])
                 : "d"(a[0]), "d"(b[0]));
  }
};

// words holds kLeft + kRight operands per lane, sink one sum per thread.
template <class Instruction>
__global__ void __launch_bounds__(512)
    rate_kernel(const typename Instruction::Word* words, int iterations, typename Instruction::Sum* sink) {
  typename Instruction::Word left[Instruction::kLeft], right[Instruction::kRight];
  const typename Instruction::Word* own = words + threadIdx.x % 32 * (Instruction::kLeft + Instruction::kRight);
#pragma unroll
  for (int i = 0; i < Instruction::kLeft; i++) left[i] = own[i];
#pragma unroll
  for (int i = 0; i < Instruction::kRight; i++) right[i] = own[Instruction::kLeft + i];
  typename Instruction::Sum sums[kChains][Instruction::kSums] = {};
#pragma unroll 4
  for (int i = 0; i < iterations; i++) {
#pragma unroll
    for (int chain = 0; chain < kChains; chain++) Instruction::add(sums[chain], left, right);
  }
  typename Instruction::Sum total = 0;
#pragma unroll
  for (int chain = 0; chain < kChains; chain++) {
#pragma unroll
    for (int i = 0; i < Instruction::kSums; i++) total += sums[chain][i];
  }
  sink[int64_t{blockIdx.x} * blockDim.x + threadIdx.x] = total;
}

__global__ void empty_kernel() {
#if __CUDA_ARCH__ >= 900
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
#endif
}

// Barriers one after the other: of all blocks, or of those of a cluster.
__global__ void grid_barrier_kernel(int barriers) {
  for (int i = 0; i < barriers; i++) cooperative_groups::this_grid().sync();
}
__global__ void cluster_barrier_kernel(int barriers) {
#if __CUDA_ARCH__ >= 900
  for (int i = 0; i < barriers; i++) cooperative_groups::this_cluster().sync();
#endif
}

// Keeps the GPU busy while the host enqueues what is timed.
__global__ void wait_kernel(uint64_t nanoseconds) {
  uint64_t begin, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(begin));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - begin < nanoseconds);
}

template <class Enqueue>
double best_us(cudaStream_t stream, uint64_t enqueue_ns, const Enqueue& enqueue) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  enqueue();
  float best = 1e30f;
  for (int repeat = 0; repeat < kRepeats; repeat++) {
    wait_kernel<<<1, 1, 0, stream>>>(enqueue_ns);
    cudaEventRecord(begin, stream);
    enqueue();
    cudaEventRecord(end, stream);
    cudaEventSynchronize(end);
    float ms = 0;
    cudaEventElapsedTime(&ms, begin, end);
    best = std::min(best, ms);
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return cudaGetLastError() == cudaSuccess ? 1e3 * best : -1;
}

constexpr uint64_t kOneLaunchNs = 50'000;

template <class Instruction>
double rate_us(const void* words, int iterations, int blocks, int threads, void* sink) {
  return best_us(nullptr, kOneLaunchNs, [&] {
    rate_kernel<Instruction><<<blocks, threads>>>(static_cast<const typename Instruction::Word*>(words), iterations,
                                                  static_cast<typename Instruction::Sum*>(sink));
  });
}

void launch_empty(cudaStream_t stream, int blocks, bool overlap) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(128);
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap ? 1 : 0;
  cudaLaunchKernelEx(&config, empty_kernel);
}

const uint4* at(const void* data, int64_t bytes) {
  return reinterpret_cast<const uint4*>(static_cast<const char*>(data) + bytes);
}

}  // namespace

extern "C" {

// The time to read all windows of `window` bytes, with one launch each; below, the time to copy them.
double ceiling_read_us(const void* data, int64_t bytes, int64_t window, int unroll, int blocks, int threads,
                       void* sink) {
  auto* kernel = unroll == 4 ? &read_kernel<4> : &read_kernel<8>;
  return best_us(nullptr, kOneLaunchNs, [&] {
    for (int64_t begin = 0; begin + window <= bytes; begin += window) {
      kernel<<<blocks, threads>>>(at(data, begin), window / 16, static_cast<uint4*>(sink));
    }
  });
}

double ceiling_copy_us(const void* from, int64_t bytes, int64_t window, int unroll, int blocks, int threads, void* to) {
  auto* kernel = unroll == 4 ? &copy_kernel<4> : &copy_kernel<8>;
  return best_us(nullptr, kOneLaunchNs, [&] {
    for (int64_t begin = 0; begin + window <= bytes; begin += window) {
      kernel<<<blocks, threads>>>(at(from, begin), window / 16, const_cast<uint4*>(at(to, begin)));
    }
  });
}

// Instructions 0..5 as in gpu_ceilings.py; each warp issues iterations * kChains of them.
double ceiling_rate_us(int instruction, const void* words, int iterations, int blocks, int threads, void* sink) {
  switch (instruction) {
    case 0:
      return rate_us<Dmma8x8x4>(words, iterations, blocks, threads, sink);
    case 1:
      return rate_us<Dmma16x8x8>(words, iterations, blocks, threads, sink);
    case 2:
      return rate_us<HmmaBfloat>(words, iterations, blocks, threads, sink);
    case 3:
      return rate_us<HmmaTf32>(words, iterations, blocks, threads, sink);
    case 4:
      return rate_us<Dfma>(words, iterations, blocks, threads, sink);
    default:
      return rate_us<Conversions>(words, iterations, blocks, threads, sink);
  }
}

int ceiling_chains() { return kChains; }

// The time of one barrier: of all blocks of a grid, or of clusters of kClusterBlocks.
double ceiling_barrier_us(int barriers, int blocks, int clusters) {
  constexpr int kThreads = 256, kClusterBlocks = 8;
  cudaLaunchAttribute attribute = {};
  if (clusters) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kClusterBlocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    blocks = blocks / kClusterBlocks * kClusterBlocks;
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kThreads);
  config.attrs = &attribute;
  config.numAttrs = 1;
  const auto us = [&](int count) {
    return best_us(nullptr, kOneLaunchNs, [&] {
      cudaLaunchKernelEx(&config, clusters ? &cluster_barrier_kernel : &grid_barrier_kernel, count);
    });
  };
  const double none = us(0), all = us(barriers);
  return none < 0 || all < 0 ? -1 : (all - none) / barriers;
}

// The time from the start of one empty kernel to that of the next, of `kernels` enqueued one by one or as a CUDA graph.
double ceiling_gap_us(int kernels, int blocks, int overlap, int as_graph) {
  cudaStream_t stream;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  const auto enqueue = [&] {
    for (int i = 0; i < kernels; i++) launch_empty(stream, blocks, overlap != 0);
  };
  double us;
  if (as_graph) {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t executable = nullptr;
    cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal);
    enqueue();
    cudaStreamEndCapture(stream, &graph);
    cudaGraphInstantiate(&executable, graph, 0);
    us = best_us(stream, 5'000'000, [&] { cudaGraphLaunch(executable, stream); });
    cudaGraphExecDestroy(executable);
    cudaGraphDestroy(graph);
  } else {
    us = best_us(stream, 5'000'000, enqueue);
  }
  cudaStreamDestroy(stream);
  return us < 0 ? us : us / kernels;
}
}
