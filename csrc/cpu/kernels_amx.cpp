// SPDX-License-Identifier: MIT
#include "kernels.h"

#if defined(GS_HAS_TILES)
#include <immintrin.h>

#include "tiles.h"

#define GS_ISA amx
#define GS_LANES 8
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#include "gram_amx.inl"
#pragma clang attribute pop
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // from GCC's own intrinsics
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "gram_amx.inl"
#endif

namespace gs {

const KernelTable kAmxKernels = {"amx", &amx::gram, &avx512::combine, &avx512::combine_by_rule};

}  // namespace gs
#endif
