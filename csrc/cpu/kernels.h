// SPDX-License-Identifier: MIT
// The N-sized kernels, compiled once per instruction set and picked at run time.
#pragma once
// The kernels' standard headers stand here, before any choice of instruction set: an inline function of theirs compiled
// for AVX-512 could be the copy that the linker keeps for everybody.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "gradsurgery/gradsurgery.h"

// Where the system can be asked for the matrix unit.
#if defined(__x86_64__) && defined(__linux__)
#define GS_HAS_TILES
#endif

namespace gs {

struct KernelTable {
  const char* isa;

  // gram[index[r] * ld + index[c]] += rows[r] . rows[c] for r <= c < k. index ascends.
  void (*gram)(const void* const* rows, const int32_t* index, int64_t k, gs_dtype dtype, int64_t n, double* gram,
               int64_t ld);

  // out = sum_r weights[r] rows[r], or out += with accumulate; out may equal one of the rows. With stream, out is
  // written past the cache, which saves reading its lines first.
  void (*combine)(const void* const* rows, const double* weights, int64_t k, gs_dtype dtype, int64_t n, void* out,
                  bool accumulate, bool stream);

  // The same for a rule. Rows that are NULL are zero; `coordinate` is that of the first column.
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

// The best table that this machine runs.
const KernelTable& kernels();

}  // namespace gs
