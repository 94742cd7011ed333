// SPDX-License-Identifier: MIT
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define GS_ISA avx2
#define GS_LANES 4
#define GS_PANEL 3  // 9 accumulators and 4 operands fit the 16 registers
#define GS_TABLE kAvx2Kernels
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#include "kernels.inl"
#pragma clang attribute pop
#else
#pragma GCC target("avx2,fma,f16c")
#include "kernels.inl"
#endif
#endif
