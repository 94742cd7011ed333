// SPDX-License-Identifier: MIT
// The CUDA entry points of the C boundary. There are no CUDA kernels yet: each returns GS_UNSUPPORTED.
#include "../cpu/unsupported.inl"
