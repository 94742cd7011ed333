// SPDX-License-Identifier: MIT
// The pointer table that a kernel of stages 2 and 4 takes by argument, so that no copy to the device is needed.
// Parameters go into a table per dtype, and into several if they do not fit.
#pragma once
#include <algorithm>

#include "cpu/schedule.h"
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
  int64_t residue;  // as in Piece
};

constexpr int kTableBytes = 32000;  // of the 32,764 that a launch takes

// `bytes` holds the runs from the front, and from the back a Param and `pointers` addresses for each parameter.
struct Table {
  int32_t dtype;
  int32_t params, runs, segments, slots;
  int32_t pointers;  // per parameter: T rows, for combine the outputs as well
  int64_t width;     // columns of a slot
  alignas(16) unsigned char bytes[kTableBytes];

  GS_HOST_DEVICE int64_t param_bytes() const { return static_cast<int64_t>(sizeof(Param)) + 8 * pointers; }
  GS_HOST_DEVICE const Run& run(int64_t r) const { return reinterpret_cast<const Run*>(bytes)[r]; }
  GS_HOST_DEVICE const Param& param(int64_t p) const {
    return *reinterpret_cast<const Param*>(bytes + kTableBytes - (p + 1) * param_bytes());
  }
  GS_HOST_DEVICE const void* const* row(int64_t p) const { return reinterpret_cast<const void* const*>(&param(p) + 1); }

  // The run of a slot: the last one that begins at or before it.
  GS_HOST_DEVICE const Run& run_of(int64_t slot) const {
    int64_t low = 0, high = runs;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (run(middle).first_slot <= slot ? low : high) = middle;
    }
    return run(low);
  }
  // The parameter of a run that holds a column.
  GS_HOST_DEVICE int64_t param_of(const Run& run, int64_t column) const {
    int64_t low = run.first_param, high = run.first_param + run.params;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (param(middle).first_column <= column ? low : high) = middle;
    }
    return low;
  }
};

// Cuts a gs_gradients into tables. width_of(columns) is the width of slots for so many columns in all.
template <class WidthOf>
class TableBuilder {
 public:
  // out: [outputs][P] of combine's directions; gram has none.
  TableBuilder(const gs_gradients& grads, void* const* out, int64_t outputs, const WidthOf& width_of)
      : grads_(grads), out_(out), outputs_(outputs), width_of_(width_of) {}

  // Fills the table with the parameters that fit, from where the last call stopped; false when there are none left.
  // Parameters without elements, gradients or (for combine) an output are left out.
  bool fill(Table& table) {
    table.params = table.runs = table.segments = table.slots = 0;
    table.pointers = static_cast<int32_t>(grads_.num_tasks + outputs_);
    highest_segment_ = -1;
    int64_t columns = 0;
    for (; table.params == 0 && dtype_ <= GS_FLOAT16; next_ = 0, dtype_++) {
      for (; next_ < grads_.num_params; next_++) {
        if (grads_.dtype[next_] != dtype_ || !counts(next_)) continue;
        if (!add(table)) break;
        columns += grads_.numel[next_];
      }
      if (next_ < grads_.num_params) break;
    }
    table.width = round_up(width_of_(columns), kWidthAlignment);
    for (int64_t r = 0; r < table.runs; r++) {
      Run& run = runs(table)[r];
      run.first_slot = table.slots;
      table.slots += static_cast<int32_t>((run.columns + table.width - 1) / table.width);
    }
    return table.params > 0;
  }

 private:
  static constexpr int64_t kWidthAlignment = 512;

  static int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }
  static Run* runs(Table& table) { return reinterpret_cast<Run*>(table.bytes); }

  bool counts(int64_t p) const {
    if (grads_.numel[p] == 0) return false;
    for (int64_t k = 0; k < outputs_; k++) {
      if (output(k, p)) return true;
    }
    if (outputs_ > 0) return false;
    const void* const* rows = grads_.data + p * grads_.num_tasks;
    return std::any_of(rows, rows + grads_.num_tasks, [](const void* row) { return row != nullptr; });
  }

  void* output(int64_t k, int64_t p) const { return out_[k * grads_.num_params + p]; }

  // Adds parameter next_; false if it does not fit.
  bool add(Table& table) {
    Run* run = table.runs > 0 ? runs(table) + table.runs - 1 : nullptr;
    const auto segment = static_cast<int32_t>(segment_of(grads_, next_));
    const bool joins = run && run->segment == segment;
    const int64_t used =
        (table.runs + !joins) * static_cast<int64_t>(sizeof(Run)) + (table.params + 1) * table.param_bytes();
    if (used > kTableBytes) return false;
    table.dtype = dtype_;
    if (!joins) {
      run = add_run(table, segment);
    }
    auto* param = const_cast<Param*>(&table.param(table.params));
    auto* pointers = reinterpret_cast<const void**>(param + 1);
    std::copy(grads_.data + next_ * grads_.num_tasks, grads_.data + (next_ + 1) * grads_.num_tasks, pointers);
    for (int64_t k = 0; k < outputs_; k++) pointers[grads_.num_tasks + k] = output(k, next_);
    *param = {run->columns, grads_.numel[next_], residue_of(pointers, table.pointers)};
    run->columns += grads_.numel[next_];
    run->params++;
    table.params++;
    return true;
  }

  Run* add_run(Table& table, int32_t segment) {
    // The last run of the segment; there is none of a segment above all before it.
    int32_t before = segment > highest_segment_ ? -1 : table.runs - 1;
    while (before >= 0 && runs(table)[before].segment != segment) before--;
    highest_segment_ = std::max(highest_segment_, segment);
    if (before >= 0) runs(table)[before].next = table.runs;
    Run* run = runs(table) + table.runs++;
    *run = {0, 0, table.params, segment, 0, -1, before < 0};
    table.segments += before < 0;
    return run;
  }

  int64_t residue_of(const void* const* pointers, int64_t count) const {
    int64_t residue = -1;
    for (int64_t t = 0; t < count; t++) {
      if (!pointers[t]) continue;
      const auto own = static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointers[t]) % 16);
      if (residue >= 0 && own != residue) return -1;
      residue = own;
    }
    return residue / element_bytes(dtype_);
  }

  const gs_gradients& grads_;
  void* const* out_;
  const int64_t outputs_;
  const WidthOf& width_of_;
  int32_t dtype_ = GS_FLOAT64;
  int64_t next_ = 0;
  int32_t highest_segment_ = -1;  // in the table
};

// The columns of a slot, in pieces of parameters.
struct Slot {
  const Table& table;
  const Run& run;
  int64_t begin, end;

  GS_DEVICE Slot(const Table& all, int64_t slot)
      : table(all), run(all.run_of(slot)), begin((slot - run.first_slot) * all.width) {
    end = begin + table.width < run.columns ? begin + table.width : run.columns;
  }
  GS_DEVICE int64_t first_param() const { return table.param_of(run, begin); }
  GS_DEVICE bool holds(int64_t p) const {
    return p < run.first_param + run.params && table.param(p).first_column < end;
  }
  template <class In, int kLanes>
  GS_DEVICE Piece<In, kLanes> piece(int64_t p) const {
    const Param& param = table.param(p);
    const int64_t from = begin > param.first_column ? begin - param.first_column : 0;
    const int64_t to = end - param.first_column < param.numel ? end - param.first_column : param.numel;
    return {table.row(p), param.residue, from, to};
  }
};

// Calls visit(piece) for each piece of a slot.
template <class In, int kLanes, class Visit>
GS_DEVICE void for_each_piece(const Table& table, int64_t index, const Visit& visit) {
  const Slot slot(table, index);
  for (int64_t p = slot.first_param(); slot.holds(p); p++) visit(slot.piece<In, kLanes>(p));
}

}  // namespace gs::gpu
