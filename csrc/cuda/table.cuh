// SPDX-License-Identifier: MIT
// The pointer table of the kernels of stages 2 and 4, one per dtype of the parameters. It travels in the arguments of
// launches, so that nothing is copied from the host: in those of the kernel itself, or if it is larger in those of
// kernels that write it to the workspace.
#pragma once
#include "cuda/rows.cuh"

namespace gs::gpu {

// A stretch of parameters with one segment, which is cut into slots, a block each.
struct Run {
  int64_t columns;
  int32_t first_slot, first_param;
  int32_t segment, params;
  int32_t next;   // the next run of the segment, or -1
  bool is_first;  // of its segment
};

// One parameter: its columns begin at first_column of its run.
struct Param {
  int64_t first_column, numel;
  int64_t coordinate : 56;  // number of the first column, counted over all parameters
  int64_t residue : 8;      // as in Piece
};

constexpr int64_t kTableBytes = 32000;  // of the 32,764 that a launch takes

// The runs, the params, and `pointers` addresses for each parameter: in `here`, or at `elsewhere` if they do not fit.
struct Table {
  int32_t dtype;
  int32_t params, runs, segments, slots;
  int32_t pointers;       // per parameter: T rows, for combine the outputs as well
  int32_t first_segment;  // of the first run
  int32_t most_slots;     // of a run
  bool shifted;           // whether rows of a parameter differ in their residues
  int64_t width;          // columns of a slot
  const unsigned char* elsewhere;
  alignas(16) unsigned char here[kTableBytes];

  GS_HOST_DEVICE int64_t bytes() const { return params_at() + params * (int64_t{sizeof(Param)} + 8 * pointers); }
  GS_DEVICE Run run(int64_t r) const { return at<Run>(r * int64_t{sizeof(Run)}); }
  GS_DEVICE Param param(int64_t p) const { return at<Param>(params_at() + p * int64_t{sizeof(Param)}); }
  GS_DEVICE int64_t first_column(int64_t p) const { return at<int64_t>(params_at() + p * int64_t{sizeof(Param)}); }

  // Pointers number t[0], t[1], ... of a parameter; null where t is negative.
  template <class In, int kCount>
  GS_DEVICE void get_pointers(int64_t p, const int (&t)[kCount], In* (&pointer)[kCount]) const {
    const int64_t first = params_at() + params * int64_t{sizeof(Param)} + p * pointers * 8;
    uint64_t word[kCount] = {};
    if (elsewhere) {
#pragma unroll
      for (int i = 0; i < kCount; i++) {
        if (t[i] >= 0) word[i] = load_word(elsewhere + first + t[i] * 8);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i++) {
        if (t[i] >= 0) word[i] = *reinterpret_cast<const uint64_t*>(here + first + t[i] * 8);
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; i++) pointer[i] = reinterpret_cast<In*>(word[i]);
  }

  // The run of a slot: the last one that begins at or before it.
  GS_DEVICE Run run_of(int64_t slot) const {
    int64_t low = 0, high = runs;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (run(middle).first_slot <= slot ? low : high) = middle;
    }
    return run(low);
  }
  // The parameter of a run that holds a column; for all lanes of a warp alike. In memory, where a look takes long, they
  // look at as many places at once.
  GS_DEVICE int64_t param_of(const Run& run, int64_t column) const {
    int64_t low = run.first_param, high = run.first_param + run.params;
    while (elsewhere && high - low > 1) {
      const int64_t step = (high - low + kWarp - 1) / kWarp, own = low + thread() % kWarp * step;
      const uint32_t before = ballot_of_warp(own < high && first_column(own) <= column);
      low += (count_bits(before) - 1) * step;
      high = low + step < high ? low + step : high;
    }
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_column(middle) <= column ? low : high) = middle;
    }
    return low;
  }

 private:
  GS_HOST_DEVICE int64_t params_at() const { return runs * int64_t{sizeof(Run)}; }
  // In separate branches: one address for both places would be that of neither kind of memory.
  template <class V>
  GS_DEVICE V at(int64_t offset) const {
    uint64_t word[sizeof(V) / 8];
    if (elsewhere) {
#pragma unroll
      for (size_t w = 0; w < sizeof(V) / 8; w++) word[w] = load_word(elsewhere + offset + 8 * w);
    } else {
      memcpy(word, here + offset, sizeof(V));
    }
    V value;
    memcpy(&value, word, sizeof(V));
    return value;
  }
};

// To be called before a table is read. What lies in the arguments may be read while the kernel ahead still runs, so
// that wait_for_previous_kernel() is to follow.
GS_DEVICE void wait_for_table(const Table& table) {
  if (table.elsewhere) wait_for_previous_kernel();
}

// What a table of so many parameters takes of the workspace, whatever their runs.
inline int64_t table_workspace_bytes(int64_t params, int64_t pointers) {
  const int64_t bytes = params * (int64_t{sizeof(Run)} + int64_t{sizeof(Param)} + 8 * pointers);
  return bytes > kTableBytes ? (bytes + 63) / 64 * 64 : 0;
}

// What a kernel writes to the workspace.
struct TableChunk {
  alignas(16) unsigned char bytes[kTableBytes];
};
gs_status write_table(const TableChunk& chunk, int64_t bytes, bool first, unsigned char* to,
                      gs_stream stream);  // in entry.cu

}  // namespace gs::gpu
