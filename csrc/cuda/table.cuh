// SPDX-License-Identifier: MIT
// The pointer table of the kernels of stages 2 and 4, one per dtype of the parameters. It travels in the arguments of
// launches, so that nothing is copied from the host: in those of the kernel itself, or if it is larger in those of
// kernels that write it to the workspace.
#pragma once
#include <algorithm>
#include <cstring>

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

constexpr int64_t kTableBytes = 32000;  // of the 32,764 that a launch takes

// The runs, the params, and `pointers` addresses for each parameter: in `here`, or at `elsewhere` if they do not fit.
struct Table {
  int32_t dtype;
  int32_t params, runs, segments, slots;
  int32_t pointers;       // per parameter: T rows, for combine the outputs as well
  int32_t first_segment;  // of the first run
  int32_t most_slots;     // of a run
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
  // The parameter of a run that holds a column.
  GS_DEVICE int64_t param_of(const Run& run, int64_t column) const {
    int64_t low = run.first_param, high = run.first_param + run.params;
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

// What a table of so many parameters takes of the workspace, whatever their runs.
inline int64_t table_workspace_bytes(int64_t params, int64_t pointers) {
  const int64_t bytes = params * (int64_t{sizeof(Run)} + int64_t{sizeof(Param)} + 8 * pointers);
  return bytes > kTableBytes ? (bytes + 63) / 64 * 64 : 0;
}

// What a kernel writes to the workspace.
struct TableChunk {
  alignas(16) unsigned char bytes[kTableBytes];
};
gs_status write_table(const TableChunk& chunk, int64_t bytes, unsigned char* to, gs_stream stream);  // in entry.cu

// The tables of a gs_gradients. width_of(columns, dtype) is the width of slots for so many columns in all.
template <class WidthOf>
class Tables {
 public:
  // out: [outputs][P] of combine's directions; gram has none.
  Tables(const gs_gradients& grads, void* const* out, int64_t outputs, const WidthOf& width_of)
      : grads_(grads), out_(out), outputs_(outputs), width_of_(width_of) {}

  // Turns to the next dtype and describes its table, without its contents; false when there is none left. Parameters
  // without elements, gradients or (for combine) an output are left out.
  bool next(Table& table) {
    table.elsewhere = nullptr;
    table.pointers = static_cast<int32_t>(grads_.num_tasks + outputs_);
    for (table.params = 0; table.params == 0;) {
      if (++dtype_ > GS_FLOAT16) return false;
      table.runs = table.segments = table.slots = table.most_slots = 0;
      int64_t columns = 0;
      each_param([&](int64_t p) { columns += grads_.numel[p]; });
      table.dtype = dtype_;
      table.width = (width_of_(columns, dtype_) + kWidthAlignment - 1) / kWidthAlignment * kWidthAlignment;
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

  // Writes the contents, into the table or to `space` on the device.
  gs_status fill(Table& table, void* space, gs_stream stream) const {
    auto* const elsewhere = table.bytes() > kTableBytes ? static_cast<unsigned char*>(space) : nullptr;
    table.elsewhere = elsewhere;
    TableChunk chunk;
    unsigned char* const to = elsewhere ? chunk.bytes : table.here;
    int64_t used = 0, written = 0;
    gs_status status = GS_OK;
    const auto flush = [&] {
      if (elsewhere && status == GS_OK) status = write_table(chunk, used, elsewhere + written, stream);
      written += used;
      used = 0;
    };
    const auto append = [&](const auto& value) {
      if (used + int64_t{sizeof(value)} > kTableBytes) flush();
      std::memcpy(to + used, &value, sizeof(value));
      used += int64_t{sizeof(value)};
    };
    each_run(append, table.width);
    int64_t columns = 0, segment = -1;
    each_param([&](int64_t p) {
      if (segment != segment_of(grads_, p)) columns = 0;
      segment = segment_of(grads_, p);
      append(Param{columns, grads_.numel[p], residue_of(p)});
      columns += grads_.numel[p];
    });
    each_param([&](int64_t p) { each_pointer(p, append); });
    flush();
    return status;
  }

 private:
  static constexpr int64_t kWidthAlignment = 64;

  static int32_t slots_of(const Run& run, int64_t width) {
    return static_cast<int32_t>((run.columns + width - 1) / width);
  }

  template <class Visit>
  void each_pointer(int64_t p, const Visit& visit) const {
    for (int64_t t = 0; t < grads_.num_tasks; t++) visit(grads_.data[p * grads_.num_tasks + t]);
    for (int64_t k = 0; k < outputs_; k++) visit(static_cast<const void*>(out_[k * grads_.num_params + p]));
  }

  bool counts(int64_t p) const {
    if (grads_.dtype[p] != dtype_ || grads_.numel[p] == 0) return false;
    const auto exists = [](const void* pointer) { return pointer != nullptr; };
    if (outputs_ == 0) {
      const void* const* rows = grads_.data + p * grads_.num_tasks;
      return std::any_of(rows, rows + grads_.num_tasks, exists);
    }
    for (int64_t k = 0; k < outputs_; k++) {
      if (exists(out_[k * grads_.num_params + p])) return true;
    }
    return false;
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
  // Whether a parameter before p has the segment.
  bool is_before(int64_t segment, int64_t p) const {
    while (--p >= 0) {
      if (segment_of(grads_, p) == segment && counts(p)) return true;
    }
    return false;
  }
  // The number of the segment's next run from parameter p on, which begins run number + 1; -1 if there is none.
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

  // Of a parameter's pointers, in elements from a boundary of 16 bytes, or -1 if they differ.
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
  const int64_t outputs_;
  const WidthOf& width_of_;
  int32_t dtype_ = GS_FLOAT64 - 1;
  const bool is_sorted_ = !grads_.segment || std::is_sorted(grads_.segment, grads_.segment + grads_.num_params);
};

// The columns of a slot, in pieces of parameters.
struct Slot {
  const Table& table;
  Run run;
  int64_t begin, end;

  GS_DEVICE Slot(const Table& all, int64_t slot)
      : table(all), run(all.run_of(slot)), begin((slot - run.first_slot) * all.width) {
    end = begin + table.width < run.columns ? begin + table.width : run.columns;
  }
  GS_DEVICE int64_t first_param() const { return table.param_of(run, begin); }
  GS_DEVICE bool holds(int64_t p) const { return p < run.first_param + run.params && table.first_column(p) < end; }
  template <class In, int kLanes>
  GS_DEVICE Piece<In, kLanes> piece(int64_t p) const {
    const Param param = table.param(p);
    const int64_t from = begin > param.first_column ? begin - param.first_column : 0;
    const int64_t to = end - param.first_column < param.numel ? end - param.first_column : param.numel;
    return {param.residue, from, to};
  }
};

// The turns of a group of lanes in a slot: of each piece the whole steps, kSteps at a time, then the rest in as many
// columns. Several groups share a slot, and their turns go on from piece to piece.
template <class In, int kLanes, int kSteps>
class Turns {
  using Rows = Piece<In, kLanes>;
  static constexpr int64_t kColumns = kSteps * Rows::kStep;

 public:
  // Those number first, first + stride, ...
  GS_DEVICE Turns(const Table& table, int64_t slot, int first, int stride)
      : table_(table), slot_(static_cast<int>(slot)), stride_(stride) {
    param_ = static_cast<int>(Slot(table, slot_).first_param());
    open(first);
  }
  GS_DEVICE bool done() const { return left_ == 0; }
  GS_DEVICE bool is_whole() const { return left_ > rest_; }
  GS_DEVICE bool aligned() const { return aligned_; }
  GS_DEVICE int64_t column() const { return column_; }  // the first one of a whole turn
  // Rows number t[0], t[1], ... of the piece's parameter; null where t is negative.
  template <class Row, int kCount>
  GS_DEVICE void get_rows(const int (&t)[kCount], Row* (&row)[kCount]) const {
    table_.get_pointers(param_, t, row);
  }

  // Goes on; true if that led to another piece.
  GS_DEVICE bool next() {
    column_ += stride_ * kColumns;
    left_ -= stride_;
    if (left_ > 0) return false;
    param_++;
    open(-left_);
    return true;
  }

  // A lane's vectors, zeros in rows that are absent and beyond the rest.
  template <int kRows, class Load>
  GS_DEVICE void load(const In* const (&row)[kRows], int lane, const Load& load_vector,
                      Vector<In> (&x)[kSteps][kRows]) const {
    if (is_whole()) return load_steps<kLanes>(row, column_, aligned_, lane, load_vector, x);
    const Steps steps = rest_steps();
#pragma unroll
    for (int s = 0; s < kSteps; s++) {
#pragma unroll
      for (int r = 0; r < kRows; r++) x[s][r] = load_rest(row[r], steps, lane, s);
    }
  }
  GS_DEVICE Steps rest_steps() const { return Steps(Slot(table_, slot_).piece<In, kLanes>(param_), kColumns); }
  // Of step s of a turn in the rest.
  GS_DEVICE Vector<In> load_rest(const In* row, const Steps& steps, int lane, int s) const {
    return gpu::load_rest<kLanes>(row, steps, rest_index() + s * Rows::kStep, lane);
  }
  GS_DEVICE int64_t rest_index() const { return (rest_ - left_) * kColumns; }

 private:
  // The first piece from param_ on that has a turn number `turn`, counted through the pieces.
  GS_DEVICE void open(int turn) {
    const Slot slot(table_, slot_);
    for (left_ = 0; slot.holds(param_); param_++) {
      const Rows piece = slot.piece<In, kLanes>(param_);
      const Steps steps(piece, kColumns);
      rest_ = static_cast<int>((steps.rest + kColumns - 1) / kColumns);
      left_ = static_cast<int>(steps.count) + rest_ - turn;
      if (left_ > 0) {
        aligned_ = piece.aligned;
        column_ = steps.step(turn);
        return;
      }
      turn = -left_;
      left_ = 0;
    }
  }

  const Table& table_;
  const int slot_, stride_;
  int param_, left_, rest_;  // turns of the piece, and how many of them are of its rest
  bool aligned_;
  int64_t column_;
};

}  // namespace gs::gpu
