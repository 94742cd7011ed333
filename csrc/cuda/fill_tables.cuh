// SPDX-License-Identifier: MIT
// How the host fills pointer tables.
#pragma once
#include <algorithm>
#include <cstring>

#include "cpu/boundary.h"
#include "cuda/table.cuh"

namespace gs::gpu {

constexpr int64_t aligned_width(int64_t columns) { return (columns + 63) / 64 * 64; }

// The tables of a gs_gradients. width_of(columns, dtype) is the width of the slots if there are `columns` columns in
// all.
template <class WidthOf>
class Tables {
 public:
  // out: the P parts of combine's direction; NULL for gram.
  Tables(const gs_gradients& grads, void* const* out, const WidthOf& width_of)
      : grads_(grads), out_(out), width_of_(width_of) {}

  // Moves to the next dtype and describes its table, without its contents; false if no dtype is left. Parameters
  // without elements are left out, and those without gradients (gram) or without an output (combine).
  bool next(Table& table) {
    table.elsewhere = nullptr;
    table.pointers = static_cast<int32_t>(grads_.num_tasks + (out_ != nullptr));
    for (table.params = 0; table.params == 0;) {
      if (++dtype_ > GS_FLOAT16) return false;
      table.runs = table.segments = table.slots = table.most_slots = 0;
      int64_t columns = 0;
      each_param([&](int64_t p) { columns += grads_.numel[p]; });
      table.dtype = dtype_;
      table.width = aligned_width(width_of_(columns, dtype_));
      each_run(
          [&](const Run& run) {
            if (table.runs == 0) table.first_segment = run.segment;
            table.params += run.params;
            table.runs++;
            table.segments += run.is_first;
            table.slots = run.first_slot + slots_of(run, table.width);
            table.most_slots = std::max(table.most_slots, slots_of(run, table.width));
          },
          table.width);
    }
    return true;
  }

  // Writes the contents into the table or, if they do not fit, to `space` on the device.
  gs_status fill(Table& table, void* space, gs_stream stream) const {
    auto* const elsewhere = table.bytes() > kTableBytes ? static_cast<unsigned char*>(space) : nullptr;
    table.elsewhere = elsewhere;
    TableChunk chunk;
    unsigned char* const to = elsewhere ? chunk.bytes : table.here;
    int64_t used = 0, written = 0;
    gs_status status = GS_OK;
    const auto flush = [&] {
      if (elsewhere && status == GS_OK) status = write_table(chunk, used, written == 0, elsewhere + written, stream);
      written += used;
      used = 0;
    };
    const auto append = [&](const auto& value) {
      if (used + int64_t{sizeof(value)} > kTableBytes) flush();
      std::memcpy(to + used, &value, sizeof(value));
      used += int64_t{sizeof(value)};
    };
    each_run(append, table.width);
    table.shifted = false;
    int64_t columns = 0, segment = -1, coordinate = 0, counted = 0;
    each_param([&](int64_t p) {
      for (; counted < p; counted++) coordinate += grads_.numel[counted];
      if (segment != segment_of(grads_, p)) columns = 0;
      segment = segment_of(grads_, p);
      const int64_t residue = residue_of(p);
      table.shifted = table.shifted || residue < 0;
      append(Param{columns, grads_.numel[p], coordinate, residue});
      columns += grads_.numel[p];
    });
    each_param([&](int64_t p) { each_pointer(p, append); });
    flush();
    return status;
  }

 private:
  static int32_t slots_of(const Run& run, int64_t width) {
    return static_cast<int32_t>((run.columns + width - 1) / width);
  }

  template <class Visit>
  void each_pointer(int64_t p, const Visit& visit) const {
    for (int64_t t = 0; t < grads_.num_tasks; t++) visit(grads_.data[p * grads_.num_tasks + t]);
    if (out_) visit(static_cast<const void*>(out_[p]));
  }

  bool counts(int64_t p) const {
    if (grads_.dtype[p] != dtype_ || grads_.numel[p] == 0) return false;
    if (out_) return out_[p] != nullptr;
    const void* const* rows = grads_.data + p * grads_.num_tasks;
    return std::any_of(rows, rows + grads_.num_tasks, [](const void* row) { return row != nullptr; });
  }
  template <class Visit>
  void each_param(const Visit& visit) const {
    for (int64_t p = 0; p < grads_.num_params; p++) {
      if (counts(p)) visit(p);
    }
  }

  template <class Visit>
  void each_run(const Visit& visit, int64_t width) const {
    Run run = {};
    int64_t number = -1, highest = -1;
    const auto close = [&](int64_t end) {
      if (number < 0) return;
      run.next = static_cast<int32_t>(next_run(run.segment, number, end));
      visit(run);
    };
    each_param([&](int64_t p) {
      const int64_t segment = segment_of(grads_, p);
      if (number < 0 || segment != run.segment) {
        close(p);
        const bool is_first = segment > highest || !is_before(segment, p);
        run = {0,
               number < 0 ? 0 : run.first_slot + slots_of(run, width),
               run.first_param + run.params,
               static_cast<int32_t>(segment),
               0,
               -1,
               is_first};
        highest = std::max(highest, segment);
        number++;
      }
      run.columns += grads_.numel[p];
      run.params++;
    });
    close(grads_.num_params);
  }
  // Whether a parameter before p belongs to the segment.
  bool is_before(int64_t segment, int64_t p) const {
    while (--p >= 0) {
      if (segment_of(grads_, p) == segment && counts(p)) return true;
    }
    return false;
  }
  // The number of the segment's next run, looking from parameter p on, where run number + 1 begins; -1 if there is
  // none.
  int64_t next_run(int64_t segment, int64_t number, int64_t p) const {
    if (is_sorted_) return -1;
    int64_t last = segment;
    for (; p < grads_.num_params; p++) {
      if (!counts(p)) continue;
      number += segment_of(grads_, p) != last;
      last = segment_of(grads_, p);
      if (last == segment) return number;
    }
    return -1;
  }

  // How many elements a parameter's pointers lie after a 16-byte boundary, or -1 if they differ in that.
  int64_t residue_of(int64_t p) const {
    int64_t residue = -1;
    bool same = true;
    each_pointer(p, [&](const void* pointer) {
      if (!pointer) return;
      const auto own = static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer) % 16);
      same = same && (residue < 0 || own == residue);
      residue = own;
    });
    return same ? residue / element_bytes(dtype_) : -1;
  }

  const gs_gradients& grads_;
  void* const* out_;
  const WidthOf& width_of_;
  int32_t dtype_ = GS_FLOAT64 - 1;
  const bool is_sorted_ = !grads_.segment || std::is_sorted(grads_.segment, grads_.segment + grads_.num_params);
};

}  // namespace gs::gpu
