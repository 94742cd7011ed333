/* SPDX-License-Identifier: MIT */
/* The header is C, and a library without CUDA still links the CUDA entry points. */
#include <gradsurgery/gradsurgery.h>
#include <stdio.h>
#include <string.h>

int main(void) {
  const double gram[4] = {18, -22, -22, 38};
  double weights[2];
  if (gs_pcgrad_cpu(gram, 1, 2, NULL, 0, 0, 0, weights, NULL) != GS_OK) return 1;
  printf("PCGrad weights %.4f %.4f, %s\n", weights[0], weights[1], gs_cpu_isa());
  if (weights[0] < 2.2222 || weights[0] > 2.2223 || weights[1] < 1.5789 || weights[1] > 1.5790) return 1;
  if (strcmp(gs_version(), GS_VERSION) != 0) return 1;
  if (!gs_has_cuda()) {
    if (gs_gram_cuda(NULL, NULL, NULL, 0, NULL) != GS_UNSUPPORTED || !strstr(gs_last_error(), "without CUDA")) return 1;
  }
  return 0;
}
