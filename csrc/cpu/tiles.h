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

// Whether this machine and its system have the unit.
inline bool exist() {
  unsigned words[4] = {};
  constexpr unsigned kNeeded = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
  if (!__get_cpuid_count(7, 0, &words[0], &words[1], &words[2], &words[3])) return false;
  if ((words[3] & kNeeded) != kNeeded) return false;
  constexpr int kSupported = 0x1021;  // ARCH_GET_XCOMP_SUPP
  uint64_t features = 0;
  return syscall(SYS_arch_prctl, kSupported, &features) == 0 && (features >> kTileData & 1);
}

// Asks the system to let this process use the unit; whether it does.
inline bool request() {
  constexpr int kRequest = 0x1023;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

// In bytes, for not every assembler knows the instructions, and GCC's intrinsics do not say that they access memory.
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
// sum[i][j] += sum_k left[i][2k] right[k][2j] + left[i][2k + 1] right[k][2j + 1], of bfloat16 numbers in float: those
// of even and of odd index are summed in order of k, by fused multiply-adds from 0 on, then added, and this is added to
// sum. Subnormal numbers are zeros, as operands and as results.
template <int Sum, int Left, int Right>
inline void multiply() {
  // tdpbf16ps
  asm volatile(".byte 0xc4, 0xe2, 0x7a - 8 * %c0, 0x5c, 0xc0 + 8 * %c1 + %c2" ::"i"(Right), "i"(Sum), "i"(Left));
}

}  // namespace gs::tiles
#endif
