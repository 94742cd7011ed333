// SPDX-License-Identifier: MIT
// The matrix unit of x86 (AMX): eight tile registers of up to 16 rows of 64 bytes. tests/cpp/emulated_tiles.h
// implements the same functions in plain C++, so that the kernels also run under the sanitizers and on machines without
// the unit.
#pragma once
#include <cstdint>

#if defined(GS_EMULATED_TILES)
#include "emulated_tiles.h"
#else
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace gs::tiles {

// What ldtilecfg reads.
struct Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // per row
  uint8_t rows[16] = {};
};

// Whether this machine has the unit and the system lets this process use it, for which it has to be asked.
inline bool available() {
  unsigned words[4] = {};
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 0, &words[0], &words[1], &words[2], &words[3])) return false;
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (words[3] & kNeeded) == kNeeded && syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// By hand, for GCC's intrinsics do not tell the compiler that they access memory.
inline void configure(const Shapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
inline void release() { asm volatile("tilerelease"); }

template <int Tile>
inline void zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(Tile));
}
template <int Tile>
inline void load(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(Tile) : "memory");
}
template <int Tile>
inline void store(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1)" ::"r"(rows), "r"(stride), "i"(Tile) : "memory");
}
// sum[i][j] += sum_k left[i][2k] right[k][2j] + left[i][2k + 1] right[k][2j + 1], of bfloat16 numbers in float: those
// of even and of odd index are summed in order of k, by fused multiply-adds from 0 on, then added, and this is added to
// sum. Subnormal numbers are zeros, as operands and as results.
template <int Sum, int Left, int Right>
inline void multiply() {
  asm volatile("tdpbf16ps %%tmm%c0, %%tmm%c1, %%tmm%c2" ::"i"(Right), "i"(Left), "i"(Sum));
}

}  // namespace gs::tiles
#endif
