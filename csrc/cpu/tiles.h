// SPDX-License-Identifier: MIT
// The matrix unit of x86 (AMX): eight tile registers of up to 16 rows of 64 bytes. tests/cpp/emulated_tiles.h
// implements the same functions in plain C++, so that the kernels also run under the sanitizers and on machines without
// the unit.
#pragma once
#include <cstdint>

namespace gs::tiles {

// What ldtilecfg reads.
struct Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // per row
  uint8_t rows[16] = {};
};

}  // namespace gs::tiles

#if defined(GS_EMULATED_TILES)
#include "emulated_tiles.h"
#else
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace gs::tiles {

constexpr int kTileData = 18;  // XFEATURE_XTILEDATA

// Whether the processor has the unit and the operating system supports it.
inline bool exist() {
  unsigned words[4] = {};
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 0, &words[0], &words[1], &words[2], &words[3])) return false;
  if ((words[3] & kNeeded) != kNeeded) return false;
  constexpr int kSupported = 0x1021;  // ARCH_GET_XCOMP_SUPP
  uint64_t features = 0;
  return syscall(SYS_arch_prctl, kSupported, &features) == 0 && (features >> kTileData & 1);
}

// Asks the operating system to let this process use the unit; returns whether it may.
inline bool request() {
  constexpr int kRequest = 0x1023;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// The instructions are written as bytes: not every assembler knows them, and GCC's intrinsics do not declare that they
// access memory.
inline void configure(const Shapes& shapes) {
  asm volatile(".byte 0xc4, 0xe2, 0x78, 0x49, 0x00" ::"a"(&shapes), "m"(shapes));  // ldtilecfg (%rax)
}
inline void release() { asm volatile(".byte 0xc4, 0xe2, 0x78, 0x49, 0xc0"); }  // tilerelease

template <int Tile>
inline void zero() {
  asm volatile(".byte 0xc4, 0xe2, 0x7b, 0x49, 0xc0 + 8 * %c0" ::"i"(Tile));  // tilezero
}
template <int Tile>
inline void load(const void* rows, int64_t stride) {
  // tileloadd (%rax,%rdx)
  asm volatile(".byte 0xc4, 0xe2, 0x7b, 0x4b, 0x04 + 8 * %c2, 0x10" ::"a"(rows), "d"(stride), "i"(Tile) : "memory");
}
template <int Tile>
inline void store(void* rows, int64_t stride) {
  // tilestored (%rax,%rdx)
  asm volatile(".byte 0xc4, 0xe2, 0x7a, 0x4b, 0x04 + 8 * %c2, 0x10" ::"a"(rows), "d"(stride), "i"(Tile) : "memory");
}
// sum[i][j] += sum_k left[i][2k] right[k][2j] + left[i][2k + 1] right[k][2j + 1], bfloat16 products summed in float.
// The products of even index and those of odd index form two sums, each in order of k by fused multiply-adds from 0 on;
// the two sums are added, and the result is added to sum. Subnormal operands and results count as zeros.
template <int Sum, int Left, int Right>
inline void multiply() {
  // tdpbf16ps
  asm volatile(".byte 0xc4, 0xe2, 0x7a - 8 * %c0, 0x5c, 0xc0 + 8 * %c1 + %c2" ::"i"(Right), "i"(Sum), "i"(Left));
}

}  // namespace gs::tiles
#endif
