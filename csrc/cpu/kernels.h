// SPDX-License-Identifier: MIT
// The N-sized kernels, compiled once per instruction set and picked at run time.
#pragma once
// The kernels' standard headers are included here, before an instruction set is chosen: otherwise one of their inline
// functions could be compiled for AVX-512, and the linker could keep that copy for every caller.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "gradsurgery/gradsurgery.h"

// Defined where the operating system can be asked for the matrix unit.
#if defined(__x86_64__) && defined(__linux__)
#define GS_HAS_TILES
#endif

namespace gs {

struct KernelTable {
  const char* isa;

  // gram[index[r] * ld + index[c]] += rows[r] . rows[c] for r <= c < k. index ascends.
  void (*gram)(const void* const* rows, const int32_t* index, int64_t k, gs_dtype dtype, int64_t n, double* gram,
               int64_t ld);

  // out = sum_r weights[r] rows[r], or out += that with accumulate; out may equal one of the rows. With stream, out is
  // written past the cache, which saves loading its cache lines first.
  void (*combine)(const void* const* rows, const double* weights, int64_t k, gs_dtype dtype, int64_t n, void* out,
                  bool accumulate, bool stream);

  // The same for a rule. Rows that are NULL count as zeros; `coordinate` is the coordinate number of the first column.
  void (*combine_by_rule)(const void* const* rows, const gs_rule& rule, int64_t k, gs_dtype dtype, int64_t n,
                          int64_t coordinate, void* out, bool accumulate, bool stream);
};

extern const KernelTable kBaselineKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
#endif
#if defined(GS_HAS_TILES)
extern const KernelTable kAmxKernels;
#endif

// The fastest table that this machine can run.
const KernelTable& kernels();

}  // namespace gs
