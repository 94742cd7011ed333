// SPDX-License-Identifier: MIT
// A library built without CUDA still defines the CUDA entry points.
#if !defined(GS_WITH_CUDA)
#include "unsupported.inl"
#endif
