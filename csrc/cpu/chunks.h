// SPDX-License-Identifier: MIT
// The loop over the columns of all parameters, used by the functions that write directions.
#pragma once
#include "boundary.h"

namespace gs {

// Whether outputs of these sizes would evict the gradients from the cache.
inline bool overflow_cache(const gs_gradients& g) {
  constexpr int64_t kBytes = 8 << 20;
  int64_t bytes = 0;
  for (int64_t p = 0; p < g.num_params; p++) bytes += g.numel[p] * element_bytes(g.dtype[p]);
  return bytes > kBytes;
}

// Calls body(p, begin, end) for chunks of the columns of each parameter. first_chunk is scratch, [P + 1].
template <class Body>
void each_chunk(const gs_gradients& g, int64_t* first_chunk, const gs_parallel* parallel, const Body& body) {
  constexpr int64_t kSerialElements = 65536;  // less than this is not worth a second thread
  // 16,384 columns of large parameters; of others about a sixteenth, so that threads get equal shares, but 1,024.
  const auto width = [&](int64_t p) { return std::clamp<int64_t>((g.numel[p] / 16 + 511) / 512 * 512, 1024, 16384); };
  int64_t elements = 0;
  first_chunk[0] = 0;
  for (int64_t p = 0; p < g.num_params; p++) {
    first_chunk[p + 1] = first_chunk[p] + (g.numel[p] + width(p) - 1) / width(p);
    elements += g.numel[p] * g.num_tasks;
  }
  const int64_t chunks = first_chunk[g.num_params];
  // In reverse: the Gram pass read the last columns last, so they may still be in the cache.
  parallel_for(elements < kSerialElements ? nullptr : parallel, chunks, [&](int64_t i) {
    const int64_t chunk = chunks - 1 - i;
    const int64_t p = std::upper_bound(first_chunk, first_chunk + g.num_params + 1, chunk) - first_chunk - 1;
    const int64_t begin = (chunk - first_chunk[p]) * width(p);
    body(p, begin, std::min(begin + width(p), g.numel[p]));
  });
}

}  // namespace gs
