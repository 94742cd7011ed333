// SPDX-License-Identifier: MIT
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define GS_ISA avx512
#define GS_LANES 8
#define GS_PANEL 4  // 16 accumulators and 5 operands of 32 registers
#define GS_TABLE kAvx512Kernels
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#include "kernels.inl"
#pragma clang attribute pop
#else
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // from GCC's own intrinsics
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#include "kernels.inl"
#endif
#endif
