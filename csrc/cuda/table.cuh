// SPDX-License-Identifier: MIT
// The pointer table that a kernel of stages 2 and 4 takes by argument, so that no copy to the device is needed. A list
// of parameters that does not fit goes into several launches.
#pragma once
#include "cpu/schedule.h"
#include "cuda/device.cuh"
#include "solvers/common.h"

namespace gs::gpu {

// One parameter: where its columns begin among those of its run, and its rows.
// A run is a stretch of parameters with one segment and one dtype; it is cut into slots of `width` columns, a block
// each.
struct Run {
  int64_t columns, width;
  int32_t first_slot, first_param;
  int32_t segment, params;
};

// One parameter: its columns begin at first_column of its run.
struct Param {
  int64_t first_column, numel;
};

constexpr int kTableBytes = 32000;  // of the 32,764 that a launch takes

// Parameters of one dtype. `bytes` holds the runs from the front, and from the back a Param and `pointers` addresses
// for each parameter.
struct Table {
  int32_t params, runs, slots;
  int32_t pointers;  // per parameter: T rows, for combine the output as well
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

// Cuts a gs_gradients into tables. slots_of(columns) is the number of slots of a run.
template <class SlotsOf>
class TableBuilder {
 public:
  TableBuilder(const gs_gradients& grads, void* const* out, const SlotsOf& slots_of)
      : grads_(grads), out_(out), slots_of_(slots_of) {}

  // Fills the table with the parameters that fit, from where the last call stopped; false when there are none left.
  // Parameters without elements, gradients or (for combine) an output are left out.
  bool fill(Table& table) {
    table.params = table.runs = table.slots = 0;
    table.pointers = static_cast<int32_t>(grads_.num_tasks + (out_ ? 1 : 0));
    for (; next_ < grads_.num_params; next_++) {
      if (!counts(next_)) continue;
      const bool joins = table.runs > 0 && last().segment == segment_of(grads_, next_) && dtype_ == grads_.dtype[next_];
      const int64_t used =
          (table.runs + !joins) * static_cast<int64_t>(sizeof(Run)) + (table.params + 1) * table.param_bytes();
      if (used > kTableBytes || (table.runs > 0 && dtype_ != grads_.dtype[next_])) break;
      if (!joins) {
        dtype_ = grads_.dtype[next_];
        run_ = reinterpret_cast<Run*>(table.bytes) + table.runs++;
        *run_ = {0, 0, 0, table.params, static_cast<int32_t>(segment_of(grads_, next_)), 0};
      }
      auto* param = const_cast<Param*>(&table.param(table.params));
      *param = {last().columns, grads_.numel[next_]};
      auto* pointers = reinterpret_cast<const void**>(param + 1);
      std::copy(grads_.data + next_ * grads_.num_tasks, grads_.data + (next_ + 1) * grads_.num_tasks, pointers);
      if (out_) pointers[grads_.num_tasks] = out_[next_];
      run_->columns += grads_.numel[next_];
      run_->params++;
      table.params++;
    }
    for (int64_t r = 0; r < table.runs; r++) {
      Run& run = reinterpret_cast<Run*>(table.bytes)[r];
      const int64_t slots = slots_of_(run.columns);
      run.width = ((run.columns + slots - 1) / slots + kSlotAlignment - 1) / kSlotAlignment * kSlotAlignment;
      run.first_slot = table.slots;
      table.slots += static_cast<int32_t>((run.columns + run.width - 1) / run.width);
    }
    return table.params > 0;
  }
  int32_t dtype() const { return dtype_; }  // of all parameters in the table

 private:
  static constexpr int64_t kSlotAlignment = 512;

  bool counts(int64_t p) const {
    if (grads_.numel[p] == 0) return false;
    if (out_) return out_[p] != nullptr;
    const void* const* rows = grads_.data + p * grads_.num_tasks;
    return std::any_of(rows, rows + grads_.num_tasks, [](const void* row) { return row != nullptr; });
  }
  const Run& last() const { return *run_; }

  const gs_gradients& grads_;
  void* const* out_;
  const SlotsOf& slots_of_;
  int64_t next_ = 0;
  int32_t dtype_ = 0;
  Run* run_ = nullptr;
};

// Elements of the four dtypes, to and from float64; 16 bytes of them.
struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

template <class In>
constexpr int kVector = 16 / static_cast<int>(sizeof(In));

GS_DEVICE double to_double(double x) { return x; }
GS_DEVICE double to_double(float x) { return x; }
GS_DEVICE double to_double(bfloat16 x) { return float_from_bits(uint32_t{x.bits} << 16); }
GS_DEVICE double to_double(float16 x) { return half_to_float(x.bits); }

GS_DEVICE void from_double(double x, double& out) { out = x; }
GS_DEVICE void from_double(double x, float& out) { out = static_cast<float>(x); }
GS_DEVICE void from_double(double x, bfloat16& out) { out.bits = float_to_bfloat(static_cast<float>(x)); }
GS_DEVICE void from_double(double x, float16& out) { out.bits = float_to_half(static_cast<float>(x)); }

template <class In>
struct alignas(16) Vector {
  In value[kVector<In>];
};

// Columns begin..end of one parameter, in steps of vectors that are aligned in every row, if one step can be.
template <class In>
struct Piece {
  const void* const* rows;
  int64_t begin, end;
  int64_t first_vector;  // the first step begins here, at or before begin
  bool aligned;          // whether steps within begin..end are 16-byte loads

  GS_DEVICE Piece(const void* const* pointers, int64_t count, int64_t from, int64_t to)
      : rows(pointers), begin(from), end(to), first_vector(from), aligned(true) {
    int64_t residue = -1;
    for (int64_t t = 0; t < count; t++) {
      if (!pointers[t]) continue;
      const auto address = reinterpret_cast<uintptr_t>(static_cast<const In*>(pointers[t]) + from);
      const auto own = static_cast<int64_t>(address % 16);
      aligned = aligned && (residue < 0 || residue == own);
      residue = own;
    }
    if (aligned && residue > 0) first_vector = from - residue / static_cast<int64_t>(sizeof(In));
  }

  GS_DEVICE bool is_whole(int64_t c) const { return aligned && c >= begin && c + kVector<In> <= end; }

  // Row t's vector at column c, with zeros outside begin..end and where the row is absent.
  GS_DEVICE Vector<In> load(int64_t t, int64_t c) const {
    Vector<In> vector = {};
    const auto* row = static_cast<const In*>(rows[t]);
    if (!row) return vector;
    if (is_whole(c)) return load_once(reinterpret_cast<const Vector<In>*>(row + c));
#pragma unroll
    for (int e = 0; e < kVector<In>; e++) {
      if (c + e >= begin && c + e < end) vector.value[e] = row[c + e];
    }
    return vector;
  }
};

// Calls visit(piece) for each stretch of a parameter in the block's slot.
template <class In, class Visit>
GS_DEVICE void for_each_piece(const Table& table, int64_t slot, const Visit& visit) {
  const Run& run = table.run_of(slot);
  const int64_t begin = (slot - run.first_slot) * run.width;
  const int64_t end = begin + run.width < run.columns ? begin + run.width : run.columns;
  const int64_t last_param = run.first_param + run.params;
  for (int64_t p = table.param_of(run, begin); p < last_param && table.param(p).first_column < end; p++) {
    const Param& param = table.param(p);
    const int64_t from = begin > param.first_column ? begin - param.first_column : 0;
    const int64_t to = end - param.first_column < param.numel ? end - param.first_column : param.numel;
    visit(Piece<In>(table.row(p), table.pointers, from, to));
  }
}

// Calls body<In>() with the type of a gs_dtype.
template <class Body>
gs_status with_dtype(int32_t dtype, const Body& body) {
  switch (dtype) {
    case GS_FLOAT64:
      return body(double{});
    case GS_FLOAT32:
      return body(float{});
    case GS_BFLOAT16:
      return body(bfloat16{});
    default:
      return body(float16{});
  }
}

}  // namespace gs::gpu
