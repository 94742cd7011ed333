// SPDX-License-Identifier: MIT
// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) and its uses: visiting orders,
// random weights, and a number for each coordinate.
#pragma once
#include "common.h"

namespace gs {

struct PhiloxBlock {
  uint32_t word[4];
};

GS_HOST_DEVICE inline PhiloxBlock philox(PhiloxBlock counter, uint64_t key) {
  uint32_t key0 = static_cast<uint32_t>(key), key1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; round++) {
    const uint64_t product0 = uint64_t{0xD2511F53} * counter.word[0];
    const uint64_t product1 = uint64_t{0xCD9E8D57} * counter.word[2];
    counter = {{static_cast<uint32_t>(product1 >> 32) ^ counter.word[1] ^ key0, static_cast<uint32_t>(product1),
                static_cast<uint32_t>(product0 >> 32) ^ counter.word[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += 0x9E3779B9;
    key1 += 0xBB67AE85;
  }
  return counter;
}

// The counter of the next step, modulo 2^64.
GS_HOST_DEVICE inline int64_t next_step(int64_t step) { return static_cast<int64_t>(static_cast<uint64_t>(step) + 1); }

// The words for four swaps of a row's order: at position num_tasks-1 - 4 block and the three positions below it.
GS_HOST_DEVICE inline PhiloxBlock order_draws(uint64_t seed, uint64_t step, int64_t row, uint32_t block) {
  return philox({{static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32), static_cast<uint32_t>(row), block}},
                seed);
}

// The position in 0..k that position k is swapped with.
GS_HOST_DEVICE inline int64_t swap_position(uint32_t word, int64_t k) {
  return static_cast<int64_t>((uint64_t{word} * static_cast<uint64_t>(k + 1)) >> 32);
}

// order = a random permutation of 0..num_tasks-1 by Fisher-Yates: for k = num_tasks-1 down to 1, swap positions k and
// floor(u (k+1) / 2^32), u the next 32-bit word of Philox with key seed and counter (step, row, block). The bias is
// below num_tasks / 2^32.
GS_HOST_DEVICE inline void task_order_row(int64_t num_tasks, uint64_t seed, uint64_t step, int64_t row,
                                          int64_t* order) {
  for (int64_t j = 0; j < num_tasks; j++) order[j] = j;
  int64_t k = num_tasks - 1;
  for (uint32_t block = 0; k > 0; block++) {
    const PhiloxBlock draws = order_draws(seed, step, row, block);
    for (int i = 0; i < 4 && k > 0; i++, k--) {
      const int64_t other = swap_position(draws.word[i], k), swapped = order[k];
      order[k] = order[other];
      order[other] = swapped;
    }
  }
}

// The counter for words 4 block to 4 block + 3 of the random weights. Its third word differs from that of every row of
// an order.
GS_HOST_DEVICE inline PhiloxBlock weights_counter(uint64_t step, int64_t block) {
  return {{static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32), 0xFFFFFFFFu, static_cast<uint32_t>(block)}};
}

// The counter for coordinates 4 block to 4 block + 3, which take a word each. Its third word differs from those of
// orders and of random weights.
GS_HOST_DEVICE inline PhiloxBlock coordinate_counter(uint64_t step, uint64_t block) {
  return {{static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32),
           0x80000000u + static_cast<uint32_t>(block >> 32), static_cast<uint32_t>(block)}};
}

// A number in (0, 1), computed exactly.
GS_HOST_DEVICE inline double uniform_of(uint32_t word) { return (word + 0.5) * 0x1p-32; }

}  // namespace gs
