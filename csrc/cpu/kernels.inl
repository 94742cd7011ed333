// SPDX-License-Identifier: MIT
// Compiles the kernels for one instruction set. The including file defines GS_ISA (a namespace), GS_LANES (doubles per
// vector), GS_PANEL (rows per register tile) and GS_TABLE, after it has chosen the compilation target.

#include "simd.inl"
// The kernels use the vector types of simd.inl, the two that write directions also blocks.inl.
#include "blocks.inl"
#include "combine.inl"
#include "combine_by_rule.inl"
#include "gram.inl"

namespace gs {

#define GS_STRING_(x) #x
#define GS_STRING(x) GS_STRING_(x)
const KernelTable GS_TABLE = {GS_STRING(GS_ISA), &GS_ISA::gram, &GS_ISA::combine, &GS_ISA::combine_by_rule};

}  // namespace gs
