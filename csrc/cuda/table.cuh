// SPDX-License-Identifier: MIT
// The pointer table of the kernels of stages 2 and 4, one per dtype of the parameters. It is passed in the arguments of
// launches, so that there is no copy from the host: those of the kernel itself or, if it is too large for them, those
// of kernels that write it to the workspace.
#pragma once
#include "cuda/rows.cuh"

namespace gs::gpu {

// Consecutive parameters of one segment, whose columns are cut into slots, one for each block.
struct Run {
  int64_t columns;
  int32_t first_slot, first_param;
  int32_t segment, params;
  int32_t next;   // the next run of the segment, or -1
  bool is_first;  // whether it is the first run of its segment
};

// One parameter: its columns begin at first_column of its run.
struct Param {
  int64_t first_column, numel;
  int64_t coordinate : 56;  // number of the first column, counted over all parameters
  int64_t residue : 8;      // as in Piece
};

constexpr int64_t kTableBytes = 32000;  // out of 32,764 bytes of arguments that a launch can have

// The runs, the params, and `pointers` addresses for each parameter: in `here`, or at `elsewhere` if they do not fit.
struct Table {
  int32_t dtype;
  int32_t params, runs, segments, slots;
  int32_t pointers;       // per parameter: T rows, for combine also the output
  int32_t first_segment;  // the segment of the first run
  int32_t most_slots;     // the most slots of a run
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
  // The parameter of a run that holds a column, the same for all lanes of a warp. Reading a table in memory takes long,
  // so there the lanes search at 32 places at once.
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
  // Two branches, so that the compiler knows in each which kind of memory the address belongs to.
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

// Must be called before a table is read. A table in the arguments may be read while the kernel ahead still runs; then
// wait_for_previous_kernel() must still follow.
GS_DEVICE void wait_for_table(const Table& table) {
  if (table.elsewhere) wait_for_previous_kernel();
}

// An upper bound of the workspace for the table of that many parameters, whatever their runs.
inline int64_t table_workspace_bytes(int64_t params, int64_t pointers) {
  const int64_t bytes = params * (int64_t{sizeof(Run)} + int64_t{sizeof(Param)} + 8 * pointers);
  return bytes > kTableBytes ? (bytes + 63) / 64 * 64 : 0;
}

// The part of a table that one kernel writes to the workspace.
struct TableChunk {
  alignas(16) unsigned char bytes[kTableBytes];
};
gs_status write_table(const TableChunk& chunk, int64_t bytes, bool first, unsigned char* to,
                      gs_stream stream);  // in entry.cu

}  // namespace gs::gpu
