// SPDX-License-Identifier: MIT
// The portable path: 16-byte vectors, which are SSE2 on x86-64 and NEON on AArch64.
#include "kernels.h"

#define GS_ISA baseline
#define GS_LANES 2
#define GS_PANEL 3
#define GS_TABLE kBaselineKernels
#include "kernels.inl"
