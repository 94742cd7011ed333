// SPDX-License-Identifier: MIT
#include "status.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdarg>
#include <cstdio>

#include "kernels.h"
#if defined(GS_HAS_TILES)
#include "tiles.h"
#endif

namespace gs {

static thread_local char last_error[256] = "";

gs_status fail(gs_status status, const char* format, ...) {
  va_list args;
  va_start(args, format);
  std::vsnprintf(last_error, sizeof(last_error), format, args);
  va_end(args);
  return status;
}

const KernelTable& kernels() {
#if defined(__x86_64__)
  static const KernelTable& best = [&]() -> const KernelTable& {
    __builtin_cpu_init();
    unsigned words[4] = {};  // older compilers have no name for F16C
    const bool f16c = __get_cpuid(1, &words[0], &words[1], &words[2], &words[3]) && (words[2] & bit_F16C);
    const bool avx2 = f16c && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(GS_HAS_TILES)
    if (avx2 && avx512 && tiles::exist()) return kAmxKernels;
#endif
    return avx2 && avx512 ? kAvx512Kernels : avx2 ? kAvx2Kernels : kBaselineKernels;
  }();
  return best;
#else
  return kBaselineKernels;
#endif
}

}  // namespace gs

const char* gs_version(void) { return GS_VERSION; }
const char* gs_last_error(void) { return gs::last_error; }
const char* gs_cpu_isa(void) { return gs::kernels().isa; }
