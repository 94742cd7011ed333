// SPDX-License-Identifier: MIT
// Failures: a status code and a thread-local message, no exceptions.
#pragma once
#include "gradsurgery/gradsurgery.h"

namespace gs {

// Stores the printf-style message for gs_last_error and returns status.
gs_status fail(gs_status status, const char* format, ...) __attribute__((format(printf, 2, 3)));

}  // namespace gs

#define GS_REQUIRE(condition, ...)                                         \
  do {                                                                     \
    if (!(condition)) return ::gs::fail(GS_INVALID_ARGUMENT, __VA_ARGS__); \
  } while (0)
