// SPDX-License-Identifier: MIT
#include "gradsurgery/gradsurgery.h"

int gs_has_cuda(void) { return 1; }
